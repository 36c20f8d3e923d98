"""What people do with a Trainer: one small training for each thing, for test_everyday_fits.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from conftest import Classifier, batches, mlp
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, Adam, AdamW


class Everyday(Classifier):
    """A classifier that is validated, tested and asked for predictions, too."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = SGD, **options: Any) -> None:
        super().__init__(net, optimizer, **options)
        self.learning_rate, self.batch_size = 0.05, 8

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", Classifier.training_step(self, batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Manual(Everyday):
    """Manual optimization of two halves."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            if self.how == "every other batch" and batch_idx % 2:
                continue
            if self.how == "toggled":
                self.toggle_optimizer(optimizer)
            if self.how == "accumulated":
                with optimizer.toggle_model(sync_grad=bool(batch_idx % 2)):
                    self.manual_backward(Classifier.training_step(self, batch, batch_idx) / 2)
                if batch_idx % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                continue

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = Classifier.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            if self.how == "closure":
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()
            if self.how == "toggled":
                self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [SGD(self.net[0].parameters(), lr=0.05), Adam(self.net[2].parameters(), lr=1e-3)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 5) for optimizer in optimizers]


class Outputs(Everyday):
    """training_step returns something other than a loss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how == "dict":
            return {"loss": loss, "logits": loss.detach()}
        if self.how == "shape (1,)":
            return loss.reshape(1)
        return None if batch_idx % 3 == 2 else loss


class Overrides(Everyday):
    """Overrides the hooks around the optimizer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        loss.backward()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Clips(Everyday):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")


class Configured(Everyday):
    """Layers come in configure_model."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = mlp()


class Plateau(Everyday):
    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}


class PerStep(Everyday):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100), "interval": "step"}
        ]


class SeveralLoaders(Everyday):
    """A batch of several loaders: a dict, a list, or one of them at a time."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
        if isinstance(parts[0], Tensor):
            parts = [parts]
        return torch.stack([Classifier.training_step(self, part, batch_idx) for part in parts]).mean()


class Iterated(Everyday):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return Classifier.training_step(self, batch, batch_idx)


class Breaks(Everyday):
    """An error, or Ctrl-C, in the sixth batch."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            raise self.error
        return super().training_step(batch, batch_idx)


class Skips(Everyday):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


class Unfreezes(cb.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class FreezesByHand(Everyday):
    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch % 2 == 0)


