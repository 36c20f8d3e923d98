"""Rules: each finds its illness with the numbers that define it, and lets the healthy neighbour pass."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lightning_gradhealth import (
    Condition,
    Finding,
    LayerStats,
    OptimizerStats,
    Rule,
    Severity,
    StepRecord,
    StepStats,
    Thresholds,
)
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.rules import Verdict, default_rules
from lightning_gradhealth.rules.clipping import AdaptiveClipping
from lightning_gradhealth.rules.gradients import ExplodingInTime
from lightning_gradhealth.rules.plain import code_of
from lightning_gradhealth.rules.training import OversizedUpdates

THRESHOLDS = Thresholds()


def judged(records: Iterable[StepRecord]) -> dict[str, Finding]:
    """What the default rules make of records."""
    judgement = Judgement(default_rules(THRESHOLDS), {})
    for record in records:
        judgement.add(record)
    assert len(judgement.rules) == len(default_rules(THRESHOLDS))  # none of them failed
    return judgement.findings


def chain(rms: Sequence[float], step: int = 0, **window: float) -> StepRecord:
    """A probed record of layers with these bias gradients."""
    layers = tuple(
        LayerStats(f"l{i}", numel=4, grad_norm=2 * value, bias_grad_rms=value, norm_ratio=1.0, optimizer=0)
        for i, value in enumerate(rms)
    )
    return StepRecord(step=step, layers=layers, probed=True, window=(StepStats(step, total_norm=1.0, **window),))


def geometric(gain: float, depth: int) -> list[float]:
    return [gain ** (depth - 1 - i) for i in range(depth)]


def steps(norms: Sequence[float | None], losses: Sequence[float | None] | None = None, rate: float = 0.1) -> StepRecord:
    """One record of many steps."""
    losses = losses or [None] * len(norms)
    window = tuple(
        StepStats(
            i, total_norm=norm, loss=loss, learning_rate=rate, non_finite=norm is not None and not math.isfinite(norm)
        )
        for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    )
    return StepRecord(step=len(norms) - 1, window=window)


def probes(updates: Sequence[Sequence[float | None]], every: int = 10, rates: Sequence[float] = ()) -> list[StepRecord]:
    """Probed records of the layers' update/weight."""
    return [
        StepRecord(
            step=i * every,
            probed=True,
            layers=tuple(
                LayerStats(
                    f"l{j}",
                    update_to_weight=value,
                    optimizer=0,
                    learning_rate=rates[j] if rates else 0.1,
                    grad_norm=1.0,
                )
                for j, value in enumerate(row)
            ),
            window=(StepStats(i * every, total_norm=1.0),),
        )
        for i, row in enumerate(updates)
    ]


def weights(norms: Sequence[float], every: int = 20) -> list[StepRecord]:
    return [
        StepRecord(
            step=i * every,
            probed=True,
            layers=(LayerStats("w", weight_norm=norm, grad_norm=1.0, optimizer=0),),
            window=(StepStats(i * every, total_norm=1.0),),
        )
        for i, norm in enumerate(norms)
    ]


# --- over depth ---


@pytest.mark.parametrize(
    ("gain", "depth", "condition"),
    [
        (0.5, 20, Condition.VANISHING_GRADIENTS),
        (0.4, 30, Condition.VANISHING_GRADIENTS),
        (2.0, 20, Condition.EXPLODING_GRADIENTS),
        (1.2, 20, None),  # 38 in all
        (0.077, 3, None),  # too few layers to have a depth
        (0.9, 30, None),
        (1.0, 100, None),
        (0.85, 30, None),
        (0.7, 50, Condition.VANISHING_GRADIENTS),
    ],
)
def test_depth(gain: float, depth: int, condition: Condition | None) -> None:
    found = judged(chain(geometric(gain, depth), step) for step in range(0, 30, 10))
    assert set(found) == ({condition} if condition else set())
    if condition:
        finding = found[condition]
        assert finding.evidence["fitted_gain"] == pytest.approx(gain)
        assert finding.first_step == 0
        assert "l0" in finding.layers
        assert f"l{depth - 1}" not in finding.layers


def test_depth_takes_two_records_and_all_measures() -> None:
    assert not judged([chain(geometric(0.4, 30), 0)])
    odd = [1e-9, *[1.0] * 19]
    assert not judged(chain(odd, step) for step in range(5))  # one odd layer at the end is no depth
    cliff = [1e-9] * 10 + [1.0] * 10
    assert not judged(chain(cliff, step) for step in range(5))  # nor are two towers side by side
    slope = [1e-9 * 10**i for i in range(10)]
    assert set(judged(chain(slope, step) for step in range(3))) == {Condition.VANISHING_GRADIENTS}


def test_an_explosion_beyond_hope_is_told_at_once() -> None:
    assert set(judged([chain(geometric(4.0, 20))])) == {Condition.EXPLODING_GRADIENTS}
    some = geometric(2.0, 20)  # 3e4: a first batch may do that once
    assert not judged([chain(some), chain([1.0] * 20, 1)])
    assert set(judged([chain(some), chain(some, 1)])) == {Condition.EXPLODING_GRADIENTS}
    broken = StepRecord(step=1, window=(StepStats(1, total_norm=math.nan, non_finite=True),))
    assert Condition.EXPLODING_GRADIENTS in judged([chain(some), broken])


@pytest.mark.parametrize("last", [0.0, 1e-9])
def test_a_loss_that_the_last_bias_does_not_change(last: float) -> None:
    """Triplet, ranking and Wasserstein losses: the gradient of the last bias is zero but for rounding."""
    assert not judged(chain([0.9, 1.1, 1.0, last], step) for step in range(5))


