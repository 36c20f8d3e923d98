"""What the page asks of a run, and the answers: plain data for JSON, and pictures as bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.view.data import SEVERITIES, Matrix, RunView, Steps
from lightning_gradhealth.view.pooling import FAR, Rows, coded, edges, fitted, limits, pool
from lightning_gradhealth.view.quantities import COLUMNS, MISSING, MISSING_TOTAL, Quantity, missing
from lightning_gradhealth.view.rows import BINS

VERSION = 1
MOST = 2_000  # columns, rows, points: more are never sent
EDGES = [2.0 ** (2 * i - BINS) for i in range(BINS + 1)]

Json = dict[str, Any]


def numbers(values: NDArray[Any], unknown: NDArray[np.bool_] | None = None) -> list[float | str | None]:
    """An array for JSON: NaN and Inf as strings, None where nothing was measured.

    Example:
        >>> numbers(np.array([1.0, np.nan, np.inf, 2.0]), np.array([False, False, False, True]))
        [1.0, 'NaN', 'Infinity', None]
    """
    flat: list[float | str | None] = values.tolist()
    for index in np.flatnonzero(~np.isfinite(values)):
        value = float(values[index])
        flat[index] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    for index in () if unknown is None else np.flatnonzero(unknown):
        flat[index] = None
    return flat


def decoded(quantity: Quantity, values: NDArray[Any]) -> list[float | str | None]:
    """Values as they travel for JSON, to six digits."""
    plain = quantity.decode(values)
    known = np.isfinite(plain) & (plain != 0)
    digits = np.zeros_like(plain)
    digits[known] = [float(f"{value:.6g}") for value in plain[known]]
    return numbers(np.where(known, digits, plain), missing(values))


# --- runs --------------------------------------------------------------------------------------------------------


def status(findings: Sequence[Json]) -> Json:
    """The worst finding, the gravest of those that hold now before those that are over."""
    grave = [finding for finding in findings if finding["severity"] != "info"]
    worst = min(
        grave,
        key=lambda f: (-SEVERITIES.index(f["severity"]), not f["active"], f["first_step"]),
        default=None,
    )
    if worst is None:
        return {"severity": "healthy", "condition": None, "since": None, "active": False, "findings": 0}
    keys = {"severity": "severity", "condition": "condition", "since": "first_step", "active": "active"}
    return {**{name: worst[key] for name, key in keys.items()}, "findings": len(grave)}


def run_entry(view: RunView) -> Json:
    """A run in the list of runs."""
    return {
        "run": view.name,
        "first_step": view.first_step,
        "last_step": view.last_step,
        "stamp": view.stamp,
        "status": status(view.findings),
        "metrics": [quantity.name for quantity in view.quantities],
    }


def runs(views: Sequence[RunView]) -> Json:
    """The list of runs."""
    return {"version": VERSION, "runs": [run_entry(view) for view in sorted(views, key=lambda view: view.name)]}


def layout(view: RunView) -> Json:
    """Everything about a run that does not depend on a quantity."""
    return {
        "run": view.name,
        "schema": view.schema,
        "schemas": [dict(zip(("schema", "x0", "x1", "layers"), entry, strict=True)) for entry in view.schemas],
        "layers": [asdict(layer) for layer in view.layers],
        "metrics": [asdict(quantity) for quantity in view.quantities],
        "x0": view.first_step,
        "x1": view.last_step,
        "last_step": view.last_step,
        "stamp": view.stamp,
    }


# --- pictures ----------------------------------------------------------------------------------------------------


def matrix(view: RunView, metric: str) -> Matrix:
    """A quantity of a run.

    Raises:
        LookupError: There is none, or it cannot be read.
    """
    found = view.load(metric)
    if found is None or not len(found.steps):
        raise LookupError("no such metric in this run")
    return found


def _cut(steps: Steps, x0: int | None, x1: int | None) -> slice:
    """The rows between two steps; the one before, too, for it holds until the next."""
    start = 0 if x0 is None else max(0, int(np.searchsorted(steps, x0, side="right")) - 1)
    stop = len(steps) if x1 is None else int(np.searchsorted(steps, x1, side="right"))
    return slice(start, max(stop, start + 1))


def picture(
    view: RunView,
    metric: str,
    *,
    x0: int | None = None,
    x1: int | None = None,
    w: int = 800,
    h: int = 1_000,
    rows: Rows | None = None,
    versus: RunView | None = None,
) -> tuple[Json, bytes]:
    """A quantity over steps and layers: a head, and one byte a cell.

    Args:
        view: The run.
        metric: The quantity.
        x0: The first step; None: from the beginning.
        x1: The last step; None: to the end.
        w: Greatest number of columns.
        h: Greatest number of rows.
        rows: Ranges of layers, one a row; None: every layer.
        versus: A run to compare with.

    Raises:
        LookupError: There is no such quantity.
    """
    found = matrix(view, metric)
    values, palette = found.values, found.quantity.palette
    if versus is not None:
        values, palette = _against(view, found, versus, matrix(versus, metric)), "diverging"
    if rows is None:
        rows = [(index, index) for index in range(values.shape[1])]
    w, h = min(w, MOST), min(h, MOST)
    part = _cut(found.steps, x0, x1)
    columns = edges(part.stop - part.start, w)
    far = None if palette != "diverging" else FAR if found.quantity.scale == "log2" else 0.0
    cells, codes = pool(values[part], columns, rows, h, far)
    low, high = found.limits if versus is None else limits(values, palette, found.quantity.scale)
    body = coded(cells, codes, low, high)
    head = {
        "shape": list(body.shape),
        "columns": found.steps[part][columns].tolist(),
        "last": int(found.steps[part.stop - 1]),
        "rows": [list(row) for row in fitted(rows, h)],
        **{"lo": low, "hi": high, "scale": found.quantity.scale, "palette": palette, "metric": metric},
        **{"n": values.shape[1], "last_step": view.last_step, "stamp": view.stamp},
    }
    if versus is not None:
        head["versus"] = versus.name
    return head, body.tobytes()


def _against(view: RunView, mine: Matrix, other: RunView, theirs: Matrix) -> NDArray[np.float32]:
    """What a run is beside another: the difference as it travels, of layers of the same name."""
    at = np.searchsorted(theirs.steps, mine.steps, side="right") - 1
    place = {layer.name: index for index, layer in enumerate(other.layers)}
    known = np.array([place.get(layer.name, -1) for layer in view.layers], dtype=np.intp)
    beside = theirs.values[np.maximum(at, 0)][:, np.maximum(known, 0)]
    unknown = missing(mine.values) | missing(beside) | (at < 0)[:, None] | (known < 0)[None, :]
    with np.errstate(invalid="ignore"):
        ratio = mine.values.astype(np.float32) - beside.astype(np.float32)
    both_zero = np.isneginf(mine.values) & np.isneginf(beside)
    ratio[both_zero] = 0.0
    ratio[unknown] = MISSING
    return ratio


def packed(head: Mapping[str, Any], body: bytes) -> bytes:
    """Head and body as one: the length of the head in 4 bytes, little endian, then both."""
    text = json.dumps(head, allow_nan=False).encode()
    return len(text).to_bytes(4, "little") + text + body


# --- series ------------------------------------------------------------------------------------------------------


def series(view: RunView, *, x0: int | None = None, x1: int | None = None, w: int = MOST) -> Json:
    """What is known of the run as a whole: columns, spans, findings."""
    steps, table = view.totals.steps, view.totals.values
    columns: list[Json] = []
    shown: list[int] = []
    if len(steps):
        part = _cut(steps, x0, x1)
        starts = edges(part.stop - part.start, min(w, MOST))
        shown = steps[part][starts].tolist()
        for place, column in enumerate(COLUMNS.values()):
            pooled, unknown = _pooled_column(table[part, place], starts, smallest=column.name == "clip_coefficient")
            if not unknown.all():
                entry = {"name": column.name, "title": column.title, "scale": column.scale}
                columns.append({**entry, "values": numbers(pooled, unknown)})
    return {
        "run": view.name,
        "step": shown,
        "columns": columns,
        "spans": [
            {"name": name, "steps": [list(span) for span in spans]} for name, spans in view.spans.items() if spans
        ],
        "findings": list(view.findings),
        "status": status(view.findings),
        "last_step": view.last_step,
        "stamp": view.stamp,
    }


def _pooled_column(
    values: NDArray[np.float32], starts: NDArray[np.intp], *, smallest: bool
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The extreme of each point, NaN where one was; and where nothing was measured."""
    unknown = values == MISSING_TOTAL
    worst = np.float32(np.inf if smallest else -np.inf)
    operation = np.minimum if smallest else np.maximum
    pooled = operation.reduceat(np.where(unknown, worst, values), starts).astype(np.float64)  # NaN goes through
    short = np.array([float(f"{value:.7g}") for value in pooled])
    return short, np.logical_and.reduceat(unknown, starts)