class Swaps(Everyday):
    """A new head, and a new optimizer for it, after the first epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[-1] = nn.Linear(16, 3)
            self.trainer.strategy.optimizers = [SGD(self.parameters(), lr=0.01)]


class Shared(Everyday):
    """One layer used three times, and a frozen one."""

    def __init__(self) -> None:
        layer = nn.Linear(8, 8)
        super().__init__(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer, nn.Linear(8, 8), nn.Linear(8, 3)))
        self.net[5].requires_grad_(False)


class Complex(Everyday):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy((self(batch[0]) * self.turn).abs(), batch[1])


class Sparse(Everyday):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 3, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]) + self.table(batch[1] * 0), batch[1])


class GroupsOfParameters(Everyday):
    def configure_optimizers(self) -> Any:
        biases = [p for name, p in self.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in self.named_parameters() if not name.endswith("bias")]
        return AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=1e-3)


class Data(pl.LightningDataModule):
    """Loaders of a data module, a new one every epoch if the Trainer asks for it."""

    def train_dataloader(self) -> Any:
        return batches()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Tuned(Data):
    batch_size = 4

    def train_dataloader(self) -> Any:
        return batches(size=self.batch_size)

    val_dataloader = train_dataloader


Run = Callable[[pl.Trainer, Any, Any], None]


def fit(trainer: pl.Trainer, model: Any, data: Any) -> None:
    trainer.fit(model, data)


def validated(trainer: pl.Trainer, model: Any, data: Any) -> None:
    trainer.fit(model, data, batches(samples=16))


def validated_on_two(trainer: pl.Trainer, model: Any, data: Any) -> None:
    model.validation_step = lambda batch, batch_idx, dataloader_idx: None
    trainer.fit(model, data, [batches(samples=16), batches(samples=24)])


def all_stages(trainer: pl.Trainer, model: Any, data: Any) -> None:
    trainer.validate(model, data, verbose=False)
    trainer.fit(model, data, batches(samples=16))
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)


def stages_of_a_module(trainer: pl.Trainer, model: Any, data: Any) -> None:
    for stage in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        stage(model, datamodule=data)


def twice(trainer: pl.Trainer, model: Any, data: Any) -> None:
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 2 * trainer.fit_loop.max_epochs
    trainer.fit(model, data)


def broken(trainer: pl.Trainer, model: Any, data: Any) -> None:
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, SystemExit):
        trainer.fit(model, data)


def resumed(trainer: pl.Trainer, model: Any, data: Any) -> None:
    """Saved within an epoch, and gone on with in another fit of the same Trainer."""
    trainer.fit(model, data)
    (saver,) = trainer.checkpoint_callbacks
    trainer.fit(model, data, ckpt_path=sorted(Path(saver.dirpath).glob("*.ckpt"))[0], weights_only=True)


def with_rate_found(trainer: pl.Trainer, model: Any, data: Any) -> None:
    Tuner(trainer).lr_find(model, data, num_training=5, update_attr=True)
    trainer.fit(model, data)


def with_batch_size_found(trainer: pl.Trainer, model: Any, data: Any) -> None:
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=2)
    trainer.fit(model, data)


def saver(path: Path) -> cb.ModelCheckpoint:
    return cb.ModelCheckpoint(path / "saved", every_n_train_steps=3, save_top_k=-1)


def nothing(_: Path) -> list[pl.Callback]:
    return []


@dataclass
class Situation:
    """One thing that people do.

    Attributes:
        model: Makes the module.
        options: What the Trainer is given.
        data: Makes what is trained on.
        run: What is done with the Trainer.
        callbacks: Makes other callbacks, in a folder of the test's own.
        loggers: Makes loggers there.
    """

    model: Callable[[], Any] = Everyday
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = batches
    run: Run = fit
    callbacks: Callable[[Path], list[pl.Callback]] = nothing
    loggers: Callable[[Path], Any] = lambda _: False


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}


def pair(mode: str) -> Callable[[], Any]:
    return lambda: CombinedLoader({"a": batches(), "b": batches(samples=24)}, mode)


def compiled() -> Any:
    model = Everyday()
    model.net = torch.compile(model.net, backend="eager")
    return model


def compiled_in_place() -> Any:
    model = Everyday()
    model.net.compile(backend="eager")
    return model


S = Situation
SITUATIONS: dict[str, Situation] = {
    "nothing special": S(),
    "accumulation": S(options={"accumulate_grad_batches": 3}),
    "accumulation that changes": S(callbacks=lambda _: [cb.GradientAccumulationScheduler({0: 2, 1: 1})]),
    "validation and sanity check": S(run=validated),
    "validation within an epoch": S(run=validated, options={"val_check_interval": 3}),
    "validation every 5 batches over epochs": S(
        run=validated, options={"val_check_interval": 5, "check_val_every_n_epoch": None}
    ),
    "two validation loaders": S(run=validated_on_two),
    "validation with gradients": S(run=validated, options={"inference_mode": False}),
    "early stopping": S(run=validated, callbacks=lambda _: [cb.EarlyStopping("val", patience=0, min_delta=10.0)]),
    "stochastic weight averaging": S(callbacks=lambda _: [cb.StochasticWeightAveraging(1e-2, swa_epoch_start=1)]),
    "stochastic weight averaging with batch norm": S(
        lambda: Everyday(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))),
        callbacks=lambda _: [cb.StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
    ),
    "an exponential average of weights": S(run=validated, callbacks=lambda _: [cb.EMAWeightAveraging(decay=0.9)]),
    "a rate finder": S(run=with_rate_found),
    "a batch size finder": S(run=with_batch_size_found, data=Tuned),
    "checkpoints": S(callbacks=lambda path: [saver(path)]),
    "resumed within an epoch": S(run=resumed, callbacks=lambda path: [saver(path)]),
    "loaders in a dict": S(SeveralLoaders, data=lambda: {"a": batches(), "b": batches(samples=24)}),
    "loaders in a list": S(SeveralLoaders, data=lambda: [batches(), batches(samples=24)]),
    "the longest loader": S(SeveralLoaders, data=pair("max_size")),
    "the shortest loader": S(SeveralLoaders, data=pair("min_size")),
    "loaders as they come": S(SeveralLoaders, data=pair("max_size_cycle")),
    "an iterator of loaders": S(Iterated),
    "manual optimization": S(Manual),
    "manual, toggled": S(lambda: Manual("toggled")),
    "manual, closures": S(lambda: Manual("closure")),
    "manual, accumulated": S(lambda: Manual("accumulated")),
    "manual, every other batch": S(lambda: Manual("every other batch")),
    "LBFGS": S(lambda: Everyday(None, LBFGS, lr=0.01, max_iter=2)),
    "a dict as output": S(lambda: Outputs("dict")),
    "steps without a loss": S(lambda: Outputs("None")),
    "a loss of one element": S(lambda: Outputs("shape (1,)")),
    "hooks overridden": S(Overrides),
    "clipping by norm": S(options={"gradient_clip_val": 0.1}),
    "clipping by value": S(options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "clipping overridden": S(Clips),
    "double precision": S(options={"precision": "64-true"}),
    "bfloat16": S(options={"precision": "bf16-true"}),
    "mixed with bfloat16": S(options={"precision": "bf16-mixed"}),
    "mixed with a loss scaler": S(options=scaled()),
    "a fused optimizer": S(lambda: Everyday(None, AdamW, lr=1e-3, fused=True)),
    "a loss scaler and a fused optimizer": S(lambda: Everyday(None, AdamW, lr=1e-3, fused=True), scaled()),
    "compiled": S(compiled),
    "compiled in place": S(compiled_in_place),
    "limited batches": S(run=validated, options={"limit_train_batches": 3, "limit_val_batches": 1}),
    "a share of the batches": S(options={"limit_train_batches": 0.5}),
    "max_steps": S(options={"max_steps": 5, "max_epochs": -1}),
    "min_steps": S(options={"min_steps": 12, "max_epochs": 1}),
    "max_time": S(options={"max_time": "00:01:00:00"}),
    "an error": S(lambda: Breaks(RuntimeError), run=broken),
    "Ctrl-C": S(lambda: Breaks(KeyboardInterrupt), run=broken),
    "the rest of an epoch left out": S(Skips),
    "fit twice": S(run=twice),
    "all stages": S(run=all_stages),
    "CSV": S(loggers=CSVLogger),
    "TensorBoard": S(loggers=TensorBoardLogger),
    "several loggers, each step": S(
        loggers=lambda path: [CSVLogger(path), TensorBoardLogger(path)], options={"log_every_n_steps": 1}
    ),
    "no step logged": S(loggers=CSVLogger, options={"log_every_n_steps": 0}),
    "a fast run": S(run=validated, options={"fast_dev_run": 4}),
    "barebones": S(options={"barebones": True}),
    "overfitting on purpose": S(run=validated, options={"overfit_batches": 2}),
    "anomalies detected": S(options={"detect_anomaly": True}),
    "unfrozen after an epoch": S(callbacks=lambda _: [Unfreezes()]),
    "frozen every other epoch": S(FreezesByHand),
    "a new head and optimizer": S(Swaps),
    "a data module": S(data=Data, run=stages_of_a_module),
    "loaders made anew": S(data=Data, options={"reload_dataloaders_every_n_epochs": 1}),
    "layers made late": S(Configured),
    "pruned": S(callbacks=lambda _: [cb.ModelPruning("l1_unstructured", amount=0.3)]),
    "a plateau": S(Plateau, run=validated),
    "a schedule": S(PerStep, callbacks=lambda _: [cb.LearningRateMonitor()], loggers=CSVLogger),
    "a simple profiler": S(options={"profiler": "simple"}),
    "a shared and a frozen layer": S(Shared),
    "complex weights": S(Complex),
    "sparse gradients": S(Sparse),
    "groups of parameters": S(GroupsOfParameters),
    "a summary": S(callbacks=lambda _: [cb.ModelSummary(2)]),
    "one batch": S(options={"limit_train_batches": 1, "max_epochs": 1}),
    "no batch": S(options={"limit_train_batches": 0}),
}
