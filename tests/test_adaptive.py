"""Clippers with a memory: against slow twins, on noise, spikes, level shifts, zeros and NaN."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from lightning_gradhealth import (
    Chain,
    Clipper,
    Cut,
    GradientMonitor,
    Gradients,
    LayerwiseClip,
    NormClip,
    PercentileClip,
    ValueClip,
    WhenExploding,
    ZScoreClip,
)
from lightning_gradhealth.gradients.sampling import sample

SCALE_FREE: dict[str, Callable[[], Clipper]] = {
    "percentile": lambda: PercentileClip(10, window=50),
    "zscore": ZScoreClip,
    "exploding": WhenExploding,
}
ALL: dict[str, Callable[[], Clipper]] = {**SCALE_FREE, "layerwise": lambda: LayerwiseClip(warmup_norm=1e30)}
scale_free = pytest.mark.parametrize("make", SCALE_FREE.values(), ids=SCALE_FREE)
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def seen(*norms: float) -> Gradients:
    """Parameters whose gradients have these norms, in float64."""
    made = []
    for norm in norms:
        made.append(nn.Parameter(torch.zeros((), dtype=torch.float64)))
        made[-1].grad = torch.tensor(norm, dtype=torch.float64)
    return Gradients.of(*made)


def cuts(clipper: Clipper, norms: Sequence[float]) -> list[Cut]:
    """What it decides about a run of one parameter."""
    return [clipper.decide(seen(norm)) for norm in norms]


def coefficients(clipper: Clipper, norms: Sequence[float]) -> list[float]:
    return [cut.coefficient.item() for cut in cuts(clipper, norms)]


def noise(steps: int, sigma: float = 0.1, seed: int = 0, level: float = 1.0) -> list[float]:
    generator = random.Random(seed)
    return [level * generator.lognormvariate(0, sigma) for _ in range(steps)]


# --- slow twins ---


@pytest.mark.parametrize("percentile", [10.0, 50.0, 99.5, 100.0])
@pytest.mark.parametrize("window", [1, 7, 1_000])
def test_percentile_is_numpys(percentile: float, window: int) -> None:
    norms = noise(60, sigma=1.0)
    expected = []
    for step, norm in enumerate(norms, start=1):
        limit = np.percentile(norms[max(0, step - window) : step], percentile)
        expected.append(min(1.0, limit / norm))
    assert coefficients(PercentileClip(percentile, window), norms) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kept", "window"), [(20, 5), (5, 20)])
def test_a_percentile_window_may_change_in_a_checkpoint(kept: int, window: int) -> None:
    before, after = PercentileClip(50, kept), PercentileClip(50, window)
    norms = [*noise(39, sigma=1.0), 50.0]
    cuts(before, norms[:39])
    after.load_state_dict(before.state_dict())
    known = norms[max(0, 39 - kept) : 39][-(window - 1) :] + norms[39:]
    assert coefficients(after, norms[39:]) == pytest.approx([min(1.0, np.median(known) / norms[39])])


@pytest.mark.parametrize(("z_threshold", "limit"), [(2.0, 1.5), (2.5, 1.78125)])
def test_the_published_vectors_of_zclip(z_threshold: float, limit: float) -> None:
    clipper = ZScoreClip(z_threshold, warmup=4)
    cuts(clipper, [0.5, 1.5, 0.5, 1.5])
    state = {name: value.item() for name, value in clipper.state.items()}
    assert (state["mean"], state["variance"]) == (1.0, 0.25)
    assert coefficients(clipper, [3.0])[0] * 3.0 == pytest.approx(limit)


def test_zscore_follows_its_formula() -> None:
    norms = [*noise(25), *noise(75, sigma=0.4, seed=1)]
    clipper = ZScoreClip(clip_factor=0.9)
    got = coefficients(clipper, norms)
    mean, variance = np.mean(norms[:25]), np.var(norms[:25])
    expected = [1.0] * 25
    for norm in norms[25:]:
        sigma = math.sqrt(variance)
        z = (norm - mean) / sigma
        limit = 0.9 * (mean + 2.5**2 * sigma / z) if z > 2.5 else math.inf
        expected.append(min(1.0, limit / norm))
        taken = min(norm, mean + 2.5 * sigma)
        old = mean
        mean = 0.97 * mean + 0.03 * taken
        variance = 0.97 * (variance + 0.03 * (taken - old) ** 2)
    assert got == pytest.approx(expected, rel=1e-9)
    assert min(got) < 0.7


def test_layerwise_follows_its_formula() -> None:
    generator = random.Random(0)
    clipper = LayerwiseClip(warmup=10, warmup_norm=2.0)
    gammas, counts = [0.0, 0.0], [0, 0]
    for step in range(60):
        norms = [generator.lognormvariate(0, 0.5), 3.0 * generator.lognormvariate(0, 0.5) * (step > 5)]
        cut = clipper.decide(seen(*norms))
        expected = []
        total = math.hypot(*norms)
        for i, norm in enumerate(norms):
            if norm == 0:
                expected.append(1.0)
                continue
            late = counts[i] >= 10
            factor = min(1.0, 1.05 * gammas[i] / norm if late else 2.0 / total)
            rate = 0.02 if late else 1 / (counts[i] + 1)
            gammas[i] = (1 - rate) * gammas[i] + rate * norm * factor
            counts[i] += 1
            expected.append(factor)
        assert cut.parts[0].tolist() == pytest.approx(expected, rel=1e-9)
        after = math.hypot(*(f * norm for f, norm in zip(expected, norms, strict=True)))
        assert cut.coefficient.item() == pytest.approx(after / total)
        assert bool(cut.clipped) == (min(expected) < 1)


def test_layerwise_knows_parameters_by_name() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in "abc"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, clip=LayerwiseClip(warmup=3, warmup_norm=1e9))
    usual = {"a": 1.0, "b": 10.0, "c": 100.0}
    for names in ("cb", "b", "ab", "abc", "ca", "ac"):  # parameters come and go
        for name, norm in usual.items():
            model[name].grad = torch.tensor([norm]) if name in names else None
        monitor.apply(monitor.observe(optimizer))
    other = GradientMonitor(model, clip=LayerwiseClip(warmup=3, warmup_norm=1e9))
    other.load_state_dict(monitor.state_dict())
    for name in usual:
        model[name].grad = torch.tensor([1e6])
    other.apply(other.observe(optimizer))
    assert {name: model[name].grad.item() for name in usual} == pytest.approx({k: v * 1.05 for k, v in usual.items()})


# --- scale, NaN, zeros ---


@scale_free
@given(exponent=st.floats(-6, 6), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_unit_of_the_gradient_does_not_matter(make: Callable[[], Clipper], exponent: float, seed: int) -> None:
    norms = noise(60, sigma=0.5, seed=seed)
    norms[20] *= 1e4
    norms[45] *= 1e4
    scaled = [norm * 10**exponent for norm in norms]
    assert coefficients(make(), scaled) == pytest.approx(coefficients(make(), norms), rel=1e-6)


@every
@given(st.sets(st.integers(0, 59), max_size=8), st.sampled_from([math.nan, math.inf]), st.booleans())
@settings(max_examples=8)
def test_nan_and_inf_never_poison(make: Callable[[], Clipper], places: set[int], bad: float, second: bool) -> None:
    sound = [(norm, 3.0 * norm) for norm in noise(60, sigma=0.5)]
    expected = [make_cut.parts[0].tolist() for make_cut in map(make().decide, (seen(*pair) for pair in sound))]
    clipper, got = make(), []
    for step, pair in enumerate(sound):
        if step in places:
            cut = clipper.decide(seen(*((1e9, bad) if second else (bad, 1e-9))))
            assert torch.all(cut.parts[0] == 1.0)
            assert not cut.clipped
        got.append(clipper.decide(seen(*pair)).parts[0].tolist())
    assert got == expected


@every
@pytest.mark.parametrize("zeros", [1, 40])
def test_zeros_enter_no_statistics(make: Callable[[], Clipper], zeros: int) -> None:
    norms = noise(60, sigma=0.5)
    clipper = make()
    before = coefficients(clipper, norms[:40])
    assert coefficients(clipper, [0.0] * zeros) == [1.0] * zeros
    assert before + coefficients(clipper, norms[40:]) == coefficients(make(), norms)


@every
def test_zeros_at_the_beginning_freeze_nothing(make: Callable[[], Clipper]) -> None:
    clipper = make()
    cuts(clipper, [0.0] * 200)
    assert min(coefficients(clipper, [1.0] * 150)) > 0.8


# --- spikes and shifts ---


@every
@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_a_spike_is_clipped_and_hardly_moves_the_level(make: Callable[[], Clipper], size: float) -> None:
    clipper = make()
    cuts(clipper, noise(200))
    spike, *after = coefficients(clipper, [size, *noise(10, seed=2), size])
    again = after.pop()
    assert 0.7 < spike * size < 2.0
    assert again * size == pytest.approx(spike * size, rel=0.3)
    assert min(after) > 0.6


@scale_free
@pytest.mark.parametrize("factor", [3.0, 1e3, 1e6, 1 / 3, 1e-6])
@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_a_lasting_shift_of_level_is_followed(make: Callable[[], Clipper], factor: float, sigma: float) -> None:
    clipper = make()
    cuts(clipper, noise(200, sigma))
    shifted = coefficients(clipper, noise(1_000, sigma, seed=1, level=factor))
    usual = {"PercentileClip": 0.75, "ZScoreClip": 0.99, "WhenExploding": 0.9}[type(clipper).__name__]
    assert np.mean(shifted[-100:]) > usual
    assert np.mean(shifted[-100:]) <= 1.0


def test_the_layerwise_level_grows_by_a_thousandth_a_step() -> None:
    clipper = LayerwiseClip(warmup=10, warmup_norm=1e9)
    cuts(clipper, [1.0] * 20)
    lasting = coefficients(clipper, [10.0] * 2_400)
    steps = next(step for step, value in enumerate(lasting) if value == 1.0)
    assert steps == math.ceil(math.log(10 / 1.05) / math.log(1.001))
    assert lasting[0] == pytest.approx(0.105)


@pytest.mark.parametrize("first", [1e-9, 1e9])
@scale_free
def test_an_odd_first_norm_is_forgotten(make: Callable[[], Clipper], first: float) -> None:
    clipper = make()
    cuts(clipper, [first, *noise(900)])
    assert np.mean(coefficients(clipper, noise(50, seed=1))) > 0.85


def test_spikes_in_the_warm_up_are_bounded() -> None:
    for clipper in (ZScoreClip(), WhenExploding()):
        assert coefficients(clipper, [1.0, 1.0, 1e6])[-1] * 1e6 <= 10.0 + 1e-6
        assert coefficients(clipper, [1.0])[0] == 1.0
    assert coefficients(LayerwiseClip(warmup_norm=0.5), [1e6, 2.0, 0.25]) == pytest.approx([0.5e-6, 0.25, 1.0])


# --- the gate ---


def test_healthy_noise_is_left_alone() -> None:
    assert set(coefficients(WhenExploding(), noise(3_000))) == {1.0}


def test_a_run_that_settles_is_left_alone() -> None:
    assert set(coefficients(WhenExploding(), [100 * n / (1 + step / 10) for step, n in enumerate(noise(500))])) == {1.0}


def test_the_gate_opens_and_closes_again() -> None:
    clipper = WhenExploding()
    armed = [bool(cut.armed) for cut in cuts(clipper, [*noise(99), 1e6, 1e6, *noise(1_000, seed=1)])]
    assert not any(armed[:99])
    assert all(armed[100:150])
    assert not any(armed[-100:])


@pytest.mark.parametrize(("every_n", "size"), [(5, 8.0), (10, 5.0), (10, 30.0), (25, 30.0), (25, 100.0)])
def test_what_comes_often_is_no_spike(every_n: int, size: float) -> None:
    norms = [norm * (size if step % every_n == every_n - 1 else 1.0) for step, norm in enumerate(noise(2_000))]
    clipped = np.cumsum([value < 1.0 for value in coefficients(WhenExploding(), norms)])
    assert clipped[-1] > 0
    assert all(clipped <= np.maximum(2, 0.005 * np.arange(1, 2_001)))


def test_spikes_in_a_row_that_rise_are_clipped_however_many_there_were() -> None:
    norms = noise(100)
    for step in (40, 60, 80):
        norms[step] = 30.0
    got = coefficients(WhenExploding(), [*norms, 60.0, 90.0, 150.0])
    assert [step for step, value in enumerate(got) if value < 1.0] == [40, 60, 101, 102]


@pytest.mark.parametrize(("sigma", "outbreak"), [(0.1, False), (0.5, False), (0.9, True)])
def test_heavy_spikes_are_an_outbreak_where_all_norms_scatter(sigma: float, outbreak: bool) -> None:
    norms = noise(300, sigma)
    norms[150] = norms[250] = 1e4
    seen = cuts(WhenExploding(), norms)
    assert bool(seen[150].armed)
    assert bool(seen[250].armed)
    assert [bool(cut.outbreak) for cut in seen] == [outbreak and step >= 250 for step in range(300)]


def test_a_latched_gate_stays_open() -> None:
    clipper = WhenExploding(latch=True)
    armed = [bool(cut.armed) for cut in cuts(clipper, [*noise(99), 1e6, 1e6, *noise(1_000, seed=1)])]
    assert not any(armed[:99])
    assert all(armed[100:])
    resumed = WhenExploding(latch=True)
    resumed.load_state_dict(clipper.state_dict())
    assert cuts(resumed, [1.0])[0].armed


def test_an_open_gate_clips_what_stands_out_only() -> None:
    clipper = WhenExploding()
    got = coefficients(clipper, [*noise(100), 1e6, 0.5, 1.0, 50.0])[100:]
    assert got[1] == got[2] == 1.0
    assert 0.7 < got[3] * 50.0 < 2.0


def test_the_first_steps_can_be_bounded() -> None:
    clipper = WhenExploding(warmup_norm=2.0)
    norms = [1e4, 1.0, math.nan, 3.0, 0.0, 2.0, 8.0]
    assert coefficients(clipper, norms) == pytest.approx([2e-4, 1.0, 1.0, 2 / 3, 1.0, 1.0, 0.25])
    cuts(clipper, [1.9] * WhenExploding.WARMUP)
    assert coefficients(clipper, [2.1]) == [1.0]  # then the history judges
    inner = WhenExploding(ValueClip(0.5), warmup_norm=2.0)
    for norm, left in ((1e4, 0.5), (1.0, 1.0)):
        gradients = seen(norm)
        inner.apply(gradients, inner.decide(gradients))
        assert gradients.tensors[0].item() == left


def test_memories_inside_a_gate_go_on_while_it_is_closed() -> None:
    gate, alone = WhenExploding(PercentileClip(50, 20)), PercentileClip(50, 20)
    norms = noise(60, sigma=0.3)
    assert set(coefficients(gate, norms)) == {1.0}
    cuts(alone, norms)
    assert coefficients(gate, [1e6]) == coefficients(alone, [1e6])


def test_memories_in_a_chain_see_what_the_ones_before_leave() -> None:
    chain = Chain([NormClip(2.0), PercentileClip(100)])
    cuts(chain, [1.0, 50.0, 3.0])
    assert chain.clippers[1].state["norms"].nan_to_num()[-3:].tolist() == pytest.approx([1.0, 2.0, 2.0])


def swinging(steps: int, growth: float, sign: float) -> list[Tensor]:
    """Gradients of a growing norm that turn round by almost half a circle, or hardly at all, from step to step."""
    made, generator = [], torch.Generator().manual_seed(0)
    for step in range(steps):
        direction = torch.tensor([sign**step, 0.3]) + 0.1 * torch.randn(2, generator=generator)
        size = growth ** max(0, step - 20) * (1.0 + 0.4 * (step % 2))
        made.append(size * direction / direction.norm())
    return made


def opened(gradients: list[Tensor]) -> list[int]:
    """The steps at which the gate opens for longer than one of them."""
    gate, steps = WhenExploding(), []
    for step, gradient in enumerate(gradients):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = gradient.clone()
        cut = gate.decide(Gradients.of(weight))
        assert cut.outbreak is not None
        if cut.outbreak:
            steps.append(step)
    return steps


def test_gradients_that_point_back_and_grow_are_an_outbreak_and_those_that_go_on_are_growth() -> None:
    back = opened(swinging(50, 1.15, -1.0))
    assert back
    assert back[0] < 40
    assert opened(swinging(50, 1.15, 1.0)) == []  # the same norms
    assert opened(swinging(50, 1.0, -1.0)) == []  # the same directions


def test_the_turn_of_a_gradient_is_its_cosine_with_the_step_before() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, before = WhenExploding(), None
    for scale in (1.0, 1e-20, 1e20, 3.0):
        weights = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), ())]
        for weight in weights:
            weight.grad = scale * torch.randn(weight.shape, generator=generator)
        now = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).double() / scale
        turn = gate._turn(Gradients.of(*weights))
        known = 0.0 if before is None else torch.nn.functional.cosine_similarity(now, before, dim=0).item()
        assert turn is not None
        assert turn.item() == pytest.approx(known, abs=1e-6)
        before = now


def test_directions_are_not_asked_for_after_the_first_steps() -> None:
    gate, weight = WhenExploding(), nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    turns = [gate._turn(Gradients.of(weight)) for _ in range(WhenExploding.LOOKS + 1)]
    assert [None if turn is None else round(turn.item(), 6) for turn in (*turns[:3], turns[-1])] == [
        0.0,
        1.0,
        1.0,
        None,
    ]
    assert gate.asking() == []
    assert "sample" not in gate.state


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_step_that_is_not_usable_is_not_the_one_before(value: float) -> None:
    gate, weight, turns = WhenExploding(), nn.Parameter(torch.zeros(2)), []
    for gradient in ([1.0, 0.0], [value, 0.0], [0.6, 0.8]):
        weight.grad = torch.tensor(gradient)
        turns.append(gate._turn(Gradients.of(weight)))
    assert [turn is not None and round(turn.item(), 6) for turn in turns] == [0.0, 0.0, 0.6]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20_000), max_size=40))
def test_a_sample_is_of_the_largest_and_at_the_same_places(sizes: list[int]) -> None:
    places = [torch.arange(size) + 100_000.0 * i for i, size in enumerate(sizes)]
    taken, counts = sample(places, torch.arange(len(sizes)) + 1.0)
    again, none = sample(places)
    assert none is None
    assert counts is not None
    assert torch.equal(taken, again)
    assert torch.equal(counts, (taken // 100_000) + 1.0)
    assert len(taken.unique()) == len(taken) <= 32 * 4_096
    largest = sorted((size for size in sizes if size), reverse=True)[:32]
    assert len(taken) >= sum(min(size, 2_048) for size in largest)
    if len(largest) == len([size for size in sizes if size]) and max(sizes, default=0) <= 4_096:
        assert torch.equal(taken, torch.cat([torch.zeros(0), *places]))


def test_what_has_no_fixed_places_is_not_sampled() -> None:
    rows = torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (4,), check_invariants=True)
    taken, _ = sample([rows, None, torch.tensor([3.0])])
    assert taken.tolist() == [3.0]


@pytest.mark.parametrize("void", [0, 40, 70])
def test_a_resumed_gate_goes_on_comparing_directions_where_it_was(void: int) -> None:
    first = [torch.full((2,), math.nan)] * void
    gradients = [*first, *swinging(50, 1.15, -1.0)]
    for at in (1, void + 10, void + 30):
        gate = WhenExploding()
        seen = [_taken(gate, gradient) for gradient in gradients[:at]]
        resumed = WhenExploding()
        resumed.load_state_dict(gate.state_dict())
        seen += [_taken(resumed, gradient) for gradient in gradients[at:]]
        unbroken = WhenExploding()
        assert seen == [_taken(unbroken, gradient) for gradient in gradients]
        assert any(outbreak for outbreak, _ in seen)


def _taken(gate: WhenExploding, gradient: Tensor) -> tuple[bool, list[float]]:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = gradient.clone()
    cut = gate.decide(Gradients.of(weight))
    assert cut.outbreak is not None
    return bool(cut.outbreak), [part.item() for part in cut.parts]
