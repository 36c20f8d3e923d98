"""The `training_step` of a LightningModule: who has one (Lightning is not imported), and what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def has_training_step(model: nn.Module) -> bool:
    """Whether it is a LightningModule with a step of its own.

    Example:
        >>> has_training_step(nn.Linear(1, 1))
        False
    """
    step = getattr(type(model), "training_step", None)
    return callable(step) and not (step.__module__ or "").startswith(("lightning.", "pytorch_lightning."))


def step_arguments(step: Callable[..., Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a training_step: batch_idx and dataloader_idx only where it takes them.

    Args:
        step: The method.
        batch: The batch.

    Example:
        >>> step_arguments(lambda batch, batch_idx: None, "x")
        (('x', 0), {})
    """
    parameters = inspect.signature(step).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    counted = len(places) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    third = len(places) > 2 and places[2].name == "dataloader_idx"
    named = {p.name: 0 for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in ("batch_idx", "dataloader_idx")}
    return (batch, *([0] if counted else []), *([0] if third else [])), named
