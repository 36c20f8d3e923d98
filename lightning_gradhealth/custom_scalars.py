"""TensorBoard's Custom Scalars panel, of which a run has one layout: the user's own charts stay in it, beside ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TAG = "custom_scalars__config__"
LARGEST = 64 * 2**20  # bytes of event files that are looked through for a layout; a run that is new has hardly any

Charts = Mapping[str, Mapping[str, Sequence[Any]]]


def show(writer: Any, charts: Charts) -> None:
    """Add charts to the panel of a writer's run, and keep those that the user has given it, or gives it later.

    Args:
        writer: A torch.utils.tensorboard.SummaryWriter.
        charts: Category -> title -> ["Multiline" or "Margin", tags], as `SummaryWriter.add_custom_scalars` takes them.
    """
    if not isinstance(getattr(writer, "log_dir", None), str):  # a stand-in, as other ranks have
        writer.add_custom_scalars(charts)
        return
    panel = vars(writer).get("gradhealth_panel")
    if not isinstance(panel, _Panel):
        panel = _Panel(writer)
        writer.gradhealth_panel = panel
    panel.add(charts)


class _Panel:
    """What the panel of one writer shows: the last layout of a run counts, so that each is written whole."""

    def __init__(self, writer: Any) -> None:
        self._write = writer.add_custom_scalars  # SummaryWriter's own
        self._ours: dict[str, Mapping[str, Sequence[Any]]] = {}
        writer.flush()
        self._theirs: Charts = _written(Path(writer.log_dir))
        writer.add_custom_scalars = self._add_theirs
        writer.add_custom_scalars_multilinechart = self._add_lines
        writer.add_custom_scalars_marginchart = self._add_margin

    def add(self, charts: Charts) -> None:
        self._ours.update(charts)
        self._write({**{name: part for name, part in self._theirs.items() if name not in self._ours}, **self._ours})

    # what the user calls on the writer from now on

    def _add_theirs(self, layout: Charts) -> None:
        self._theirs = layout
        self.add({})

    def _add_lines(self, tags: Sequence[str], category: str = "default", title: str = "untitled") -> None:
        self._add_theirs({category: {title: ["Multiline", tags]}})

    def _add_margin(self, tags: Sequence[str], category: str = "default", title: str = "untitled") -> None:
        self._add_theirs({category: {title: ["Margin", tags]}})


def _written(folder: Path) -> Charts:
    """The layout that the event files of a run hold already."""
    found: Charts = {}
    for path in sorted(folder.glob("*tfevents*")):
        if path.stat().st_size <= LARGEST and TAG.encode() in path.read_bytes():
            for layout in _layouts(path):
                found = layout
    return found


def _layouts(path: Path) -> Iterator[Charts]:
    """Every layout in an event file, in order."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    for raw in RawEventFileLoader(str(path)).Load():
        for value in Event.FromString(raw).summary.value:
            if value.tag == TAG:
                layout = Layout.FromString(value.tensor.string_val[0])
                yield {part.title: {c.title: _chart(c) for c in part.chart} for part in layout.category}


def _chart(chart: Any) -> list[Any]:
    """A chart as `add_custom_scalars` takes it."""
    if chart.WhichOneof("content") == "margin":
        series = chart.margin.series[0]
        return ["Margin", [series.value, series.lower, series.upper]]
    return ["Multiline", list(chart.multiline.tag)]