def test_convergence_shrinks_all_alike_and_is_healthy() -> None:
    records = []
    for step in range(300):
        scale = math.exp(-step / 15)
        record = chain([scale * (1 + 0.3 * math.sin(i + step)) for i in range(12)], step)
        window = (StepStats(step, total_norm=scale, loss=scale),)
        records.append(StepRecord(step=step, layers=record.layers, probed=True, window=window))
    assert not judged(records)


def test_a_fall_to_zero_is_vanishing_and_one_blocked_layer_is_not() -> None:
    falling = [0.0] * 6 + [1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0]
    assert set(judged(chain(falling, step) for step in range(3))) == {Condition.VANISHING_GRADIENTS}
    for blocked in (6, 11):  # a dead layer in the middle, or a head that starts at zero
        assert not judged(chain([0.0] * blocked + [1.0] * (12 - blocked), step) for step in range(3))
    assert not judged(chain([0.0] * 12, step) for step in range(3))


def test_nan_over_depth_is_no_verdict() -> None:
    assert not judged(chain([math.nan, *geometric(0.4, 30)], step) for step in range(5))


def test_hysteresis_over_depth() -> None:
    rules = default_rules(THRESHOLDS)
    judgement = Judgement(rules, {})
    for probe in range(3):
        judgement.add(chain(geometric(0.6, 20), 10 * probe))
    assert judgement.active == 1
    judgement.add(chain(geometric(0.68, 20), 30))  # above the threshold, but not by ten times
    assert judgement.findings[Condition.VANISHING_GRADIENTS].last_step == 30
    for probe in range(4, 4 + THRESHOLDS.release):
        assert judgement.active == 1
        judgement.add(chain(geometric(0.95, 20), 10 * probe))
    assert judgement.active == 0
    assert judgement.findings[Condition.VANISHING_GRADIENTS].last_step == 30


# --- over time ---


def test_exploding_in_time_names_the_step() -> None:
    norms = [1.0 + 0.5 * math.sin(i) for i in range(50)]
    found = judged([steps([*norms, 5e3, 1.0])])
    assert found[Condition.EXPLODING_GRADIENTS].first_step == 50
    assert not judged([steps([*norms, 40.0, 1.0])])


def test_nan_does_not_blind_the_running_median() -> None:
    norms: list[float | None] = [1.0] * 30
    norms[10:20] = [math.nan, math.inf] * 5
    assert judged([steps([*norms, 5e3])])[Condition.EXPLODING_GRADIENTS].first_step == 30


def test_a_hard_batch_after_convergence_is_no_explosion() -> None:
    norms = [10 * math.exp(-i / 10) + 1e-4 for i in range(300)]
    assert not judged([steps([*norms, 5.0])])


def test_gradients_that_die_while_the_loss_stays() -> None:
    norms = [1.0] * 30 + [1e-7] * 300
    window = [steps(norms[i : i + 30], [2.3] * 30) for i in range(0, 330, 30)]
    records = [
        StepRecord(
            step=30 * i + 29,
            window=tuple(StepStats(s.step + 30 * i, total_norm=s.total_norm, loss=s.loss) for s in r.window),
        )
        for i, r in enumerate(window)
    ]
    assert Condition.VANISHING_GRADIENTS in judged(records)
    learned = [
        StepRecord(
            step=r.step,
            window=tuple(StepStats(s.step, total_norm=s.total_norm, loss=2.3 * (s.total_norm or 0)) for s in r.window),
        )
        for r in records
    ]
    assert not judged(learned)


def test_non_finite_names_the_exact_step_and_place() -> None:
    def record(hit: Sequence[int]) -> StepRecord:
        layers = tuple(LayerStats(f"l{i}", non_finite=count, optimizer=0) for i, count in enumerate(hit))
        window = tuple(StepStats(i, total_norm=math.nan if i >= 7 else 1.0, non_finite=i >= 7) for i in range(10))
        return StepRecord(step=9, layers=layers, window=window)

    finding = judged([record([3, 3, 3])])[Condition.NON_FINITE]
    assert (finding.first_step, finding.severity, finding.layers) == (7, Severity.CRITICAL, ())
    assert "origin unknown" in finding.summary
    partial = judged([record([3, 3, 2])])[Condition.NON_FINITE]  # the third only one step later
    assert partial.layers == ("l0", "l1")
    loss_only = StepRecord(step=0, window=(StepStats(0, total_norm=1.0, loss=math.nan),))
    assert judged([loss_only])[Condition.NON_FINITE].first_step == 0


def test_a_loss_scaler_may_skip_now_and_then_but_not_for_ever() -> None:
    def skipping(flags: Sequence[bool]) -> list[StepRecord]:
        window = [StepStats(i, total_norm=None if f else 1.0, overflow=f) for i, f in enumerate(flags)]
        return [StepRecord(step=i + 4, window=tuple(window[i : i + 5])) for i in range(0, len(window), 5)]

    assert not judged(skipping([True] * 19 + [False] + [True] * 10))
    finding = judged(skipping([False] * 3 + [True] * 37))[Condition.NON_FINITE]
    assert finding.first_step == 3
    assert "skipped 37 steps in a row" in finding.summary


def test_no_gradient() -> None:
    def record(count: int) -> StepRecord:
        return StepRecord(
            step=count - 1,
            layers=(
                LayerStats(
                    "head", without_grad=("head.weight",), no_gradient_since=0, steps_without_grad=count, optimizer=0
                ),
            ),
        )

    assert not judged([record(19)])
    finding = judged([record(20)])[Condition.NO_GRADIENT]
    assert (finding.layers, finding.first_step) == (("head",), 0)


