"""The report of a run: a terminal table, Markdown, JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from lightning_gradhealth.history import sparkline
from lightning_gradhealth.messages import as_markdown
from lightning_gradhealth.records import Finding, HealthReport, LayerStats, Severity
from lightning_gradhealth.reports.layers import LayerRow, folded, layer_table, summary, worst_first
from lightning_gradhealth.reports.markdown import findings_markdown, table_markdown
from lightning_gradhealth.reports.rendering import colour_of, figure, line, plain, render_findings, save, titled
from lightning_gradhealth.reports.tables import Column


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
# the column that shows a condition
_SHOWS = {
    "vanishing_gradients": "gradient RMS",
    "exploding_gradients": "gradient RMS",
    "vanishing_activations": "output RMS",
    "exploding_activations": "output RMS",
    "dead_units": "dead",
    "saturated_units": "saturated",
    "oversized_updates": "update/weight",
    "stalled_layers": "update/weight",
}


def _columns(report: HealthReport) -> list[tuple[str, Callable[[LayerStats], float | None]]]:
    return [*_COLUMNS, *(column for column in _SIGNALS if any(column[1](la) is not None for la in report.layers))]


def _layer_rows(report: HealthReport) -> list[LayerRow]:
    return [LayerRow(layer, *layer_state(layer, report.findings)) for layer in report.layers]


def _table(report: HealthReport) -> list[RenderableType]:
    """The layers, those that are in order in one line where they are many."""
    shown, quiet = folded(_layer_rows(report))
    told = [_SHOWS[finding.condition] for finding in report.findings if finding.condition in _SHOWS]
    ranking = dict.fromkeys(["grad norm", *told, *(title for title, _ in _columns(report))])
    rank = {title: 1 + place for place, title in enumerate(ranking)}
    columns = [
        Column(title, [figure(read(row.layer)) for row in shown], rank[title]) for title, read in _columns(report)
    ]
    return layer_table(shown, columns, quiet, _columns(report)[:4])


def headline(report: HealthReport) -> str:
    """The verdict, and at how many steps something was done.

    Example:
        >>> headline(HealthReport(steps=9, clipped_steps=3))
        'healthy after 9 optimizer steps, 3 clipped (33 %)'
    """
    text = f"{report.verdict} after {report.steps} optimizer steps"
    if report.non_finite_steps:
        text += f", {report.non_finite_steps} of them with NaN or Inf"
        text += f" ({report.skipped_steps} skipped)" if report.skipped_steps else ""
    if report.clipped_steps:
        text += f", {report.clipped_steps} clipped ({100 * report.clipped_steps / report.steps:.2g} %)"
    return text


def render_health(report: HealthReport) -> RenderableType:
    """A table of layers, the findings with evidence and remedy, and what could not be measured.

    It takes the width it is given: at 80 columns the numbers that matter most are shown, from about 130 on all.

    Example:
        >>> print(plain(render_health(HealthReport()), width=60).splitlines()[1])
        nothing was watched after 0 optimizer steps
    """
    colour = colour_of(report.findings, report.healthy)
    parts: list[RenderableType] = [line(headline(report), style=f"bold {colour}"), *_table(report)]
    if report.trend:
        parts.append(Text(f"total norm, log scale: {sparkline([total for _, total in report.trend])}", style="dim"))
    parts += render_findings(report.findings)
    if report.aside:
        parts.append(line(f"GradHealth stepped aside: {report.aside}", style="yellow"))
    parts += [line(f"not watched: {what}", style="yellow") for what in report.unwatched]
    parts += [line(f"note: {note}", style="dim") for note in report.notes]
    return titled(parts, colour)


def markdown(report: HealthReport) -> str:
    """The report as Markdown that fits a comment on a pull request: the table of layers opens on a click.

    Example:
        >>> markdown(HealthReport()).splitlines()[0]
        '# Health: nothing was watched after 0 optimizer steps'
    """
    lines = [f"# Health: {as_markdown(headline(report))}", "", *findings_markdown(report.findings)]
    if report.layers:
        rows = worst_first(_layer_rows(report))
        titles = ("layer", "state", *(title for title, _ in _columns(report)))
        cells = [
            (row.layer.name, row.state, *(figure(read(row.layer)) for _, read in _columns(report))) for row in rows
        ]
        lines += table_markdown(summary(rows), titles, cells)
    lines += [f"GradHealth stepped aside: {as_markdown(report.aside)}", ""] if report.aside else []
    lines += [f"- Not watched: {as_markdown(what)}" for what in report.unwatched]
    lines += [f"- Note: {as_markdown(note)}" for note in report.notes]
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
