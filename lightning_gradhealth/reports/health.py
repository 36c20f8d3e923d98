"""The report of a run: a terminal table, Markdown, JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gradhealth.history import sparkline
from lightning_gradhealth.messages import as_markdown, printable
from lightning_gradhealth.records import Finding, HealthReport, LayerStats, Severity
from lightning_gradhealth.reports.rendering import COLOURS, evidence, figure, line, plain, render_finding, save


def layer_state(layer: LayerStats, findings: tuple[Finding, ...]) -> tuple[str, Severity]:
    """What to say of a layer in one word or two, and how grave it is.

    Example:
        >>> layer_state(LayerStats("net.0", frozen=True), ())
        ('frozen', <Severity.INFO: 'info'>)
    """
    if layer.frozen:
        return "frozen", Severity.INFO
    hit = [finding for finding in findings if layer.name in finding.layers]
    if concerned := [finding for finding in hit if layer.name not in finding.healed]:
        worst = max(concerned, key=lambda finding: finding.severity.rank)
        return str(worst.condition).replace("_", " "), worst.severity
    if layer.grad_norm is not None and not math.isfinite(layer.grad_norm):
        return "not finite", Severity.CRITICAL
    if layer.optimizer is None:
        return "not in an optimizer", Severity.INFO
    if layer.grad_norm is None:
        return "no gradient", Severity.INFO
    return "recovered" if hit else "ok", Severity.INFO


_COLUMNS: tuple[tuple[str, Callable[[LayerStats], float | None]], ...] = (
    ("grad norm", lambda layer: layer.grad_norm),
    ("norm ratio", lambda layer: layer.norm_ratio),
    ("grad/weight", lambda layer: layer.grad_to_weight),
    ("update/weight", lambda layer: layer.update_to_weight),
)
# shown where any layer has them
_SIGNALS: tuple[tuple[str, Callable[[LayerStats], float | None]], ...] = (
    ("output RMS", lambda layer: layer.forward_rms),
    ("gradient RMS", lambda layer: layer.backward_rms),
    ("dead", lambda layer: layer.dead_fraction),
    ("saturated", lambda layer: layer.saturated_fraction),
)


def _columns(report: HealthReport) -> list[tuple[str, Callable[[LayerStats], float | None]]]:
    return [*_COLUMNS, *(column for column in _SIGNALS if any(column[1](la) is not None for la in report.layers))]


def _figures(report: HealthReport, layer: LayerStats) -> list[str]:
    return [figure(read(layer)) for _, read in _columns(report)]


def _rows(report: HealthReport) -> list[tuple[str, ...]]:
    return [
        (printable(layer.name), *_figures(report, layer), printable(layer_state(layer, report.findings)[0]))
        for layer in report.layers
    ]


def _headline(report: HealthReport) -> str:
    text = f"{report.verdict} after {report.steps} optimizer steps"
    if report.non_finite_steps:
        text += f", {report.non_finite_steps} of them with NaN or Inf"
        text += f" ({report.skipped_steps} skipped)" if report.skipped_steps else ""
    if report.clipped_steps:
        text += f", {report.clipped_steps} clipped ({100 * report.clipped_steps / report.steps:.2g} %)"
    return text


def render_health(report: HealthReport) -> RenderableType:
    """A table of layers, the findings with evidence and remedy, and what could not be measured.

    Example:
        >>> plain(render_health(HealthReport()), width=60).splitlines()[1].strip("│ ")
        'nothing was watched after 0 optimizer steps'
    """
    worst = max((f.severity for f in report.findings), key=lambda s: s.rank, default=Severity.INFO)
    colour = "green" if report.healthy else COLOURS[worst]
    parts: list[RenderableType] = [line(_headline(report), style=f"bold {colour}")]
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for title, _ in _columns(report):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("state")
        for layer, row in zip(report.layers, _rows(report), strict=True):
            severity = layer_state(layer, report.findings)[1]
            style = "dim" if layer.frozen else ("" if row[-1] in ("ok", "recovered") else COLOURS[severity])
            table.add_row(*(Text(cell, style=style) for cell in row))
        parts.append(table)
    if report.trend:
        parts.append(Text(f"total norm, log scale: {sparkline([total for _, total in report.trend])}", style="dim"))
    for finding in report.findings:
        parts.append(render_finding(finding))
    if report.aside:
        parts.append(line(f"GradHealth stepped aside: {report.aside}", style="yellow"))
    parts += [line(f"not watched: {what}", style="yellow") for what in report.unwatched]
    parts += [line(f"note: {note}", style="dim") for note in report.notes]
    return Panel(Group(*parts), title="GradHealth", border_style=colour, title_align="left")


def markdown(report: HealthReport) -> str:
    """The report as Markdown.

    Example:
        >>> markdown(HealthReport()).splitlines()[0]
        '# Health: nothing was watched after 0 optimizer steps'
    """
    lines = [f"# Health: {as_markdown(_headline(report))}", ""]
    for finding in report.findings:
        lines += [f"- **{finding.severity}: {as_markdown(finding.condition)}** — {as_markdown(finding)}"]
        if numbers := evidence(finding):
            lines += [f"  Evidence: {as_markdown(numbers)}."]
        if finding.code:
            code = [printable(line) for line in finding.code.splitlines()]
            fence = "`" * max(3, 1 + max((len(run) for line in code for run in re.findall("`+", line)), default=0))
            lines += ["", f"  {fence}python", *(f"  {line}" for line in code), f"  {fence}"]
    if report.findings:
        lines.append("")
    if report.layers:
        titles = ("layer", *(title for title, _ in _columns(report)), "state")
        lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        lines += [f"| {' | '.join(map(as_markdown, row))} |" for row in _rows(report)]
        lines.append("")
    lines += [f"GradHealth stepped aside: {as_markdown(report.aside)}"] if report.aside else []
    lines += [f"Not watched: {as_markdown(what)}" for what in report.unwatched]
    lines += [f"Note: {as_markdown(note)}" for note in report.notes]
    return "\n".join(lines)


def save_health(report: HealthReport, path: Path) -> Path:
    """Write a report as a page, JSON, Markdown or text, by its suffix.

    Example:
        >>> save_health(HealthReport(), Path("health.doc"))
        Traceback (most recent call last):
        ...
        ValueError: path must end in .html, .json, .md or .txt, got 'health.doc'; the suffix decides the format
    """
    from lightning_gradhealth.pages import health_page

    return save(
        path,
        {
            ".html": lambda: health_page(report),
            ".json": lambda: report.to_json(indent=1),
            ".md": lambda: markdown(report),
            ".txt": lambda: plain(render_health(report), width=160),
        },
    )
