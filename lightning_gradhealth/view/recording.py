"""A run as it is shown, kept in memory while it goes on, of a bounded size whatever its length."""

from __future__ import annotations

import io
import json
import math
import time
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.records import Finding, StepRecord
from lightning_gradhealth.view.data import Histograms, Matrix, RunView, Totals, finding_of, with_spans
from lightning_gradhealth.view.quantities import (
    COLUMNS,
    MISSING,
    MISSING_TOTAL,
    PEAKS,
    QUANTITIES,
    Half,
    Single,
    either,
)
from lightning_gradhealth.view.rows import BINS, Layer, Row, Spans, few, joined, schema_of, told

_SPANS = 512  # ranges of one kind that are kept
_FAR = 3.0
_TABLES = 32  # histograms that go into a checkpoint
_NONE: Half = np.zeros(0, dtype=np.float16)


class Recording:
    """Keeps at most `limit` points of a run, each standing for the same number of records, as `History` does.

    Args:
        limit: Greatest number of points, even, at least 2.

    Example:
        >>> recording = Recording(limit=4)
        >>> for step in range(10):
        ...     recording.append(StepRecord(step=step, total_norm=1.0, total_norm_max=float(step)), (), ())
        >>> recording.view("run").totals.column("total_norm")
        (array([3, 7, 9]), array([3., 7., 9.]))
    """

    def __init__(self, limit: int = 256) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be even and >= 2, got {limit}; leave it out for 256")
        self._limit = limit
        self._layers: dict[str, Layer] = {}
        self._steps: list[int] = []
        self._values: list[dict[str, Half]] = []
        self._totals: list[Single] = []
        self._histograms: list[NDArray[np.uint8] | None] = []
        self._stride, self._filled = 1, 0
        self._spans: dict[str, Spans] = {}
        self._history: list[tuple[int, list[dict[str, Any]]]] = []
        self._first = -1

    def append(self, record: StepRecord, findings: Sequence[Finding], active: Collection[str]) -> None:
        """Add a record.

        Args:
            record: What was measured.
            findings: All findings so far.
            active: The conditions that hold now.

        A record that is not later than the last is passed over.
        """
        if self._steps and record.step <= self._steps[-1]:
            return  # a window that was judged before it was over
        row = Row.of(record)
        self._first = row.step if self._first < 0 else self._first
        for layer in row.layers:
            self._layers.setdefault(layer.name, layer)
        self._tell(row.step, [told(finding, finding.condition in active) for finding in findings])
        for name, spans in row.spans.items():
            self._spans[name] = few(joined([*self._spans.get(name, []), *spans]), _SPANS)
        values, histogram = self._placed(row)
        if self._steps and self._filled < self._stride:
            self._steps[-1] = row.step
            self._values[-1] = _merged(self._values[-1], values)
            self._totals[-1] = _merged_totals(self._totals[-1], row.totals)
            self._histograms[-1] = histogram if histogram is not None else self._histograms[-1]
            self._filled += 1
            return
        if len(self._steps) == self._limit:
            self._pool()
        self._steps.append(row.step)
        self._values.append(values)
        self._totals.append(row.totals)
        self._histograms.append(histogram)
        self._filled = 1

    def _tell(self, step: int, findings: list[dict[str, Any]]) -> None:
        """Keep findings where they changed."""
        known = [finding for finding in map(finding_of, findings) if finding is not None]
        if not self._history or _gist(self._history[-1][1]) != _gist(known):
            self._history.append((step, known))
            if len(self._history) > _SPANS:  # the oldest states go, all but the first
                del self._history[1]
        else:
            self._history[-1] = (self._history[-1][0], known)

    def _placed(self, row: Row) -> tuple[dict[str, Half], NDArray[np.uint8] | None]:
        """The values of a row at the places of their layers."""
        place = {name: index for index, name in enumerate(self._layers)}
        at = [place[layer.name] for layer in row.layers]
        values = {}
        for name, known in row.values.items():
            values[name] = np.full(len(place), MISSING, dtype=np.float16)
            values[name][at] = known
        if row.histogram is None:
            return values, None
        histogram = np.zeros((len(place), BINS), dtype=np.uint8)
        histogram[at] = row.histogram
        return values, histogram

    def _pool(self) -> None:
        pairs = range(0, len(self._steps), 2)
        self._values = [_merged(self._values[i], self._values[i + 1]) for i in pairs]
        self._totals = [_merged_totals(self._totals[i], self._totals[i + 1]) for i in pairs]
        self._histograms = [
            self._histograms[i + 1] if self._histograms[i + 1] is not None else self._histograms[i] for i in pairs
        ]
        self._steps = [self._steps[i + 1] for i in pairs]
        self._stride *= 2

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, so that the report of a resumed run shows the whole run: text and bytes.

        About 3 kB a layer; of the histograms the last of every few points stay.
        """
        count = len(self._layers)
        named = {name for point in self._values for name in point}
        arrays = {
            f"values/{name}": np.stack([_wide(point.get(name, _NONE), count) for point in self._values])
            for name in sorted(named)
        }
        arrays["steps"] = np.array(self._steps, dtype=np.int64)
        arrays["totals"] = np.stack(self._totals) if self._totals else np.zeros((0, len(COLUMNS)), dtype=np.float32)
        at = [place for place, table in enumerate(self._histograms) if table is not None]
        at = at[:: -max(1, math.ceil(len(at) / _TABLES))][::-1]
        tables = [
            np.pad(table, ((0, count - len(table)), (0, 0))) for i in at if (table := self._histograms[i]) is not None
        ]
        arrays["tables"] = np.stack(tables) if tables else np.zeros((0, count, BINS), dtype=np.uint8)
        arrays["tables_at"] = np.array(at, dtype=np.int64)
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        about = {
            "columns": list(COLUMNS),
            "layers": [[layer.name, layer.kind, layer.numel] for layer in self._layers.values()],
            "stride": self._stride,
            "filled": self._filled,
            "first": self._first,
            "spans": self._spans,
            "history": self._history,
        }
        return {"about": json.dumps(about), "arrays": zlib.compress(file.getvalue(), 1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: It is another version's, or cannot be read.
        """
        fresh = Recording(self._limit)
        try:
            about = json.loads(state["about"])
            if about["columns"] != list(COLUMNS):
                raise ValueError("it has other columns")
            with np.load(io.BytesIO(zlib.decompress(state["arrays"])), allow_pickle=False) as arrays:
                fresh._take_up(about, arrays)
        except (LookupError, TypeError, ValueError, AttributeError, OSError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"state must be what Recording.state_dict() returned ({reason_of(error)})") from error
        vars(self).update(vars(fresh))

    def _take_up(self, about: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        layers = [Layer(str(name), str(kind), int(numel)) for name, kind, numel in about["layers"]]
        self._layers = {layer.name: layer for layer in layers}
        self._steps = [int(step) for step in arrays["steps"]]
        points = len(self._steps)
        shapes = {"totals": (points, len(COLUMNS)), "tables": (len(arrays["tables_at"]), len(layers), BINS)}
        self._values = [{} for _ in range(points)]
        for name in QUANTITIES:
            if f"values/{name}" in arrays:
                shapes[f"values/{name}"] = (points, len(layers))
                for point, row in zip(self._values, arrays[f"values/{name}"].astype(np.float16), strict=True):
                    if (row != np.float16(MISSING)).any():
                        point[name] = row
        if wrong := [name for name, shape in shapes.items() if arrays[name].shape != shape]:
            raise ValueError(f"{wrong[0]} has another shape")
        self._totals = list(arrays["totals"].astype(np.float32))
        self._histograms = [None] * points
        for at, table in zip(arrays["tables_at"], arrays["tables"].astype(np.uint8), strict=True):
            self._histograms[int(at)] = table
        self._stride, self._filled, self._first = int(about["stride"]), int(about["filled"]), int(about["first"])
        self._spans = {str(name): [(int(a), int(b)) for a, b in spans] for name, spans in about["spans"].items()}
        self._history = [(int(step), [dict(finding) for finding in known]) for step, known in about["history"]]

    # --- what is shown

    def view(self, name: str) -> RunView:
        """The run so far.

        Args:
            name: What it is called.
        """
        layers = list(self._layers.values())
        steps = np.array(self._steps, dtype=np.int64)
        last = self._steps[-1] if self._steps else 0
        count = len(layers)
        empty = np.zeros((0, len(COLUMNS)), dtype=np.float32)
        values = list(self._values)
        shares = [(step, table) for step, table in zip(self._steps, self._histograms, strict=True) if table is not None]

        def load(metric: str) -> Matrix | None:
            at = [index for index, point in enumerate(values) if metric in point]
            if not at:
                return None
            return Matrix(QUANTITIES[metric], steps[at], np.stack([_wide(values[i][metric], count) for i in at]))

        def histograms() -> Histograms | None:
            if not shares:
                return None
            tables = [np.pad(table, ((0, count - len(table)), (0, 0))) for _, table in shares]
            return Histograms(np.array([step for step, _ in shares], dtype=np.int64), np.stack(tables))

        return RunView(
            name=name,
            schema=schema_of(layers),
            layers=layers,
            quantities=[q for q in QUANTITIES.values() if any(q.name in point for point in values)],
            load=load,
            totals=Totals(steps, np.stack(self._totals) if self._totals else empty),
            findings=with_spans(self._history, last),
            spans=dict(self._spans),
            histograms=histograms,
            first_step=max(self._first, 0),
            last_step=last,
            stamp=time.time(),
            schemas=[(schema_of(layers), max(self._first, 0), last, count)] if layers else [],
        )


def _gist(findings: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(f["id"], f["severity"], f["active"]) for f in findings]


def _wide(values: Half, count: int) -> Half:
    """A point's values, "not measured" for layers that came up later."""
    return np.pad(values, (0, count - len(values)), constant_values=MISSING)


def _merged(old: dict[str, Half], new: dict[str, Half]) -> dict[str, Half]:
    """Two points as one: the larger value; of a diverging quantity the one that is farther off, where that is far."""
    result = {**old, **new}
    for name in old.keys() & new.keys():
        one, two = _wide(old[name], max(len(old[name]), len(new[name]))), new[name]
        two = _wide(two, len(one))
        if QUANTITIES[name].palette == "diverging":
            result[name] = _farther(one, two)
        else:
            result[name] = either(one, two, np.maximum(one, two))  # NaN goes through
    return result


def _farther(one: Half, two: Half) -> Half:
    wide_one, wide_two = one.astype(np.float32), two.astype(np.float32)
    with np.errstate(invalid="ignore"):
        extreme = np.where(np.abs(wide_one) > np.abs(wide_two), wide_one, wide_two)
        both = np.where(np.abs(extreme) > _FAR, extreme, (wide_one + wide_two) / 2)
    both = np.where(np.isnan(wide_one) | np.isnan(wide_two), np.nan, both)
    return either(one, two, both.astype(np.float16))


def _merged_totals(old: Single, new: Single) -> Single:
    """The later of two points, with the extremes and counts of both."""
    result = np.where(new == np.float32(MISSING_TOTAL), old, new)
    both = (old != np.float32(MISSING_TOTAL)) & (new != np.float32(MISSING_TOTAL))
    for place, name in enumerate(COLUMNS):
        if not both[place]:
            continue
        if name in (*PEAKS, "armed"):
            result[place] = np.maximum(old[place], new[place])
        elif name == "clip_coefficient":
            result[place] = np.minimum(old[place], new[place])
        elif name in ("non_finite_steps", "skipped_steps"):
            result[place] = old[place] + new[place]
    return result
