"""A run as it is shown: its layers, its quantities as arrays over steps, its findings; where they come from is open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.records import HealthReport
from lightning_gradhealth.view.pooling import limits
from lightning_gradhealth.view.quantities import COLUMNS, MISSING_TOTAL, PALETTES, SCALES, Quantity
from lightning_gradhealth.view.rows import LONGEST, SHOWN_LAYERS, Layer, Spans, joined

Steps = NDArray[np.int64]
SEVERITIES = ("info", "warning", "critical")
_NAME = 10_000  # characters of a name that are passed on


@dataclass(frozen=True)
class Matrix:
    """One quantity over a run.

    Attributes:
        quantity: What it is.
        steps: The loggers' x values, rising, shape (steps,).
        values: As they travel, shape (steps, layers).

    Example:
        >>> Matrix(Quantity("x", "x", ""), np.array([3]), np.array([[1.0, -2.0]], np.float16)).limits[0] < 0
        True
    """

    quantity: Quantity
    steps: Steps
    values: NDArray[Any]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The values at the ends of the colours."""
        return limits(self.values, self.quantity.palette, self.quantity.scale)


@dataclass(frozen=True)
class Totals:
    """The columns of a run.

    Attributes:
        steps: Rising, shape (steps,).
        values: Shape (steps, columns), in the order of `COLUMNS`.
    """

    steps: Steps = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    values: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), dtype=np.float32))

    def column(self, name: str) -> tuple[Steps, NDArray[np.float64]]:
        """The steps at which a column was measured, and its values there."""
        values = self.values[:, list(COLUMNS).index(name)]
        known = values != np.float32(MISSING_TOTAL)
        return self.steps[known], values[known].astype(np.float64)


@dataclass(frozen=True)
class Histograms:
    """Output by magnitude, of all layers.

    Attributes:
        steps: Rising, shape (steps,).
        shares: Of 255, shape (steps, layers, 32); all 0 where a layer was not measured.
    """

    steps: Steps
    shares: NDArray[np.uint8]


@dataclass(frozen=True)
class RunView:
    """One model in one run.

    Attributes:
        name: The run.
        schema: Names what its rows mean.
        layers: In depth order.
        quantities: Those there are, in the order in which they are offered.
        load: Gives the matrix of a quantity; None where there is none that can be read.
        totals: The columns of the run.
        findings: As they stood last, gravest first, see `finding_of`.
        spans: What happened at which optimizer steps.
        histograms: Gives the histograms; None: there are none.
        first_step: The first step with data.
        last_step: The last step with data.
        stamp: Changes whenever anything was added.
        schemas: All models in the run, the latest last: schema, first and last step, number of layers.
        report: Gives the run's own report; None: it has not ended, or its report is not at hand.
    """

    name: str
    schema: str = ""
    layers: Sequence[Layer] = ()
    quantities: Sequence[Quantity] = ()
    load: Callable[[str], Matrix | None] = lambda name: None
    totals: Totals = field(default_factory=Totals)
    findings: Sequence[dict[str, Any]] = ()
    spans: Mapping[str, Spans] = field(default_factory=dict)
    histograms: Callable[[], Histograms | None] = lambda: None
    first_step: int = 0
    last_step: int = 0
    stamp: float = 0.0
    schemas: Sequence[tuple[str, int, int, int]] = ()
    report: Callable[[], HealthReport | None] = lambda: None


# --- what comes from files is data of strangers: every field is looked at ----------------------------------------


def _text(value: Any, limit: int = LONGEST) -> str:
    return value[:limit] if isinstance(value, str) else ""