# --- updates and weights ---


def test_oversized_updates() -> None:
    at_once = judged(probes([[11.0, 5.0, 0.001]]))[Condition.OVERSIZED_UPDATES]
    assert (at_once.severity, at_once.layers) == (Severity.CRITICAL, ("l0", "l1"))
    assert not judged(probes([[11.0, 0.01, 0.01]]))  # one layer of three
    assert not judged(probes([[0.3, 0.3], [0.01, 0.01], [0.01, 0.01]]))  # the first probe alone
    assert not judged(probes([[0.3, 0.3], [0.3, 0.3], [0.01, 0.01]]))
    repeated = judged(probes([[0.01] * 2, [0.01] * 2, [0.3] * 2, [0.3] * 2]))[Condition.OVERSIZED_UPDATES]
    assert (repeated.severity, repeated.first_step) == (Severity.WARNING, 20)
    assert not judged(probes([[0.05, 0.05]] * 10))
    assert not judged(probes([[None, None]] * 10))  # zero weights: undefined, never alarmed on
    newborn = [
        StepRecord(
            step=step, probed=True, layers=(LayerStats("b", weight_norm=norm, update_to_weight=ratio, optimizer=0),)
        )
        for step, norm, ratio in ((0, 0.0, None), (1, 1.0, 1.2), (9, 5.0, 0.2), (19, 9.0, 0.11), (29, 10.0, 0.01))
    ]
    assert not judged(newborn)  # LoRA's B: a few updates are no measure of one


def test_decay_is_no_oversized_update() -> None:
    def run(factor: float) -> dict[str, Finding]:
        return judged(
            StepRecord(
                step=10 * i,
                probed=True,
                layers=(LayerStats("w", weight_norm=factor**i, update_to_weight=0.2, grad_norm=1.0, optimizer=0),),
            )
            for i in range(5)
        )

    assert Condition.OVERSIZED_UPDATES in run(1.0)
    assert Condition.OVERSIZED_UPDATES not in run(0.5)


def test_stalled_layers() -> None:
    found = judged(probes([[1e-8, 1e-3]] * 3))[Condition.STALLED_LAYERS]
    assert (found.layers, found.severity, found.first_step) == (("l0",), Severity.WARNING, 0)
    assert not judged(probes([[1e-8, 1e-3]] * 2))
    still = judged(probes([[1e-8, 1e-8]] * 5))[Condition.STALLED_LAYERS]  # nothing moves, nor ever did
    assert (still.layers, still.first_step) == (("l0", "l1"), 10)  # at step 0 the rate had only just appeared
    assert not judged(probes([[1e-3, 1e-3]] + [[1e-8, 1e-8]] * 5))  # it has moved: converged, or decayed
    assert not judged(probes([[1e-8, 1e-3], [1e-4, 1e-3]] * 5))  # not in a row
    assert not judged(probes([[1e-9 * 2**i, 1e-3] for i in range(9)]))  # behind a branch that has started at zero
    assert judged(probes([[1e-9, 1e-3]] * 25, every=1))
    assert not judged(probes([[1e-9, 1e-3]] * 20, every=1))  # who will grow cannot be told yet
    noted = judged(probes([[1e-8, 1e-3]] * 3, rates=[1e-5, 0.1]))[Condition.STALLED_LAYERS]
    assert noted.severity is Severity.INFO  # somebody wants it slow
    zero = judged(probes([[0.0, 1e-3]] * 3, rates=[0.0, 0.1]))[Condition.STALLED_LAYERS]
    assert zero.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("norms", "condition"),
    [
        ([1, 2, 4, 8], Condition.GROWING_WEIGHTS),
        ([1, 2, 3, 4, 5, 6], None),
        ([0.001, 0.5, 1.2, 1.5, 1.6], None),  # from zero, slowing down
        ([1, 1, 1, 1], None),
        ([1, 0.5, 0.25, 0.12, 0.06], Condition.COLLAPSING_WEIGHTS),
        ([1, 0.5, 0.25], None),  # not yet below a tenth
        ([1, 0.9, 0.8, 0.7], None),
        ([1, math.nan, 2, 4, 8], Condition.GROWING_WEIGHTS),
    ],
)
def test_weight_drift(norms: Sequence[float], condition: Condition | None) -> None:
    assert set(judged(weights(norms))) == ({condition} if condition else set())


def test_growth_that_comes_with_learning_is_an_info() -> None:
    def run(losses: Sequence[float]) -> dict[str, Finding]:
        record = weights([1, 1, 1, 1, 2, 4, 8])
        return judged(
            StepRecord(
                step=r.step,
                probed=True,
                layers=r.layers,
                window=tuple(StepStats(r.step + i, total_norm=1.0, loss=loss) for i in range(20)),
            )
            for r, loss in zip(record, losses, strict=True)
        )

    assert run([2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2])[Condition.GROWING_WEIGHTS].severity is Severity.INFO
    assert run([2.0, 2.1, 2.2, 2.5, 3.0, 5.0, 9.0])[Condition.GROWING_WEIGHTS].severity is Severity.WARNING
    ascent = run([-1.0, -2.0, -4.0, -8.0, -16.0, -50.0, -900.0])  # the wrong way, on purpose
    assert ascent[Condition.GROWING_WEIGHTS].severity is Severity.WARNING


