"""Arrays out of tensors of event files, whatever stands in these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.view.data import rising
from lightning_gradhealth.view.rows import BINS, Spans


def ranges(listed: list[Any]) -> Spans:
    """Those of a list that are ranges of steps.

    Example:
        >>> ranges([[1, 4], [3], "x", [9, 2]])
        [(1, 4)]
    """
    pairs = [part for part in listed if isinstance(part, list) and len(part) == 2]
    whole = [pair for pair in pairs if all(isinstance(n, int) and abs(n) < 2**53 for n in pair)]
    return [(first, last) for first, last in whole if first <= last]


def none(length: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """No rows of this length.

    Example:
        >>> none(3)[1].shape
        (0, 3)
    """
    return np.zeros(0, dtype=np.int64), np.zeros((0, length), dtype=np.float32)


def vectors(data: Sequence[Any], length: int | None) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Steps and values of those data that are vectors of numbers, and of this length.

    Args:
        data: TensorBoard's data of a tag, each with a `step` and an array `numpy`.
        length: The length; None: any.

    Example:
        >>> import types
        >>> datum = types.SimpleNamespace(step=3, numpy=np.ones(2, np.float16))
        >>> vectors([datum], 2)[0].tolist(), vectors([datum], 3)[0].tolist()
        ([3], [])
    """
    fit = []
    for datum in data:
        array = datum.numpy
        if array.ndim == 1 and array.dtype.kind == "f" and (length is None or len(array) == length):
            fit.append((int(datum.step), array))
    kept = rising([step for step, _ in fit])
    if not len(kept):
        return none(length or 0)
    kind = np.float16 if fit[kept[0]][1].dtype == np.float16 else np.float32
    with np.errstate(over="ignore"):
        values = np.stack([fit[index][1].astype(kind) for index in kept])
    return np.array([fit[index][0] for index in kept], dtype=np.int64), values


def with_peaks(
    steps: NDArray[np.int64], values: NDArray[Any], extra: NDArray[np.int64], peaks: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rows and the extremes of several: at the same step the larger counts, else an extreme is a row of its own.

    Args:
        steps: Rising, shape (steps,).
        values: Shape (steps, layers).
        extra: Rising, the steps of the extremes.
        peaks: Shape (extra, layers).

    Example:
        >>> with_peaks(np.array([1, 4]), np.zeros((2, 1)), np.array([4, 6]), np.array([[9.0], [7.0]]))[1].tolist()
        [[0.0], [9.0], [7.0]]
    """
    if not len(steps) or not len(extra):
        return steps, values
    lowest = np.finfo(values.dtype).min
    with np.errstate(over="ignore", invalid="ignore"):
        known = peaks.astype(values.dtype)
    both = np.concatenate([steps, extra])
    rows = np.concatenate([values, known])
    order = np.argsort(both, kind="stable")
    both, rows = both[order], rows[order]
    starts = np.flatnonzero(np.append(True, both[1:] != both[:-1]))
    zero = np.isneginf(rows)
    merged = np.maximum.reduceat(np.where(zero, lowest, rows), starts, 0)
    none = merged == lowest
    merged = np.where(none & np.logical_or.reduceat(zero, starts, 0), -np.inf, merged).astype(values.dtype)
    return both[starts], merged


def table(array: Any, length: int) -> NDArray[np.uint8] | None:
    """Shares of the bins (layers, 32) out of a vector; None where it is none of ours.

    Args:
        array: First bin, number of bins, and the shares of these (layers, bins).
        length: Number of layers.

    Example:
        >>> table(np.array([4, 1, 255], np.uint8), 1)[0, 4], table(np.array([4, 1], np.uint8), 1)
        (np.uint8(255), None)
    """
    if array.ndim != 1 or array.dtype != np.uint8 or len(array) < 2:
        return None
    first, width = int(array[0]), int(array[1])
    if width < 1 or first + width > BINS or len(array) != 2 + length * width:
        return None
    table = np.zeros((length, BINS), dtype=np.uint8)
    table[:, first : first + width] = array[2:].reshape(length, width)
    return table
