"""Event files to runs as they are shown, through TensorBoard's data provider; whatever stands in the files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard.data import provider

from lightning_gradhealth.records import HealthReport
from lightning_gradhealth.tensorboard import arrays
from lightning_gradhealth.tensorboard.cache import Cache
from lightning_gradhealth.view.data import (
    Histograms,
    Matrix,
    RunView,
    Totals,
    finding_of,
    layers_of,
    quantity_of,
    rising,
    with_spans,
)
from lightning_gradhealth.view.quantities import (
    COLUMNS,
    EVENTS_PLUGIN,
    GRAD_NORM,
    MISSING_TOTAL,
    PEAKS,
    PLUGIN,
    QUANTITIES,
    Quantity,
)
from lightning_gradhealth.view.rows import Layer, Spans, few, joined

SAMPLES, EVENTS = 2_000, 20_000  # that are read of one tag
MOST_LAYERS = 20_000
MOST_QUANTITIES = 64
_TAG = re.compile(r"(gradhealth(?:-\d{1,4})?)/([0-9a-f]{8})/([A-Za-z0-9_]{1,100})")
_TEXT = re.compile(r"(gradhealth(?:-\d{1,4})?)/events/(findings|spans|report)")
_SPANS = 2_000  # ranges of one kind that are shown
_NOT_QUANTITIES = ("layers", "total", "histogram", "peak")

T = TypeVar("T")


@dataclass(frozen=True)
class _Run:
    """A run of the data provider, and the prefix of one GradHealth in it."""

    run: str
    prefix: str
    tags: Mapping[str, Mapping[str, Any]]  # schema -> name -> time series
    texts: Mapping[str, Any]  # "findings", "spans", "report" -> time series
    peaks: Mapping[str, Any]  # schema -> time series

    @property
    def name(self) -> str:
        return self.run if self.prefix == PLUGIN else f"{self.run} ({self.prefix})"

    @property
    def series(self) -> list[Any]:
        return [*(series for tags in self.tags.values() for series in tags.values()), *self.texts.values()]


class Reader:
    """Reads runs for one TensorBoard.

    Args:
        data: TensorBoard's data provider.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._cache = Cache()

    def runs(self, context: Any, experiment: str) -> list[RunView]:
        """All runs with data of ours."""
        return [self._view(context, experiment, found, None) for found in self._found(context, experiment, None)]

    def run(self, context: Any, experiment: str, name: str, schema: str | None = None) -> RunView:
        """One run.

        Args:
            context: TensorBoard's, of the request.
            experiment: TensorBoard's, of the request.
            name: The run.
            schema: Which of its models; None: the last.

        Raises:
            LookupError: There is no such run, or no such model in it.
        """
        plain = re.sub(r" \(gradhealth-\d{1,4}\)$", "", name)
        for known in dict.fromkeys((name, plain)):
            for found in self._found(context, experiment, known):
                if found.name == name:
                    return self._view(context, experiment, found, schema)
        raise LookupError("no such run")

    # --- what there is

    def _listed(self, context: Any, experiment: str, plugin: str, run: str | None) -> Mapping[str, Mapping[str, Any]]:
        only = None if run is None else provider.RunTagFilter(runs=[run])
        listed: Mapping[str, Mapping[str, Any]] = self._data.list_tensors(
            context, experiment_id=experiment, plugin_name=plugin, run_tag_filter=only
        )
        return listed

    def _found(self, context: Any, experiment: str, run: str | None) -> Iterator[_Run]:
        ours = self._listed(context, experiment, PLUGIN, run)
        kept = self._listed(context, experiment, EVENTS_PLUGIN, run)
        for name in sorted({*ours, *kept}):
            tags: dict[str, dict[str, dict[str, Any]]] = {}
            texts: dict[str, dict[str, Any]] = {}
            peaks: dict[str, dict[str, Any]] = {}
            for tag, series in ours.get(name, {}).items():
                if match := _TAG.fullmatch(tag):
                    prefix, schema, part = match.groups()
                    tags.setdefault(prefix, {}).setdefault(schema, {})[part] = series
            for tag, series in kept.get(name, {}).items():
                if match := _TEXT.fullmatch(tag):
                    texts.setdefault(match[1], {})[match[2]] = series
                elif (match := _TAG.fullmatch(tag)) and match[3] == "peak":
                    peaks.setdefault(match[1], {})[match[2]] = series
            for prefix in sorted({*tags, *texts}):
                yield _Run(name, prefix, tags.get(prefix, {}), texts.get(prefix, {}), peaks.get(prefix, {}))

    # --- one run

    def _view(self, context: Any, experiment: str, found: _Run, schema: str | None) -> RunView:
        def read(tag: str, plugin: str, series: Any, make: Callable[[Sequence[Any]], tuple[T, int]]) -> T:
            key, stamp = (experiment, found.run, tag), (series.max_step, series.max_wall_time)
            return self._cache.get(key, stamp, lambda: make(self._data_of(context, experiment, found.run, tag, plugin)))

        return _Assembly(found, read).view(schema)

    def _data_of(self, context: Any, experiment: str, run: str, tag: str, plugin: str) -> Sequence[Any]:
        """The data of one tag; none where they cannot be read, as where a declared shape is wrong."""
        try:
            read = self._data.read_tensors(
                context,
                experiment_id=experiment,
                plugin_name=plugin,
                downsample=SAMPLES if plugin == PLUGIN else EVENTS,
                run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
            )
            data: Sequence[Any] = read.get(run, {}).get(tag, ())
            return data
        except Exception:  # whatever a tensor of a stranger makes of itself: other tags and runs go on
            return ()