def test_windows_of_weights_are_at_least_twenty_steps() -> None:
    assert not judged(weights([2.0**i for i in range(4)], every=5))
    assert Condition.GROWING_WEIGHTS in judged(weights([2.0 ** (i / 4) for i in range(20)], every=5))


# --- the loss ---


def noisy(level: Callable[[int], float], count: int, noise: float = 0.05) -> list[float]:
    source = random.Random(0)
    return [level(i) * math.exp(noise * source.gauss(0, 1)) for i in range(count)]


def test_loss_spike() -> None:
    falling = noisy(lambda i: 2.3 * math.exp(-i / 50), 150)
    once = judged([steps([1.0] * 151, [*falling, 3.0])])[Condition.LOSS_SPIKE]
    assert (once.first_step, once.severity) == (150, Severity.INFO)
    lasting = judged([steps([1.0] * 154, [*falling, 3.0, 0.2, 3.5, 2.8])])[Condition.LOSS_SPIKE]
    assert (lasting.first_step, lasting.severity) == (153, Severity.WARNING)
    assert not judged([steps([1.0] * 151, [*falling, 0.15])])
    blinded = [*falling[:100], math.nan, *falling[101:], 3.0]
    assert judged([steps([1.0] * 151, blinded)])[Condition.LOSS_SPIKE].first_step == 150


def test_learning_undone_is_a_spike_even_where_losses_spread() -> None:
    losses = noisy(lambda i: 2.3 * math.exp(-i / 30) + 0.05, 200, noise=1.2)
    found = judged([steps([1.0] * 204, [*losses, 18.0, 0.5, 19.0, 17.0])])
    assert found[Condition.LOSS_SPIKE].severity is Severity.WARNING


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rare", [0.02, 0.05])
def test_rare_hard_samples_are_no_warning(seed: int, rare: float) -> None:
    source = random.Random(seed)
    losses = [source.expovariate(1 / (8.0 if source.random() < rare else 0.2)) + 1e-3 for _ in range(1500)]
    found = judged([steps([1.0] * 1500, losses)])
    assert all(finding.severity is Severity.INFO for finding in found.values())


def test_heavy_tails_near_convergence_are_no_spike() -> None:
    losses = noisy(lambda i: 2.3 * math.exp(-i / 60) + 0.02, 400, noise=1.0)
    assert not judged([steps([1.0] * 400, losses)])


def test_stalled_loss() -> None:
    def records(losses: Sequence[float], rate: Callable[[int], float] = lambda i: 0.1) -> list[StepRecord]:
        return [
            StepRecord(
                step=i + 9,
                window=tuple(
                    StepStats(j, total_norm=1.0, loss=losses[j], learning_rate=rate(j)) for j in range(i, i + 10)
                ),
            )
            for i in range(0, len(losses), 10)
        ]

    flat = noisy(lambda i: 2.3, 200)
    alone = judged(records(flat))
    assert set(alone) == {Condition.STALLED_LOSS}
    assert alone[Condition.STALLED_LOSS].severity is Severity.INFO  # the loss alone proves nothing
    sick = [StepRecord(step=r.step, window=r.window, layers=chain(geometric(0.4, 20)).layers) for r in records(flat)]
    assert judged(sick)[Condition.STALLED_LOSS].severity is Severity.WARNING
    assert not judged(records(noisy(lambda i: 2.3 - i * 2.5e-4, 200, noise=0.005)))  # slowly, but beyond doubt
    assert not judged(records(flat[:100]))
    assert not judged(records(noisy(lambda i: 2.3 * math.exp(-i / 300), 200)))
    assert not judged(records(noisy(lambda i: 2.3 if i < 30 else 1.0, 600)))  # a plateau after learning
    assert not judged(records(noisy(lambda i: 2.3, 200, noise=0.6)))  # noise is no verdict
    assert not judged(records(flat, rate=lambda i: i * 1e-4))  # still warming up


# --- patience, muting, merging, state ---


class Every(Rule):
    """Finds something wherever the test says so."""

    condition = "every"
    per_layer = True
    patience = 2

    def check(self, record: StepRecord) -> Verdict | None:
        names = tuple(layer.name for layer in record.layers if layer.non_finite)
        return Verdict("info", "it is there", "nothing", layers=names) if names else None


def here(*names: str, step: int = 0) -> StepRecord:
    return StepRecord(step=step, layers=tuple(LayerStats(n, non_finite=int(n in names)) for n in "abc"))


def test_patience_counts_for_each_layer() -> None:
    judgement = Judgement([Every()], {})
    assert judgement.add(here("a", step=0)) == []
    assert judgement.add(here("a", "b", step=1))[0].layers == ("a",)
    assert judgement.add(here("b", step=2)) == []  # known already: said once
    assert judgement.findings["every"].layers == ("a", "b")
    assert (judgement.findings["every"].first_step, judgement.findings["every"].last_step) == (0, 2)


def test_muting() -> None:
    judgement = Judgement([Every()], {"every": "a|b"})
    for step in range(2):
        judgement.add(here("a", "b", "c", step=step))
    assert judgement.findings["every"].layers == ("c",)
    muted = Judgement(default_rules(THRESHOLDS), {"non_finite": ".*"})
    muted.add(StepRecord(step=0, window=(StepStats(0, loss=math.nan),)))
    assert muted.report(()).healthy


class Broken(Rule):
    condition = "broken"

    def check(self, record: StepRecord) -> None:
        raise ZeroDivisionError("oops")


