"""Clippers without a memory, what all clippers promise, chains, state and arguments."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from counting import host_reads
from hypothesis import given, settings, strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_gradhealth import (
    Chain,
    Clipper,
    Cut,
    GradHealth,
    GradHealthError,
    GradientMonitor,
    Gradients,
    LayerwiseClip,
    NormClip,
    PercentileClip,
    SignClip,
    UnitwiseClip,
    ValueClip,
    WhenExploding,
    ZScoreClip,
)

EPS = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

STATELESS: dict[str, Callable[[], Clipper]] = {
    "norm": lambda: NormClip(1.0),
    "value": lambda: ValueClip(0.5),
    "sign": SignClip,
    "unitwise": lambda: UnitwiseClip(0.1),
    "chain": lambda: Chain([UnitwiseClip(0.1), NormClip(0.05)]),
}
ADAPTIVE: dict[str, Callable[[], Clipper]] = {
    "percentile": lambda: PercentileClip(50, window=20),
    "zscore": lambda: ZScoreClip(warmup=5),
    "layerwise": lambda: LayerwiseClip(warmup=5, warmup_norm=1e9),
    "exploding": WhenExploding,
    "gated value": lambda: WhenExploding(ValueClip(0.5)),
    "gated units": lambda: WhenExploding(UnitwiseClip()),
    "gated memory": lambda: WhenExploding(Chain([PercentileClip(), ValueClip(0.5)])),
    "dry value": lambda: WhenExploding(ValueClip(0.5), dry_run=True),
    "chain with memory": lambda: Chain(
        [WhenExploding(ValueClip(1.0)), LayerwiseClip(warmup=5), Chain([ZScoreClip(), SignClip()]), NormClip(1.0)]
    ),
}
ALL = {**STATELESS, **ADAPTIVE}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def parameters(*gradients: Any, weight: float = 1.0) -> list[nn.Parameter]:
    """Parameters with these gradients."""
    made = []
    for value in gradients:
        gradient = value if isinstance(value, Tensor) else torch.tensor(value)
        parameter = nn.Parameter(torch.full(gradient.shape, weight, dtype=gradient.dtype, device=gradient.device))
        parameter.grad = gradient.clone()
        made.append(parameter)
    return made


def clip(clipper: Clipper, made: list[nn.Parameter]) -> Cut:
    gradients = Gradients.of(*made)
    cut = clipper.decide(gradients)
    clipper.apply(gradients, cut)
    return cut


def clipped(clipper: Clipper, *gradients: Any) -> list[Tensor]:
    made = parameters(*gradients)
    clip(clipper, made)
    return [parameter.grad for parameter in made]


def warm(clipper: Clipper, steps: int = 60, norm: float = 1.0, made: list[nn.Parameter] | None = None) -> Clipper:
    """Let it see steps of one norm, over the parameters given or one."""
    for _ in range(steps):
        seen = parameters(*(p.grad for p in made)) if made else parameters([norm])  # a deep copy has no gradient
        clipper.decide(Gradients.of(*seen))
    return clipper


def bits(tensor: Tensor) -> list[int]:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def total(made: list[nn.Parameter]) -> float:
    return Gradients.of(*made).total.item()


# --- published vectors ---


def test_agc() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    weight.grad = torch.tensor([[7.0, 24.0], [0.07, 0.24]])
    clip(UnitwiseClip(0.5), [weight])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.7, 2.4], [0.07, 0.24]]))


def test_optax() -> None:
    for i in range(1, 51):
        made = parameters([500.0, 5.0], [300.0, 3.0])
        first = clip(NormClip(1 / i), made)
        assert total(made) == pytest.approx(1 / i, rel=1e-6)
        assert first.coefficient.item() == pytest.approx(1 / i / math.hypot(500, 5, 300, 3))
        once = [parameter.grad.clone() for parameter in made]
        clip(NormClip(1 / i), made)
        torch.testing.assert_close([parameter.grad for parameter in made], once, rtol=1e-6, atol=0)


def test_the_usual_functions_of_torch() -> None:
    gradients = [torch.randn(4, 3), torch.randn(5) * 10]
    for clipper, reference in (
        (NormClip(2.0), lambda made: nn.utils.clip_grad_norm_(made, 2.0)),
        (ValueClip(0.7), lambda made: nn.utils.clip_grad_value_(made, 0.7)),
    ):
        mine, theirs = parameters(*gradients), parameters(*gradients)
        clip(clipper, mine)
        reference(theirs)
        torch.testing.assert_close([p.grad for p in mine], [p.grad for p in theirs])


def test_finite_gradients_whose_squares_overflow_are_clipped_not_zeroed() -> None:
    (gradient,) = clipped(NormClip(1.0), torch.full((100,), 3e20))
    torch.testing.assert_close(gradient, torch.full((100,), 0.1))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
@pytest.mark.parametrize("shape", [(4096,), ()])
def test_tiny_factors_do_not_vanish_in_half_precision(shape: tuple[int, ...], device: str) -> None:
    (gradient,) = clipped(NormClip(1e-4), torch.full(shape, 6e4, dtype=torch.float16, device=device))
    size = 1e-4 / math.sqrt(max(1, gradient.numel()))
    assert gradient.flatten()[0].item() == pytest.approx(size, rel=0.02)
    assert gradient.dtype is torch.float16


# --- properties ---

numbers = st.floats(-1e4, 1e4, allow_nan=False, width=16)
vectors = st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=4)
dtypes = st.sampled_from(list(EPS))
limits = st.sampled_from([0.01, 0.1, 1.0, 17.0])


@given(vectors, dtypes, limits)
@settings(max_examples=60)
def test_the_norm_stays_below_the_limit_and_the_direction_is_kept(
    values: list[list[float]], dtype: torch.dtype, limit: float
) -> None:
    made = parameters(*(torch.tensor(v, dtype=dtype) for v in values))
    before, was = [p.grad.clone().double() for p in made], total(made)
    cut = clip(NormClip(limit), made)
    now = total(made)
    subnormal = torch.finfo(dtype).smallest_normal * 10
    assert now <= limit * (1 + EPS[dtype]) + subnormal
    assert now == pytest.approx(min(limit, was), rel=2 * EPS[dtype], abs=subnormal)
    assert bool(cut.clipped) == (was > limit)
    for old, parameter in zip(before, made, strict=True):
        expected = old * cut.coefficient.item()
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=EPS[dtype], atol=subnormal)


@given(vectors, dtypes, limits)
@settings(max_examples=60)
def test_no_element_is_beyond_the_limit(values: list[list[float]], dtype: torch.dtype, limit: float) -> None:
    made = parameters(*(torch.tensor(v, dtype=dtype) for v in values))
    bound = torch.tensor(limit, dtype=dtype)
    beyond = any((p.grad.abs() > bound).any() for p in made)
    assert bool(clip(ValueClip(limit), made).clipped) == beyond
    assert all((p.grad.abs() <= bound).all() for p in made)


@given(vectors, dtypes, st.sampled_from(sorted(STATELESS)))
@settings(max_examples=80)
def test_clipping_twice_is_clipping_once(values: list[list[float]], dtype: torch.dtype, name: str) -> None:
    made = parameters(*(torch.tensor(v, dtype=dtype) for v in values))
    clip(STATELESS[name](), made)
    once = [p.grad.clone() for p in made]
    clip(STATELESS[name](), made)
    for parameter, known in zip(made, once, strict=True):
        atol = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(parameter.grad, known, rtol=EPS[dtype] * 1.01, atol=atol)


@given(st.integers(0, 1000), st.sampled_from(sorted(ALL)))
@settings(max_examples=20)
def test_the_order_of_parameters_changes_nothing(seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=generator).tolist()
    one, other = ALL[name](), ALL[name]()
    names = ["0", "1", "2", "3"]
    for step in range(30):
        scale = 100.0 if step > 26 else 1.0
        gradients = [torch.randn(n + 1, 2, generator=generator) * scale for n in range(4)]
        mine, theirs = parameters(*gradients), parameters(*(gradients[i] for i in order))
        clip(one, mine)
        seen = Gradients.of(*theirs)  # parameters keep their names
        seen.slots = [Gradients.of(*mine).slots[i] for i in order]
        assert [slot.name for slot in seen.slots] == [names[i] for i in order]
        other.apply(seen, other.decide(seen))
        for place, i in enumerate(order):
            torch.testing.assert_close(theirs[place].grad, mine[i].grad, rtol=1e-6, atol=0)


# --- what is left alone, bit for bit ---


def odd_gradients() -> dict[str, Tensor]:
    """Gradients of all kinds, none of them large."""
    tiny = 1e-45
    index = torch.tensor([[2, 0, 2]])
    rows = torch.tensor([[1e-3, -0.0], [tiny, 2e-3], [3e-3, -4e-3]])
    return {
        "zeros": torch.tensor([[-0.0, 0.0], [tiny, -tiny]]),
        "of 16 bits": torch.tensor([1e-3, -0.0, 6e-8], dtype=torch.float16),
        "of brain": torch.tensor([1e-3, -0.0, 1e-40], dtype=torch.bfloat16),
        "of 64 bits": torch.tensor([1e-3, 5e-324], dtype=torch.float64),
        "of two parts": torch.tensor([1e-3 - 2e-3j, complex(-0.0, tiny)]),
        "transposed": torch.linspace(-1e-3, 1e-3, 6).reshape(2, 3).t(),
        "scalar": torch.tensor(-1e-3),
        "empty": torch.zeros(0, 3),
        "coalesced": torch.sparse_coo_tensor(index, rows, (4, 2)).coalesce(),
        "uncoalesced": torch.sparse_coo_tensor(index, rows, (4, 2)),
    }


LENIENT: dict[str, Callable[[], Clipper]] = {
    "norm": lambda: NormClip(1.0),
    "value": lambda: ValueClip(0.5),
    "unitwise": lambda: UnitwiseClip(0.1),
    "percentile": lambda: PercentileClip(100),
    "zscore": ZScoreClip,
    "layerwise": lambda: LayerwiseClip(warmup=3),
    "exploding": lambda: WhenExploding(warmup_norm=1.0),
    "gated signs": lambda: WhenExploding(SignClip()),
    "gated chain": lambda: WhenExploding(Chain([SignClip(), ValueClip(1e-4), NormClip(1e-4)])),
    "dry": lambda: WhenExploding(Chain([SignClip(), UnitwiseClip()]), dry_run=True),
    "chain": lambda: Chain([NormClip(1.0), PercentileClip(100)]),
    "mixed chain": lambda: Chain([ValueClip(1.0), UnitwiseClip(0.1), WhenExploding(SignClip()), NormClip(1.0)]),
}


@pytest.mark.parametrize("make", LENIENT.values(), ids=LENIENT)
def test_steps_that_need_no_clipping_are_left_bit_for_bit(make: Callable[[], Clipper]) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones_like(g.to_dense())) for name, g in odd_gradients().items()})
    model["unused"] = nn.Parameter(torch.ones(3))
    named = list(model.values())
    optimizer = torch.optim.SGD([{"params": named[:5]}, {"params": named[5:], "lr": 0.5}], lr=0.1)
    monitor = GradientMonitor(model, clip=make())
    for _ in range(8):
        for name, gradient in odd_gradients().items():
            model[name].grad = gradient
        expected = {
            name: bits(gradient.coalesce() if name == "uncoalesced" else gradient)
            for name, gradient in odd_gradients().items()
        }
        decision = monitor.observe(optimizer)
        monitor.apply(decision)
        assert decision.action == "ok"
        for name, known in expected.items():
            assert bits(model[name].grad) == known, name
        assert model["transposed"].grad.stride() == odd_gradients()["transposed"].stride()
        assert model["unused"].grad is None
        assert not decision.cut.clipped
    assert all(s.clipped is False and s.clip_coefficient in (None, 1.0) for s in monitor.flush().window)


SHARING: dict[str, Callable[[], Tensor]] = {
    "one number": lambda: torch.tensor(1e6).expand(3),
    "one row": lambda: torch.tensor([1e6, -2e6, 3.0]).expand(2, 3),
    "windows": lambda: torch.linspace(-1e6, 2e6, 5).unfold(0, 3, 1),
}


@every
@pytest.mark.parametrize("shared", SHARING.values(), ids=SHARING)
def test_elements_that_share_memory_are_clipped_like_others(make: Callable[[], Clipper], shared: Any) -> None:
    found = []
    for gradient in (shared(), shared().contiguous()):
        layer = nn.ParameterDict({"weight": nn.Parameter(torch.ones(gradient.shape))})
        clipper = warm(make(), made=parameters(torch.ones(gradient.shape)))
        layer["weight"].grad = gradient
        monitor = GradientMonitor(layer, clip=clipper)
        decision = monitor.observe(torch.optim.SGD(layer.parameters(), 0.1))
        monitor.apply(decision)
        assert decision.cut is not None
        found.append((layer["weight"].grad, decision.cut.coefficient))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("made", [lambda: torch.ones(2, 6)[:, ::2], lambda: torch.ones(1).expand(1, 1)])
def test_elements_with_memory_of_their_own_stay_where_they_are(made: Callable[[], Tensor]) -> None:
    gradient = made()
    weight = nn.Parameter(torch.ones(gradient.shape))
    weight.grad = gradient
    clip(NormClip(0.1), [weight])
    assert weight.grad is gradient
    assert total([weight]) == pytest.approx(0.1)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_nan_or_inf_is_left_as_it_is(make: Callable[[], Clipper], bad: float) -> None:
    clipper = warm(make(), made=parameters([[1.0, 2.0]], [0.5], [-0.0]))
    made = parameters([[1e6, bad]], [-1e6], [-0.0])
    before = [bits(p.grad) for p in made]
    cut = clip(clipper, made)
    assert [bits(p.grad) for p in made] == before
    assert not cut.clipped
    assert cut.coefficient is None or cut.coefficient == 1.0
    assert cut.would is None or cut.would == 1.0


@every
def test_zeros_stay_zeros(make: Callable[[], Clipper]) -> None:
    clipper = make()
    for _ in range(30):
        made = parameters(torch.zeros(2, 2), torch.zeros(3), torch.zeros(0))
        cut = clip(clipper, made)
        assert all((p.grad == 0).all() for p in made)
        assert not cut.clipped
    made = parameters(torch.full((2, 2), 1e-3), torch.full((3,), 1e-3), torch.zeros(0))
    clip(clipper, made)
    assert total(made) > 0


def test_sparse_gradients_are_clipped_as_dense_ones_are() -> None:
    for make in (lambda: NormClip(1.0), lambda: ValueClip(0.5), lambda: UnitwiseClip(0.1), lambda: SignClip(2.0)):
        sparse, dense = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2)
        dense.load_state_dict(sparse.state_dict())
        for model in (sparse, dense):
            (model(torch.tensor([1, 3, 1])) * torch.tensor([3.0, -4.0])).sum().backward()
            monitor = GradientMonitor(model, clip=make())
            decision = monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1))
            monitor.apply(decision)
            assert decision.action == "clip"
        torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.filterwarnings("ignore:.*CSR.*")
def test_compressed_gradients_are_clipped_too() -> None:
    weight = nn.Parameter(torch.eye(2).to_sparse_csr())
    weight.grad = torch.tensor([[30.0, 0.0], [0.0, -40.0]]).to_sparse_csr()
    clip(NormClip(1.0), [weight])
    torch.testing.assert_close(weight.grad.values(), torch.tensor([0.6, -0.8]))
    clip(Chain([ValueClip(0.7), NormClip(10.0)]), [weight])
    torch.testing.assert_close(weight.grad.values(), torch.tensor([0.6, -0.7]))
    with pytest.raises(GradHealthError, match=r"gradient of '0' is torch.sparse_csr.*exclude='0'"):
        clip(UnitwiseClip(), [weight])


def test_conjugates_and_complex_numbers() -> None:
    for make, expected in (
        (lambda: NormClip(1.0), 0.6 - 0.8j),
        (lambda: ValueClip(3.5), 3 - 3.5j),
        (lambda: SignClip(10.0), 6 - 8j),
        (lambda: UnitwiseClip(1.0), 0.6 - 0.8j),
    ):
        weight = nn.Parameter(torch.ones(1, dtype=torch.complex64))
        weight.grad = torch.tensor([3 + 4j]).conj()
        assert weight.grad.is_conj()
        clip(make(), [weight])
        assert weight.grad.item() == pytest.approx(expected)


# --- elementwise and unitwise ones ---


def test_signs() -> None:
    half, scalar = clipped(SignClip(0.25), torch.tensor([3.0, -1e-7, -0.0], dtype=torch.float16), 7.0)
    assert (half.tolist(), scalar.item()) == ([0.25, -0.25, 0.0], 0.25)


def unitwise(clipper: UnitwiseClip, model: nn.Module, size: float = 100.0) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, size)
    monitor = GradientMonitor(model, clip=clipper)
    monitor.apply(monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1)))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_units_are_rows_channels_vectors_and_scalars() -> None:
    model = nn.ParameterDict({"scalar": nn.Parameter(torch.tensor(3.0)), "one": nn.Parameter(torch.ones(4, 2))})
    model.update({"conv": nn.Conv2d(3, 5, 2).weight, "linear": nn.Linear(4, 6).weight, "bias": nn.Linear(1, 7).bias})
    gradients = unitwise(UnitwiseClip(0.1), model)
    for name, parameter in model.items():
        rows = parameter.detach().reshape(len(parameter) if parameter.ndim > 1 else 1, -1)
        after = gradients[name].reshape(rows.shape).norm(dim=1)
        torch.testing.assert_close(after, 0.1 * rows.norm(dim=1).clamp(min=1e-3), rtol=1e-5, atol=0)


def test_a_single_matrix_of_many_units() -> None:
    model = nn.Linear(2, 5, bias=False)
    after = unitwise(UnitwiseClip(0.1), model)["weight"].norm(dim=1)
    torch.testing.assert_close(after, 0.1 * model.weight.detach().norm(dim=1))


def test_weights_that_start_at_zero_move() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    after = unitwise(UnitwiseClip(0.1, eps=0.5), model)["weight"].norm(dim=1)
    torch.testing.assert_close(after, torch.full((2,), 0.05))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("head", set()),  # whole names
        ("head.*", {"head.weight", "head.bias"}),
        (["head.weight", r".*\.bias"], {"head.weight", "head.bias", "body.bias"}),
        (nn.Embedding, {"table.weight"}),
        ([nn.Linear, "table.*"], {"head.weight", "head.bias", "body.weight", "body.bias", "table.weight"}),
    ],
)
def test_exclude(exclude: Any, left: set[str]) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "table": nn.Embedding(3, 2), "head": nn.Linear(2, 2)})
    gradients = unitwise(UnitwiseClip(exclude=exclude), model)
    assert {name for name, gradient in gradients.items() if (gradient == 100).all()} == left


def test_flat_shards_are_refused_on_every_rank() -> None:
    made = parameters([[1.0, 2.0]])
    made[0]._fsdp_flattened = True
    seen = Gradients.of(*made)
    for tensors in ([None], seen.tensors):
        seen.tensors = tensors
        with pytest.raises(GradHealthError, match=r"UnitwiseClip needs whole rows.*'0'.*NormClip"):
            UnitwiseClip().decide(seen)


# --- chains and gates ---

CHAINS: dict[str, Callable[[], list[Clipper]]] = {
    "factors": lambda: [NormClip(5.0), PercentileClip(50), LayerwiseClip(warmup=3, warmup_norm=2.0), NormClip(0.5)],
    "value first": lambda: [ValueClip(0.5), NormClip(1.0), ZScoreClip(warmup=3)],
    "value last": lambda: [NormClip(1.0), ZScoreClip(warmup=3), ValueClip(0.3)],
    "between": lambda: [
        NormClip(3.0),
        UnitwiseClip(0.5),
        ValueClip(0.4),
        PercentileClip(50),
        SignClip(),
        NormClip(0.2),
    ],
    "nested": lambda: [Chain([NormClip(3.0), NormClip(2.0)]), Chain([ValueClip(0.5), NormClip(1.0)]), NormClip(0.5)],
    "gates": lambda: [WhenExploding(ValueClip(0.5)), NormClip(9.0), WhenExploding(Chain([NormClip(2.0), SignClip()]))],
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_a_chain_is_one_after_the_other(make: Callable[[], list[Clipper]]) -> None:
    chain, by_hand, plain = Chain(make()), make(), 0
    for step in range(40):
        gradients = [torch.randn(3, 2) * (50.0 if step % 9 == 8 else 1.0), torch.randn(4)]
        mine, theirs = parameters(*gradients), parameters(*gradients)
        before = total(mine)
        cut = clip(chain, mine)
        cuts = [clip(clipper, theirs) for clipper in by_hand]
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0)
        assert bool(cut.clipped) == any(bool(each.clipped) for each in cuts)
        if cut.coefficient is not None:
            assert cut.coefficient.item() == pytest.approx(total(mine) / before, rel=1e-5)
            plain += 1
    assert plain == (40 if chain.whole else 0)


def test_clippers_inside_a_gate_act_only_while_it_is_open() -> None:
    for make in (lambda: ValueClip(0.1), lambda: UnitwiseClip(1e-3), lambda: NormClip(0.1), SignClip):
        gate = warm(WhenExploding(make()))
        (quiet,) = parameters([1.0])
        cut = clip(gate, [quiet])
        assert (quiet.grad.item(), bool(cut.armed), bool(cut.clipped)) == (1.0, False, False)
        loud, alone = parameters([1e6]), parameters([1e6])
        cut = clip(gate, loud)
        clip(make(), alone)
        assert (loud[0].grad.item(), bool(cut.armed)) == (alone[0].grad.item(), True)
        assert loud[0].grad.item() < 2


@pytest.mark.parametrize("inner", [lambda: None, lambda: NormClip(0.5), lambda: ValueClip(0.5), UnitwiseClip])
def test_a_dry_run_reports_and_changes_nothing(inner: Callable[[], Clipper | None]) -> None:
    dry, wet = warm(WhenExploding(inner(), dry_run=True)), warm(WhenExploding(inner()))
    for norm in (1.0, 1e6, 2.0, 1e6):
        mine, theirs = parameters([norm, 0.1]), parameters([norm, 0.1])
        before = total(mine)
        cut, real = clip(dry, mine), clip(wet, theirs)
        assert mine[0].grad.tolist() == [norm, pytest.approx(0.1)]
        assert not cut.clipped
        assert cut.coefficient is None or cut.coefficient == 1.0
        assert cut.would.item() == pytest.approx(total(theirs) / before, rel=1e-5)
        assert bool(cut.armed) == bool(real.armed)
        assert (cut.would.item() < 1) == bool(real.clipped)


# --- no host reads ---


@every
def test_deciding_and_applying_reads_nothing(make: Callable[[], Clipper]) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 300), nn.LayerNorm(300), nn.Linear(300, 3))
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), GradientMonitor(model, clip=make())
    with host_reads() as reads:
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) * 10.0**step
            monitor.apply(monitor.observe(optimizer))
    assert reads.count == 0


@every
def test_deciding_and_applying_on_fake_cuda_tensors_reads_nothing(make: Callable[[], Clipper]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        kinds = {
            (6, 6): torch.float32,
            (6,): torch.float32,
            (7, 6): torch.bfloat16,
            (): torch.float64,
            (0, 2): torch.half,
        }
        fake = [nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)) for shape, dtype in kinds.items()]
        model = nn.ParameterList(fake)
        optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), GradientMonitor(model, clip=make())
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            if step == 2:
                fake[0].grad = None
            decision = monitor.observe(optimizer)
            monitor.apply(decision)
            assert decision.cut.clipped.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            decision.action  # noqa: B018  (a read does raise here)


# --- sharded tensors ---


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@every
def test_sharded_tensors_are_clipped_as_whole_ones(make: Callable[[], Clipper], mesh: DeviceMesh) -> None:
    plain, sharded = (nn.ParameterList([torch.ones(4, 2), torch.ones(3)]) for _ in range(2))
    for i, parameter in enumerate(plain):
        sharded[i] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
    monitors = [(GradientMonitor(m, clip=make()), torch.optim.SGD(m.parameters(), lr=0.1)) for m in (plain, sharded)]
    for step in range(30):
        size = {12: 1e3, 14: math.nan, 28: 1e3}.get(step, 1.0)
        for one, other in zip(plain, sharded, strict=True):
            one.grad = torch.randn_like(one) * size
            other.grad = distribute_tensor(one.grad, mesh, [Shard(0)])
        decisions = [monitor.observe(optimizer) for monitor, optimizer in monitors]
        for (monitor, _), decision in zip(monitors, decisions, strict=True):
            monitor.apply(decision)
        assert decisions[0].action == decisions[1].action
        for one, other in zip(plain, sharded, strict=True):
            torch.testing.assert_close(other.grad.to_local(), one.grad, rtol=1e-6, atol=0, equal_nan=True)


# --- state ---


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def noisy(step: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    scale = size * (1e3 if step % 13 == 12 else 1.0)
    return [torch.randn(3, 2, generator=generator) * scale, torch.randn(2, generator=generator) * scale]


@every
@pytest.mark.parametrize("stop", [3, 31])
def test_a_resumed_clipper_decides_as_the_unbroken_one(make: Callable[[], Clipper], stop: int) -> None:
    unbroken, first, second = make(), make(), make()
    for step in range(50):
        if step == stop:
            second.load_state_dict(reloaded(first.state_dict()))
        mine, theirs = parameters(*noisy(step)), parameters(*noisy(step))
        clip(unbroken, mine)
        clip(first if step < stop else second, theirs)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


def test_the_state_is_a_copy() -> None:
    clipper = warm(PercentileClip())
    saved = clipper.state_dict()
    known = saved["state"]["norms"].clone()
    clipper.state["norms"].zero_()
    assert torch.equal(saved["state"]["norms"].nan_to_num(), known.nan_to_num())


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE)
def test_two_optimizers_have_statistics_of_their_own(make: Callable[[], Clipper]) -> None:
    def build() -> tuple[nn.ModuleDict, list[torch.optim.Optimizer], GradientMonitor]:
        parts = {name: nn.ParameterList([torch.ones(3, 2), torch.ones(2)]) for name in "gd"}
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts.values()]
        model = nn.ModuleDict(parts)
        return model, optimizers, GradientMonitor(model, clip=make())

    def step(number: int, built: Any) -> list[Tensor]:
        model, optimizers, monitor = built
        for part, size, optimizer in zip(model.values(), (1.0, 1e4), optimizers, strict=True):
            part[0].grad, part[1].grad = noisy(number, size)
            monitor.apply(monitor.observe(optimizer))
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole, part, alone = build(), build(), make()
    for number in range(30):
        if number == 17:
            resumed = build()
            resumed[2].load_state_dict(reloaded(part[2].state_dict()))
            part = resumed
        expected, got = step(number, whole), step(number, part)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        own = parameters(*noisy(number))  # as if there were no other optimizer
        clip(alone, own)
        torch.testing.assert_close([p.grad for p in own], expected[:2], rtol=1e-6, atol=0)


def test_a_state_of_another_kind_is_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    state = warm(PercentileClip()).state_dict()
    for other in (ZScoreClip(), WhenExploding(), Chain([ZScoreClip()]), LayerwiseClip()):
        other.load_state_dict(reloaded(state))
        assert "holds the statistics of PercentileClip" in caplog.text
        assert type(other).__name__ in caplog.text
        caplog.clear()
        warm(other)
    longer = Chain([PercentileClip(), ZScoreClip()])
    longer.load_state_dict(Chain([warm(PercentileClip())]).state_dict())
    assert len(longer.clippers[0].state) == 1
    warm(longer)


# --- arguments ---

BAD = [True, "1", -1.0, 0, math.nan, math.inf, None, [1.0]]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (NormClip, "max_norm"),
        (ValueClip, "limit"),
        (SignClip, "scale"),
        (UnitwiseClip, "clipping"),
        (UnitwiseClip, "eps"),
        (PercentileClip, "percentile"),
        (PercentileClip, "window"),
        (ZScoreClip, "z_threshold"),
        (ZScoreClip, "alpha"),
        (ZScoreClip, "warmup"),
        (ZScoreClip, "clip_factor"),
        (ZScoreClip, "warmup_cap"),
        (LayerwiseClip, "relative"),
        (LayerwiseClip, "beta"),
        (LayerwiseClip, "warmup"),
        (LayerwiseClip, "warmup_norm"),
        (WhenExploding, "warmup_norm"),
    ],
)
def test_bad_numbers_are_named_with_a_remedy(kind: type[Clipper], name: str, value: Any) -> None:
    if (kind, value) == (WhenExploding, None):
        return
    with pytest.raises((ValueError, TypeError), match=rf"^{kind.__name__}: {name} must be .*, got .*; .+") as error:
        kind(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PercentileClip(101), ValueError, r"percentile must be a finite number > 0 and <= 100, got 101; 10 is"),
        (lambda: ZScoreClip(alpha=1.0), ValueError, r"alpha must be a finite number > 0 and < 1, got 1.0; \.97"),
        (lambda: ZScoreClip(warmup=2.5), TypeError, r"warmup must be an int >= 1, got 2.5; 25"),
        (lambda: LayerwiseClip(beta=2), ValueError, r"beta must be a finite number > 0 and < 1, got 2; \.98"),
        (lambda: UnitwiseClip(exclude="("), ValueError, r"exclude: '\(' is not a valid regular.*e\.g\. exclude="),
        (
            lambda: UnitwiseClip(exclude=[3]),
            TypeError,
            r"exclude must be regular expressions or .*, got 3; e\.g\. exclude=",
        ),
        (
            lambda: UnitwiseClip(exclude=3),
            TypeError,
            r"exclude must be regular expressions or .*, got 3; e\.g\. exclude=",
        ),
        (lambda: UnitwiseClip(exclude=int), TypeError, r"exclude must be .*, got <class 'int'>; e\.g\. exclude="),
        (lambda: Chain([]), ValueError, r"at least one clipper, got \[\]; e\.g\. Chain"),
        (lambda: Chain(NormClip(1.0)), TypeError, r"must be a list of clippers, got NormClip\(max_norm=1.0\); e\.g\."),
        (lambda: Chain("adaptive"), TypeError, r"must be a list of clippers, got 'adaptive'; e\.g\."),
        (lambda: Chain([NormClip(1.0), 1.0]), TypeError, r"Chain: clippers must be a Clipper, got 1.0; e\.g\."),
        (lambda: WhenExploding(0.5), TypeError, r"WhenExploding: clipper must be a Clipper, got 0.5; e\.g\."),
        (lambda: WhenExploding(NormClip), TypeError, r"WhenExploding: clipper must be a Clipper, got <class"),
        (lambda: WhenExploding(latch="no"), TypeError, r"latch must be True or False, got 'no'; leave it out"),
        (lambda: WhenExploding(dry_run=1), TypeError, r"dry_run must be True or False, got 1; leave it out"),
        (lambda: GradientMonitor(mlp(), clip=1.0), TypeError, r"clip must be .*, got 1.0; e\.g\. clip=NormClip"),
        (lambda: GradHealth(clip="norm"), ValueError, r"clip must be .*, got 'norm'; e\.g\. clip=NormClip"),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_repr_is_what_was_asked_for() -> None:
    shown = repr(Chain([UnitwiseClip(0.01, exclude="head.*"), WhenExploding(NormClip(1))]))
    assert eval(shown).__repr__() == shown
    assert "whole" not in shown
    assert "state" not in shown


def test_a_clipper_of_ones_own() -> None:
    with pytest.raises(NotImplementedError, match="Clipper must define decide"):
        Clipper().decide(Gradients.of(*parameters([1.0])))


PACKAGE = "lightning_gradhealth"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, "None"),
        ("adaptive", "'adaptive'"),
        ({"class_path": f"{PACKAGE}.NormClip", "init_args": {"max_norm": 1.5}}, "NormClip(max_norm=1.5)"),
        (
            {
                "class_path": f"{PACKAGE}.Chain",
                "init_args": {
                    "clippers": [
                        {
                            "class_path": f"{PACKAGE}.UnitwiseClip",
                            "init_args": {"exclude": ["torch.nn.Embedding", "head.*"]},
                        },
                        {"class_path": f"{PACKAGE}.PercentileClip", "init_args": {"window": 7}},
                    ]
                },
            },
            "Chain(clippers=[UnitwiseClip(clipping=0.01, eps=0.001, exclude="
            "[<class 'torch.nn.modules.sparse.Embedding'>, 'head.*']), PercentileClip(percentile=10.0, window=7)])",
        ),
        (
            {
                "class_path": f"{PACKAGE}.WhenExploding",
                "init_args": {
                    "clipper": {"class_path": f"{PACKAGE}.ValueClip", "init_args": {"limit": 2.0}},
                    "latch": True,
                },
            },
            "WhenExploding(clipper=ValueClip(limit=2.0), latch=True, dry_run=False, warmup_norm=None)",
        ),
    ],
)
def test_the_command_line_builds_them(given: Any, shown: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GradHealth, "health")
    config = parser.parse_object({"health": {"clip": given}})
    assert repr(parser.instantiate_classes(config).health.clip) == shown


def test_a_fit_under_lightning_clips() -> None:
    health = GradHealth(clip=Chain([UnitwiseClip(0.01), NormClip(1e-3)]))
    model = Classifier(mlp(), torch.optim.SGD, lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer(health, max_steps=3).fit(model, batches())
    moved = math.hypot(*((a - b).norm().item() for a, b in zip(before, model.parameters(), strict=True)))
    assert 0 < moved <= 3e-3 * (1 + 1e-4)
