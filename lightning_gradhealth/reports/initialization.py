"""The report of an initialisation: what was done to every parameter, and the signal that it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from lightning_gradhealth.records import DepthPoint, InitReport
from lightning_gradhealth.reports.rendering import figure, line
from lightning_gradhealth.reports.tables import Column, FittedTable

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


def _init_table(report: InitReport) -> FittedTable:
    entries = report.entries
    gain_from = [" ".join(filter(None, (e.follows, f"({e.found})" if e.found else ""))) for e in entries]
    columns = [
        Column("rule and scheme", [f"{e.rule}: {e.scheme} {e.distribution}" for e in entries], 1, words=True),
        Column("fan", [figure(e.fan) for e in entries], 5),
        Column("gain", [figure(e.gain) for e in entries], 3),
        Column("std", [figure(e.target_std) for e in entries], 2),
        Column("measured", [figure(e.measured_std) for e in entries], 4),
        Column(
            "follows, note",
            ["; ".join(filter(None, (gain, e.note))) for gain, e in zip(gain_from, entries, strict=True)],
            6,
            words=True,
            below=True,
        ),
    ]
    if any(e.relative_step is not None for e in entries):
        columns.insert(
            5, Column("one step", ["" if (step := e.relative_step) is None else f"{step:.1%}" for e in entries], 3)
        )
    names = [f"{entry.name} {'×'.join(map(str, entry.shape))}" for entry in entries]
    styles = ["yellow" if e.rule == "uncovered" else "dim" if e.scheme == "kept" else "" for e in entries]
    return FittedTable("parameter", names, columns, styles)


def _init_summary(report: InitReport) -> str:
    """How the model was read, in one line."""
    read = f"read by {report.source}; " if report.source else ""
    gains = (report.forward_gain, report.backward_gain)
    flow = "; gain per weight {} forward, {} back".format(*map(figure, gains)) if report.depth else ""
    return f"{read}residual branches: {report.residual}{flow}; seed {report.seed}"


def _depth_table(depth: tuple[DepthPoint, ...]) -> FittedTable:
    """The signal at the first, every k-th and the last weight."""
    step = math.ceil((len(depth) - 1) / (_SHOWN_DEPTHS - 1)) if len(depth) > _SHOWN_DEPTHS else 1
    shown = sorted({*range(0, len(depth), step), len(depth) - 1})
    numbers: list[tuple[str, Callable[[DepthPoint], float | None]]] = [
        ("signal", lambda point: point.forward),
        ("gradient", lambda point: point.backward),
    ]
    if any(point.after is not None for point in depth):
        numbers += [
            ("target", lambda point: point.target),
            ("before", lambda point: point.before),
            ("calibrated", lambda point: point.after),
        ]
    columns = [Column("depth", [str(index + 1) for index in shown], len(numbers))]
    columns += [
        Column(title, [figure(read(depth[index])) for index in shown], rank)
        for rank, (title, read) in enumerate(numbers)
    ]
    return FittedTable("predicted RMS behind", [depth[index].name for index in shown], columns, [""] * len(shown))