def test_a_broken_rule_steps_aside_once(caplog: pytest.LogCaptureFixture) -> None:
    judgement = Judgement([Broken(), Every()], {})
    for step in range(3):
        judgement.add(here("a", step=step))
    assert [record.message for record in caplog.records] == [
        "gradhealth: the rule Broken failed and is left out from now on; training goes on"
    ]
    assert set(judgement.findings) == {"every"}
    report = judgement.report(())
    assert report.unwatched == ("broken by the rule Broken, since step 0 (it failed: ZeroDivisionError: oops)",)
    assert not report.healthy


def test_causes_stand_before_symptoms() -> None:
    judgement = Judgement(default_rules(THRESHOLDS), {})
    judgement.add(StepRecord(step=0, window=(StepStats(0, total_norm=math.nan, non_finite=True),)))
    for record in probes([[5.0, 5.0]]):
        judgement.add(record)
    assert [finding.condition for finding in judgement.report(()).findings] == ["oversized_updates", "non_finite"]


@settings(max_examples=25)
@given(cut=st.integers(0, 40), seed=st.integers(0, 5))
def test_property_state_survives_anywhere(cut: int, seed: int) -> None:
    source = random.Random(seed)
    records = [
        StepRecord(
            step=i,
            probed=True,
            layers=tuple(
                LayerStats(
                    f"l{j}",
                    bias_grad_rms=10 ** source.uniform(-8, 0),
                    update_to_weight=10 ** source.uniform(-9, 1),
                    weight_norm=2.0**i,
                    optimizer=0,
                )
                for j in range(6)
            ),
            total_norm_max=1.0,
            window=(StepStats(i, total_norm=10 ** source.uniform(-3, 5), loss=10 ** source.uniform(-1, 2)),),
        )
        for i in range(40)
    ]
    whole, first, second = (Judgement(default_rules(THRESHOLDS), {}) for _ in range(3))
    for record in records:
        whole.add(record)
    for record in records[:cut]:
        first.add(record)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for record in records[cut:]:
        second.add(record)
    assert second.report(()) == whole.report(())
    left, right = second.state_dict(), whole.state_dict()
    values = [state["history"].pop("values").nan_to_num(-1.0) for state in (left, right)]
    assert values[0].equal(values[1])
    assert left == right


def test_wrong_thresholds() -> None:
    with pytest.raises(
        ValueError, match=r"Thresholds: time_ratio must be a finite number > 0, got -1; leave it out for 1000.0"
    ):
        Thresholds(time_ratio=-1)


# --- clipping ------------------------------------------------------------------------------------------------


def gated(step: int, norm: float, *, armed: bool = False, factor: float = 1.0, **more: Any) -> StepStats:
    more = {"clip_coefficient": factor, "clipped": factor < 1, "acted": factor < 1, **more}
    return StepStats(
        step=step, total_norm=norm, armed=armed or bool(more.get("outbreak")), **{"outbreak": False, **more}
    )


def test_an_explosion_that_clipping_has_brought_down_is_none() -> None:
    def found(**clipping: Any) -> Finding | None:
        rule = ExplodingInTime()
        calm = tuple(gated(step, 1.0) for step in range(20))
        assert rule.judge(StepRecord(step=19, window=calm)) is None
        return rule.judge(StepRecord(step=20, window=(gated(20, 1e6, armed=True, **clipping),)))

    assert found(factor=1e-6) is None
    assert found(factor=1.0, clip_coefficient=None, clipped=True) is None  # by no single factor
    dry = found(factor=1.0, would_clip=1e-6, acted=True)
    assert dry is not None
    assert dry.severity is Severity.CRITICAL


def test_the_gate_is_told_while_open_and_once_more_when_it_closes() -> None:
    rule = AdaptiveClipping()
    assert rule.judge(StepRecord(step=9, window=tuple(gated(s, 1.0) for s in range(10)))) is None
    window = (gated(10, 1.0), gated(11, 50.0, outbreak=True, factor=0.02), gated(12, 1.0, outbreak=True))
    opened = rule.judge(StepRecord(step=12, window=window))
    assert opened is not None
    assert (opened.severity, opened.first_step) == (Severity.INFO, 11)
    assert opened.summary == (
        "an outbreak opened the gate at step 11, at a gradient norm of 50; 1 step was clipped, the most by a factor of"
        " 0.02; it is open"
    )
    closed = rule.judge(StepRecord(step=14, window=(gated(13, 1.0, outbreak=True), gated(14, 1.0))))
    assert closed is not None
    assert closed.summary.endswith("it closed at step 14")
    assert rule.judge(StepRecord(step=15, window=(gated(15, 1.0),))) is None
    again = rule.judge(StepRecord(step=16, window=(gated(16, 9.0, outbreak=True, factor=0.2),)))
    assert again is not None
    assert "(2 times since step 11); 2 steps were clipped" in again.summary


