"""A run as it is shown, as a report: its own, or what can be said of a run that has written none."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_gradhealth.records import Finding, HealthReport, LayerStats
from lightning_gradhealth.view.data import RunView
from lightning_gradhealth.view.quantities import missing

TREND = 256  # points, as the report of a run has


def health_of(view: RunView) -> HealthReport:
    """The report of a run.

    Args:
        view: The run. Where it has not ended, or was killed, its last findings and figures make the report.

    Example:
        >>> health_of(RunView("run", last_step=99)).verdict  # no quantity of it could be read
        'nothing was watched'
    """
    known = view.report()
    return _so_far(view) if known is None else known


def _so_far(view: RunView) -> HealthReport:
    happened = {name: sum(last - first + 1 for first, last in spans) for name, spans in view.spans.items()}
    steps, norms = view.totals.column("total_norm")
    is_measured = len(view.totals.steps) or any(view.load(quantity.name) is not None for quantity in view.quantities)
    return HealthReport(
        findings=tuple(map(_finding, view.findings)),
        layers=_layers(view),
        step=view.last_step,
        steps=max(view.last_step + 1, 0)
        if is_measured
        else 0,  # where x values count optimizer steps, as Lightning's do
        non_finite_steps=happened.get("non_finite", 0),
        clipped_steps=happened.get("clipped", 0),
        skipped_steps=happened.get("skipped", 0),
        trend=tuple((float(step), float(norm)) for step, norm in _pooled(steps, norms)),
        notes=(
            f"the run is still going on, or was killed: this is what it had written by step {view.last_step}, and"
            " evidence may be older",
        ),
    )


def _pooled(steps: Any, norms: Any) -> list[tuple[int, float]]:
    """At most `TREND` points: the last step of several, and their largest norm."""
    parts = np.array_split(np.arange(len(steps)), min(TREND, len(steps))) if len(steps) else []
    return [(steps[part[-1]], np.fmax.reduce(norms[part])) for part in parts]


def _finding(data: dict[str, Any]) -> Finding:
    return Finding(
        condition=data["condition"],
        severity=data["severity"],
        layers=tuple(data["layers"]),
        first_step=data["first_step"],
        last_step=data["last_step"],
        summary=data["summary"],
        evidence={entry["name"]: entry["value"] for entry in data["evidence"]},
        remedy=data["remedy"],
        code=data["code"],
        healed=tuple(data["healed"]),
    )


def _layers(view: RunView) -> tuple[LayerStats, ...]:
    """What was measured last of each layer."""
    known: list[dict[str, float]] = [{} for _ in view.layers]
    for quantity in view.quantities:
        matrix = view.load(quantity.name)
        if matrix is None or quantity.name not in LayerStats.__dataclass_fields__:
            continue
        measured = ~missing(matrix.values)
        last = len(measured) - 1 - np.argmax(measured[::-1], axis=0)
        values = quantity.decode(matrix.values[last, np.arange(matrix.values.shape[1])])
        for place in np.flatnonzero(measured.any(axis=0)):
            known[place][quantity.name] = float(values[place])
    return tuple(
        LayerStats(layer.name, max(layer.numel, 0), kind=layer.kind, optimizer=0, **values)  # type: ignore[arg-type]
        for layer, values in zip(view.layers, known, strict=True)
    )
