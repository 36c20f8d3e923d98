"""The report on a network before its first step: a terminal table, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import RenderableType

from lightning_gradhealth.messages import as_markdown
from lightning_gradhealth.records import FlowReport, LayerStats, Severity
from lightning_gradhealth.reports.layers import LayerRow, folded, layer_table, summary, worst_first
from lightning_gradhealth.reports.markdown import findings_markdown, table_markdown
from lightning_gradhealth.reports.rendering import colour_of, figure, line, plain, render_findings, save, titled
from lightning_gradhealth.reports.tables import Column


def _share(layer: LayerStats) -> str:
    """The share of units that are dead or saturated."""
    share = layer.saturated_fraction if layer.dead_fraction is None else layer.dead_fraction
    return "–" if share is None else f"{100 * share:.3g} %"


_NUMBERS: tuple[tuple[str, Callable[[LayerStats], float | None]], ...] = (
    ("forward RMS", lambda layer: layer.forward_rms),
    ("forward gain", lambda layer: layer.forward_gain),
    ("backward RMS", lambda layer: layer.backward_rms),
    ("backward gain", lambda layer: layer.backward_gain),
)
_IMPORTANCE = ("backward RMS", "forward RMS", "backward gain", "forward gain")


def _columns(layers: Sequence[LayerStats]) -> list[Column]:
    numbers = [
        Column(title, [figure(read(layer)) for layer in layers], 1 + _IMPORTANCE.index(title))
        for title, read in _NUMBERS
    ]
    share = Column("dead or saturated", list(map(_share, layers)), 5)
    return [*numbers, share, Column("activation", [layer.activation or "–" for layer in layers], 6, words=True)]


def _layer_rows(report: FlowReport) -> list[LayerRow]:
    # the order of findings is: the gravest first, and causes before their symptoms
    hit = {name: finding for finding in reversed(report.findings) for name in finding.layers}
    rows = []
    for layer in report.layers:
        finding = None if layer.frozen else hit.get(layer.name)
        state = "frozen" if layer.frozen else "ok" if finding is None else str(finding.condition).replace("_", " ")
        rows.append(LayerRow(layer, state, Severity.INFO if finding is None else finding.severity))
    return rows


def _flow_headline(report: FlowReport) -> str:
    gains = f"gain per layer {figure(report.forward_gain)} forward, {figure(report.backward_gain)} back"
    parts = (f"{report.verdict} before the first step; {gains} over {len(report.chain.points)} layers", report.outlook)
    return "; ".join(filter(None, parts))


def _through_time(report: FlowReport) -> list[str]:
    """One line for each recurrent layer."""
    return [
        f"through time in {name}: gain {figure(flow.gain_per_step)} per step over {len(flow.grad_norms)} steps"
        + (f"; it remembers {flow.memory} steps" if flow.memory is not None else "")
        for name, flow in report.temporal.items()
    ]


def _other_remedies(report: FlowReport) -> Sequence[str]:
    """The remedies that do not stand with a finding."""
    return [remedy for remedy in report.remedies if remedy not in {finding.remedy for finding in report.findings}]


def render_flow(report: FlowReport) -> RenderableType:
    """A table of the signal at every layer, the findings with remedies, and what could not be measured.

    Example:
        >>> print(plain(render_flow(FlowReport())).splitlines()[1])
        nothing was measured before the first step; gain per layer – forward, – back over 0 layers
    """
    colour = colour_of(report.findings, report.healthy)
    shown, quiet = folded(_layer_rows(report))
    parts: list[RenderableType] = [line(_flow_headline(report), style=f"bold {colour}")]
    parts += layer_table(shown, _columns([row.layer for row in shown]), quiet, _NUMBERS)
    parts += [line(each) for each in _through_time(report)]
    parts += render_findings(report.findings, with_step=False)
    parts += [line(f"remedy: {remedy}") for remedy in _other_remedies(report)]
    parts += [line(f"note: {note}", style="dim") for note in report.notes]
    return titled(parts, colour)


def flow_markdown(report: FlowReport) -> str:
    """The report as Markdown that fits a comment on a pull request: the table of layers opens on a click.

    Example:
        >>> flow_markdown(FlowReport(notes=("no loss",))).splitlines()[-1]
        '- Note: no loss'
    """
    lines = [f"# Preflight: {as_markdown(_flow_headline(report))}", ""]
    lines += findings_markdown(report.findings, with_step=False)
    if others := _other_remedies(report):
        lines += [*(f"- Remedy: {as_markdown(remedy)}" for remedy in others), ""]
    if report.layers:
        rows = worst_first(_layer_rows(report))
        columns = _columns([row.layer for row in rows])
        titles = ("layer", "state", *(column.title for column in columns))
        cells = [(row.layer.name, row.state, *(c.cells[i] for c in columns)) for i, row in enumerate(rows)]
        lines += table_markdown(summary(rows), titles, cells)
    lines += [f"- {as_markdown(text)}" for text in _through_time(report)]
    return "\n".join([*lines, *(f"- Note: {as_markdown(note)}" for note in report.notes)])


def save_flow(report: FlowReport, path: Path) -> Path:
    """Write a report as JSON, Markdown or text, by its suffix.

    Example:
        >>> save_flow(FlowReport(), Path("flow.doc"))
        Traceback (most recent call last):
        ...
        ValueError: path must end in .json, .md or .txt, got 'flow.doc'; the suffix decides the format
    """
    return save(
        path,
        {
            ".json": lambda: report.to_json(indent=1),
            ".md": lambda: flow_markdown(report),
            ".txt": lambda: plain(render_flow(report), width=160),
        },
    )
