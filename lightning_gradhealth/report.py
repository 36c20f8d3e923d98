"""Records to something to read: a terminal table, Markdown, JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gradhealth.history import sparkline
from lightning_gradhealth.records import (
    DepthPoint,
    Finding,
    HealthReport,
    InitReport,
    LayerStats,
    Severity,
)

_COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "red"}


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def layer_state(layer: LayerStats, findings: tuple[Finding, ...]) -> tuple[str, Severity]:
    """What to say of a layer in one word or two, and how grave it is.

    Example:
        >>> layer_state(LayerStats("net.0", frozen=True), ())
        ('frozen', <Severity.INFO: 'info'>)
    """
    if layer.frozen:
        return "frozen", Severity.INFO
    concerned = [finding for finding in findings if layer.name in finding.layers]
    if concerned:
        worst = max(concerned, key=lambda finding: finding.severity.rank)
        return str(worst.condition).replace("_", " "), worst.severity
    if layer.grad_norm is not None and not math.isfinite(layer.grad_norm):
        return "not finite", Severity.CRITICAL
    if layer.optimizer is None:
        return "not in an optimizer", Severity.INFO
    if layer.grad_norm is None:
        return "no gradient", Severity.INFO
    return "ok", Severity.INFO


_COLUMNS: tuple[tuple[str, Callable[[LayerStats], float | None]], ...] = (
    ("grad norm", lambda layer: layer.grad_norm),
    ("norm ratio", lambda layer: layer.norm_ratio),
    ("grad/weight", lambda layer: layer.grad_to_weight),
    ("update/weight", lambda layer: layer.update_to_weight),
)


def _rows(report: HealthReport) -> list[tuple[str, ...]]:
    return [
        (layer.name, *(_figure(read(layer)) for _, read in _COLUMNS), layer_state(layer, report.findings)[0])
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
        >>> Console(width=60, file=io.StringIO()).print(render_health(HealthReport()))
    """
    worst = max((f.severity for f in report.findings), key=lambda s: s.rank, default=Severity.INFO)
    colour = "green" if report.healthy else _COLOURS[worst]
    parts: list[RenderableType] = [Text(_headline(report), style=f"bold {colour}")]
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for title, _ in _COLUMNS:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("state")
        for layer, row in zip(report.layers, _rows(report), strict=True):
            severity = layer_state(layer, report.findings)[1]
            style = "dim" if layer.frozen else ("" if row[-1] == "ok" else _COLOURS[severity])
            table.add_row(*(Text(cell, style=style) for cell in row))
        parts.append(table)
    if report.trend:
        parts.append(Text(f"total norm, log scale: {sparkline([total for _, total in report.trend])}", style="dim"))
    for finding in report.findings:
        parts.append(_render_finding(finding))
    if report.aside:
        parts.append(Text(f"GradHealth stepped aside: {report.aside}", style="yellow"))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Panel(Group(*parts), title="GradHealth", border_style=colour, title_align="left")


def _evidence(finding: Finding) -> str:
    shown = {k: v for k, v in finding.evidence.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return ", ".join(f"{key} {_figure(float(value))}" for key, value in shown.items())


def _render_finding(finding: Finding) -> RenderableType:
    colour = _COLOURS[finding.severity]
    since = f"step {finding.first_step}"
    if finding.last_step > finding.first_step:
        since = f"steps {finding.first_step} to {finding.last_step}"
    head = Text(f"{finding.severity}: {finding.condition}", style=f"bold {colour}")
    head.append(f" in {finding.where}, {since}", style="default")
    lines = [head, Text(f"  {finding.summary}")]
    if evidence := _evidence(finding):
        lines.append(Text(f"  evidence: {evidence}", style="dim"))
    lines.append(Text(f"  remedy: {finding.remedy}"))
    return Group(*lines)


def markdown(report: HealthReport) -> str:
    """The report as Markdown.

    Example:
        >>> markdown(HealthReport()).splitlines()[0]
        '# Health: nothing was watched after 0 optimizer steps'
    """
    lines = [f"# Health: {_headline(report)}", ""]
    for finding in report.findings:
        lines += [f"- **{finding.severity}: {finding.condition}** — {finding}"]
        if evidence := _evidence(finding):
            lines += [f"  Evidence: {evidence}."]
    if report.findings:
        lines.append("")
    if report.layers:
        titles = ("layer", *(title for title, _ in _COLUMNS), "state")
        lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in _rows(report)]
        lines.append("")
    lines += [f"GradHealth stepped aside: {report.aside}"] if report.aside else []
    lines += [f"Note: {note}" for note in report.notes]
    return "\n".join(lines)


