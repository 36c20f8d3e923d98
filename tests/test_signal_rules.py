"""Rules that judge signals: over depth, of units, through time; and what stands before what in a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given
from test_rules import chain as stand_ins, geometric, judged

from lightning_gradhealth import (
    ChainPoint,
    Condition,
    Finding,
    HealthReport,
    LayerStats,
    Severity,
    SignalChain,
    StepRecord,
    StepStats,
    TemporalFlow,
)
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.rules.remedies import Makeup, chief, for_dead, for_depth, for_saturated, for_time


def signals(
    forward: Sequence[float | None] = (),
    backward: Sequence[float | None] = (),
    step: int = 0,
    sizes: Sequence[int] = (),
    given: float | None = 1.0,
    activation: str = "",
) -> StepRecord:
    """A record with one main chain of layers."""
    depth = max(len(forward), len(backward))
    points = tuple(
        ChainPoint(
            f"l{i}",
            f"l{i}",
            forward[i] if forward else 1.0,
            backward[i] if backward else 1.0,
            sizes[i] if sizes else 64,
        )
        for i in range(depth)
    )
    layers = tuple(LayerStats(f"l{i}", grad_norm=1.0, optimizer=0, activation=activation) for i in range(depth))
    return StepRecord(
        step=step,
        layers=layers,
        chains=(SignalChain(points, 0, given),),
        window=(StepStats(step, total_norm=1.0),),
    )


def units(
    dead: Sequence[float | None] = (), saturated: Sequence[float | None] = (), step: int = 0, **window: float
) -> StepRecord:
    count = max(len(dead), len(saturated))
    layers = tuple(
        LayerStats(
            f"l{i}",
            grad_norm=1.0,
            optimizer=0,
            dead_fraction=dead[i] if dead else None,
            saturated_fraction=saturated[i] if saturated else None,
            activation="relu" if dead else "tanh",
            forward_mean=-10.0,
            forward_rms=10.1,
        )
        for i in range(count)
    )
    return StepRecord(step=step, layers=layers, window=(StepStats(step, total_norm=1.0, **window),))


# --- over depth ---


@pytest.mark.parametrize(
    ("gain", "depth", "sick"), [(0.5, 20, True), (1.2, 50, True), (1.2, 20, False), (0.9, 30, False)]
)
def test_forward_and_backward_are_told_apart(gain: float, depth: int, sick: bool) -> None:
    verb = "vanishing" if gain < 1 else "exploding"
    forward, backward = [gain ** (i + 1) for i in range(depth)], geometric(gain, depth)
    ahead = judged(signals(forward=forward, step=step) for step in range(0, 30, 10))
    back = judged(signals(backward=backward, step=step) for step in range(0, 30, 10))
    assert set(ahead) == ({Condition(f"{verb}_activations")} if sick else set())
    assert set(back) == ({Condition(f"{verb}_gradients")} if sick else set())
    if sick:
        (one,), (other,) = ahead.values(), back.values()
        assert one.evidence["fitted_gain"] == pytest.approx(gain)
        assert other.evidence["fitted_gain"] == pytest.approx(gain)
        assert one.evidence["depth_limit"] == math.ceil(abs(math.log(1e-3) / math.log(gain)))
        assert f"l{depth - 1}" in one.layers
        assert "l0" in other.layers
        assert list(one.layers) == sorted(one.layers, key=lambda name: int(name[1:]))


def test_an_explosion_of_activations_is_one_beside_the_input_too() -> None:
    """An output that is its bias, behind activations of 1e-13, is no explosion."""
    tiny = [1e-13 * 4**i for i in range(20)]
    assert not judged(signals(forward=tiny, step=step) for step in range(3))
    assert set(judged(signals(forward=tiny, given=1e-13, step=step) for step in range(3))) == {
        Condition.EXPLODING_ACTIVATIONS
    }


def test_widths_that_change_are_no_matter_of_depth() -> None:
    """Behind He's weights, from wide to narrow, the gradient's RMS falls with the root of the ratio, its norm stays."""
    sizes = [16 * 16**i for i in range(8)]
    falling = [math.sqrt(sizes[0] / size) for size in sizes]
    assert not judged(signals(backward=falling[::-1], sizes=sizes[::-1], step=step) for step in range(0, 30, 10))
    same = judged(signals(backward=falling[::-1], step=step) for step in range(0, 30, 10))
    assert set(same) == {Condition.VANISHING_GRADIENTS}


def test_biases_retire_once_signals_are_seen() -> None:
    sick = [stand_ins(geometric(0.4, 30), step) for step in range(1, 5)]
    assert set(judged(sick)) == {Condition.VANISHING_GRADIENTS}
    healthy = signals(backward=[1.0] * 30)
    assert not judged([healthy, *sick])
    assert not judged([signals(backward=[1.0] * 3), *sick])  # towers side by side have no depth to judge


@given(st.lists(st.floats(0.05, 20.0), min_size=4, max_size=60))
def test_no_wobble_without_a_slope_is_a_verdict(values: list[float]) -> None:
    """Whatever neighbouring gains there are, what stays within two decades and a half is healthy."""
    assert not judged(signals(forward=values, backward=values, step=step) for step in range(4))


def test_a_layer_that_lets_nothing_through_is_vanishing_in_the_long_run() -> None:
    blocked = [0.0] * 8 + [1e-3]
    assert not judged(signals(backward=blocked, step=step) for step in range(20))  # a head that starts at zero
    finding = judged(signals(backward=blocked, step=step) for step in range(30))[Condition.VANISHING_GRADIENTS]
    assert (finding.severity, finding.layers) == (Severity.CRITICAL, tuple(f"l{i}" for i in range(8)))
    assert "the signal at l0 is exactly 0" in finding.summary
    healed = [signals(backward=blocked if step < 15 else [1.0] * 9, step=step) for step in range(60)]
    assert not judged(healed)


def test_what_is_not_beyond_hope_has_a_probe_and_some_steps_to_heal() -> None:
    some = geometric(0.6, 20)
    assert not judged(signals(backward=some, step=step) for step in (0, 10))
    assert not judged(signals(backward=some, step=step) for step in (0, 1, 2, 4, 8))
    assert judged(signals(backward=some, step=step) for step in (0, 1, 16))
    assert judged(signals(backward=geometric(0.3, 20), step=step) for step in range(2))


def test_points_without_a_gradient_are_left_out() -> None:
    gaps: list[float | None] = [None if i % 2 else 0.3 ** (20 - i) for i in range(20)]
    finding = judged(signals(backward=gaps, step=step) for step in range(3))[Condition.VANISHING_GRADIENTS]
    assert finding.evidence["layers_measured"] == 10
    assert not judged(signals(backward=[None] * 20, step=step) for step in range(3))


# --- units ---


def test_dead_units() -> None:
    found = judged([units(dead=[0.2, 0.6, 1.0, None])])[Condition.DEAD_UNITS]
    assert (found.layers, found.severity) == (("l1", "l2"), Severity.CRITICAL)
    assert "100 % of the units of l2" in found.summary
    assert "bias" in found.remedy
    assert judged([units(dead=[0.2, 0.6])])[Condition.DEAD_UNITS].severity is Severity.WARNING
    assert not judged([units(dead=[0.26, 0.49])])
    assert not judged([units(dead=[None, None])])


def test_half_of_the_units_may_be_dead_by_chance() -> None:
    """Deep in a plain net every unit is active for all samples or for none, by the toss of a coin."""

    def layer(dead: float, always: float, units: int) -> StepRecord:
        stats = LayerStats("l0", grad_norm=1.0, optimizer=0, dead_fraction=dead, full_fraction=always, units=units)
        return StepRecord(step=0, layers=(stats,), window=(StepStats(0, total_norm=1.0),))

    assert not judged([layer(0.55, 0.45, 100)])
    assert set(judged([layer(0.55, 0.02, 100)])) == {Condition.DEAD_UNITS}  # the others choose: so should these
    assert set(judged([layer(0.7, 0.3, 100)])) == {Condition.DEAD_UNITS}
    assert set(judged([layer(0.75, 0.0, 24)])) == {Condition.DEAD_UNITS}
    assert set(judged([layer(1.0, 0.0, 4)])) == {Condition.DEAD_UNITS}


def test_saturation_that_comes_with_learning_is_an_info() -> None:
    early = judged([units(saturated=[0.1, 0.9])])[Condition.SATURATED_UNITS]
    assert (early.layers, early.severity) == (("l1",), Severity.WARNING)
    learning = [units(saturated=[None], step=step, loss=2.0 * 0.95**step) for step in range(60)]
    late = judged([*learning, units(saturated=[0.9], step=60, loss=0.1)])[Condition.SATURATED_UNITS]
    assert late.severity is Severity.INFO
    stuck = [units(saturated=[None], step=step, loss=2.0) for step in range(60)]
    assert (
        judged([*stuck, units(saturated=[0.9], step=60, loss=2.0)])[Condition.SATURATED_UNITS].severity
        is Severity.WARNING
    )


# --- through time ---


def through_time(gain: float, length: int, count: int, loss: float = 1.0) -> list[StepRecord]:
    flow = TemporalFlow.of({"l0": geometric(gain, length)})
    return [
        StepRecord(
            step=step,
            layers=(LayerStats("rnn", grad_norm=1.0, optimizer=0),),
            temporal={"rnn": flow},
            window=(StepStats(step, total_norm=1.0, loss=loss * (0.9**step if loss < 0 else 1.0)),),
        )
        for step in range(count)
    ]


def test_a_memory_that_fades_is_an_info_until_the_loss_stalls() -> None:
    finding = judged(through_time(0.8, 50, 1))[Condition.VANISHING_GRADIENTS]
    assert (finding.severity, finding.layers) == (Severity.INFO, ("rnn",))
    assert finding.evidence["gain_per_step"] == pytest.approx(0.8)
    assert "remembers" in finding.summary
    assert judged(through_time(0.8, 50, 99))[Condition.VANISHING_GRADIENTS].severity is Severity.INFO
    stalled = judged(through_time(0.8, 50, 100))
    assert stalled[Condition.VANISHING_GRADIENTS].severity is Severity.WARNING
    assert judged(through_time(1.2, 50, 1))[Condition.EXPLODING_GRADIENTS].severity is Severity.WARNING
    assert not judged(through_time(0.99, 50, 1))


# --- what is said ---


def test_no_symptom_stands_before_its_cause() -> None:
    judgement = Judgement([], {})

    def add(condition: str, severity: Severity, step: int) -> None:
        judgement.findings[condition] = Finding(condition, severity, (), step, step)

    add("stalled_loss", Severity.WARNING, 0)
    add("stalled_layers", Severity.WARNING, 10)
    add("vanishing_gradients", Severity.CRITICAL, 0)
    add("dead_units", Severity.CRITICAL, 150)
    add("saturated_units", Severity.INFO, 1)
    order = [str(finding.condition) for finding in judgement.report(()).findings]
    assert order == ["dead_units", "vanishing_gradients", "stalled_layers", "stalled_loss", "saturated_units"]


def test_remedies_fit_the_case() -> None:
    assert chief(["relu6", "relu", "tanh"]) == "relu"
    assert "nn.ReLU()" in for_depth(True, Makeup(activation="sigmoid")).words
    assert 'scheme="he"' in for_depth(True, Makeup(activation="relu")).words
    assert "tanh" in for_depth(False, Makeup(activation="tanh")).words
    assert "clip" in for_depth(False, Makeup()).words
    assert "clip" not in for_depth(True, Makeup()).words
    low, near = (LayerStats("0", forward_mean=mean, forward_rms=10.1, bias_grad_rms=0.0) for mean in (-10.0, 0.1))
    assert "bias" in for_dead([low], Makeup(), None, died=False).words
    assert "bias" not in for_dead([near], Makeup(), None, died=False).words
    attention = LayerStats("q", activation="attention")
    assert "queries" in for_saturated([attention], Makeup(), None, came=False).words
    assert "LSTM" in for_time(True).words
    for remedy in (for_depth(True, Makeup()), for_dead([], Makeup(), None, died=True), for_time(False)):
        assert "\n" not in remedy.words


def test_no_remedy_offers_what_the_network_has() -> None:
    """Norms by the dimension of the layers; neither norms nor residual connections where there are some."""
    plain = for_depth(True, Makeup(kinds=("conv2d",), main="conv2d")).words
    assert "nn.BatchNorm2d" in plain
    assert "BatchNorm1d" not in plain
    assert "nn.BatchNorm3d" in for_depth(True, Makeup(main="conv3d")).words
    assert "nn.LayerNorm" in for_depth(True, Makeup(main="recurrent")).words
    full = for_depth(True, Makeup(kinds=("linear", "norm"), main="linear", residual=True)).words
    assert not {"Norm", "residual"} & set(full.replace("(", " ").split())
    assert "Norm" not in full
    assert "x + f(x)" not in full


def test_a_finding_of_a_signal_survives_json() -> None:
    (finding,) = judged([units(dead=[1.0])]).values()
    report = HealthReport(findings=(finding,), steps=1)
    assert HealthReport.from_json(report.to_json()) == report
