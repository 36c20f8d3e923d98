"""TensorBoard's own panels: Custom Scalars, of which a run has one layout that is the user's, too, and Text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradhealth.loggers.scalars import PREFIX
from lightning_gradhealth.messages import as_markdown
from lightning_gradhealth.records import Finding

TAG = "custom_scalars__config__"
LARGEST = 64 * 2**20  # bytes of event files that are looked through for a layout; a run that is new has hardly any

Charts = Mapping[str, Mapping[str, Sequence[Any]]]


def is_stand_in(writer: Any) -> bool:
    """Whether a writer has no folder, as that of other ranks.

    Example:
        >>> is_stand_in(object())
        True
    """
    return not isinstance(getattr(writer, "log_dir", None), (str, os.PathLike))


def show(writer: Any, charts: Charts) -> None:
    """Add charts to the panel of a writer's run, and keep those that the user has given it, or gives it later.

    Args:
        writer: A torch.utils.tensorboard.SummaryWriter.
        charts: Category -> title -> ["Multiline" or "Margin", tags], as `SummaryWriter.add_custom_scalars` takes them.
    """
    if is_stand_in(writer):
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


def layout(layers: bool = True, clipping: bool = True, prefix: str = PREFIX) -> dict[str, dict[str, list[Any]]]:
    """The charts of TensorBoard's Custom Scalars panel, the verdict first.

    Args:
        layers: Whether there are scalars of single layers to show.
        clipping: Whether the session clips.
        prefix: What the names of the scalars begin with.

    Example:
        >>> list(layout()), list(layout(layers=False, clipping=False))
        (['Grad Health', 'Grad Health: clipping', 'Grad Health: layers'], ['Grad Health'])
    """

    def chart(*patterns: str) -> list[Any]:
        # regexes, matched from the start of a tag, where a logger's own prefix may stand
        return ["Multiline", [f"(.*-)?{prefix}/{pattern}$" for pattern in patterns]]

    title = "Grad Health" + prefix.removeprefix(PREFIX).replace("-", " ")
    charts = {
        title: {
            "Active findings": chart("findings"),
            "Gain per layer, backwards and forwards (1: ideal)": chart("gain_per_layer", "forward_gain_per_layer"),
            "log10 of the largest gradient norm": chart("log10_total_norm"),
            "log10 of update / weight (-3: usual)": chart("log10_update_to_weight"),
            "log10 of the norm ratio, min and max layer": chart("log10_norm_ratio_min", "log10_norm_ratio_max"),
            "Steps with NaN or Inf": chart("non_finite_steps"),
        },
    }
    if clipping:
        charts[f"{title}: clipping"] = {
            "log10 of the norm before and after clipping": chart("log10_total_norm", "log10_applied_norm"),
            "Share of clipped steps, gate open": chart("clipped_fraction", "clipping_active"),
            "log10 of the smallest factor": chart("log10_(clip_coefficient|would_clip)"),
        }
    if layers:
        charts[f"{title}: layers"] = {
            "log10 of the gradient norm, a line a layer": chart("layers/log10_grad_norm/.*"),
            "log10 of update / weight, a line a layer": chart("layers/log10_update_to_weight/.*"),
        }
    return charts


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as short paragraphs of Markdown for the Text panel, whose tables break words.

    Example:
        >>> print(findings_text([Finding("loss_spike", "warning", (), 7, 7, "loss 40 after 2", {}, "lower the rate")]))
        **loss_spike** (warning) in the whole network, step 7: loss 40 after 2.
        <BLANKLINE>
        Remedy: lower the rate
    """
    return "\n\n---\n\n".join(map(_paragraphs, findings))


def _paragraphs(finding: Finding) -> str:
    steps = (
        f"since step {finding.first_step}" if finding.last_step > finding.first_step else f"step {finding.first_step}"
    )
    condition, where, summary = (as_markdown(part) for part in (finding.condition, finding.where, finding.summary))
    text = f"**{condition}** ({finding.severity}) in {where}, {steps}: {summary}."
    return f"{text}\n\nRemedy: {as_markdown(finding.remedy)}" if finding.remedy else text
