"""The private attributes of Lightning that the callback needs, each in one small function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.amp import GradScaler


def logged_step(trainer: pl.Trainer) -> int:
    """The x value that Lightning gives its loggers for the batch that is being trained on."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_cadence(trainer: pl.Trainer) -> int | None:
    """The Trainer's `log_every_n_steps`; None where it logs nothing (barebones)."""
    return cast(Any, trainer).log_every_n_steps or None


def due(trainer: pl.Trainer, step: int, cadence: int) -> bool:
    """Whether `step` is one that the Trainer logs, by its regular cadence.

    Lightning's own `should_update_logs` is also true when training is about to stop; a state that depended on
    that would differ between a resumed run and an unbroken one.
    """
    return (step + 1) % (log_cadence(trainer) or cadence) == 0


def grad_scaler(trainer: pl.Trainer) -> GradScaler | None:
    """The loss scaler of fp16 mixed precision, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) else None


def hides_gradients(trainer: pl.Trainer) -> bool:
    """Whether the strategy keeps the gradients to itself, as DeepSpeed does."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def loss_of(trainer: pl.Trainer, outputs: Any, key: str | None) -> Tensor | float | None:
    """A batch's share in the training loss: what `training_step` returned, else the metric logged under `key`."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, (Tensor, float)):
        return loss  # divided by the batches that are accumulated already
    return trainer.callback_metrics.get(key) if key is not None else None


def announcer(trainer: pl.Trainer, fallback: Callable[[str], None]) -> Callable[[str], None]:
    """A function that prints a line on rank zero, without tearing the progress bar where there is one."""

    def announce(line: str) -> None:
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            (fallback if bar is None else bar.print)(line)

    return announce