def save_health(report: HealthReport, path: Path) -> Path:
    """Write a report as JSON, Markdown or text, by its suffix.

    Example:
        >>> save_health(HealthReport(), Path("health.doc"))
        Traceback (most recent call last):
        ...
        ValueError: path must end in .json, .md or .txt, got 'health.doc'; the suffix decides the format
    """
    if path.suffix == ".json":
        content = report.to_json(indent=1)
    elif path.suffix == ".md":
        content = markdown(report)
    elif path.suffix == ".txt":
        content = plain(render_health(report), width=160)
    else:
        raise ValueError(f"path must end in .json, .md or .txt, got {str(path)!r}; the suffix decides the format")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="utf-8")
    return path


def plain(renderable: RenderableType, width: int = 120) -> str:
    """What rich would print, without colours.

    Example:
        >>> plain(Text("ok", style="red"))
        'ok'
    """
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text().rstrip("\n")


_SHOWN_DEPTHS = 12


def render_init(report: InitReport) -> RenderableType:
    """A table of what was done to every parameter, how the model was read, and the signal over depth.

    Example:
        >>> print(plain(render_init(InitReport(seed=3, source="module order", applied=False))).splitlines()[-1])
        dry run: nothing was changed
    """
    parts: list[RenderableType] = [_init_table(report), Text(_init_summary(report), style="bold")]
    if report.depth:
        parts.append(_depth_table(report.depth))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    if not report.applied:
        parts.append(Text("dry run: nothing was changed", style="bold yellow"))
    return Group(*parts)


def _init_table(report: InitReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("parameter", overflow="fold", ratio=3)
    table.add_column("rule and scheme", overflow="fold", ratio=2)
    for title in ("fan", "gain", "std", "measured"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("follows, note", overflow="fold", ratio=3)
    for entry in report.entries:
        style = "yellow" if entry.rule == "uncovered" else ("dim" if entry.scheme == "kept" else "")
        gain_from = " ".join(filter(None, (entry.follows, f"({entry.found})" if entry.found else "")))
        cells = (
            f"{entry.name} {'×'.join(map(str, entry.shape))}",
            f"{entry.rule}: {entry.scheme} {entry.distribution}".strip(),
            *(_figure(v) for v in (entry.fan, entry.gain, entry.target_std, entry.measured_std)),
            "; ".join(filter(None, (gain_from, entry.note))),
        )
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _init_summary(report: InitReport) -> str:
    """How the model was read, in one line."""
    read = f"read by {report.source}; " if report.source else ""
    gains = (report.forward_gain, report.backward_gain)
    flow = "; gain per weight {} forward, {} back".format(*map(_figure, gains)) if report.depth else ""
    return f"{read}residual branches: {report.residual}{flow}; seed {report.seed}"


def _depth_table(depth: tuple[DepthPoint, ...]) -> Table:
    """The signal at the first, every k-th and the last weight."""
    step = math.ceil((len(depth) - 1) / (_SHOWN_DEPTHS - 1)) if len(depth) > _SHOWN_DEPTHS else 1
    shown = sorted({*range(0, len(depth), step), len(depth) - 1})
    columns: list[tuple[str, Callable[[DepthPoint], float | None]]] = [
        ("signal", lambda point: point.forward),
        ("gradient", lambda point: point.backward),
    ]
    if any(point.after is not None for point in depth):
        columns += [
            ("target", lambda point: point.target),
            ("before", lambda point: point.before),
            ("calibrated", lambda point: point.after),
        ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("depth", justify="right", no_wrap=True)
    table.add_column("predicted RMS behind", overflow="fold")
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for index in shown:
        table.add_row(str(index + 1), Text(depth[index].name), *(_figure(read(depth[index])) for _, read in columns))
    return table
