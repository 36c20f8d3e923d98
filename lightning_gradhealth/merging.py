"""One record out of several, and what is known of a layer by the latest measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_gradhealth.records import LayerStats, StepCounts, StepRecord, StepStats

KEPT = 1_024  # steps whose own entries a record keeps; those before are counted

# what is measured together: by every step, at probes of the weights, at probes of the signals, over several probes
_STEP = (
    *("numel", "grad_norm", "grad_norm_max", "norm_ratio", "non_finite", "bias_grad_rms", "learning_rate"),
    *("without_grad", "no_gradient_since", "steps_without_grad", "optimizer"),
)
_WEIGHTS = ("weight_norm", "matrix_rms", "matrices", "grad_to_weight", "update_to_weight", "applied_norm")
_SIGNALS = ("forward_rms", "forward_mean", "backward_rms", "forward_gain", "backward_gain", "forward_histogram")
_UNITS = ("activation", "units", "full_fraction", "dead_fraction", "saturated_fraction")


def latest(new: LayerStats, old: LayerStats | None) -> LayerStats:
    """The last that is known of a layer: what was not measured anew stays as it was; a measured 0 is known.

    Example:
        >>> old = LayerStats("a", optimizer=0, forward_rms=1.0, backward_rms=0.5, dead_fraction=1.0, units=8)
        >>> new = LayerStats("a", optimizer=0, forward_rms=1.0, backward_rms=0.0)
        >>> latest(new, old).backward_rms, latest(new, old).dead_fraction
        (0.0, 1.0)
    """
    if old is None:
        return new
    kept = [name for name in _UNITS if getattr(new, name) in (None, "")]
    if new.optimizer is None:
        kept += _STEP
    if new.weight_norm is None:
        kept += [name for name in _WEIGHTS if getattr(new, name) in (None, ())]
    if new.forward_rms is None:
        kept += _SIGNALS
    return new.changed(**{name: getattr(old, name) for name in kept})


def merged(records: Sequence[StepRecord]) -> StepRecord:
    """One record that covers all steps of several, at least one, in order.

    Counts are added and extremes kept; what was measured more than once is given as it was last.

    Example:
        >>> steps = StepStats(4, total_norm=50.0), StepStats(5, total_norm=0.5)
        >>> both = merged([StepRecord(s.step, s.total_norm, s.total_norm, window=(s,)) for s in steps])
        >>> both.step, both.total_norm, both.total_norm_max, both.steps
        (5, 0.5, 50.0, 2)
    """
    last = records[-1]
    if len(records) == 1:
        return last
    steps = [step for record in records for step in record.window]
    window, cut = tuple(steps[-KEPT:]), steps[:-KEPT]
    gains = next((r for r in reversed(records) if r.chains), None)  # those of signals come before those of biases
    return StepRecord(
        step=last.step,
        total_norm=last_norm(window, "total_norm"),
        total_norm_max=_extreme(max, (record.total_norm_max for record in records)),
        applied_norm=last_norm(window, "applied_norm"),
        clip_coefficient=_extreme(min, (record.clip_coefficient for record in records)),
        layers=_layers(records),
        window=window,
        probed=any(record.probed for record in records),
        backward_gain=_last(records if gains is None else [gains], "backward_gain"),
        forward_gain=_last(records if gains is None else [gains], "forward_gain"),
        chains=() if gains is None else gains.chains,
        temporal={name: flow for record in records for name, flow in record.temporal.items()},
        first_non_finite=next((r.first_non_finite for r in records if r.first_non_finite), ""),
        unstepped=next((r.unstepped for r in reversed(records) if r.probed or r.unstepped), ()),
        squashed=next((record.squashed for record in records if record.squashed), None),
        carried=_extreme(max, (record.carried for record in records)),
        before=_counts([record.before for record in records], cut),
    )


def last_norm(window: Iterable[StepStats], name: str) -> float | None:
    """The norm of each optimizer's last step that has one; of several optimizers the largest, NaN above all.

    Args:
        window: The steps.
        name: "total_norm" or "applied_norm".

    Example:
        >>> last_norm([StepStats(0, 0, total_norm=3.0), StepStats(0, 1, total_norm=2.0)], "total_norm")
        3.0
    """
    norms = {step.optimizer: norm for step in window if (norm := getattr(step, name)) is not None}
    return max(norms.values(), key=lambda norm: math.inf if math.isnan(norm) else norm, default=None)


def _layers(records: Sequence[StepRecord]) -> tuple[LayerStats, ...]:
    """The layers of the last record, as they are known from all."""
    known: dict[str, LayerStats] = {}
    for record in records:
        for layer in record.layers:
            before = known.get(layer.name)
            after = latest(layer, before)
            if before is not None:
                peak = _extreme(max, (before.grad_norm_max, layer.grad_norm_max))
                after = after.changed(grad_norm_max=peak, non_finite=before.non_finite + layer.non_finite)
            known[layer.name] = after
    return tuple(known[layer.name] for layer in records[-1].layers)


def _counts(before: Iterable[StepCounts], cut: Sequence[StepStats]) -> StepCounts:
    parts = [
        *before,
        StepCounts(
            steps=len(cut),
            non_finite=sum(step.non_finite for step in cut),
            clipped=sum(bool(step.clipped) for step in cut),
            skipped=sum(bool(step.skipped) for step in cut),
            would_clip=_extreme(min, (step.would_clip for step in cut)),
        ),
    ]
    return StepCounts(
        steps=sum(part.steps for part in parts),
        non_finite=sum(part.non_finite for part in parts),
        clipped=sum(part.clipped for part in parts),
        skipped=sum(part.skipped for part in parts),
        would_clip=_extreme(min, (part.would_clip for part in parts)),
    )


def _last(records: Sequence[StepRecord], name: str) -> Any:
    """The last value of a field that is known."""
    return next((value for record in reversed(records) if (value := getattr(record, name)) is not None), None)


def _extreme(of: Any, values: Iterable[float | None]) -> float | None:
    """The largest or smallest that is known."""
    result: float | None = of((value for value in values if value is not None), default=None)
    return result
