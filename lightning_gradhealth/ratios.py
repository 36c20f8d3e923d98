"""The pure functions that turn sums into ratios and slopes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def norm_ratios(rms: Sequence[float | None]) -> list[float | None]:
    """Each RMS over the geometric mean of those that are finite and positive (None stays None).

    A zero gives 0, a non-finite value stays itself, and with no positive value at all the ratio is undefined.

    Example:
        >>> norm_ratios([1.0, 4.0, 0.0, None])
        [0.5, 2.0, 0.0, None]
    """
    logs = [math.log(value) for value in rms if value is not None and 0.0 < value < math.inf]
    if not logs:
        return [None if value is None or value == 0.0 else value for value in rms]
    scale = math.exp(math.fsum(logs) / len(logs))
    return [None if value is None else value / scale for value in rms]


def fitted_gain(rms: Sequence[float]) -> float | None:
    """Gain per layer of a signal that travels from the last entry of `rms` to the first.

    The slope of log RMS over depth by least squares, as the factor by which one layer multiplies the signal on
    its way back: 0.5 halves it at every layer. Entries that are not finite and positive are left out; fewer
    than two others give None.

    Example:
        >>> fitted_gain([0.25, 0.5, 1.0])
        0.5
    """
    points = [(depth, math.log(value)) for depth, value in enumerate(rms) if 0.0 < value < math.inf]
    if len(points) < 2:
        return None
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / math.fsum((x - mean_x) ** 2 for x, _ in points)
    return math.exp(-slope) if abs(slope) < 700 else (0.0 if slope > 0 else math.inf)


def median(values: Iterable[float]) -> float:
    """Median of the values that are not NaN; NaN where there is none.

    Example:
        >>> median([3.0, 1.0, float("nan"), 2.0])
        2.0
    """
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    if len(ordered) % 2 or ordered[middle - 1] == ordered[middle]:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
