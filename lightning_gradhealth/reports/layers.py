"""Layers in a report: those with a finding first, those that are in order in one line where they are many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType

from lightning_gradhealth.messages import printable
from lightning_gradhealth.records import LayerStats, Severity
from lightning_gradhealth.reports.rendering import COLOURS, figure, line
from lightning_gradhealth.reports.tables import Column, FittedTable

QUIET = ("ok", "recovered", "frozen")  # states that nobody has to look at
_MOST_QUIET = 12  # rows of such layers that are shown


@dataclass(frozen=True)
class LayerRow:
    """A layer, and what to say of it.

    Attributes:
        layer: What was measured of it.
        state: What to say of it.
        severity: How grave that is.
    """

    layer: LayerStats
    state: str
    severity: Severity

    @property
    def quiet(self) -> bool:
        """Whether nobody has to look at it."""
        return self.state in QUIET

    @property
    def style(self) -> str:
        """The style of its row."""
        return "dim" if self.state == "frozen" else "" if self.quiet else COLOURS[self.severity]


def worst_first(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """The layers that something is wrong with, the worst first, then the others; else as they came.

    Example:
        >>> rows = [LayerRow(LayerStats("a"), "ok", Severity.INFO), LayerRow(LayerStats("b"), "dead", Severity.WARNING)]
        >>> [row.layer.name for row in worst_first(rows)]
        ['b', 'a']
    """
    return sorted(rows, key=lambda row: (row.quiet, -row.severity.rank))


def folded(rows: Iterable[LayerRow]) -> tuple[list[LayerRow], list[LayerRow]]:
    """The layers to show, and those that are in order and too many to be shown.

    Args:
        rows: All layers, in order of use.
    """
    ordered = worst_first(rows)
    quiet = [row for row in ordered if row.quiet]
    if len(quiet) <= _MOST_QUIET:
        return ordered, []
    return [row for row in ordered if not row.quiet], quiet


def summary(rows: Sequence[LayerRow]) -> str:
    """How many layers are in which state.

    Example:
        >>> summary([LayerRow(LayerStats("a"), "ok", Severity.INFO)] * 2)
        '2 layers: 2 ok'
    """
    states = Counter(row.state for row in rows)
    noun = "layer" if len(rows) == 1 else "layers"
    return f"{len(rows)} {noun}: {', '.join(f'{count} {printable(state)}' for state, count in states.items())}"


def layer_table(
    shown: Sequence[LayerRow],
    columns: Sequence[Column],
    quiet: Sequence[LayerRow] = (),
    ranges: Sequence[tuple[str, Callable[[LayerStats], float | None]]] = (),
) -> list[RenderableType]:
    """A table of the layers to show, and a line for those that are folded.

    Args:
        shown: The layers to show.
        columns: Columns beside name and state, with a cell for each of them.
        quiet: The layers that are folded.
        ranges: The numbers whose range is told of these.
    """
    parts: list[RenderableType] = []
    if shown:
        state = Column("state", [printable(row.state) for row in shown], words=True)
        names, styles = [row.layer.name for row in shown], [row.style for row in shown]
        parts.append(FittedTable("layer", names, [*columns, state], styles))
    if quiet:
        states = Counter(row.state for row in quiet)
        which = next(iter(states)) if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in states.items())
        known = [(title, _range([read(row.layer) for row in quiet])) for title, read in ranges]
        told = ", ".join(f"{title} {span}" for title, span in known if span)
        more = "more" if shown else "layers"
        parts.append(line(f"{len(quiet)} {more}, {which}{f': {told}' if told else ''}", style="green"))
    return parts


def _range(values: Iterable[float | None]) -> str:
    """From where to where numbers go; empty where there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    return figure(low) if low == high else f"{figure(low)} to {figure(high)}"
