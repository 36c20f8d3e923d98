"""GradHealth in real Trainer fits: what it finds, what it survives, what it leaves behind."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradhealth import (
    Condition,
    GradHealth,
    HealthSession,
    Rule,
    Severity,
    StepRecord,
    Thresholds,
    init_weights,
)
from lightning_gradhealth.judgement import Judgement


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    run = trainer(*callbacks, **{"max_steps": 23, **options})
    run.fit(module, batches())
    return run


# --- what it finds ---


def test_a_healthy_run_has_no_finding() -> None:
    health, module = GradHealth(), Classifier(mlp(6), torch.optim.Adam, lr=1e-3)
    init_weights(module, scheme="he", seed=0)
    fit(module, health, max_steps=200)
    report = health.report()
    assert report.healthy
    assert not report.findings
    assert (report.step, report.steps) == (199, 200)
    assert [layer.name for layer in report.layers] == ["net.0", "net.2", "net.4", "net.6", "net.8", "net.10"]
    for layer in report.layers:
        assert None not in (layer.grad_norm, layer.norm_ratio, layer.weight_norm, layer.update_to_weight)


def test_vanishing_is_found_and_cured() -> None:
    sick = GradHealth()
    fit(Classifier(mlp(24), torch.optim.Adam, lr=1e-3), sick)
    assert Condition.VANISHING_GRADIENTS in sick.report().conditions
    cured, module = GradHealth(), Classifier(mlp(24), torch.optim.Adam, lr=1e-3)
    init_weights(module, scheme="he", seed=0)
    fit(module, cured)
    assert cured.report().healthy


class Poisoned(Classifier):
    """One bad batch, or an exception, at a given step."""

    def __init__(self, nan_at: int = -1, raise_at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.nan_at, self.raise_at, self.error = nan_at, raise_at, error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.raise_at:
            raise self.error("stop here")
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step == self.nan_at else loss


def test_a_nan_batch_is_dated_exactly() -> None:
    health = GradHealth()
    fit(Poisoned(nan_at=13), health)
    (finding,) = [f for f in health.report().findings if f.condition == Condition.NON_FINITE]
    assert (finding.first_step, finding.severity) == (13, Severity.CRITICAL)
    assert health.report().non_finite_steps == 10


def test_unused_layers_and_frozen_ones() -> None:
    module, health = Classifier(mlp(4)), GradHealth()
    module.unused = nn.Linear(3, 3)
    for parameter in module.net[0].parameters():
        parameter.requires_grad_(False)
    fit(module, health, max_steps=30)
    report = health.report()
    assert report.conditions == {Condition.NO_GRADIENT}
    assert report.findings[0].layers == ("unused",)
    assert [layer.name for layer in report.layers if layer.frozen] == ["net.0"]


class Backbone(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp(6))
        self.backbone, self.head = self.net[:8], self.net[8:]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


def test_a_finetuning_callback_that_unfreezes_later() -> None:
    health = GradHealth(probe_every_n_steps=2)
    fit(
        Backbone(), health, BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False, train_bn=True), max_steps=40
    )
    report = health.report()
    assert report.healthy
    assert not any(layer.frozen for layer in report.layers)
    assert all(layer.grad_norm for layer in report.layers)


# --- x values, accumulation, losses ---


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_steps_are_the_loggers_x_and_losses_are_whole(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StepRecord] = []
    judge = Judgement.add
    monkeypatch.setattr(Judgement, "add", lambda self, record: seen.append(record) or judge(self, record))  # type: ignore[func-returns-value]
    module, losses = Classifier(), []
    step = module.training_step

    def recorded(batch: list[Tensor], batch_idx: int) -> Tensor:
        losses.append(step(batch, batch_idx))
        return losses[-1]

    module.training_step = recorded  # type: ignore[method-assign]
    run = fit(module, GradHealth(), max_steps=20, accumulate_grad_batches=accumulate)
    window = [s for record in seen for s in record.window]
    assert [s.step for s in window] == list(range(20)) == list(range(run.global_step))
    epoch = [range(i, min(i + accumulate, 8)) for i in range(0, 8, accumulate)]  # the last group may be short
    groups = [[8 * e + i for i in group] for e in range(20) for group in epoch][:20]
    expected = [sum(losses[i].item() for i in group) / accumulate for group in groups]
    assert [s.loss for s in window] == pytest.approx(expected, rel=1e-6)


class Manual(Classifier):
    """Manual optimization, with a loss that only the log knows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("my_loss", loss)


