"""The report of an initialisation: what was done to every parameter, and the signal that it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_gradhealth.records import DepthPoint, InitReport
from lightning_gradhealth.reports.rendering import figure, line

_SHOWN_DEPTHS = 12


def render_init(report: InitReport) -> RenderableType:
    """A table of what was done to every parameter, how the model was read, and the signal over depth.

    Example:
        >>> from lightning_gradhealth.reports.rendering import plain
        >>> print(plain(render_init(InitReport(seed=3, source="module order", applied=False))).splitlines()[-1])
        dry run: nothing was changed
    """
    parts: list[RenderableType] = [_init_table(report), Text(_init_summary(report), style="bold")]
    if report.depth:
        parts.append(_depth_table(report.depth))
    parts += [line(f"note: {note}", style="yellow") for note in report.notes]
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
            *(figure(v) for v in (entry.fan, entry.gain, entry.target_std, entry.measured_std)),
            "; ".join(filter(None, (gain_from, entry.note))),
        )
        table.add_row(*(line(cell, style=style) for cell in cells))
    return table


def _init_summary(report: InitReport) -> str:
    """How the model was read, in one line."""
    read = f"read by {report.source}; " if report.source else ""
    gains = (report.forward_gain, report.backward_gain)
    flow = "; gain per weight {} forward, {} back".format(*map(figure, gains)) if report.depth else ""
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
        table.add_row(str(index + 1), line(depth[index].name), *(figure(read(depth[index])) for _, read in columns))
    return table
