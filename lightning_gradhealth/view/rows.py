"""A record as it travels: one row of numbers a quantity, and what happened at single steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.messages import in_words
from lightning_gradhealth.records import Finding, StepRecord, StepStats
from lightning_gradhealth.view.quantities import COLUMNS, FORMAT, QUANTITIES, Half, Single, layer_value, totals

BINS = 32  # of LayerStats.forward_histogram
SHOWN_LAYERS = 200  # names that a finding carries; it says how many there are
LONGEST = 4_000  # characters of a text
MOST_SPANS = 64  # of one kind in one window: the nearest are merged beyond it

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Layer:
    """What is known of a layer whatever the step.

    Attributes:
        name: Its name.
        kind: What it is, as in `LayerStats.kind`.
        numel: Number of its elements when it was first seen.
    """

    name: str
    kind: str = ""
    numel: int = 0


@dataclass(frozen=True)
class Row:
    """One logged step.

    Attributes:
        step: The loggers' x value.
        layers: The layers, in order.
        values: Quantity -> one number a layer, as they travel; only those that were measured.
        totals: The columns of `COLUMNS`.
        histogram: Shares of each layer's output by magnitude, of 255, shape (layers, 32); None: not measured.
        spans: What happened at which steps since the last row: "armed", "clipped", "skipped", "non_finite".

    Example:
        >>> Row.of(StepRecord(step=3, total_norm=2.0)).step
        3
    """

    step: int
    layers: tuple[Layer, ...]
    values: Mapping[str, Half]
    totals: Single
    histogram: NDArray[np.uint8] | None = None
    spans: Mapping[str, Spans] = field(default_factory=dict)

    @classmethod
    def of(cls, record: StepRecord) -> Row:
        """Take from a record what is shown."""
        values = {}
        for name, quantity in QUANTITIES.items():
            known = [layer_value(name, layer) for layer in record.layers]
            if any(value is not None for value in known):
                values[name] = quantity.encode(known)
        layers = tuple(Layer(layer.name, layer.kind, layer.numel) for layer in record.layers)
        return cls(record.step, layers, values, totals(record), _histogram(record), spans(record.window))


def schema_of(layers: Sequence[Layer]) -> str:
    """A short name for what the rows of a model mean, another one for another model.

    Example:
        >>> schema_of([Layer("a")]) == schema_of([Layer("a", numel=8)]) != schema_of([Layer("b")])
        True
    """
    meaning = [FORMAT, list(COLUMNS), [(layer.name, layer.kind) for layer in layers]]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:8]


def _histogram(record: StepRecord) -> NDArray[np.uint8] | None:
    counts = [layer.forward_histogram for layer in record.layers]
    if not any(counts):
        return None
    table = np.array([row if len(row) == BINS else (0,) * BINS for row in counts], dtype=np.float64)
    return np.asarray(np.rint(table / np.maximum(table.sum(1, keepdims=True), 1.0) * 255.0), dtype=np.uint8)


_HAPPENED: Mapping[str, Callable[[StepStats], bool]] = {
    "armed": lambda step: bool(step.armed),
    "clipped": lambda step: bool(step.clipped),
    "skipped": lambda step: bool(step.skipped),
    "non_finite": lambda step: step.non_finite,
}


def spans(window: Iterable[StepStats]) -> dict[str, Spans]:
    """What happened at which steps of a window, as inclusive ranges; what never did is left out.

    Example:
        >>> spans([StepStats(4, clipped=True), StepStats(5, clipped=True), StepStats(6, skipped=True)])
        {'clipped': [(4, 5)], 'skipped': [(6, 6)]}
    """
    steps: dict[int, list[StepStats]] = {}
    for step in window:
        steps.setdefault(step.step, []).append(step)
    found: dict[str, Spans] = {}
    for name, happened in _HAPPENED.items():
        ranges: Spans = []
        goes_on = False
        for number, parts in sorted(steps.items()):
            if any(map(happened, parts)):
                ranges[-1:] = [(ranges[-1][0], number)] if goes_on else [*ranges[-1:], (number, number)]
            goes_on = any(map(happened, parts))
        if ranges:
            found[name] = few(ranges, MOST_SPANS)
    return found


def few(ranges: Spans, most: int) -> Spans:
    """At most `most` of the ranges: those with the smallest gaps between them are merged.

    Example:
        >>> few([(0, 1), (3, 3), (90, 91)], 2)
        [(0, 3), (90, 91)]
    """
    if len(ranges) <= most:
        return ranges
    gaps = sorted(range(1, len(ranges)), key=lambda i: ranges[i][0] - ranges[i - 1][1])
    kept = [0, *sorted(gaps[len(ranges) - most :])]
    ends = [ranges[i - 1][1] for i in kept[1:]] + [ranges[-1][1]]
    return [(ranges[i][0], end) for i, end in zip(kept, ends, strict=True)]


def joined(ranges: Iterable[tuple[int, int]]) -> Spans:
    """Ranges in order, those that overlap or follow each other as one.

    Example:
        >>> joined([(5, 6), (0, 2), (3, 3)])
        [(0, 3), (5, 6)]
    """
    result: Spans = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(result[-1][1], last))
        else:
            result.append((first, last))
    return result


def told(finding: Finding, active: bool) -> dict[str, Any]:
    """A finding as it travels: plain data, bounded in size.

    Args:
        finding: The finding.
        active: It holds now.
    """
    data = finding.changed(layers=finding.layers[:SHOWN_LAYERS], healed=finding.healed[:SHOWN_LAYERS]).to_dict()
    texts = {name: str(data[name])[:LONGEST] for name in ("summary", "remedy", "code")}
    evidence = {
        str(name)[:100]: value if isinstance(value, (int, float)) else in_words(value)
        for name, value in list(data["evidence"].items())[:40]
        if value is not None and value != ""
    }
    where = {"where": finding.where, "layers_total": len(finding.layers), "active": active}
    return {**data, **texts, "evidence": evidence, **where}