def test_single_spikes_are_told_from_an_outbreak() -> None:
    rule = AdaptiveClipping()
    first = rule.judge(StepRecord(step=5, window=(gated(5, 9.0, armed=True, factor=0.1), gated(6, 1.0))))
    assert first is not None
    assert first.summary == (
        "1 single spike at step 5, at a gradient norm of 9; 1 step was clipped, the most by a factor of 0.1"
    )
    assert rule.judge(StepRecord(step=7, window=(gated(7, 1.0),))) is None  # nothing new
    second = rule.judge(StepRecord(step=8, window=(gated(8, 4.0, armed=True, factor=0.5),)))
    assert second is not None
    assert second.summary.startswith("2 single spikes since step 5, the latest at step 8, at a gradient norm of 4; 2 s")
    assert (second.evidence["spikes"], second.evidence["openings"], second.evidence["open"]) == (2, 0, False)
    third = rule.judge(StepRecord(step=9, window=(gated(9, 60.0, outbreak=True, factor=0.02),)))
    assert third is not None
    assert "opened the gate at step 9, at a gradient norm of 60; 2 single spikes besides; 3 steps" in third.summary
    assert (third.evidence["spikes"], third.evidence["openings"], third.evidence["open"]) == (2, 1, True)


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_run_that_lives_on_clipping_is_a_warning_however_often_one_logs(every: int) -> None:
    def worst(share: int, steps: int) -> Severity | None:
        rule, grave = AdaptiveClipping(), None
        for start in range(0, steps, every):
            window = tuple(
                gated(s, 9.0, armed=True, factor=0.1 if s % share == 0 else 1.0) for s in range(start, start + every)
            )
            finding = rule.judge(StepRecord(step=start + every - 1, window=window))
            grave = finding.severity if finding else grave
        return grave

    assert worst(share=2, steps=200) is Severity.WARNING
    assert worst(share=3, steps=200) is Severity.INFO
    assert worst(share=1, steps=50) is Severity.INFO  # too short a time to say so


def test_what_others_in_a_chain_clip_is_not_the_gates_doing() -> None:
    rule = AdaptiveClipping()
    steps = [gated(s, 1.0, factor=0.1, acted=False, armed=s == 5) for s in range(200)]
    finding = rule.judge(StepRecord(step=199, window=tuple(steps)))
    assert finding is not None
    assert (finding.severity, finding.evidence["clipped_steps"]) == (Severity.INFO, 0)


def test_a_gate_from_a_checkpoint_is_closed_where_the_run_has_none() -> None:
    rule = AdaptiveClipping()
    assert rule.judge(StepRecord(step=5, window=(gated(5, 9.0, armed=True, factor=0.1),)))
    for step in range(6, 9):
        assert rule.judge(StepRecord(step=step, window=(StepStats(step=step, total_norm=1.0),))) is None


# --- remedies by what was measured -------------------------------------------------------------------------


def broken(norms: Sequence[float], losses: Sequence[float] | None = None, last: float = math.nan) -> Finding:
    """What is said of NaN gradients, or of a NaN loss, after steps with these norms."""
    losses = losses or [1.0] * len(norms)
    return judged([steps([*norms, last], [*losses, math.nan])])[Condition.NON_FINITE]


@pytest.mark.parametrize(
    "norms",
    [
        [1.0] * 30,
        [2.0, 1.0, 3.0, 0.5] * 10,
        [10.0 / (1 + i) for i in range(40)],  # it learns
        [1.0, 1.2],
        [*([1.0] * 8), 60.0, *([1.0] * 8), 50.0],  # heavy-tailed: such a norm has been there before
        [3.0, 9.0, 2.0, 30.0, 5.0, 1.0, 25.0, 4.0],
    ],
    ids=["level", "noisy", "falling", "early", "spiky", "wild"],
)
def test_nan_out_of_the_blue_is_skipped(norms: list[float]) -> None:
    finding = broken(norms)
    assert finding.remedy.startswith('GradHealth(on_non_finite="skip")')
    assert finding.code == 'health_arguments["on_non_finite"] = "skip"'
    assert "a smaller" not in finding.remedy
    assert "gradient_clip_val" not in finding.remedy
    assert finding.evidence["norm_before"] == norms[-1]


@pytest.mark.parametrize(
    ("norms", "losses"),
    [
        ([1.0, 1e3, 1e6, 1e12], None),
        ([*([1.0] * 20), 1e5], None),
        ([1.5**i for i in range(40)], None),
        ([1.0] * 30, [*([1.0] * 27), 1e2, 1e4, 1e8]),
        ([1.0, 1e9], None),
    ],
    ids=["at once", "a leap", "slowly", "by the loss", "two steps"],
)
def test_nan_after_a_growth_gets_a_rate_and_clipping(norms: list[float], losses: list[float] | None) -> None:
    finding = broken(norms, losses)
    assert "a smaller learning rate" in finding.remedy
    assert 'group["lr"] *= ' in finding.code
    assert 'trainer_arguments["gradient_clip_val"]' in finding.code
    assert "skip" not in finding.remedy


def test_nan_in_the_first_step_takes_an_edit() -> None:
    finding = judged([steps([math.nan] * 3, [math.nan] * 3)])[Condition.NON_FINITE]
    assert (finding.first_step, finding.code) == (0, "")
    assert "0/0" in finding.remedy


def test_a_nan_loss_with_finite_gradients_is_said_to_be_that() -> None:
    record = steps([1.0] * 40 + [0.0] + [1.0] * 9, [1.0] * 40 + [math.nan] + [1.0] * 9)
    finding = judged([record])[Condition.NON_FINITE]
    assert (finding.first_step, finding.severity) == (40, Severity.WARNING)
    assert "while the gradients are finite" in finding.summary
    assert "max(count, 1)" in finding.remedy
    assert not finding.code
    then = StepRecord(step=50, window=(StepStats(50, total_norm=math.nan, loss=math.nan, non_finite=True),))
    graver = judged([record, then])[Condition.NON_FINITE]
    assert (graver.severity, graver.summary.partition(" in ")[0]) == (Severity.CRITICAL, "gradients are NaN or Inf")


