"""Reports as figures of Matplotlib: what `plot()` gives, and loggers get that take nothing but images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from lightning_gradhealth.pages import recorded
from lightning_gradhealth.records import Finding, FlowReport, HealthReport, InitReport, Severity
from lightning_gradhealth.reports.drawing import (
    BLUE,
    GATE,
    GREEN,
    GREY,
    INK,
    MAGENTA,
    ORANGE,
    PURPLE,
    SEVERITY,
    SHAPE,
    SMALL,
    figure_type,
    legend,
    log_scale,
    mark_the_rest,
    name_layers,
    new_figure,
    on_a_scale,
    quiet,
    readable,
    tell,
    width_for,
)
from lightning_gradhealth.reports.health import headline, layer_state
from lightning_gradhealth.validation import wrong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 6  # findings above the axes of the total norm
_BAR = 11.0  # points of each of them


@singledispatch
def figure(report: HealthReport | FlowReport | InitReport) -> Figure:
    """A report as a figure, which pyplot does not know.

    Args:
        report: The report.

    Example:
        >>> len(figure(HealthReport()).axes)
        2
    """
    raise TypeError(wrong("report", "a report", report, "e.g. health.report()"))


@figure.register
def _(report: HealthReport) -> Any:
    return plot_health(report)[0]


@figure.register
def _(report: FlowReport) -> Any:
    return plot_flow(report)[0]


@figure.register
def _(report: InitReport) -> Any:
    return plot_init(report)[0]


# --- a run -------------------------------------------------------------------------------------------------------


def plot_health(report: HealthReport, ax: Axes | Sequence[Axes] | None = None) -> tuple[Figure, Any]:
    """The total gradient norm over the steps, and the gradient of each layer.

    Args:
        report: The report.
        ax: Axes for the gradient of each layer, or two, for the total norm and for it; None: a new figure.

    Returns:
        The figure, and the axes that were drawn on: an array of both, or the one that was given.
    """
    figure_type()
    if ax is None:
        drawn = new_figure(width_for(len(report.layers)), 6.2)
        above, below = both = drawn.subplots(2, 1, height_ratios=(1.0, 1.35))
        _total_norm(above, report)
        _gradient_flow(below, report)
        return drawn, both
    several: list[Any] = [ax] if hasattr(ax, "plot") else list(ax)
    if len(several) == 1:
        _gradient_flow(several[0], report)
        return _figure_of(several[0]), ax
    if len(several) != 2:
        raise ValueError(wrong("ax", "Axes or two of them", len(several), "leave it out for a new figure"))
    _total_norm(several[0], report)
    _gradient_flow(several[1], report)
    return _figure_of(several[0]), ax


def _figure_of(axes: Any) -> Figure:
    owner: Figure = axes.get_figure()
    return owner


def _total_norm(axes: Axes, report: HealthReport) -> None:
    """The total norm over steps, with what was found above it and what was done below."""
    from matplotlib.ticker import MaxNLocator

    view = recorded(report)
    steps, norms = (column.tolist() for column in view.totals.column("total_norm"))
    if len(report.trend) > len(steps):  # few rows were logged, or none that are still known
        steps, norms = [int(point[0]) for point in report.trend], [point[1] for point in report.trend]
    shown = report.findings[:_MOST_BARS]
    quiet(axes, headline(report), pad=6.0 + _BAR * len(shown))
    if not steps:
        tell(axes, "no step was recorded")
        return
    axes.set_ylabel("total gradient norm", fontsize=SMALL + 0.5, color=INK)
    axes.set_xlabel("step", fontsize=SMALL + 0.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(steps, on_a_scale(norms), color=BLUE, linewidth=1.2, marker="." if len(steps) == 1 else "", label="norm")
    after, applied = (column.tolist() for column in view.totals.column("applied_norm"))
    clipped = view.spans.get("clipped", ())
    if clipped and after:
        style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 2.8}
        axes.plot(after, on_a_scale(applied), color=ORANGE, label="after clipping (probed steps)", **style)
    log_scale(axes, [*norms, *(applied if clipped else ())])
    mark_the_rest(axes, steps, norms)
    for first, last in view.spans.get("armed", ()):
        axes.axvspan(first - 0.5, last + 0.5, color=GATE, alpha=0.18, linewidth=0, gid="gate")
    for name, colour, height in (("clipped", ORANGE, 0.015), ("skipped", MAGENTA, 0.045)):
        for number, (first, last) in enumerate(view.spans.get(name, ())):
            label = f"{name} steps" if number == 0 else "_"
            ends = [first - 0.5, last + 0.5]
            edge = axes.get_xaxis_transform()
            axes.plot(ends, [height] * 2, transform=edge, color=colour, linewidth=3, solid_capstyle="butt", label=label)
    held = {finding["condition"]: finding.get("spans") for finding in view.findings}
    bars = [held.get(str(f.condition)) or [[f.first_step, f.last_step]] for f in shown]
    low, high = min(*steps, *(spans[0][0] for spans in bars), steps[0]), max(steps)
    room = 0.01 * max(high - low, 1)
    axes.set_xlim(low - room, high + room)
    for row, (finding, spans) in enumerate(reversed(list(zip(shown, bars, strict=True)))):
        _bar(axes, finding, spans, row)
    legend(axes)


def _bar(axes: Axes, finding: Finding, spans: Sequence[Sequence[float]], row: int) -> None:
    """When a finding held, as a bar above the axes."""
    from matplotlib.transforms import ScaledTranslation

    owner = _figure_of(axes)
    up = ScaledTranslation(0.0, (_BAR / 2 + 2.0 + _BAR * row) / 72.0, owner.dpi_scale_trans)
    place = axes.get_xaxis_transform() + up
    low, high = axes.get_xlim()
    least = 0.004 * (high - low)
    for first, last in spans:
        ends = [min(max(low, first - least), high), min(max(low, last + least), high)]
        style: dict[str, Any] = {"color": SEVERITY[finding.severity], "alpha": 0.35, "solid_capstyle": "butt"}
        axes.plot(ends, [1.0, 1.0], transform=place, linewidth=_BAR - 2.0, clip_on=False, label="_", **style)
    start = min(max(low, spans[0][0]), high)
    on_left = start < low + 0.6 * (high - low)
    text = readable(axes, f"{str(finding.condition).replace('_', ' ')}", 60)
    style = {"fontsize": SMALL - 0.5, "color": INK, "va": "center_baseline", "ha": "left" if on_left else "right"}
    axes.text(start, 1.0, f" {text} ", transform=place, parse_math=False, clip_on=False, **style)


def _gradient_flow(axes: Axes, report: HealthReport) -> None:
    """The gradient norm of each layer, in order of use: the last one, and the largest since the record before it."""
    layers = report.layers
    quiet(axes, "gradient norm of each layer")
    if not layers:
        tell(axes, "no layer was measured")
        return
    axes.set_ylabel("gradient norm", fontsize=SMALL + 0.5, color=INK)
    places = list(range(len(layers)))
    last = [None if layer.frozen else layer.grad_norm for layer in layers]
    most = [None if layer.frozen else layer.grad_norm_max for layer in layers]
    log_scale(axes, [value for value in (*last, *most) if value is not None])
    low, high = on_a_scale(last), on_a_scale(most)
    told = "up to the largest of the last window"
    axes.vlines(places, low, high, color=GREY, alpha=0.45, linewidth=_thick(len(layers)), label=told)
    axes.plot(places, low, color=GREY, linewidth=0.8, alpha=0.7, label="_line")
    states = [layer_state(layer, report.findings) for layer in layers]
    size = 4.5 if len(layers) <= 100 else 3.2
    sick = {place: severity for place, (state, severity) in enumerate(states) if _is_sick(state)}
    well = [place for place in places if place not in sick]
    style: dict[str, Any] = {"linestyle": "none", "markersize": size, "markeredgewidth": 0}
    if well:
        axes.plot(well, [low[place] for place in well], marker="o", color=BLUE, label="ok", **style)
    for severity in reversed(Severity):
        here = [place for place, grave in sick.items() if grave is severity]
        if here:
            what = ", ".join(dict.fromkeys(states[place][0] for place in here))
            label = readable(axes, what, 60)
            drawn = [low[place] for place in here]
            axes.plot(here, drawn, marker=SHAPE[severity], color=SEVERITY[severity], label=label, **style)
    mark_the_rest(axes, places, last)
    name_layers(
        axes,
        [layer.name for layer in layers],
        "layers in order of use",
        {place: SEVERITY[severity] for place, severity in sick.items() if severity is not Severity.INFO},
    )
    legend(axes)


def _is_sick(state: str) -> bool:
    return state not in ("ok", "recovered", "frozen")


def _thick(count: int) -> float:
    """Points of the line up to the largest, so that lines of neighbours do not touch."""
    return max(1.0, min(5.0, 240.0 / count))


# --- before the first step ---------------------------------------------------------------------------------------


def plot_flow(report: FlowReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The signal on its way forward and the gradient on its way back, along the main chain, with the fitted gains.

    Args:
        report: The report.
        ax: Axes to draw on; None: a new figure.

    Returns:
        The figure and the axes.
    """
    points = report.chain.points
    chained = len(points) > 1
    names = [point.name for point in points] if chained else [layer.name for layer in report.layers]
    source: Sequence[Any] = points if chained else report.layers
    drawn, axes = _one(ax, len(names))
    outlook = f"; {report.outlook}" if report.outlook else ""
    quiet(axes, f"{report.verdict} before the first step{outlook}")
    gains = (report.forward_gain, report.backward_gain)
    lines = (
        ("signal", [item.forward_rms for item in source], gains[0], 1, BLUE, "o"),
        ("gradient", [item.backward_rms for item in source], gains[1], -1, ORANGE, "s"),
    )
    hit = {name: finding.severity for finding in reversed(report.findings) for name in finding.layers}
    owners = [point.layer for point in points] if chained else names
    sick = {place: SEVERITY[hit[owner]] for place, owner in enumerate(owners) if owner in hit}
    _over_depth(axes, names, lines, "points of the main chain" if chained else "layers in order of use", sick)
    return drawn, axes