@pytest.mark.parametrize("key", [None, "my_loss"])
def test_manual_optimization(key: str | None) -> None:
    health, module = GradHealth(loss_key=key), Manual()
    fit(module, health)
    assert health.report().steps == 23
    assert "loss: unavailable" not in health.report().notes  # what is logged under a name with "loss" serves
    spikes = health.state_dict()["judgement"]["rules"]["LossSpike:loss_spike:0"]["memory"]
    assert spikes["of0"]["recent"] == pytest.approx(module.losses[:20])  # three are pending


class Two(Classifier):
    """Two networks, two optimizers; what it logs is old, or the sum, or nothing."""

    def __init__(self, log: str = "", dying: float = 0.0, parts: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.log_what, self.dying, self.parts = log, dying, parts
        self.generator, self.critic = nn.Linear(8, 1), nn.Linear(8, 1)
        self.losses: list[list[float]] = [[], []]

    def critic_loss(self, x: Tensor) -> Tensor:
        return (self.critic(x) - x[:, :1]).square().mean()

    def generator_loss(self, x: Tensor) -> Tensor:
        score = self.generator(x) - self.dying * self.global_step / 2
        return -nn.functional.softplus(score).mean() if self.dying else (score - x[:, 1:2]).square().mean() + 1.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        last = []
        for number, (optimizer, loss_of) in enumerate(
            zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True)
        ):
            optimizer.zero_grad()
            losses = [loss_of(part) / self.parts for part in batch[0].chunk(self.parts)]
            for loss in losses:
                self.manual_backward(loss)
            optimizer.step()
            last.append(torch.stack(losses).sum().detach())
            self.losses[number].append(last[-1].item())
        generator, critic = last
        if self.log_what == "both":
            self.log_dict({"generator_loss": generator, "critic_loss": critic})
        elif self.log_what == "now and then" and batch_idx % 7 == 0:
            self.log("loss", critic)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.generator, self.critic)]


class Losses(Rule):
    """Keeps the losses of all steps."""

    condition = "losses"

    def check(self, record: StepRecord) -> None:
        for step in record.window:
            self.memory.setdefault(f"of{step.optimizer}", []).append(step.loss)


@pytest.mark.parametrize("log", ["", "both", "now and then"])
@pytest.mark.parametrize("parts", [1, 2])
def test_in_manual_optimization_a_step_has_the_loss_of_its_own_backward_passes(log: str, parts: int) -> None:
    module, health = Two(log, parts=parts), GradHealth(rules=[Losses()])
    fit(module, health, max_epochs=3, max_steps=-1, log_every_n_steps=8)
    kept = health.state_dict()["judgement"]["rules"]["Losses:losses:0"]["memory"]
    for number, losses in enumerate(module.losses):
        assert kept[f"of{number}"] == pytest.approx(losses)


@pytest.mark.parametrize("log", ["", "both", "now and then"])
def test_a_generator_whose_gradient_dies_is_found_whatever_is_logged(log: str) -> None:
    health = GradHealth()
    fit(Two(log, dying=0.3), health, max_epochs=8, max_steps=-1)
    (finding,) = [f for f in health.report().findings if f.condition == Condition.VANISHING_GRADIENTS]
    assert finding.layers == ("generator",)
    assert finding.evidence["norm_now"] < 1e-3 * finding.evidence["norm_before"]


