"""What the metrics share: sums that keep their precision, of vectors whose length the data decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_gradhealth.norms import wide


class Sums(Metric):
    """What all metrics here share: sums that keep their precision, and `plot`.

    Args:
        kwargs: What every `torchmetrics.Metric` takes.

    Example:
        >>> from lightning_gradhealth import metrics
        >>> metrics.SignalGain().to(torch.bfloat16).totals.dtype
        torch.float64
    """

    is_differentiable = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # A model that is cast to bfloat16 casts the metrics that it holds: counts would stop growing at 256.
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device, wide(device)), exclude_state)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value, or a sequence of values over time.

        Args:
            val: What `compute` or a call of the metric returned, or a list of such; None: what `compute` returns now.
            ax: The matplotlib axes to draw on; None: new ones.

        Returns:
            The figure (None where `ax` was given) and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> from lightning_gradhealth import metrics
            >>> gain = metrics.SignalGain()
            >>> values = [gain(torch.ones(4), scale * torch.ones(4)) for scale in (1.0, 2.0)]
            >>> figure, axes = gain.plot(values)  # doctest: +SKIP
        """
        return self._plot(val, ax)


class VectorSums(Sums):
    """Sums as one vector, whose length the first update decides: until then it is a scalar 0, which fits any.

    Args:
        state: What the vector is called. A MetricCollection takes metrics whose states have the same names, and the
            same values after the first batch, for one and the same: what tells two of them apart belongs in it.
        kwargs: What every `torchmetrics.Metric` takes.

    Example:
        >>> from lightning_gradhealth import metrics
        >>> metric = metrics.DeadUnitFraction()
        >>> metric.update(torch.tensor([[0.0, 1.0, 2.0]]))
        >>> metric.metric_state  # how often each unit was active; the number of samples
        {'relu_on_axis_1': tensor([0., 1., 1., 1.], dtype=torch.float64)}
    """

    def __init__(self, state: str, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", _gather_vectors)
        super().__init__(**kwargs)
        self._forgets = True
        self._state = state
        self.add_state(state, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch and return the value of that batch alone."""
        self._forgets = False  # torchmetrics resets in between, and puts the sums back
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._forgets = True

    def reset(self) -> None:
        """Forget everything, the length of the vector too: another layer or model may come next."""
        super().reset()
        if self._forgets:
            self.forget()

    def forget(self) -> None:
        """Forget what belongs to the layer or model that was measured, beside the sums."""

    @property
    def vector(self) -> Tensor | None:
        """The sums, or None as long as there are none on any rank."""
        state: Tensor = getattr(self, self._state)
        return state if state.numel() and state.ndim else None

    def nothing(self) -> Tensor:
        """What `compute` returns as long as there are no sums: NaN, shape ()."""
        return torch.tensor(torch.nan, device=self.device, dtype=wide(self.device))

    def add(self, values: Tensor) -> None:
        """Add a vector to the sums, wherever it is."""
        state: Tensor = getattr(self, self._state)
        setattr(self, self._state, state + values.to(state.device, state.dtype))


def _gather_vectors(state: Tensor, group: Any = None) -> list[Tensor]:
    """The vectors of all ranks, of which some may not have got any data yet."""
    parts: list[Tensor] = gather_all_tensors(state if state.ndim else state.new_zeros(0), group)
    lengths = {part.numel() for part in parts} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"the ranks have given the metric layers of different sizes (states of {sorted(lengths)} elements);"
            " give it the same layer on every rank"
        )
    return [part if part.numel() else part.new_zeros(max(lengths, default=0)) for part in parts]