def plot_init(report: InitReport, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The signal and the gradient that are predicted at each weight, and what `calibrate=` measured.

    Args:
        report: The report.
        ax: Axes to draw on; None: a new figure.

    Returns:
        The figure and the axes.
    """
    depth = report.depth
    drawn, axes = _one(ax, len(depth))
    quiet(axes, "signal and gradient as predicted behind each weight" if depth else "initialisation")
    lines = [
        ("signal", [point.forward for point in depth], report.forward_gain, 1, BLUE, "o"),
        ("gradient", [point.backward for point in depth], report.backward_gain, -1, ORANGE, "s"),
    ]
    if any(point.after is not None for point in depth):
        lines += [
            ("target", [point.target for point in depth], None, 1, GREY, "_"),
            ("measured before", [point.before for point in depth], None, 1, PURPLE, "x"),
            ("calibrated", [point.after for point in depth], None, 1, GREEN, "D"),
        ]
    _over_depth(axes, [point.name for point in depth], lines, "weights in order of use", {})
    return drawn, axes


_Line = tuple[str, list[float | None], float | None, int, str, str]


def _one(ax: Axes | None, count: int) -> tuple[Figure, Axes]:
    figure_type()
    if ax is not None:
        return _figure_of(ax), ax
    drawn = new_figure(width_for(count), 4.2)
    return drawn, drawn.subplots()


def _over_depth(axes: Axes, names: Sequence[str], lines: Sequence[_Line], what: str, sick: Mapping[int, str]) -> None:
    """Lines over depth, each with the line that its gain per layer fits."""
    known = [line for line in lines if any(value is not None for value in line[1])]
    if not known:
        tell(axes, "no signal over depth is known")
        return
    axes.set_ylabel("root mean square", fontsize=SMALL + 0.5, color=INK)
    log_scale(axes, [value for line in known for value in line[1] if value is not None])
    places = list(range(len(names)))
    for name, values, gain, way, colour, marker in known:
        told = f"{name}, gain {gain:.3g} per layer" if gain is not None else name
        on_scale = on_a_scale(values)
        size = 3.6 if len(names) <= 100 else 2.4
        width = 0.0 if marker in "x_" else 1.0
        axes.plot(places, on_scale, color=colour, marker=marker, markersize=size, linewidth=width, label=told)
        if (fit := _fit(on_scale, gain, way)) is not None:
            axes.plot(places, fit, color=colour, linewidth=1.0, linestyle=(0, (5, 3)), alpha=0.6, label="_fit")
        mark_the_rest(axes, places, values)
    name_layers(axes, names, what, sick)
    legend(axes)


def _fit(values: Sequence[float], gain: float | None, way: int) -> list[float] | None:
    """The line of a gain per layer through the middle of the values."""
    points = [(place, math.log(value)) for place, value in enumerate(values) if not math.isnan(value)]
    if gain is None or not 0.0 < gain < math.inf or len(points) < 2:
        return None
    slope = way * math.log(gain)
    offset = math.fsum(value - slope * place for place, value in points) / len(points)
    return [math.exp(min(700.0, max(-700.0, offset + slope * place))) for place in range(len(values))]
