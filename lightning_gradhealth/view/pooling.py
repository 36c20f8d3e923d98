"""Arrays (steps, layers) to pictures of one byte a cell, pooled so that no spike and no NaN is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.view.quantities import MISSING, missing

TOP, ZERO, NOT_MEASURED, INF, NAN = 250, 252, 253, 254, 255
FAR = 3.0  # |log2| beyond which a cell of a diverging picture shows its extreme, not its mean: a factor of 8
LEAST, MOST = 3.4, 24.0  # half the range of a diverging picture, in log2: noise stays pale, wild runs stay graded
_SAMPLE = 200_000  # values that limits are taken from

Rows = Sequence[tuple[int, int]]


def edges(length: int, parts: int) -> NDArray[np.intp]:
    """Where each of at most `parts` equal parts begins.

    Example:
        >>> edges(5, 2).tolist(), edges(2, 8).tolist()
        ([0, 2], [0, 1])
    """
    parts = min(length, parts)
    return (np.arange(parts) * length) // max(parts, 1)


def fitted(rows: Rows, height: int) -> list[tuple[int, int]]:
    """Rows of layers, inclusive ranges, pooled with their neighbours where there are more than `height`.

    Example:
        >>> fitted([(0, 0), (1, 3), (7, 7)], 2)
        [(0, 0), (1, 7)]
    """
    starts = edges(len(rows), height)
    ends = [*starts[1:], len(rows)]
    return [(rows[a][0], rows[b - 1][1]) for a, b in zip(starts, ends, strict=True)]


def pool(
    values: NDArray[Any],
    columns: NDArray[np.intp],
    rows: Rows | None = None,
    height: int = 2_000,
    far: float | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Pool cells of (steps, layers).

    Args:
        values: Shape (steps, layers), as they travel.
        columns: The first step's row of each column.
        rows: Ranges of layers, inclusive, one a row; None: every layer.
        height: The greatest number of rows.
        far: For diverging pictures: the distance from 0 beyond which the extreme stands for a cell, and not the mean.
            None: the largest stands for it.

    Returns:
        The pooled finite values and the codes of what is not finite (0 where it is), both (rows, columns).

    Example:
        >>> cells, codes = pool(np.array([[1.0, np.nan], [3.0, 0.5]], np.float16), np.array([0]))
        >>> cells.tolist(), codes.tolist()
        ([[3.0], [0.5]], [[0], [255]])
    """
    count = values.shape[1]
    rows = [(index, index) for index in range(count)] if rows is None else rows
    starts = edges(len(rows), height)
    widths = np.array([last - first + 1 for first, last in rows], dtype=np.intp)
    taken = values if _is_all(rows, count) else values[:, np.concatenate([np.arange(a, b + 1) for a, b in rows])]
    places = np.concatenate([[0], np.cumsum(widths)[:-1]])[starts] if len(rows) else starts

    def down(operation: np.ufunc, cells: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(operation.reduceat(operation.reduceat(cells, columns, 0), places, 1)).T

    cells = taken.astype(np.float32)
    finite = np.isfinite(cells) & ~missing(taken)
    if finite.all():
        codes = np.zeros((len(places), len(columns)), dtype=np.uint8)
        return _pooled(cells, finite, down, far), codes
    some = down(np.logical_or, finite)
    codes = np.where(some, 0, NOT_MEASURED).astype(np.uint8)
    codes[~some & down(np.logical_or, np.isneginf(cells))] = ZERO
    codes[down(np.logical_or, np.isposinf(cells))] = INF
    codes[down(np.logical_or, np.isnan(cells))] = NAN
    return np.where(some, _pooled(cells, finite, down, far), np.float32(0)), codes


def _is_all(rows: Rows, count: int) -> bool:
    """Whether rows are all layers, in order and without gaps."""
    at = 0
    for first, last in rows:
        if first != at:
            return False
        at = last + 1
    return at == count


def _pooled(cells: NDArray[np.float32], finite: NDArray[np.bool_], down: Any, far: float | None) -> NDArray[np.float32]:
    whole = bool(finite.all())
    high = down(np.maximum, cells if whole else np.where(finite, cells, -np.inf))
    if far is None:
        return np.asarray(high, dtype=np.float32)
    low = down(np.minimum, cells if whole else np.where(finite, cells, np.inf))
    count = down(np.add, finite.astype(np.float32))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = down(np.add, cells if whole else np.where(finite, cells, np.float32(0))) / count
    extreme = np.where(high >= -low, high, low)
    return np.asarray(np.where(np.abs(extreme) > far, extreme, mean), dtype=np.float32)


def limits(values: NDArray[Any], palette: str, scale: str = "log2") -> tuple[float, float]:
    """The values that the ends of the colours stand for, of a whole run.

    Args:
        values: As they travel, any shape.
        palette: "sequential", "diverging" or "fraction".
        scale: "log2" or "linear".

    Example:
        >>> limits(np.array([0.0, 0.25]), "fraction", "linear"), limits(np.array([-8.0, 8.0, 8.0]), "diverging")
        ((0.0, 1.0), (-8.0, 8.0))
    """
    if palette == "fraction":
        return 0.0, 1.0
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // _SAMPLE)]
    flat = flat[np.isfinite(flat) & (flat != MISSING)].astype(np.float64)
    if not flat.size:
        return -1.0, 1.0
    low, high = (float(end) for end in np.percentile(flat, [0.5, 99.9]))
    if palette == "diverging":
        least, most = (LEAST, MOST) if scale == "log2" else (1e-3, np.inf)
        half = min(max(-low, high, least), most)
        return -half, half
    return low, max(high, low + (1.0 if scale == "log2" else 1e-6))


def coded(cells: NDArray[np.float32], codes: NDArray[np.uint8], low: float, high: float) -> NDArray[np.uint8]:
    """One byte a cell: 0 to 250 from `low` to `high`, and the codes of what is not finite.

    Example:
        >>> coded(np.array([[0.0, 1.0]], np.float32), np.array([[0, 255]], np.uint8), 0.0, 2.0).tolist()
        [[0, 255]]
    """
    scaled = np.rint((cells.astype(np.float64) - low) / (high - low) * TOP)
    return np.where(codes > 0, codes, np.clip(scaled, 0, TOP)).astype(np.uint8)
