"""Records to something to read: a terminal table, Markdown, JSON."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_gradhealth.history import sparkline
from lightning_gradhealth.messages import as_markdown, printable
from lightning_gradhealth.records import (
    DepthPoint,
    Finding,
    FlowReport,
    HealthReport,
    InitReport,
    LayerStats,
    Severity,
)

_COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "red"}


def _line(text: str, style: str = "") -> Text:
    """A line of a terminal, without control characters of others."""
    return Text(printable(text), style=style)


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
    return [_figure(read(layer)) for _, read in _columns(report)]


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
        >>> Console(width=60, file=io.StringIO()).print(render_health(HealthReport()))
    """
    worst = max((f.severity for f in report.findings), key=lambda s: s.rank, default=Severity.INFO)
    colour = "green" if report.healthy else _COLOURS[worst]
    parts: list[RenderableType] = [_line(_headline(report), style=f"bold {colour}")]
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for title, _ in _columns(report):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("state")
        for layer, row in zip(report.layers, _rows(report), strict=True):
            severity = layer_state(layer, report.findings)[1]
            style = "dim" if layer.frozen else ("" if row[-1] in ("ok", "recovered") else _COLOURS[severity])
            table.add_row(*(Text(cell, style=style) for cell in row))
        parts.append(table)
    if report.trend:
        parts.append(Text(f"total norm, log scale: {sparkline([total for _, total in report.trend])}", style="dim"))
    for finding in report.findings:
        parts.append(_render_finding(finding))
    if report.aside:
        parts.append(_line(f"GradHealth stepped aside: {report.aside}", style="yellow"))
    parts += [_line(f"not watched: {what}", style="yellow") for what in report.unwatched]
    parts += [_line(f"note: {note}", style="dim") for note in report.notes]
    return Panel(Group(*parts), title="GradHealth", border_style=colour, title_align="left")


def _evidence(finding: Finding) -> str:
    shown = {k: v for k, v in finding.evidence.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return ", ".join(f"{key} {_figure(float(value))}" for key, value in shown.items())


def _render_finding(finding: Finding, *, with_step: bool = True) -> RenderableType:
    colour = _COLOURS[finding.severity]
    since = f", step {finding.first_step}"
    if finding.last_step > finding.first_step:
        since = f", steps {finding.first_step} to {finding.last_step}"
    head = _line(f"{finding.severity}: {finding.condition}", style=f"bold {colour}")
    head.append(f" in {finding.where}{since if with_step else ''}", style="default")
    lines = [head, _line(f"  {finding.summary}")]
    if evidence := _evidence(finding):
        lines.append(_line(f"  evidence: {evidence}", style="dim"))
    lines.append(_line(f"  remedy: {finding.remedy}"))
    lines += [_line(f"    {line}", style="bold") for line in finding.code.splitlines()]
    return Group(*lines)


def markdown(report: HealthReport) -> str:
    """The report as Markdown.

    Example:
        >>> markdown(HealthReport()).splitlines()[0]
        '# Health: nothing was watched after 0 optimizer steps'
    """
    lines = [f"# Health: {as_markdown(_headline(report))}", ""]
    for finding in report.findings:
        lines += [f"- **{finding.severity}: {as_markdown(finding.condition)}** — {as_markdown(finding)}"]
        if evidence := _evidence(finding):
            lines += [f"  Evidence: {as_markdown(evidence)}."]
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

    return _save(
        path,
        {
            ".html": lambda: health_page(report),
            ".json": lambda: report.to_json(indent=1),
            ".md": lambda: markdown(report),
            ".txt": lambda: plain(render_health(report), width=160),
        },
    )


def _save(path: Path, formats: Mapping[str, Callable[[], str]]) -> Path:
    """Write what the path's suffix stands for."""
    if path.suffix not in formats:
        *others, last = formats
        must = f"{', '.join(others)} or {last}"
        raise ValueError(f"path must end in {must}, got {str(path)!r}; the suffix decides the format")
    content = formats[path.suffix]()
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


# --- before the first step ---


def _share(layer: LayerStats) -> str:
    """The share of units that are dead or saturated."""
    share = layer.saturated_fraction if layer.dead_fraction is None else layer.dead_fraction
    return "–" if share is None else f"{100 * share:.3g} %"


_FLOW_COLUMNS: tuple[tuple[str, Callable[[LayerStats], str]], ...] = (
    ("forward RMS", lambda layer: _figure(layer.forward_rms)),
    ("gain", lambda layer: _figure(layer.forward_gain)),
    ("backward RMS", lambda layer: _figure(layer.backward_rms)),
    ("gain", lambda layer: _figure(layer.backward_gain)),
    ("activation", lambda layer: layer.activation or "–"),
    ("dead or saturated", _share),
)


def _flow_rows(report: FlowReport) -> list[tuple[str, ...]]:
    return [(printable(layer.name), *(read(layer) for _, read in _FLOW_COLUMNS)) for layer in report.layers]


def _flow_headline(report: FlowReport) -> str:
    gains = f"gain per layer {_figure(report.forward_gain)} forward, {_figure(report.backward_gain)} back"
    parts = (f"{report.verdict} before the first step; {gains} over {len(report.chain.points)} layers", report.outlook)
    return "; ".join(filter(None, parts))


def _through_time(report: FlowReport) -> list[str]:
    """One line for each recurrent layer."""
    return [
        f"through time in {name}: gain {_figure(flow.gain_per_step)} per step over {len(flow.grad_norms)} steps"
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
    colour = "green" if report.healthy else _COLOURS[worst]
    parts: list[RenderableType] = [Text(_flow_headline(report), style=f"bold {colour}")]
    if report.layers:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        for title, _ in _FLOW_COLUMNS:
            table.add_column(title, justify="left" if title == "activation" else "right", no_wrap=True)
        hit = {name: finding.severity for finding in reversed(report.findings) for name in finding.layers}
        for layer, row in zip(report.layers, _flow_rows(report), strict=True):
            style = "dim" if layer.frozen else (_COLOURS[hit[layer.name]] if layer.name in hit else "")
            table.add_row(*(Text(cell, style=style) for cell in row))
        parts.append(table)
    parts += [_line(line) for line in _through_time(report)]
    parts += [_render_finding(finding, with_step=False) for finding in report.findings]
    parts += [_line(f"remedy: {remedy}") for remedy in _other_remedies(report)]
    parts += [_line(f"note: {note}", style="dim") for note in report.notes]
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
    return _save(
        path,
        {
            ".json": lambda: report.to_json(indent=1),
            ".md": lambda: flow_markdown(report),
            ".txt": lambda: plain(render_flow(report), width=160),
        },
    )


# --- initialisation ---

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
    parts += [_line(f"note: {note}", style="yellow") for note in report.notes]
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
        table.add_row(*(_line(cell, style=style) for cell in cells))
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
        table.add_row(str(index + 1), _line(depth[index].name), *(_figure(read(depth[index])) for _, read in columns))
    return table