class _Assembly:
    """Puts a view together from the tags of a run."""

    def __init__(self, found: _Run, read: Callable[..., Any]) -> None:
        self._found = found
        self._read = read

    def view(self, schema: str | None) -> RunView:
        """The view of a schema; None: of the last."""
        found = self._found
        models = self._models()
        if schema is not None and schema not in [entry[0] for entry in models]:
            raise LookupError("no such schema in this run")
        chosen = schema or (models[-1][0] if models else "")
        layers = self._layers(chosen)
        tags = found.tags.get(chosen, {})
        totals = self._totals()
        ends = [int(series.max_step) for series in found.series]
        last = int(totals.steps[-1]) if len(totals.steps) else max(ends, default=0)  # of a run begun again: the new one
        starts = [entry[1] for entry in models]
        quantities = self._quantities(tags)
        return RunView(
            name=found.name,
            schema=chosen,
            layers=layers,
            quantities=[quantity for quantity in quantities.values() if layers],
            load=lambda name: self._matrix(chosen, quantities.get(name), len(layers)),
            totals=totals,
            findings=with_spans(self._history(), last),
            spans=self._spans(),
            histograms=lambda: self._histograms(chosen, len(layers)),
            first_step=min(starts, default=int(totals.steps[0]) if len(totals.steps) else 0),
            last_step=last,
            stamp=max((float(series.max_wall_time) for series in found.series), default=0.0),
            schemas=models,
            report=self._report,
        )

    def _series(self, schema: str, part: str) -> Any:
        return self._found.tags.get(schema, {}).get(part)

    def _tag(self, schema: str, part: str) -> str:
        return f"{self._found.prefix}/{schema}/{part}"

    def _models(self) -> list[tuple[str, int, int, int]]:
        """Every model of the run that can be shown, by its last step."""
        models = []
        for schema in self._found.tags:
            layers, totals = self._layers(schema), self._total(schema)
            if layers and len(totals.steps):
                models.append((schema, int(totals.steps[0]), int(totals.steps[-1]), len(layers)))
        return sorted(models, key=lambda entry: (entry[2], entry[1], entry[0]))

    def _layers(self, schema: str) -> list[Layer]:
        series = self._series(schema, "layers")
        data = None if series is None else _json(series.plugin_content)
        return (layers_of(data.get("layers"), MOST_LAYERS) if isinstance(data, dict) else None) or []

    def _quantities(self, tags: Mapping[str, Any]) -> dict[str, Quantity]:
        """The known ones in our order, then others; each under the name of its tag."""
        names = [name for name in QUANTITIES if name in tags]
        names += [name for name in sorted(tags) if name not in QUANTITIES and name not in _NOT_QUANTITIES]
        found = {}
        for name in names[:MOST_QUANTITIES]:
            quantity = quantity_of(_json(tags[name].plugin_content))
            if quantity is not None and quantity.name == name:
                found[name] = quantity
        return found

    # --- arrays

    def _rows(self, schema: str, part: str, length: int | None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Steps and vectors of a tag, those of the right shape, rising."""
        series = self._series(schema, part)
        if series is None:
            return arrays.none(length or 0)

        def make(data: Sequence[Any]) -> tuple[tuple[NDArray[np.int64], NDArray[Any]], int]:
            steps, values = arrays.vectors(data, length)
            return (steps, values), values.nbytes + steps.nbytes

        got: tuple[NDArray[np.int64], NDArray[Any]] = self._read(self._tag(schema, part), PLUGIN, series, make)
        return got

    def _matrix(self, schema: str, quantity: Quantity | None, length: int) -> Matrix | None:
        if quantity is None:
            return None
        series, peak = self._series(schema, quantity.name), self._found.peaks.get(schema)
        if quantity.name != GRAD_NORM.name:
            peak = None

        def make(data: Sequence[Any]) -> tuple[Matrix | None, int]:
            steps, values = arrays.vectors(data, length)
            if peak is not None:
                extra, rows = self._peaks(schema, peak, length)
                steps, values = arrays.with_peaks(steps, values, extra, rows[:, len(PEAKS) :])
            return (Matrix(quantity, steps, values), values.nbytes) if len(steps) else (None, 0)

        found: Matrix | None = self._read(self._tag(schema, quantity.name), PLUGIN, series, make)
        return found

    def _peaks(self, schema: str, series: Any, length: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        def make(data: Sequence[Any]) -> tuple[tuple[NDArray[np.int64], NDArray[Any]], int]:
            steps, values = arrays.vectors(data, length + len(PEAKS))
            return (steps, values), values.nbytes

        got: tuple[NDArray[np.int64], NDArray[Any]] = self._read(self._tag(schema, "peak"), EVENTS_PLUGIN, series, make)
        return got

    def _total(self, schema: str) -> Totals:
        """The columns of one model, under our names."""
        series = self._series(schema, "total")
        about = None if series is None else _json(series.plugin_content)
        names = about.get("columns") if isinstance(about, dict) else None
        if not isinstance(names, list) or not 0 < len(names) <= MOST_QUANTITIES:
            return Totals()
        steps, values = self._rows(schema, "total", len(names))
        table = np.full((len(steps), len(COLUMNS)), MISSING_TOTAL, dtype=np.float32)
        for place, name in enumerate(COLUMNS):
            if name in names:
                table[:, place] = values[:, names.index(name)]
        peak, layers = self._found.peaks.get(schema), len(self._layers(schema))
        if peak is not None and len(steps):
            places = [list(COLUMNS).index(name) for name in PEAKS]
            extra, rows = self._peaks(schema, peak, layers)
            more = np.full((len(extra), len(COLUMNS)), MISSING_TOTAL, dtype=np.float32)
            more[:, places] = rows[:, : len(PEAKS)]
            steps, table = arrays.with_peaks(steps, table, extra, more)
        return Totals(steps, table)

    def _totals(self) -> Totals:
        """The columns of all models of the run, as one."""
        parts = [self._total(schema) for schema, *_ in self._models()]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Totals()
        steps = np.concatenate([part.steps for part in parts])
        table = np.concatenate([part.values for part in parts])
        kept = rising(steps)
        return Totals(steps[kept], table[kept])

    def _histograms(self, schema: str, length: int) -> Histograms | None:
        series = self._series(schema, "histogram")
        if series is None:
            return None

        def make(data: Sequence[Any]) -> tuple[Histograms | None, int]:
            known = [
                (int(datum.step), table) for datum in data if (table := arrays.table(datum.numpy, length)) is not None
            ]
            kept = rising([step for step, _ in known])
            if not len(kept):
                return None, 0
            shares = np.stack([known[index][1] for index in kept])
            return Histograms(np.array([known[index][0] for index in kept], dtype=np.int64), shares), shares.nbytes

        found: Histograms | None = self._read(self._tag(schema, "histogram"), PLUGIN, series, make)
        return found

    # --- texts

    def _texts(self, name: str) -> list[tuple[int, Any]]:
        series = self._found.texts.get(name)
        if series is None:
            return []

        def make(data: Sequence[Any]) -> tuple[list[tuple[int, Any]], int]:
            texts = [(int(datum.step), _json(_only(datum.numpy))) for datum in data]
            known = [(step, text) for step, text in texts if isinstance(text, dict)]
            return [known[index] for index in rising([step for step, _ in known])], 2_000 * len(known)

        got: list[tuple[int, Any]] = self._read(f"{self._found.prefix}/events/{name}", EVENTS_PLUGIN, series, make)
        return got

    def _history(self) -> list[tuple[int, list[dict[str, Any]]]]:
        history = []
        for step, text in self._texts("findings"):
            listed = text.get("findings")
            if isinstance(listed, list):
                history.append((step, [f for f in map(finding_of, listed[:200]) if f is not None]))
        return history

    def _report(self) -> HealthReport | None:
        """What was written when the run ended; None where it goes on, or has gone on since."""
        texts = self._texts("report")
        if not texts:
            return None
        written = self._found.texts["report"].max_wall_time
        if any(series.max_wall_time > written for series in self._found.series):
            return None
        try:
            return HealthReport.from_dict(texts[-1][1].get("report"))
        except (ValueError, TypeError, RecursionError):
            return None

    def _spans(self) -> dict[str, Spans]:
        found: dict[str, Spans] = {}
        for _, text in self._texts("spans"):
            for name in ("armed", "clipped", "skipped", "non_finite"):
                listed = text.get(name)
                found.setdefault(name, []).extend(arrays.ranges(listed[:100]) if isinstance(listed, list) else [])
        return {name: few(joined(spans), _SPANS) for name, spans in found.items() if spans}


def _json(content: Any) -> Any:
    try:
        return json.loads(content)
    except (ValueError, TypeError, RecursionError):
        return None


def _only(array: Any) -> Any:
    return array.reshape(-1)[0] if getattr(array, "size", 0) else None