class Named(Two):
    """Steps by `loss.backward()`: of the losses nothing is known but what is logged, under such names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for number, (optimizer, loss_of) in enumerate(
            zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True)
        ):
            optimizer.zero_grad()
            loss = loss_of(batch[0])
            loss.backward()
            optimizer.step()
            self.losses[number].append(loss.item())
            if len(self.names) > number:
                self.log(self.names[number], loss)


@pytest.mark.parametrize(
    "names",
    [("g_loss", "d_loss"), ("loss_Gen", "loss_critic"), ("train/GeneratorLoss", "adv_loss"), ("x_loss", "c_loss")],
)
def test_logged_losses_are_those_of_the_optimizers_that_they_are_named_after(names: tuple[str, str]) -> None:
    module, health = Named(*names), GradHealth(rules=[Losses()])
    fit(module, health, max_epochs=3, max_steps=-1, log_every_n_steps=8)
    kept = health.state_dict()["judgement"]["rules"]["Losses:losses:0"]["memory"]
    for number, losses in enumerate(module.losses):
        assert kept[f"of{number}"] == pytest.approx(losses)


@pytest.mark.parametrize("names", [("loss",), ("first_loss", "second_loss"), ("g_loss",)])
def test_losses_that_could_be_anybodys_are_summed(names: tuple[str, ...]) -> None:
    module, health = Named(*names), GradHealth(rules=[Losses()])
    fit(module, health, max_epochs=2, max_steps=-1, log_every_n_steps=8)
    kept = health.state_dict()["judgement"]["rules"]["Losses:losses:0"]["memory"]
    whole = [sum(both) for both in zip(*module.losses[: len(names)], strict=True)]
    assert kept["of0"] == pytest.approx(whole)
    assert kept["of1"] == pytest.approx(whole)


@pytest.mark.parametrize("log", ["", "both", "now and then"])
def test_a_loss_that_converges_to_what_is_left_is_no_dying(log: str) -> None:
    health = GradHealth()
    fit(Two(log), health, max_epochs=12, max_steps=-1)
    assert Condition.VANISHING_GRADIENTS not in health.report().conditions


# --- what it survives ---


class PerSample(Classifier):
    """Steps by hand and returns a loss for each sample."""

    def __init__(self, shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.shape = shape
        self.means: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none").reshape(self.shape)
        self.optimizers().zero_grad()
        losses.mean().backward()  # not by manual_backward, which would tell the loss of the step
        self.optimizers().step()
        self.means.append(losses.mean().item())
        return {"loss": losses, "more": 0} if losses.ndim > 1 else losses


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (2, -1)])
def test_losses_per_sample_count_by_their_mean(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []
    add_loss = HealthSession.add_loss
    monkeypatch.setattr(
        HealthSession, "add_loss", lambda self, loss: (seen.append(float(loss)), add_loss(self, loss))[1]
    )
    module, health = PerSample(shape), GradHealth()
    fit(module, health, max_steps=8)
    assert seen == pytest.approx(module.means)
    said = [note for note in health.report().notes if note.startswith("loss: ")]
    assert said == ["loss: the mean of what training_step returned, a loss for each sample"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_dies_at_step_7_has_its_report(error: type[BaseException]) -> None:
    module, health = Poisoned(raise_at=7, error=error), GradHealth()
    module.net = mlp(24)
    with pytest.raises((error, SystemExit)):  # Lightning turns Ctrl-C into an exit
        fit(module, health, log_every_n_steps=50)
    report = health.report()
    assert (report.step, report.steps) == (6, 7)
    assert Condition.VANISHING_GRADIENTS in report.conditions
    assert not any(module._forward_pre_hooks for module in module.modules())


def test_the_partial_window_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    fit(Classifier(mlp(24)), GradHealth(), max_steps=7, log_every_n_steps=50)
    assert sum("vanishing_gradients" in record.message for record in caplog.records) == 1


def test_the_partial_window_reaches_the_loggers(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(Classifier(mlp(24)), GradHealth(), max_steps=7, log_every_n_steps=50, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    (point,) = events.Scalars("gradhealth/findings")
    assert (point.step, point.value) == (6, 1.0)
    (text,) = events.Tensors("gradhealth/findings/text_summary")
    assert b"vanishing" in text.tensor_proto.string_val[0]


def test_findings_do_not_tear_the_progress_bar() -> None:
    bar = TQDMProgressBar()
    lines: list[str] = []
    bar.print = lambda *parts, **_: lines.append(" ".join(map(str, parts)))  # type: ignore[method-assign]
    fit(Classifier(mlp(24)), GradHealth(), bar, enable_progress_bar=True)
    assert sum("vanishing_gradients" in line for line in lines) == 1


class Failing(GradHealth):
    """Fails in its own code at the third step."""

    def _log(self, trainer: pl.Trainer, record: Any) -> None:
        raise OSError("no space left on device")


def test_its_own_failure_is_told_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    health = Failing()
    run = fit(Classifier(), health)
    assert run.global_step == 23
    told = [record for record in caplog.records if "steps aside" in record.message]
    assert len(told) == 1
    assert "no space left on device" in told[0].message
    assert health.report().aside == "OSError: no space left on device"
    assert not health.report().healthy


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"barebones": True, "enable_progress_bar": None, "log_every_n_steps": None, "enable_model_summary": None},
        {"logger": False},
        {"log_every_n_steps": 1},
        {"log_every_n_steps": 10_000},
        {"num_sanity_val_steps": 2},
        {"precision": "bf16-true"},
        {"overfit_batches": 1},
        {"limit_train_batches": 2},
        {"max_steps": 0},
    ],
    ids=str,
)
def test_trainer_options(options: dict[str, Any]) -> None:
    health, module = GradHealth(), Classifier()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run = trainer(health, **{"max_steps": 12, **options})
    run.fit(module, batches(), batches(samples=16))
    report = health.report()
    assert report.steps == run.global_step
    assert not report.aside
    assert report.healthy == (run.global_step > 0)


def test_a_step_without_a_loss() -> None:
    class Skips(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    health = GradHealth()
    fit(Skips(), health, max_epochs=3, max_steps=-1)
    assert not health.report().aside
    assert health.report().healthy


def test_fit_twice_is_two_runs_or_one_that_goes_on() -> None:
    health, module = GradHealth(), Classifier()
    run = trainer(health, max_epochs=1)
    run.fit(module, batches())
    assert (health.report().step, health.report().steps) == (7, 8)
    run.fit_loop.max_epochs = 2
    run.fit(module, batches())
    assert (health.report().step, health.report().steps) == (15, 8)
    fit(Classifier(mlp(2)), health, max_steps=3)
    assert [layer.name for layer in health.report().layers] == ["net.0", "net.2"]


def test_an_unused_branch_is_dated_by_its_first_step() -> None:
    module, health = Classifier(), GradHealth()
    module.unused = nn.Linear(3, 3)
    fit(module, health, max_steps=60, log_every_n_steps=50)
    (finding,) = health.report().findings
    assert (finding.condition, finding.first_step) == (Condition.NO_GRADIENT, 0)


def test_an_explosion_at_initialisation_is_named_although_the_next_step_is_nan() -> None:
    module, health = Classifier(mlp(30), lr=0.1), GradHealth()
    init_weights(module, scheme="he", gamma=1.6, seed=0)
    fit(module, health)
    assert {Condition.EXPLODING_GRADIENTS, Condition.NON_FINITE} <= health.report().conditions


def test_the_model_is_let_go_after_the_fit(tmp_path: Path) -> None:
    health, module = GradHealth(), Classifier()
    run = fit(module, health)
    before = health.report()
    run.save_checkpoint(tmp_path / "after.ckpt")
    held = weakref.ref(module)
    del run, module
    gc.collect()
    assert held() is None
    assert health.report() == before


class SavesEarly(Classifier):
    """Copies and saves its network before the first batch, as EMA callbacks do."""

    def on_train_start(self) -> None:
        self.__dict__["twin"] = copy.deepcopy(self.net)
        torch.save(self.net, io.BytesIO())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.on_train_start()


def test_models_are_copied_and_saved_while_they_are_watched() -> None:
    health, module = GradHealth(), SavesEarly()
    fit(module, health)
    assert health.report().healthy


def test_a_rule_with_a_memory_that_no_checkpoint_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    health = GradHealth(rules=[Hoarder()])
    run = fit(Classifier(), health)
    run.save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert any("the state of the rule Hoarder is not saved" in record.message for record in caplog.records)


class Hoarder(Rule):
    condition = "hoard"

    def check(self, record: StepRecord) -> None:
        self.memory.setdefault("all", collections.deque()).append(record.step)


def test_validation_and_test_leave_the_report_alone() -> None:
    health, module = GradHealth(), Classifier()
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run = fit(module, health)
    before = health.report()
    run.test(module, batches(), verbose=False)
    assert health.report() == before


def test_the_tuner_and_a_fit_after_it(tmp_path: Path) -> None:
    class Tunable(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    health, module = GradHealth(), Tunable()
    run = trainer(health, max_steps=16, default_root_dir=tmp_path)
    Tuner(run).lr_find(module, batches(), num_training=12, update_attr=False)
    run.fit(module, batches())
    assert health.report().steps == 16
    assert not health.report().aside
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_compiled_models_keep_their_names_and_say_what_is_hidden() -> None:
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    health = GradHealth()
    fit(module, health)
    report = health.report()
    assert [layer.name for layer in report.layers] == ["net.0", "net.2", "net.4", "net.6"]
    assert any("registration order" in note for note in report.notes)


def test_several_instances_and_a_checkpoint_of_both(tmp_path: Path) -> None:
    fine, coarse = GradHealth(layers="parameter"), GradHealth(layers=1)
    run = fit(Classifier(), fine, coarse)
    assert len(fine.report().layers) == 8
    assert len(coarse.report().layers) == 1
    run.save_checkpoint(tmp_path / "both.ckpt")
    state = torch.load(tmp_path / "both.ckpt", weights_only=True)
    assert {fine.state_key, coarse.state_key} <= set(state["callbacks"])


def test_pickling_leaves_the_process_behind() -> None:
    health = GradHealth(ignore="loss_spike", thresholds=Thresholds(time_ratio=10.0))
    fit(Classifier(), health)
    for other in (pickle.loads(pickle.dumps(health)), copy.deepcopy(health)):
        assert other.thresholds == health.thresholds
        assert other.ignore == {"loss_spike": ".*"}
        assert other.report() == health.report()
        fit(Classifier(), other)
        assert other.report().steps == 23


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Gradients are reduced before they are seen: both ranks record the same norms, on different data."""
    health = GradHealth()
    run = trainer(health, Ranks(tmp_path), max_steps=12, devices=2, strategy="ddp_spawn", use_distributed_sampler=True)
    run.fit(Classifier(), batches())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["norms"] == second["norms"]
    assert first["loss"] != second["loss"]
    assert first["steps"] == second["steps"] == 12
    assert "nothing was observed in this process" in health.report().notes[0]  # worker state never returns


