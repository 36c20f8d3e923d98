"""The report on a network before its first step: a terminal table, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gradhealth.messages import as_markdown, printable
from lightning_gradhealth.records import FlowReport, LayerStats, Severity
from lightning_gradhealth.reports.rendering import COLOURS, figure, line, plain, render_finding, save


def _share(layer: LayerStats) -> str:
    """The share of units that are dead or saturated."""
    share = layer.saturated_fraction if layer.dead_fraction is None else layer.dead_fraction
    return "–" if share is None else f"{100 * share:.3g} %"


_FLOW_COLUMNS: tuple[tuple[str, Callable[[LayerStats], str]], ...] = (
    ("forward RMS", lambda layer: figure(layer.forward_rms)),
    ("gain", lambda layer: figure(layer.forward_gain)),
    ("backward RMS", lambda layer: figure(layer.backward_rms)),
    ("gain", lambda layer: figure(layer.backward_gain)),
    ("activation", lambda layer: layer.activation or "–"),
    ("dead or saturated", _share),
)


def _flow_rows(report: FlowReport) -> list[tuple[str, ...]]:
    return [(printable(layer.name), *(read(layer) for _, read in _FLOW_COLUMNS)) for layer in report.layers]


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
        >>> plain(render_flow(FlowReport())).splitlines()[1].strip("│ ")
        'nothing was measured before the first step; gain per layer – forward, – back over 0 layers'
    """
    worst = max((f.severity for f in report.findings), key=lambda s: s.rank, default=Severity.INFO)
    colour = "green" if report.healthy else COLOURS[worst]
    parts: list[RenderableType] = [Text(_flow_headline(report), style=f"bold {colour}")]
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for title, _ in _FLOW_COLUMNS:
            table.add_column(title, justify="left" if title == "activation" else "right", no_wrap=True)
        hit = {name: finding.severity for finding in reversed(report.findings) for name in finding.layers}
        for layer, row in zip(report.layers, _flow_rows(report), strict=True):
            style = "dim" if layer.frozen else (COLOURS[hit[layer.name]] if layer.name in hit else "")
            table.add_row(*(Text(cell, style=style) for cell in row))
        parts.append(table)
    parts += [line(each) for each in _through_time(report)]
    parts += [render_finding(finding, with_step=False) for finding in report.findings]
    parts += [line(f"remedy: {remedy}") for remedy in _other_remedies(report)]
    parts += [line(f"note: {note}", style="dim") for note in report.notes]
    return Panel(Group(*parts), title="GradHealth", border_style=colour, title_align="left")


def flow_markdown(report: FlowReport) -> str:
    """The report as Markdown.

    Example:
        >>> flow_markdown(FlowReport(notes=("no loss",))).splitlines()[-1]
        'Note: no loss'
    """
    lines = [f"# Preflight: {as_markdown(_flow_headline(report))}", ""]
    lines += [
        f"- **{f.severity}: {as_markdown(f.condition)}** in"
        f" {as_markdown(f'{f.where}: {f.summary}. Remedy: {f.remedy}')}"
        for f in report.findings
    ]
    lines += [f"- Remedy: {as_markdown(remedy)}" for remedy in _other_remedies(report)]
    if report.findings or report.remedies:
        lines.append("")
    if report.layers:
        titles = ("layer", *(title for title, _ in _FLOW_COLUMNS))
        lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        lines += [f"| {' | '.join(map(as_markdown, row))} |" for row in _flow_rows(report)]
        lines.append("")
    lines += map(as_markdown, _through_time(report))
    return "\n".join([*lines, *(f"Note: {as_markdown(note)}" for note in report.notes)])


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
