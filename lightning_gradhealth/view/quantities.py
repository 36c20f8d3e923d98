"""What is shown of each layer and of each step: one table each, read by whoever writes data and by whoever shows it.

A quantity travels in half precision: log2 of a value that has orders of magnitude, the value itself of a share. The
lowest finite number stands for "not measured", so that NaN and Inf keep their meaning; log2 of 0 is -Inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.records import LayerStats, StepRecord

Half = NDArray[np.float16]
Single = NDArray[np.float32]

PLUGIN, EVENTS_PLUGIN = "gradhealth", "gradhealth_events"  # names of event files' data: thinned out, and kept whole
FORMAT = 1
MISSING = np.finfo(np.float16).min  # -65504: no log2, and no share
MISSING_TOTAL = np.finfo(np.float32).min
SCALES = ("log2", "linear")
PALETTES = ("sequential", "diverging", "fraction")


@dataclass(frozen=True)
class Quantity:
    """A quantity that every layer has.

    Attributes:
        name: Its name.
        title: The same for a reader.
        about: What it is, in a sentence.
        scale: "log2" where it has orders of magnitude, else "linear".
        palette: "sequential", "diverging" (around `neutral`) or "fraction" (0 to 1).
        neutral: The value of a layer in order; None: there is none.

    Example:
        >>> QUANTITIES["norm_ratio"].palette, QUANTITIES["norm_ratio"].neutral
        ('diverging', 1.0)
    """

    name: str
    title: str
    about: str
    scale: str = "log2"
    palette: str = "sequential"
    neutral: float | None = None

    def encode(self, values: Sequence[float | None]) -> Half:
        """Values of the layers as they travel, shape (layers,).

        Args:
            values: One a layer; None: not measured.

        Example:
            >>> QUANTITIES["grad_norm"].encode([1.0, 0.25, 0.0, None]).tolist()
            [0.0, -2.0, -inf, -65504.0]
        """
        known = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            coded = (np.log2(known) if self.scale == "log2" else known).astype(np.float16)
        coded[[value is None for value in values]] = MISSING
        return coded

    def decode(self, coded: NDArray[Any]) -> NDArray[np.float64]:
        """The values again; what was not measured is NaN here, see `missing`.

        Example:
            >>> QUANTITIES["grad_norm"].decode(np.array([-2.0, -np.inf], np.float16)).tolist()
            [0.25, 0.0]
        """
        wide = np.where(missing(coded), np.nan, coded.astype(np.float64))
        with np.errstate(over="ignore"):
            return np.exp2(wide) if self.scale == "log2" else wide


def missing(coded: NDArray[Any]) -> NDArray[np.bool_]:
    """Where nothing was measured.

    Example:
        >>> missing(np.array([1.0, MISSING], np.float16)).tolist()
        [False, True]
    """
    return np.asarray(coded == MISSING)


def either(one: NDArray[Any], two: NDArray[Any], both: NDArray[Any], unknown: Any = MISSING) -> NDArray[Any]:
    """What two points are as one: where one of them was not measured the other, else `both`.

    Args:
        one: A point.
        two: Another, of the same shape.
        both: What they make where both were measured.
        unknown: What stands for "not measured".

    Example:
        >>> one, two = np.array([1.0, MISSING], np.float16), np.array([3.0, 2.0], np.float16)
        >>> either(one, two, np.maximum(one, two)).tolist()
        [3.0, 2.0]
    """
    return np.where(one == unknown, two, np.where(two == unknown, one, both))


_LAYER: tuple[Quantity, ...] = (
    Quantity(
        "norm_ratio",
        "norm ratio",
        "RMS gradient of the layer over the geometric mean of all layers; 1: like the others",
        palette="diverging",
        neutral=1.0,
    ),
    Quantity("grad_norm", "gradient norm", "L2 norm of the gradient before clipping, the largest since the last point"),
    Quantity("grad_to_weight", "gradient / weight", "norm of the gradient over that of the weights"),
    Quantity("update_to_weight", "update / weight", "norm of one optimizer step over that of the weights; 1e-3: usual"),
    Quantity("weight_norm", "weight norm", "L2 norm of the parameters"),
    Quantity("forward_rms", "forward RMS", "root mean square of the output"),
    Quantity("backward_rms", "backward RMS", "root mean square of the gradient at the output"),
    Quantity(
        "forward_gain",
        "forward gain",
        "output RMS over that of the layer before; 1: the signal is kept",
        palette="diverging",
        neutral=1.0,
    ),
    Quantity(
        "backward_gain",
        "backward gain",
        "what the gradient is multiplied by on its way back through the layer; 1: it is kept",
        palette="diverging",
        neutral=1.0,
    ),
    Quantity(
        "dead_fraction",
        "dead units",
        "share of units that were active in none of at least 256 samples",
        scale="linear",
        palette="fraction",
    ),
    Quantity(
        "saturated_fraction",
        "saturated units",
        "share of units whose derivative is on average below 5 % of its greatest",
        scale="linear",
        palette="fraction",
    ),
)
QUANTITIES: Mapping[str, Quantity] = {quantity.name: quantity for quantity in _LAYER}
GRAD_NORM = QUANTITIES["grad_norm"]


def layer_value(name: str, layer: LayerStats) -> float | None:
    """A quantity of a layer in a record: of the gradient norm the largest of the window, NaN where a step had one.

    Example:
        >>> layer_value("grad_norm", LayerStats("a", grad_norm=1.0, grad_norm_max=40.0))
        40.0
    """
    if name != GRAD_NORM.name:
        value: float | None = getattr(layer, name)
        return value
    if layer.non_finite:
        last = layer.grad_norm
        return last if last is not None and not math.isfinite(last) else math.nan
    known = [norm for norm in (layer.grad_norm, layer.grad_norm_max) if norm is not None]
    return max(known, default=None)


# --- of a step as a whole ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A quantity of the whole run, one number a logged step.

    Attributes:
        name: Its name.
        title: The same for a reader.
        scale: "log" or "linear", for the axis.
        of: Takes it out of a record; None: not measured.
    """

    name: str
    title: str
    scale: str
    of: Callable[[StepRecord], float | None]