class Ranks(pl.Callback):
    """Writes what each rank has seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (health,) = [c for c in trainer.callbacks if isinstance(c, GradHealth)]
        report = health.report()
        (loss,) = {step.loss for step in health._session._last.window[-1:]}  # type: ignore[union-attr]
        state = {"norms": [layer.grad_norm for layer in report.layers], "steps": report.steps, "loss": loss}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def test_the_other_package_of_lightning() -> None:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    health = GradHealth()
    run = pytorch_lightning.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[health],  # type: ignore[list-item]
    )
    run.fit(Module(), batches())
    assert health.report().steps == 12
    assert health.report().healthy


def test_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    config = tmp_path / "config.yaml"
    config.write_text(
        """
seed_everything: false
trainer:
  accelerator: cpu
  max_steps: 8
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gradhealth.GradHealth
      init_args:
        probe_every_n_steps: 3
        layers: [net]
        log_layers: 4
        ignore: {loss_spike: ".*"}
        thresholds: {time_ratio: 500.0}
        rules:
          - class_path: lightning_gradhealth.rules.loss.LossSpike
"""
    )
    cli = LightningCLI(Classifier, args=["--config", str(config)], run=False, save_config_callback=None)
    (health,) = [c for c in cli.trainer.callbacks if isinstance(c, GradHealth)]
    assert health.thresholds.time_ratio == 500.0
    cli.trainer.fit(cli.model, batches())
    assert health.report().steps == 8


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"probe_every_n_steps": 0},
            ValueError,
            "probe_every_n_steps must be None or an int >= 1, got 0; leave it out to follow the Trainer",
        ),
        (
            {"probe_every_n_steps": 2.5},
            TypeError,
            "probe_every_n_steps must be None or an int >= 1, got 2.5; leave it out",
        ),
        ({"layers": 0}, ValueError, "layers as a depth must be an int >= 1, got 0"),
        ({"log_layers": -1}, ValueError, r'log_layers must be "auto" .* got -1'),
        ({"log_layers": "all"}, ValueError, r'log_layers must be "auto" .* got \'all\''),
        ({"rules": ["vanishing"]}, TypeError, "rules must be instances of subclasses of Rule .* got 'vanishing'"),
        ({"ignore": "dead_unit"}, ValueError, "ignore: 'dead_unit' is no condition; the conditions are adaptive_cl"),
        ({"rules": 3}, TypeError, "rules must be a sequence of Rule instances, got 3"),
        ({"ignore": 3}, TypeError, "ignore must be a condition, several, or condition -> regex, got 3"),
        ({"ignore": {"loss_spike": "["}}, ValueError, r"ignore: '\[' is not a valid regular expression"),
        ({"thresholds": {"time_ratio": 3}}, TypeError, "thresholds must be a Thresholds, got .*; e.g. Thresholds"),
        ({"loss_key": 3}, TypeError, "loss_key must be the name of a logged metric or None, got 3"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradHealth(**options)


def test_a_rescued_run_goes_on_and_is_healthy() -> None:
    """README's recipe: what the gate has brought down is neither an explosion nor a reason to stop."""
    batch_of_30 = [[x * (1e4 if i == 30 else 1.0), y] for i, (x, y) in enumerate(batches(samples=640))]
    data = DataLoader(batch_of_30, batch_size=None)

    def fit(clip: str | None) -> tuple[int, GradHealth]:
        torch.manual_seed(0)
        health = GradHealth(clip=clip, on_non_finite="skip", stop_on="exploding_gradients")
        run = trainer(health, max_epochs=1)
        run.fit(Classifier(lr=1e-3), data)
        return run.global_step, health

    stopped, sick = fit(None)
    assert stopped < 40
    assert "exploding_gradients" in sick.report().conditions
    steps, saved = fit("adaptive")
    report = saved.report()
    assert (steps, report.steps) == (80, 80)
    assert "exploding_gradients" not in report.conditions
    (finding,) = [f for f in report.findings if f.condition == "adaptive_clipping"]
    assert finding.first_step == 30
    assert 1 <= report.clipped_steps < 60