@pytest.mark.parametrize(("loss", "said"), [(math.nan, "the loss itself is nan"), (0.5, "sqrt(0)")])
def test_a_scaler_that_skips_every_step_is_said_to_do_so(loss: float, said: str) -> None:
    bad = not math.isfinite(loss)
    window = tuple(
        StepStats(i, total_norm=math.nan if bad else None, loss=loss, non_finite=bad, overflow=not bad, scaled=True)
        for i in range(60)
    )
    finding = judged([StepRecord(step=59, window=window)])[Condition.NON_FINITE]
    assert (finding.first_step, finding.severity) == (0, Severity.CRITICAL)
    assert "the loss scaler has skipped 60 steps in a row" in finding.summary
    assert f"at a loss of {loss:.3g}" in finding.summary
    assert said in finding.remedy


def shrinking(decay: float | None, momentum: float = 0.0, name: str = "SGD") -> Finding:
    records = [
        StepRecord(
            step=i * 20,
            probed=True,
            layers=(
                LayerStats("w", weight_norm=0.2**i, grad_norm=1.0, optimizer=0, weight_decay=decay, learning_rate=0.1),
            ),
            optimizers=(OptimizerStats(0, name, momentum),),
            window=(StepStats(i * 20, total_norm=1.0),),
        )
        for i in range(6)
    ]
    return judged(records)[Condition.COLLAPSING_WEIGHTS]


def test_weight_decay_is_named_where_it_is_to_blame() -> None:
    finding = shrinking(0.5)
    assert "0.05 of every weight" in finding.remedy
    assert finding.code.endswith('group["weight_decay"] = min(group["weight_decay"], 0.0005)')  # biases stay free
    assert "0.5 of every weight" in shrinking(0.5, momentum=0.9).remedy
    without = shrinking(0.0)
    assert "it is not weight_decay, which is 0" in without.remedy
    assert not without.code
    assert "weight_decay" in shrinking(None).remedy


@pytest.mark.parametrize(
    ("losses", "said", "code"),
    [
        ([-(1.1**i) for i in range(200)], "check its sign", ""),
        ([1.02**i for i in range(200)], "zero_grad", 'group["lr"] *='),
        ([1.0] * 200, "weight decay", 'group["weight_decay"] = 0.01'),
    ],
    ids=["falls for ever", "rises", "level"],
)
def test_growing_weights_are_explained_by_the_loss(losses: list[float], said: str, code: str) -> None:
    records = []
    for i in range(9):
        window = tuple(StepStats(s, total_norm=1.0, loss=losses[s]) for s in range(i * 20, i * 20 + 20))
        layer = LayerStats("w", weight_norm=3.0**i, grad_norm=1.0, optimizer=0)
        records.append(StepRecord(step=i * 20 + 19, probed=True, layers=(layer,), window=window))
    finding = judged(records)[Condition.GROWING_WEIGHTS]
    assert said in finding.remedy
    assert code in finding.code
    assert ("check its sign" in finding.remedy) == (said == "check its sign")


def test_a_gradient_of_exactly_zero_is_no_stall() -> None:
    def records(grad: float) -> list[StepRecord]:
        found = []
        for record in probes([[0.0, 1e-3]] * 8):
            layers = (record.layers[0].changed(grad_norm=grad), record.layers[1])
            found.append(StepRecord(**{**vars(record), "layers": layers}))
        return found

    finding = judged(records(0.0))[Condition.STALLED_LAYERS]
    assert (finding.severity, finding.layers) == (Severity.INFO, ("l0",))
    assert "exactly 0" in finding.summary
    assert judged(records(1e-12))[Condition.STALLED_LAYERS].severity is Severity.WARNING


def test_no_rate_is_offered_where_every_gradient_is_zero() -> None:
    still = [
        StepRecord(**{**vars(r), "layers": tuple(la.changed(grad_norm=0.0) for la in r.layers)})
        for r in probes([[0.0, 0.0]] * 8)
    ]
    finding = judged(still)[Condition.STALLED_LAYERS]
    assert "every gradient is exactly 0" in finding.summary
    assert not finding.code
    slow = judged(probes([[1e-9, 1e-9]] * 8))[Condition.STALLED_LAYERS]
    assert slow.code == 'for group in optimizer.param_groups: group["lr"] *= 1e+06'


def trained_into(rms: Sequence[float], update: float, start: Sequence[float], rate: float = 0.1) -> Finding:
    """What is said of gradients that were sound at the first probe, and are not any more."""
    records = [chain(start if i == 0 else rms, i) for i in range(5)]
    records = [
        StepRecord(
            **{
                **vars(record),
                "layers": tuple(la.changed(update_to_weight=update, learning_rate=rate) for la in record.layers),
            }
        )
        for record in records
    ]
    return judged(records)[Condition.VANISHING_GRADIENTS]


def test_depth_that_came_with_training_gets_a_rate() -> None:
    finding = trained_into(geometric(0.3, 20), 0.5, geometric(1.0, 20))
    assert "came with training" in finding.remedy
    assert finding.code == 'for group in optimizer.param_groups: group["lr"] *= 0.002'
    assert "init_weights" not in finding.remedy
    assert finding.evidence["at_start"] == pytest.approx(1.0)
    from_the_start = trained_into(geometric(0.3, 20), 1e-3, geometric(0.3, 20))
    assert from_the_start.code.splitlines()[1:] == ["gh.init_weights(model, batch)"]


def updated(record: StepRecord, *updates: float, rate: float = 0.1) -> StepRecord:
    """The record with one layer an optimizer, which a step has moved by so much."""
    layers = tuple(
        LayerStats(f"l{i}", weight_norm=1.0, grad_norm=1.0, update_to_weight=update, learning_rate=rate, optimizer=i)
        for i, update in enumerate(updates)
    )
    return record.changed(layers=layers, probed=True)


