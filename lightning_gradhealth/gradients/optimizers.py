"""What has to be known of optimizers and loss scalers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.records import OptimizerStats
from lightning_gradhealth.validation import wrong


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


def check_optimizer(optimizer: Any) -> Optimizer:
    """Return an optimizer, or what has parameter groups as one has.

    Raises:
        TypeError: It has none.

    Example:
        >>> check_optimizer(5)
        Traceback (most recent call last):
        ...
        TypeError: optimizer must be a torch.optim.Optimizer, got 5; give the one that is about to step
    """
    groups = None if isinstance(optimizer, type) else getattr(optimizer, "param_groups", None)
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise TypeError(wrong("optimizer", "a torch.optim.Optimizer", optimizer, "give the one that is about to step"))
    return cast(Optimizer, optimizer)


def check_scaler(grad_scaler: Any) -> GradScaler | None:
    """Return a loss scaler, what behaves as one, or None.

    Raises:
        TypeError: It is none.

    Example:
        >>> check_scaler(True)
        Traceback (most recent call last):
        ...
        TypeError: grad_scaler must be a torch.amp.GradScaler or None, got True; leave it out where no loss is scaled
    """
    methods = ("is_enabled", "unscale_")
    has_all = all(callable(getattr(grad_scaler, name, None)) for name in methods)
    if grad_scaler is not None and (isinstance(grad_scaler, type) or not has_all):
        remedy = "leave it out where no loss is scaled"
        raise TypeError(wrong("grad_scaler", "a torch.amp.GradScaler or None", grad_scaler, remedy))
    return cast("GradScaler | None", grad_scaler)


def rate(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group, where it can be had without a host read."""
    return _plain(group.get("lr"))


def described(number: int, optimizer: Optimizer) -> tuple[OptimizerStats, tuple[float | None, ...]]:
    """What an optimizer is, and the weight decay of each of its groups, where they are plain numbers.

    Args:
        number: Its index.
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> described(0, torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01))
        (OptimizerStats(optimizer=0, name='SGD', momentum=0.9), (0.01,))
    """
    groups = optimizer.param_groups
    momenta = [value for group in groups if (value := _plain(group.get("momentum"))) is not None]
    stats = OptimizerStats(number, type(optimizer).__name__, max(momenta, default=None))
    return stats, tuple(_plain(group.get("weight_decay")) for group in groups)


def _plain(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def still_scaled(optimizer: Optimizer, scaler: GradScaler) -> bool:
    """Whether the scaler has not unscaled this optimizer's gradients yet."""
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return bool(stage.name == "READY" and scaler._scale is not None)


def unscaled(vector: Tensor, scaler: GradScaler) -> Tensor:
    """Divide by the loss scale, on the device."""
    assert scaler._scale is not None
    return vector / scaler._scale.to(vector.device, vector.dtype)
