"""TensorBoard's event file as the Grad Health tab reads it: one tensor event a logged step, for all layers.

Tags, under the names of two plugins; `gradhealth` is down-sampled by TensorBoard, `gradhealth_events` is kept whole:

    gradhealth         {prefix}/{schema}/layers      names, kinds and sizes, in the metadata of the first event
    gradhealth         {prefix}/{schema}/{quantity}  half precision, (layers,)
    gradhealth         {prefix}/{schema}/total       single precision, (columns,), their names in the metadata
    gradhealth         {prefix}/{schema}/histogram   bytes: first bin, number of bins, then shares of 255 (layers, bins)
    gradhealth_events  {prefix}/{schema}/peak        the largest gradient norms of several steps, where there are many
    gradhealth_events  {prefix}/events/findings      JSON: all findings, whenever they change
    gradhealth_events  {prefix}/events/spans         JSON: what happened at which steps
    gradhealth_events  {prefix}/events/report        JSON: the run's report, written when it ends
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.records import Finding, HealthReport, StepRecord
from lightning_gradhealth.view.quantities import (
    COLUMNS,
    EVENTS_PLUGIN,
    FORMAT,
    GRAD_NORM,
    MISSING,
    MISSING_TOTAL,
    PEAKS,
    PLUGIN,
    QUANTITIES,
    Half,
    Single,
    either,
)
from lightning_gradhealth.view.rows import Layer, Row, schema_of, told

KEPT = 1_024  # events of a tag that TensorBoard keeps for sure (of 2,000): from there on it draws lots, and peaks begin
SPACING = 1.03  # a histogram whenever the run is 3 % longer: some hundreds, however long it gets

_TYPES = {"<f2": "DT_HALF", "<f4": "DT_FLOAT", "|u1": "DT_UINT8"}


def why_not(writer: Any) -> str:
    """Why the tab's events cannot be written through a writer; empty where they can.

    Example:
        >>> why_not(object())
        'object is no SummaryWriter of torch.utils.tensorboard'
    """
    kind = type(writer)
    if any(base.__module__.partition(".")[0] == "tensorboardX" for base in kind.__mro__):
        return (
            "tensorboardX's SummaryWriter has no tensor events; for the Grad Health tab use"
            " torch.utils.tensorboard.SummaryWriter (pip install tensorboard)"
        )
    if not callable(getattr(writer, "_get_file_writer", None)):
        return f"{kind.__name__} is no SummaryWriter of torch.utils.tensorboard"
    return ""


class EventsWriter:
    """Writes records to an event file; it keeps what it has told already.

    Args:
        prefix: What all tags begin with.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     EventsWriter().write(writer, StepRecord(step=3, total_norm=1.0), [], ())
    """

    def __init__(self, prefix: str = PLUGIN) -> None:
        self._prefix = prefix
        self._layers: tuple[Layer, ...] | None = None
        self._schema = ""
        self._begun: set[str] = set()
        self._known: list[tuple[Any, ...]] = []
        self._histogram_at = -1.0
        self._count = 0
        self._peak: tuple[Half, Single] | None = None

    def write(self, writer: Any, record: StepRecord, findings: Sequence[Finding], active: Collection[str]) -> None:
        """Write one record as one event.

        Args:
            writer: A torch.utils.tensorboard.SummaryWriter.
            record: What was measured.
            findings: All findings so far.
            active: The conditions that hold now.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        row = Row.of(record)
        if self._layers is None or _names(self._layers) != _names(row.layers):
            self._layers, self._schema, self._peak = row.layers, schema_of(row.layers), None
        values = [*self._rows(row), *self._peaks(row), *self._told(row, findings, active)]
        writer._get_file_writer().add_summary(Summary(value=values), global_step=row.step)

    def end(self, writer: Any, report: HealthReport, active: Collection[str]) -> None:
        """Write the report of a run that ends: whoever has the event file can have it again.

        Args:
            writer: A torch.utils.tensorboard.SummaryWriter.
            report: The run's own report.
            active: The conditions that hold at its end.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = report.to_dict()
        measured = [{name: value for name, value in layer.items() if value is not None} for layer in data["layers"]]
        values = [
            *self._changed(report.findings, active),
            self._text("report", {"format": FORMAT, "report": {**data, "layers": measured}}),
        ]
        writer._get_file_writer().add_summary(Summary(value=values), global_step=report.step)

    def _rows(self, row: Row) -> Iterator[Any]:
        if row.layers:
            listed = [[layer.name, layer.kind, layer.numel] for layer in row.layers]
            if f"{self._prefix}/{self._schema}/layers" not in self._begun:
                yield self._value("layers", np.zeros(1, dtype=np.uint8), {"format": FORMAT, "layers": listed})
        for name, values in row.values.items():
            yield self._value(name, values, _about(name))
        yield self._value("total", row.totals, {"format": FORMAT, "columns": list(COLUMNS)})
        if row.histogram is not None and row.step >= self._histogram_at:
            self._histogram_at = row.step * SPACING
            yield self._value("histogram", _trimmed(row.histogram), {"format": FORMAT})

    def _peaks(self, row: Row) -> Iterator[Any]:
        """Where TensorBoard draws lots, the largest of every few steps go where it keeps all."""
        self._count += 1
        norms = row.values.get(GRAD_NORM.name, np.full(len(row.layers), MISSING, dtype=np.float16))
        self._peak = (norms, row.totals) if self._peak is None else _larger(self._peak, (norms, row.totals))
        stride = 1 << (max(self._count * 2 // KEPT, 1).bit_length() - 1)
        if self._count % stride == 0:
            peak, self._peak = self._peak, None
            if stride > 1:
                columns = [float(peak[1][list(COLUMNS).index(name)]) for name in PEAKS]
                both = np.concatenate([np.array(columns, dtype=np.float32), peak[0].astype(np.float32)])
                yield self._value("peak", both, {"format": FORMAT, "columns": list(PEAKS)}, EVENTS_PLUGIN)

    def _told(self, row: Row, findings: Sequence[Finding], active: Collection[str]) -> Iterator[Any]:
        gist = [(f.condition, f.severity, f.layers, f.condition in active, f.healed) for f in findings]
        if gist != self._known or "findings" not in self._begun:
            self._known = gist
            yield from self._changed(findings, active)
        if row.spans:
            yield self._text("spans", {name: [list(span) for span in spans] for name, spans in row.spans.items()})

    def _changed(self, findings: Sequence[Finding], active: Collection[str]) -> Iterator[Any]:
        listed = [told(finding, finding.condition in active) for finding in findings]
        yield self._text("findings", {"format": FORMAT, "findings": listed})

    # --- protos

    def _value(self, name: str, array: NDArray[Any], about: dict[str, Any], plugin: str = PLUGIN) -> Any:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

        array = np.ascontiguousarray(array)
        dim = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in array.shape]
        tensor = tensor_pb2.TensorProto(
            dtype=getattr(types_pb2, _TYPES[array.dtype.str]),
            tensor_content=array.tobytes(),
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=dim),
        )
        tag = f"{self._prefix}/{self._schema}/{name}"
        value = summary_pb2.Summary.Value(tag=tag, tensor=tensor)
        return self._described(value, tag, about, plugin)

    def _text(self, name: str, data: dict[str, Any]) -> Any:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

        text = json.dumps(data, allow_nan=False, default=str).encode()
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text])
        value = summary_pb2.Summary.Value(tag=f"{self._prefix}/events/{name}", tensor=tensor)
        return self._described(value, name, {"format": FORMAT}, EVENTS_PLUGIN)

    def _described(self, value: Any, key: str, about: dict[str, Any], plugin: str) -> Any:
        """A value, with what its tag means if it is the first of it: TensorBoard keeps the first metadata of a tag."""
        from tensorboard.compat.proto import summary_pb2

        if key not in self._begun:
            self._begun.add(key)
            value.metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
            value.metadata.plugin_data.plugin_name = plugin
            value.metadata.plugin_data.content = json.dumps(about).encode()
        return value


def _names(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    return [(layer.name, layer.kind) for layer in layers]


def _about(name: str) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(QUANTITIES[name])}


def _larger(one: tuple[Half, Single], two: tuple[Half, Single]) -> tuple[Half, Single]:
    """NaN goes through; "not measured" gives way."""
    norms = either(one[0], two[0], np.maximum(one[0], two[0]))
    return norms, either(one[1], two[1], np.maximum(one[1], two[1]), MISSING_TOTAL)


def _trimmed(histogram: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """First bin and number of bins that any layer uses, then their shares, as one vector."""
    used = np.flatnonzero(histogram.any(0))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    body = histogram[:, first : last + 1]
    return np.concatenate([np.array([first, last - first + 1], dtype=np.uint8), body.reshape(-1)])
