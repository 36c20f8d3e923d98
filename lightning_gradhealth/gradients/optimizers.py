"""What has to be known of optimizers and loss scalers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a wrapper of Lightning or Fabric calls in the end.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> bare(optimizer) is optimizer
        True
    """
    while isinstance(inner := getattr(optimizer, "_optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def rate(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group, where it can be had without a host read."""
    rate = group.get("lr")
    return float(rate) if isinstance(rate, (int, float)) else None


def still_scaled(optimizer: Optimizer, scaler: GradScaler) -> bool:
    """Whether the scaler has not unscaled this optimizer's gradients yet."""
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return bool(stage.name == "READY" and scaler._scale is not None)


def unscaled(vector: Tensor, scaler: GradScaler) -> Tensor:
    """Divide by the loss scale, on the device."""
    assert scaler._scale is not None
    return vector / scaler._scale.to(vector.device, vector.dtype)
