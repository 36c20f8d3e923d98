"""What flows through the layers as metrics: dead and saturated units, and gains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.metrics.sums import Sums, VectorSums
from lightning_gradhealth.norms import norms
from lightning_gradhealth.signals.kinds import FLAT, KINDS
from lightning_gradhealth.signals.units import unit_sums
from lightning_gradhealth.validation import check_choice, check_int, check_number

_RECTIFIERS = tuple(name for name, kind in KINDS.items() if kind.is_rectifier)
_SATURATING = tuple(name for name, kind in KINDS.items() if not kind.is_rectifier)
_REMEDY = "DeadUnitFraction is for rectifiers, SaturatedUnitFraction for those that flatten out on both sides"


class _UnitFraction(VectorSums):
    """A sum for each unit over all samples (see `signals.units`), the number of samples behind them."""

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, activation: str, axis: int, known: tuple[str, ...], **kwargs: Any) -> None:
        check_choice("activation", activation, known, _REMEDY)
        axis = check_int("axis", axis, None, "1 for (batch, channels, ...), -1 for features")
        super().__init__(f"{activation}_on_axis_{axis}", **kwargs)
        self.activation = activation
        self.axis = axis
        self._units: int | None = None

    def forget(self) -> None:
        """Forget how many units there were."""
        self._units = None

    @torch.no_grad()
    def update(self, output: Tensor) -> None:
        """Take in a batch.

        Args:
            output: What the activation gave, any shape with the units on `axis`; every other axis counts as samples.

        Raises:
            TypeError: `output` is no floating-point tensor.
            ValueError: It has no such axis, or not as many units as before.
        """
        _check_floating("output", output)
        if not -output.ndim <= self.axis < output.ndim:
            raise ValueError(
                f"output has the shape {tuple(output.shape)} and no axis {self.axis};"
                " set axis= to that of the units: 1 for (batch, channels, ...), -1 where features are last"
            )
        sums = unit_sums(KINDS[self.activation], output.detach(), self.axis)
        units = sums.numel()
        known = self._units if (vector := self.vector) is None else vector.numel() - 1
        if known not in (None, units):
            raise ValueError(
                f"output has {units} units on axis {self.axis}, at earlier updates {known};"
                " use one metric for each layer, or set axis= to that of the units"
            )
        self._units = units
        # NaN > 0 is false: without this a layer whose output is NaN would pass for dead
        sums = sums.where(output.isfinite().all(), torch.nan)
        self.add(torch.cat([sums, sums.new_full((1,), output.numel() // max(units, 1))]))

    def compute(self) -> Tensor:
        """The share of units, shape (); NaN without any sample, and once an output was NaN or Inf."""
        vector = self.vector
        if vector is None:
            return self.nothing()
        sums, samples = vector[:-1], vector[-1]
        share = self._is_bad(sums, samples).to(sums.dtype).mean()
        return share.where((samples > 0) & sums.isfinite().all(), torch.nan)

    def _is_bad(self, sums: Tensor, samples: Tensor) -> Tensor:
        raise NotImplementedError


class DeadUnitFraction(_UnitFraction):
    """The share of units (channels, features) that were never active in any sample since the last reset.

    A rectifier that is never active passes no gradient: what feeds it no longer learns (Lu et al., "Dying ReLU and
    initialization", 2020). Fewer than some 256 samples cannot tell a dead unit from a rare one. Over ranks a unit is
    dead only if it was active on none.

    Args:
        activation: "relu" or "relu6".
        axis: Of the units: 1 for (batch, channels, height, width), -1 for (batch, time, features).
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        ValueError: `activation` is none of these.
        TypeError: `axis` is no int.

    Example:
        >>> metric = DeadUnitFraction()
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> metric.compute().item()
        0.5
    """

    def __init__(self, activation: str = "relu", axis: int = 1, **kwargs: Any) -> None:
        super().__init__(activation, axis, _RECTIFIERS, **kwargs)

    def _is_bad(self, sums: Tensor, samples: Tensor) -> Tensor:
        return sums == 0


class SaturatedUnitFraction(_UnitFraction):
    """The share of units whose local derivative is on average nearly zero, over all samples since the last reset.

    Such units sit on the flat ends of a sigmoid or tanh and let hardly any gradient through (Glorot and Bengio,
    2010). Fewer than some 256 samples say little.

    Args:
        activation: "sigmoid", "tanh", "hardtanh", "hardsigmoid" or "softsign".
        axis: Of the units: 1 for (batch, channels, height, width), -1 for (batch, time, features).
        threshold: A unit is saturated below this share of the greatest derivative that the activation has.
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        ValueError: `activation` is none of these, or `threshold` is not between 0 and 1.
        TypeError: `axis` is no int, or `threshold` no number.

    Example:
        >>> metric = SaturatedUnitFraction("tanh")
        >>> metric.update(torch.tensor([[0.1, 9.0], [-0.2, -8.0]]).tanh())
        >>> metric.compute().item()
        0.5
    """

    def __init__(self, activation: str = "tanh", axis: int = 1, threshold: float = FLAT, **kwargs: Any) -> None:
        super().__init__(activation, axis, _SATURATING, **kwargs)
        self.threshold = check_number("threshold", threshold, f"leave it out for {FLAT}", below=1.0)

    def _is_bad(self, sums: Tensor, samples: Tensor) -> Tensor:
        return sums < self.threshold * samples


class SignalGain(Sums):
    """By how much a layer, a block or a whole net makes a signal larger: RMS of its output over RMS of its input.

    To the power of the number of layers it says whether the signal survives: .9 per layer leaves 3e-5 after 100
    (He et al., "Delving deep into rectifiers", 2015). For the way back give dL/d(output) as `input` and dL/d(input)
    as `output`.

    Args:
        kwargs: What every `torchmetrics.Metric` takes.

    Example:
        >>> metric = SignalGain()
        >>> metric.update(torch.ones(4, 4), 2 * torch.ones(4, 1))
        >>> metric.compute().item()
        2.0
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    totals: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # squares and number of elements: of the input, of the output
        self.add_state("totals", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, input: Tensor, output: Tensor) -> None:
        """Take in a batch.

        Args:
            input: What went in, any shape.
            output: What came out, any shape.

        Raises:
            TypeError: One of them is no floating-point tensor.
        """
        _check_floating("input", input)
        _check_floating("output", output)
        squares = norms([input, output]).square().to(self.totals)
        counts = squares.new_tensor([input.numel(), output.numel()])
        self.totals = self.totals + torch.stack([squares, counts], dim=1)

    def compute(self) -> Tensor:
        """The gain, shape (); NaN without any update."""
        squares, counts = self.totals.unbind(1)
        before, after = (squares / counts).unbind()
        return torch.sqrt(after / before)


def _check_floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; of several outputs choose one")
    if value.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor of shape {tuple(value.shape)} on the meta device;"
            " give what a forward pass gives"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {value.dtype}; of token ids give what the embedding returns"
        )
