"""The private attributes of Lightning that the callback needs, each in one small function."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.text import Text
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.messages import say
from lightning_gradhealth.sharding import is_flat, is_sharded


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
    """A batch's share in the training loss: what `training_step` returned, else a metric.

    Args:
        trainer: The Trainer.
        outputs: What `training_step` has returned.
        key: The name of that metric; None: in manual optimization, where `manual_backward` was not called, all that
            are called a loss, added up.
    """
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, (Tensor, float)):
        loss = trainer.callback_metrics.get(key) if key is not None else _logged_losses(trainer)
    if isinstance(loss, Tensor) and loss.numel() != 1:  # by hand: one a sample
        return loss.detach().float().mean() if loss.numel() and not loss.is_complex() else None
    return loss  # divided by the batches that are accumulated already


def _logged_losses(trainer: pl.Trainer) -> Tensor | None:
    """In manual optimization the sum of the training losses that were given to `self.log`, by their names."""
    single = list(_by_name(trainer).values())
    return sum(single[1:], single[0].clone()) if single else None


def _by_name(trainer: pl.Trainer) -> dict[str, Tensor]:
    """In manual optimization the training losses that were given to `self.log`."""
    if trainer.lightning_module.automatic_optimization:
        return {}
    return {
        name: value.detach()
        for name, value in trainer.callback_metrics.items()
        if "loss" in name.lower()
        and not name.lower().startswith(("val", "test"))
        and not name.endswith("_epoch")
        and value.numel() == 1
    }


def losses_by_optimizer(trainer: pl.Trainer, outputs: Any) -> list[tuple[Optimizer, Tensor]]:
    """In manual optimization, of several optimizers each with the logged loss that is named after what it steps.

    As "g_loss" or "loss_gen" after the module "generator"; of a last optimizer and a last loss each is the other's.
    Empty where one of them is left without, and where `training_step` has returned a loss.

    Args:
        trainer: The Trainer.
        outputs: What it has returned.
    """
    optimizers = trainer.optimizers
    returned = outputs.get("loss") if isinstance(outputs, dict) else outputs
    losses = {} if returned is not None or len(optimizers) < 2 else _by_name(trainer)
    if not losses:
        return []
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    stepped = [
        {part.lower() for g in o.param_groups for p in g["params"] for part in names.get(id(p), "").split(".")[:-1]}
        for o in optimizers
    ]
    own = [parts.difference(*(other for other in stepped if other is not parts)) for parts in stepped]
    found = {number: _named_after(parts, losses) for number, parts in enumerate(own)}
    chosen = [name for name in found.values() if name]
    left = [name for name in losses if name not in chosen]
    if len(left) == 1 and list(found.values()).count("") == 1:
        found = {number: name or left[0] for number, name in found.items()}
    if "" in found.values() or len(set(found.values())) < len(found):
        return []
    return [(optimizers[number], losses[name]) for number, name in found.items()]


_NO_MODULE = {"loss", "losses", "train", "training", "step", "total"}


def _named_after(modules: Collection[str], losses: Collection[str]) -> str:
    """The loss with a word that is the beginning of one of some modules' names; of several the shortest; "" for none.

    Example:
        >>> _named_after({"generator"}, ["d_loss", "g_loss", "g_loss_l1"]), _named_after({"critic"}, ["d_loss"])
        ('g_loss', '')
    """
    known = [
        name
        for name in losses
        if any(
            module.startswith(word) or word.startswith(module)
            for word in set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())) - _NO_MODULE
            for module in modules
            if not module.isdigit()
        )
    ]
    return min(known, key=len, default="")


class BackwardLosses:
    """In manual optimization: the losses given to `manual_backward`, which are those of the optimizer that steps next.

    What is logged may be old, or the sum over several optimizers; this is neither. Nothing is read from the device.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._stepped = False  # what comes next begins anew
        self.seen = False  # since the batch began

    def add(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Take one in, before its backward pass; several before a step are summed, as their gradients are."""
        if loss.numel() != 1 or loss.is_complex():
            return
        scaler = grad_scaler(trainer)
        value = loss.detach().reshape(()).clone()
        if scaler is not None and scaler.is_enabled() and scaler._scale is not None:  # Lightning has multiplied it
            value = value / scaler._scale.to(value.device)
        self._sum = value if self._stepped or self._sum is None else self._sum + value
        self._stepped, self.seen = False, True

    def of_step(self) -> Tensor | None:
        """The loss of the step that is at hand; of a second one without a backward pass between the same."""
        self._stepped = True
        return self._sum

    def end_batch(self) -> bool:
        """Whether there was one in the batch that ends."""
        seen, self.seen = self.seen, False
        return seen


def note_on_loss(outputs: Any) -> str:
    """What a report has to say where `training_step` returned a loss for each sample; empty where it did not."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    several = isinstance(loss, Tensor) and loss.numel() > 1
    return "loss: the mean of what training_step returned, a loss for each sample" if several else ""


def outermost(trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module:
    """The model as the strategy wrapped it where parameters are flat shards of that wrapper, else the module."""
    wrapped = trainer.strategy.model
    return module if wrapped is None or not any(map(is_flat, module.parameters())) else wrapped


def called_through(trainer: pl.Trainer, module: pl.LightningModule) -> frozenset[nn.Module]:
    """What the strategy calls in order to get to `training_step`; nothing where it calls that directly."""
    wrapped = trainer.strategy.model
    return frozenset() if wrapped is None or wrapped is module else frozenset((wrapped, module))


def no_rerun(module: pl.LightningModule) -> str:
    """Why `training_step` cannot be run again: it would do more than a forward pass; empty where it can."""
    if not module.automatic_optimization:
        return "manual optimization: training_step would step the optimizers"
    if "dataloader_iter" in signature(module.training_step).parameters:
        return "training_step takes dataloader_iter: a batch cannot be run twice"
    return ""


def rerun(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Callable[[], Any], batch_idx: int
) -> Callable[[], Any]:
    """A function that runs `training_step` on a batch again, where nothing speaks against it (`no_rerun`).

    Args:
        trainer: The Trainer.
        module: The module.
        batch: Gives the batch as it was.
        batch_idx: Its number.
    """
    counted = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as Lightning decides it

    def run() -> Any:
        arguments = (batch(), batch_idx) if counted else (batch(),)
        with trainer.precision_plugin.train_step_context():
            if any(map(is_sharded, module.parameters())):  # through the wrapper, which gathers the weights
                return trainer.strategy.training_step(*arguments)
            return module.training_step(*arguments)

    return run


def no_preflight(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Why a batch cannot be run before the first step; empty where it can. Ranks answer alike."""
    sharded = any(map(is_sharded, module.parameters()))
    return no_rerun(module) or ("the parameters are sharded over ranks" if sharded else "")


def loss_scale(trainer: pl.Trainer) -> float:
    """The factor that the loss is going to be multiplied by; 1 where there is no scaler."""
    scaler = grad_scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def other_clipping(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """What else changes the gradients between the callback and the optimizer, in words."""
    notes = []
    if trainer.gradient_clip_val:
        kind = str(trainer.gradient_clip_algorithm or "norm").removeprefix("GradClipAlgorithmType.").lower()
        notes.append(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips by {kind}"
            " after GradHealth: the smaller limit holds; applied_norm is what is left"
        )
    own = getattr(type(module), "configure_gradient_clipping", None)
    if own is not None and not (own.__module__ or "").startswith(("lightning.", "pytorch_lightning.")):
        notes.append(
            f"{type(module).__name__}.configure_gradient_clipping is overridden: what it does to the gradients comes"
            " after GradHealth; applied_norm is what is left"
        )
    return notes


def held_back(trainer: pl.Trainer) -> str:
    """What keeps Lightning from ending the fit now although it is asked to; empty where nothing does."""
    loop = trainer.fit_loop
    if loop._can_stop_early:
        return ""
    by_default = loop.min_steps and loop.min_epochs == 1  # then Lightning sets it
    least = {"min_epochs": None if by_default else loop.min_epochs, "min_steps": loop.min_steps}
    given = ", ".join(f"{name}={value}" for name, value in least.items() if value)
    return f" as soon as Trainer({given}) lets it"


def anywhere(trainer: pl.Trainer, flag: bool) -> str:
    """Words for a stop that another rank asks for; empty where none does. All ranks call it."""
    asked = trainer.strategy.reduce_boolean_decision(flag, all=False)
    return "another rank has found a condition of stop_on" if asked else ""


def announcer(trainer: pl.Trainer) -> Callable[[str], None]:
    """A function that prints a line on rank zero, without tearing the progress bar where there is one."""

    def announce(line: str) -> None:
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            say(line, through=None if bar is None else partial(_print, bar))

    return announce


def _print(bar: ProgressBar, line: str) -> None:
    """Print as it is: for a rich console `[/x]` in a layer's name would be markup."""
    bar.print(Text(line) if isinstance(bar, RichProgressBar) else line)


# what a bar shows its metrics by; one that does it in a way of its own may take nothing but numbers
_SHOWN_BY: dict[type[ProgressBar], tuple[str, ...]] = {
    TQDMProgressBar: ("on_train_batch_end", "on_train_epoch_end", "on_validation_end"),
    RichProgressBar: ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "_update_metrics"),
}


class BarLines:
    """Stands in for `get_metrics` of a progress bar, and adds lines of text to what that gives.

    `self.log` takes numbers only, and what it takes goes to loggers; here nothing but what the bar shows is changed.

    Args:
        bar: The bar.
    """

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self.lines: dict[str, Callable[[], str]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shown = type(self._bar).get_metrics(self._bar, *args, **kwargs)
        if not isinstance(shown, dict):  # a bar of the user's may give anything
            return shown
        ours = {name: text for name, line in self.lines.items() if name not in shown and (text := line())}
        return {**shown, **ours}

    def __getstate__(self) -> dict[str, Any]:
        """A copy adds nothing: the run stays here."""
        return {"_bar": self._bar, "lines": {}}


def show_in_bar(trainer: pl.Trainer, name: str, line: Callable[[], str]) -> None:
    """Show a line of text among the metrics in the Trainer's progress bar, where it has one of Lightning's.

    Args:
        trainer: The Trainer.
        name: What stands before the line; a metric of the user's that has this name is shown in its place.
        line: Gives the line whenever the bar is drawn; an empty one is not shown.
    """
    bar = trainer.progress_bar_callback
    known = next((kind for kind in _SHOWN_BY if isinstance(bar, kind)), None)
    if bar is None or known is None or not trainer.is_global_zero:
        return
    own_way = any(getattr(type(bar), method) is not getattr(known, method) for method in _SHOWN_BY[known])
    if not own_way:
        lines = vars(bar).setdefault("get_metrics", BarLines(bar))
        if isinstance(lines, BarLines):
            lines.lines[name] = line


def hide_from_bar(trainer: pl.Trainer, name: str) -> None:
    """Show a line no longer; a bar without lines is as it was.

    Args:
        trainer: The Trainer.
        name: The line's name.
    """
    bar = trainer.progress_bar_callback
    lines = None if bar is None else vars(bar).get("get_metrics")
    if isinstance(lines, BarLines):
        lines.lines.pop(name, None)
        if not lines.lines:
            del vars(bar)["get_metrics"]


def report_folder(trainer: pl.Trainer, wanted: str | os.PathLike[str] | None) -> Path | None:
    """Where the report of a run goes: "auto" is the run's own log folder, as checkpoints have it; None: nowhere.

    `trainer.log_dir` would wait for the other ranks, which may have failed.
    """
    if wanted is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if wanted != "auto":
        return Path(wanted)
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            folder = _named_folder(logger)
        if folder is not None and "://" not in os.fspath(folder):
            return Path(folder)
    return None


def _named_folder(logger: Logger) -> str | None:
    """The folder of a run whose logger has only one for all of them."""
    root, name, version = logger.save_dir, logger.name, logger.version
    if not isinstance(root, (str, os.PathLike)) or version is None:
        return None
    return os.path.join(os.fspath(root), str(name), version if isinstance(version, str) else f"version_{version}")
