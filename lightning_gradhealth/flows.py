"""What is said of signals: the points of a main chain, and the gradient through time. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gradhealth.ratios import fitted_gain
from lightning_gradhealth.serial import Record
from lightning_gradhealth.validation import wrong


@dataclass(frozen=True)
class ChainPoint(Record):
    """The signal at one point of the main chain: the output of a layer, or what a layer reads behind a merge.

    Attributes:
        name: The module whose output it is, or `name (input)` for what that module reads.
        layer: The layer that the module belongs to.
        forward_rms: Root mean square of the elements.
        backward_rms: Root mean square of the elements of dL/d(this); None where no gradient came.
        size: Number of elements, of one pass.

    Example:
        >>> ChainPoint("0", "0", 1.0, 0.5).forward_rms
        1.0
    """

    name: str
    layer: str
    forward_rms: float | None = None
    backward_rms: float | None = None
    size: int = 1


@dataclass(frozen=True)
class Matrix(Record):
    """A matrix that a module applies by hand, as one of an `nn.ParameterList`.

    Attributes:
        name: The parameter.
        rms: Root mean square of its elements.
        backward_gain: What is left before it of the smallest gradient behind it, by root mean square; None: not all of
            the signal goes through it, or no gradient has come.

    Example:
        >>> Matrix("weights.3", 0.2, 0.9).backward_gain
        0.9
    """

    name: str
    rms: float
    backward_gain: float | None = None


@dataclass(frozen=True)
class SignalChain(Record):
    """The main chain of one forward pass: the points that all of the signal goes through, from the input on.

    In residual nets these are the outputs of the merges.

    Attributes:
        points: The points in order.
        optimizer: Index of the optimizer whose step it belongs to.
        input_rms: Root mean square of what the first point's module reads; None where it is no floating tensor.

    Example:
        >>> chain = SignalChain(tuple(ChainPoint(str(i), str(i), 0.5**i, 2.0**i) for i in range(4)))
        >>> round(chain.forward_gain, 9), round(chain.backward_gain, 9)
        (0.5, 0.5)
    """

    points: tuple[ChainPoint, ...] = ()
    optimizer: int = 0
    input_rms: float | None = None

    @property
    def forward_gain(self) -> float | None:
        """What the signal is multiplied by from one point to the next, fitted over all; None: not measured."""
        return fitted_gain([_or_zero(point.forward_rms) for point in reversed(self.points)])

    @property
    def backward_gain(self) -> float | None:
        """The same of the gradient on its way back."""
        return fitted_gain([_or_zero(point.backward_rms) for point in self.points])


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


@dataclass(frozen=True)
class TemporalFlow(Record):
    """How the gradient of a recurrent module's last output fares on its way back through time.

    Attributes:
        grad_norms: L2 norm of d(last output)/d(h_t) for every step t, shape (T,) in the order in which the steps are
            taken: root mean square over the samples and over output directions of length 1, so that the last is 1.
            Of the layer and direction that is farthest from carrying it unchanged.
        gain_per_step: What one step multiplies it by on its way back, fitted over all steps; 0 where nothing comes
            through at all; None: not known.
        memory: Steps back from the last after which it is below a hundredth of what it was, and stays there; None:
            it never is within these steps.
        by_layer: The norms of every layer and direction, as "l0", "l0_reverse": shape (T,) each.

    Example:
        >>> flow = TemporalFlow.of({"l0": (0.9, 0.9, 1.0), "l1": (0.25, 0.5, 1.0)})
        >>> flow.grad_norms, flow.gain_per_step, flow.memory
        ((0.25, 0.5, 1.0), 0.5, None)
    """

    grad_norms: tuple[float, ...] = ()
    gain_per_step: float | None = None
    memory: int | None = None
    by_layer: dict[str, tuple[float, ...]] | None = None

    @classmethod
    def of(cls, by_layer: Mapping[str, Sequence[float]]) -> TemporalFlow:
        """Conclude from the norms of every layer and direction.

        Args:
            by_layer: Name of the layer and direction -> its norms, shape (T,).
        """
        if not isinstance(by_layer, Mapping):
            raise TypeError(wrong("by_layer", "a dict of norms by layer", by_layer, 'e.g. {"l0": (0.5, 1.0)}'))
        norms = {name: tuple(values) for name, values in by_layer.items()}
        worst = max(norms.values(), key=_distance_from_one, default=())
        return cls(worst, _gain_per_step(worst), memory_length(worst), norms)


def _gain_per_step(norms: Sequence[float]) -> float | None:
    """The fitted gain, which leaves zeros out; where there is nothing but zeros before the last step, 0."""
    gain = fitted_gain(norms)
    return 0.0 if gain is None and 0.0 in norms else gain


def _distance_from_one(norms: Sequence[float]) -> float:
    """How far the gain per step is from 1, on the log scale."""
    gain = _gain_per_step(norms)
    if gain is None:
        return -1.0
    return abs(math.log(gain)) if 0.0 < gain < math.inf else math.inf


def memory_length(norms: Sequence[float], share: float = 0.01) -> int | None:
    """Steps back from the last after which all norms are below `share` of that at the last step; None: never.

    Args:
        norms: Gradient norms in the order of the steps.
        share: What counts as forgotten.

    Example:
        >>> memory_length([0.001, 0.1, 1.0])
        2
    """
    if not norms or not math.isfinite(norms[-1]) or norms[-1] <= 0.0:
        return None
    forgotten = next((step for step, norm in enumerate(norms) if not norm < share * norms[-1]), 0)
    return len(norms) - forgotten if forgotten else None