# --- one layer, one step -----------------------------------------------------------------------------------------


def _check_layer(view: RunView, layer: int) -> None:
    if not 0 <= layer < len(view.layers):
        raise LookupError("no such layer in this run")


def layer(view: RunView, layer: int, *, x0: int | None = None, x1: int | None = None, w: int = 1_000) -> Json:
    """The lines of one layer, and its histogram over time.

    Raises:
        LookupError: There is no such layer.
    """
    _check_layer(view, layer)
    lines = []
    for quantity in view.quantities:
        found = view.load(quantity.name)
        if found is None or missing(found.values[:, layer]).all():
            continue
        part = _cut(found.steps, x0, x1)
        known = ~missing(found.values[part, layer])
        steps, values = found.steps[part][known], found.values[part, layer][known]
        if not len(steps):
            continue
        columns = edges(len(steps), min(w, MOST))
        cells, codes = pool(values[:, None], columns, far=FAR if quantity.palette == "diverging" else None)
        pooled = np.where(codes[0] == 0, cells[0], np.where(codes[0] == 252, -np.inf, np.inf))
        pooled[codes[0] == 255] = np.nan
        entry = {"metric": quantity.name, "title": quantity.title, "scale": quantity.scale}
        lines.append({**entry, "step": steps[columns].tolist(), "values": decoded(quantity, pooled)})
    about = view.layers[layer]
    return {
        **{"layer": layer, "name": about.name, "kind": about.kind, "numel": about.numel, "lines": lines},
        "histogram": histogram(view, layer, x0=x0, x1=x1),
    }