def test_a_leap_of_the_norm_after_large_steps_gets_a_rate() -> None:
    def leap(update: float) -> Finding:
        calm = StepRecord(step=19, window=tuple(StepStats(i, total_norm=1.0) for i in range(20)))
        wild = StepRecord(step=20, window=(StepStats(20, total_norm=1e5),))
        return judged([updated(calm, update), updated(wild, update)])[Condition.EXPLODING_GRADIENTS]

    assert leap(0.45).code == 'for group in optimizer.param_groups: group["lr"] *= 0.002'
    assert leap(1e-3).code == 'health_arguments["clip"] = "adaptive"'  # a bad batch rather than the rate


def test_the_optimizer_whose_steps_are_too_large_is_named() -> None:
    several = judged([updated(steps([1.0]), 1e-3, 7.0, rate=1.0)])[Condition.OVERSIZED_UPDATES]
    assert "a smaller learning rate of optimizer 1 (x 0.0001)" in several.remedy
    assert several.layers == ("l1",)
    assert "of optimizer" not in judged([updated(steps([1.0]), 7.0)])[Condition.OVERSIZED_UPDATES].remedy


def test_a_replacing_step_at_a_small_rate_points_at_unscaled_data() -> None:
    small = judged([updated(steps([1.0]), 160.0, rate=0.01)])[Condition.OVERSIZED_UPDATES]
    assert "bring inputs and targets to mean 0" in small.remedy
    assert "inputs" not in judged([updated(steps([1.0]), 8.2, rate=1.0)])[Condition.OVERSIZED_UPDATES].remedy


def test_large_steps_are_an_info_where_the_run_learns_well_all_the_same() -> None:
    def run(now: float) -> Finding:
        losses = [2.0] * 25 + [now] * 60
        return judged(
            [
                updated(steps([1.0] * 25, losses[:25]), 1.5),
                updated(steps([1.0] * 60, losses[25:]).changed(step=84), 1e-3),
            ]
        )[Condition.OVERSIZED_UPDATES]

    assert run(0.01).severity is Severity.INFO
    assert "all the same" in run(0.01).summary
    assert run(1.0).severity is Severity.CRITICAL


def test_clipping_is_not_offered_where_something_clips() -> None:
    def end(applied: float) -> Finding:
        window = tuple(StepStats(i, total_norm=9.0**i, applied_norm=applied * 9.0**i) for i in range(9))
        bad = StepStats(9, total_norm=math.nan, non_finite=True)
        return judged([updated(StepRecord(step=9, window=(*window, bad)), 0.5)])[Condition.NON_FINITE]

    assert "gradient_clip_val" in end(1.0).code
    assert "gradient_clip_val" not in end(0.1).code + end(0.1).remedy
    assert 'group["lr"]' in end(0.1).code


def test_code_brings_its_imports() -> None:
    assert code_of('group["lr"] *= 0.1') == 'group["lr"] *= 0.1'
    assert code_of("model.set_submodule(name, nn.ReLU())").splitlines()[0] == "from torch import nn"
    both = code_of("nn.init.zeros_(b); gh.init_weights(model, batch)").splitlines()[0]
    assert both == "import lightning_gradhealth as gh; from torch import nn"
    assert code_of("import torch; torch.manual_seed(0)") == "import torch; torch.manual_seed(0)"


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_units_that_decay_has_killed_get_a_smaller_decay(decay: float) -> None:
    def record(i: int, dead: float) -> StepRecord:
        layer = LayerStats("w", weight_norm=0.5**i, grad_norm=1.0, dead_fraction=dead, activation="relu", units=32)
        layer = layer.changed(optimizer=0, weight_decay=decay, learning_rate=0.1, update_to_weight=0.05)
        return StepRecord(
            step=i * 20, probed=True, layers=(layer,), kinds=("relu",), optimizers=(OptimizerStats(0, "SGD", 0.0),)
        )

    finding = judged([record(0, 0.0), record(1, 0.0), *(record(i, 1.0) for i in range(2, 6))])[Condition.DEAD_UNITS]
    assert ("weight_decay=" in finding.remedy) == (decay > 0.0)
    assert ('group["weight_decay"]' in finding.code) == (decay > 0.0)


def test_norms_beyond_any_training_ask_for_bounds_before_clipping() -> None:
    def leap(usual: float) -> Finding:
        calm = StepRecord(step=19, window=tuple(StepStats(i, total_norm=usual) for i in range(20)))
        wild = StepRecord(step=20, window=(StepStats(20, total_norm=1e5 * usual),))
        return judged([calm, wild])[Condition.EXPLODING_GRADIENTS]

    assert "exp()" in leap(1e20).remedy.partition("clip=")[0]
    assert not leap(1e20).code  # clipping alone heals nothing there
    assert "exp()" not in leap(1.0).remedy
    spike = judged([steps([1e20] * 40, [1.0] * 39 + [1e9])])[Condition.LOSS_SPIKE]
    assert "gradient_clip_val=1)" in spike.remedy


def test_updates_that_turn_out_harmless_last_as_long_as_they_were_seen() -> None:
    rule = OversizedUpdates()
    first = updated(steps([1.0], [1.0]), 3.0)
    found = [rule.judge(first)]
    for number in range(1, 80):
        window = (StepStats(number, total_norm=1.0, loss=1.0 if number < 10 else 0.01),)
        found.append(rule.judge(updated(StepRecord(step=number, window=window), 1e-3)))
    (told,) = [finding for finding in found[1:] if finding is not None]
    assert (told.severity, told.first_step, told.last_step) == (Severity.INFO, 0, 0)