def _whole(value: Any, default: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return default
    return int(max(-(2**53), min(2**53, value)))


def _names(value: Any) -> list[str]:
    return [name[:_NAME] for name in value[:SHOWN_LAYERS] if isinstance(name, str)] if isinstance(value, list) else []


def quantity_of(data: Any) -> Quantity | None:
    """A quantity from what an event file says of it; None where that is nothing that can be shown.

    Example:
        >>> quantity_of({"name": "x", "scale": "linear"}).title, quantity_of(["x"])
        ('x', None)
    """
    if not isinstance(data, dict) or not (name := _text(data.get("name"), 100)):
        return None
    neutral = data.get("neutral")
    is_number = isinstance(neutral, (int, float)) and not isinstance(neutral, bool) and math.isfinite(neutral)
    scale, palette = data.get("scale"), data.get("palette")
    return Quantity(
        name,
        _text(data.get("title"), 200) or name,
        _text(data.get("about"), 1_000),
        scale if scale in SCALES else "log2",
        palette if palette in PALETTES else "sequential",
        float(neutral) if is_number and neutral is not None else None,
    )


def layers_of(data: Any, most: int) -> list[Layer] | None:
    """Layers from what an event file says; None where it is not that, or there are more than `most`.

    Example:
        >>> layers_of([["a", "linear", 8]], 10), layers_of("ab", 10)
        ([Layer(name='a', kind='linear', numel=8)], None)
    """
    if not isinstance(data, list) or not 0 < len(data) <= most:
        return None
    if not all(isinstance(part, list) and len(part) == 3 and isinstance(part[0], str) for part in data):
        return None
    return [Layer(name[:_NAME], _text(kind, 100), _whole(numel)) for name, kind, numel in data]


def finding_of(data: Any) -> dict[str, Any] | None:
    """A finding from what `rows.told` made of it; None where it is none.

    Example:
        >>> finding_of({"condition": "loss_spike", "first_step": 3})["last_step"], finding_of(3)
        (3, None)
    """
    if not isinstance(data, dict) or not (condition := _text(data.get("condition"), 200)):
        return None
    first = _whole(data.get("first_step"))
    layers, evidence = _names(data.get("layers")), data.get("evidence")
    return {
        "id": condition,
        "condition": condition,
        "severity": data.get("severity") if data.get("severity") in SEVERITIES else "info",
        "active": data.get("active") is True,
        "first_step": first,
        "last_step": max(first, _whole(data.get("last_step"), first)),
        "layers": layers,
        "layers_total": max(len(layers), _whole(data.get("layers_total"))),
        "where": _text(data.get("where")),
        "summary": _text(data.get("summary")),
        "evidence": _evidence(evidence),
        "remedy": _text(data.get("remedy")),
        "code": _text(data.get("code")),
        "healed": _names(data.get("healed")),
    }


def _evidence(data: Any) -> list[dict[str, Any]]:
    if not isinstance(data, dict):
        return []
    return [{"name": str(name)[:100], "value": _shown(value)} for name, value in list(data.items())[:40]]


def _shown(value: Any) -> float | int | str:
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int):
        return value if isinstance(value, bool) else _whole(value)
    return str(value)[:1_000]


def with_spans(history: Iterable[tuple[int, Sequence[dict[str, Any]]]], last_step: int) -> list[dict[str, Any]]:
    """The findings as they stood last, each with the spans of steps in which it held.

    Args:
        history: Step -> all findings as they stood then, in order.
        last_step: The last step of the run: until then holds what is active.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    since: dict[str, int] = {}
    latest: Sequence[dict[str, Any]] = ()
    for step, latest in history:
        for finding in latest:
            name = finding["id"]
            if name not in ranges:
                ranges[name], since[name] = [], finding["first_step"]
            if finding["active"]:
                since.setdefault(name, step)
            elif name in since:
                first = since.pop(name)
                ranges[name].append((first, max(first, finding["last_step"])))
    for name, first in since.items():
        ranges[name].append((first, max(first, last_step)))
    shown = []
    for finding in latest:
        held = joined(ranges.get(finding["id"], [])) or [(finding["first_step"], finding["last_step"])]
        last = max(finding["last_step"], last_step) if finding["active"] else finding["last_step"]
        shown.append({**finding, "last_step": last, "spans": [list(span) for span in held]})
    return shown


def rising(steps: Sequence[int] | Steps) -> NDArray[np.intp]:
    """Which of several rows, in the order in which they were written, count: those that no later one overtakes.

    A run that goes on from a checkpoint writes some steps again: what was written after the checkpoint is void.

    Example:
        >>> rising([0, 1, 2, 3, 1, 2]).tolist()
        [0, 4, 5]
    """
    array = np.asarray(steps, dtype=np.int64)
    if not array.size:
        return np.zeros(0, dtype=np.intp)
    later = np.append(np.minimum.accumulate(array[::-1])[::-1][1:], np.iinfo(np.int64).max)
    return np.flatnonzero(array < later)
