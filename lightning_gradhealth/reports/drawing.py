"""What figures of reports share: colours, quiet axes, names of layers that can be read, and marks off the scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_gradhealth.messages import printable
from lightning_gradhealth.records import Severity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the page's colours, fit for colour-blind readers; severities have a shape of their own, too
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#008060", "#a0558a"
GREY, MAGENTA, GATE, INK = "#7a828e", "#d6006e", "#e69f00", "#2b303a"
SEVERITY = {Severity.INFO: "#4c8bd6", Severity.WARNING: "#d98c00", Severity.CRITICAL: "#c8322a"}
SHAPE = {Severity.INFO: "o", Severity.WARNING: "s", Severity.CRITICAL: "D"}
SMALL = 7.5  # points
_NAME = 36  # characters of a name below an axis
_NAME_ROOM = 0.125  # inches between two names
_FARTHEST = 150  # decades


def figure_type() -> type[Figure]:
    """Matplotlib's Figure.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        message = "plot() needs matplotlib, which is not installed; pip install 'lightning-gradhealth[plot]'"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    return Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: pyplot does not know it, so that it is neither kept nor shown a second time.

    Args:
        width: Inches.
        height: Inches.
    """
    return figure_type()(figsize=(width, height), layout="constrained", facecolor="white")


def width_for(count: int) -> float:
    """Inches of a figure with so many layers side by side.

    Example:
        >>> width_for(3), width_for(60), width_for(1_000)
        (7.0, 9.0, 14.0)
    """
    return min(14.0, max(7.0, 1.5 + _NAME_ROOM * count))


def quiet(axes: Axes, title: str, pad: float = 6.0) -> None:
    """Give axes little ink, and a title in words that nothing interprets.

    Args:
        axes: The axes.
        title: The title.
        pad: Points between it and the axes.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c8d0")
    axes.tick_params(colors=INK, labelsize=SMALL, length=3, color="#c3c8d0", which="both")
    axes.grid(axis="y", color="#e8eaee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(readable(axes, title), loc="left", fontsize=9.5, color=INK, pad=pad, parse_math=False, wrap=True)


def readable(axes: Axes, text: object, limit: int | None = None) -> str:
    """A text of others whose characters the font has; what it has not is escaped.

    Args:
        axes: The axes that it is for.
        text: The text.
        limit: The greatest number of characters; None: no limit.
    """
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(axes.xaxis.label.get_fontproperties())).get_charmap()
    line = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in printable(text))
    return printable(line, limit)


def name_layers(axes: Axes, names: Sequence[str], what: str, colours: Mapping[int, str]) -> None:
    """Write the names of layers below an axis: all that have room, and before others those that are in a colour.

    Args:
        axes: The axes, with a layer at each whole number.
        names: The names, in order.
        what: What they are.
        colours: Number of a layer -> the colour of its name.
    """
    common = _common(names)
    short = [readable(axes, name[len(common) :], _NAME) for name in names]
    axes.set_xlim(-0.7, max(len(names), 2) - 0.3)
    inches = _inches(axes)
    apart = math.ceil(len(names) * _NAME_ROOM / max(inches, 1.0))
    taken: list[int] = []
    for place in sorted(range(len(names)), key=lambda place: (place not in colours, place % apart != 0, place)):
        if all(abs(place - other) >= apart for other in taken):
            taken.append(place)
    shown = sorted(taken)
    flat = sum(len(short[place]) for place in shown) * 0.075 < 0.8 * inches
    labels = [short[place] for place in shown]
    axes.set_xticks(shown, labels, rotation=0 if flat else 90, fontsize=SMALL, parse_math=False)
    for place, label in zip(shown, axes.get_xticklabels(), strict=True):
        label.set_color(colours.get(place, INK))
    within = f", of {readable(axes, common.rstrip('.'), 60)}" if common else ""
    axes.set_xlabel(f"{what}{within}", fontsize=SMALL + 0.5, color=INK, parse_math=False)


def _inches(axes: Axes) -> float:
    """The width of axes, also where it is laid out no sooner than they are drawn."""
    owner: Any = axes.get_figure()
    grid = axes.get_subplotspec()
    if owner.get_layout_engine() is None or grid is None:
        return float(axes.get_position().width * owner.get_figwidth())
    return float(owner.get_figwidth() / grid.get_gridspec().ncols - 0.9)


def _common(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    prefix = "".join(f"{part}." for part in common) if len(names) > 1 else ""
    return prefix if all(len(name) > len(prefix) for name in names) else ""


def on_a_scale(values: Sequence[float | None]) -> list[float]:
    """The values that a logarithmic axis can show; NaN, which is not drawn, in place of the others."""
    return [value if value is not None and 0.0 < value < math.inf else math.nan for value in values]


def mark_the_rest(axes: Axes, places: Sequence[float], values: Sequence[float | None]) -> None:
    """Mark what has no place on a logarithmic axis: NaN and Inf at its top, 0 at its bottom.

    Args:
        axes: The axes.
        places: Where on the x axis.
        values: The values there; None: not measured, and not marked.
    """
    pairs = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    wild = [place for place, value in pairs if not math.isfinite(value)]
    zero = [place for place, value in pairs if value == 0.0]
    edge = axes.get_xaxis_transform()
    for at, height, marker, colour, label in (
        (wild, 0.97, "x", MAGENTA, "NaN or Inf"),
        (zero, 0.02, "v", GREY, "exactly 0"),
    ):
        if at:
            style: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 4.5, "linestyle": "none"}
            axes.plot(at, [height] * len(at), transform=edge, clip_on=False, label=label, **style)


def log_scale(axes: Axes, drawn: Sequence[float]) -> None:
    """A logarithmic axis around what is drawn on it; what is farther away than Matplotlib can write stays outside.

    Args:
        axes: The axes.
        drawn: Everything that is drawn on it.
    """
    exponents = [min(_FARTHEST, max(-_FARTHEST, math.log10(value))) for value in drawn if 0.0 < value < math.inf]
    low, high = min(exponents, default=-1.0), max(exponents, default=1.0)
    room = max(0.3, 0.06 * (high - low))
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** (low - room), 10.0 ** (high + room))


def legend(axes: Axes) -> None:
    """Say what is what, where there is more than one thing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        style: dict[str, Any] = {"fontsize": SMALL, "frameon": False, "labelcolor": INK, "handlelength": 1.4}
        axes.legend(handles, labels, loc="best", ncols=2 if len(handles) > 3 else 1, **style)


def tell(axes: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": 9}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, parse_math=False, **style)