def histogram(view: RunView, layer: int, *, x0: int | None = None, x1: int | None = None) -> Json | None:
    """The output of a layer by magnitude, over time; None where it was not measured."""
    found = view.histograms()
    if found is None or not len(found.steps):
        return None
    part = _cut(found.steps, x0, x1)
    shares = found.shares[part, layer].astype(np.float64)
    sums = shares.sum(1)
    known = np.flatnonzero(sums > 0)[-MOST:]
    if not len(known):
        return None
    return {
        "what": "output by magnitude",
        "step": found.steps[part][known].tolist(),
        "edges": EDGES,
        "shares": np.round(shares[known] / sums[known, None], 4).tolist(),
    }


def profile(view: RunView, metric: str, step: int) -> Json:
    """A quantity over depth, at the logged step nearest to the one asked for.

    Raises:
        LookupError: There is no such quantity.
    """
    found = matrix(view, metric)
    at = int(np.abs(found.steps - step).argmin())
    fits = []
    for name in ("backward_gain", "forward_gain"):
        steps, values = view.totals.column(name)
        if len(steps) and math.isfinite(value := float(values[np.abs(steps - step).argmin()])):
            fits.append({"name": name, "title": COLUMNS[name].title, "value": value})
    return {
        "metric": metric,
        "step": int(found.steps[at]),
        "values": decoded(found.quantity, found.values[at]),
        "fits": fits,
    }


def value(view: RunView, metric: str, layer: int, step: int) -> Json:
    """The exact value at the logged step at or before the one asked for.

    Raises:
        LookupError: There is no such quantity or layer.
    """
    _check_layer(view, layer)
    found = matrix(view, metric)
    at = max(0, int(np.searchsorted(found.steps, step, side="right")) - 1)
    known = decoded(found.quantity, found.values[at, layer : layer + 1])[0]
    place = {"layer": layer, "name": view.layers[layer].name, "metric": metric}
    return {**place, "step": int(found.steps[at]), "value": known}