def _total_norm(record: StepRecord) -> float | None:
    """The largest finite one of the window, so that the way into a NaN is seen; NaN or Inf where all steps were."""
    if record.total_norm_max is not None:
        return record.total_norm_max
    known = [step.total_norm for step in record.window if step.total_norm is not None]
    return _largest(known) if known else math.nan if record.non_finite_steps else record.total_norm


def _largest(values: Sequence[float]) -> float | None:
    """The largest finite value; without one NaN, or else Inf."""
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) if finite else next((value for value in values if math.isnan(value)), max(values, default=None))


def _applied_norm(record: StepRecord) -> float | None:
    """The largest norm that the optimizer was given; None where nothing has clipped, so that it is the one before.

    The session's factors are known at every step, what others clip only where it was measured.
    """
    measured, after = [], []
    by_others = False
    for step in record.window:
        if step.total_norm is None or not math.isfinite(step.total_norm) or step.skipped:
            continue
        expected = step.total_norm * (1.0 if step.clip_coefficient is None else step.clip_coefficient)
        after.append(expected)
        if step.applied_norm is not None:
            measured.append(step.applied_norm)
            by_others = by_others or step.applied_norm < 0.999 * expected
    if by_others or not record.window:
        return max(measured, default=record.applied_norm)
    return max(after, default=None) if record.clips else None


def _losses(record: StepRecord) -> list[float]:
    return [step.loss for step in record.window if step.loss is not None]


def _mean_loss(record: StepRecord) -> float | None:
    """NaN or Inf where one of them was."""
    losses = _losses(record)
    bad = [loss for loss in losses if not math.isfinite(loss)]
    return _largest(bad) if bad or not losses else math.fsum(losses) / len(losses)


def _last(record: StepRecord, name: str) -> float | None:
    return next((value for step in reversed(record.window) if (value := getattr(step, name)) is not None), None)


def _share_clipped(record: StepRecord) -> float | None:
    return record.clipped_steps / record.steps if record.clips and record.steps else None


_TOTALS: tuple[Column, ...] = (
    Column("total_norm", "total gradient norm before clipping, largest since the last point", "log", _total_norm),
    Column("applied_norm", "total gradient norm that the optimizer was given, largest", "log", _applied_norm),
    Column("loss", "loss, mean since the last point", "linear", _mean_loss),
    Column("loss_max", "loss, largest since the last point", "linear", lambda r: _largest(_losses(r))),
    Column("learning_rate", "learning rate", "log", lambda r: _last(r, "learning_rate")),
    Column("clip_coefficient", "smallest clipping factor", "log", lambda r: r.clip_coefficient if r.clips else None),
    Column("clipped_fraction", "share of clipped steps", "linear", _share_clipped),
    Column("armed", "gate of adaptive clipping open", "linear", lambda r: None if r.armed is None else float(r.armed)),
    Column("non_finite_steps", "steps with NaN or Inf", "linear", lambda r: float(r.non_finite_steps)),
    Column("skipped_steps", "skipped steps", "linear", lambda r: float(r.skipped_steps) if r.skips else None),
    Column("backward_gain", "fitted gain per layer, backwards", "log", lambda r: r.backward_gain),
    Column("forward_gain", "fitted gain per layer, forwards", "log", lambda r: r.forward_gain),
    Column("loss_scale", "loss scale", "log", lambda r: _last(r, "loss_scale")),
)
COLUMNS: Mapping[str, Column] = {column.name: column for column in _TOTALS}
PEAKS = ("total_norm", "loss_max")  # those of which a point that stands for several keeps the largest


def totals(record: StepRecord) -> Single:
    """The columns of a record, shape (columns,), in the order of `COLUMNS`.

    Example:
        >>> totals(StepRecord(step=1, total_norm=2.0))[0]
        np.float32(2.0)
    """
    values = [column.of(record) for column in COLUMNS.values()]
    with np.errstate(over="ignore"):
        return np.array([MISSING_TOTAL if value is None else value for value in values], dtype=np.float32)
