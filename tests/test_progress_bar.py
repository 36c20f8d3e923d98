"""The line in the progress bar: what it says, in both of Lightning's bars, and that nothing else is changed by it."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from conftest import Classifier, batches, mlp
from counting import host_reads
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from torch import Tensor, nn

from lightning_gradhealth import GradHealth
from lightning_gradhealth.records import StepRecord
from lightning_gradhealth.rules import Rule, Verdict

ROOT = Path(__file__).parents[1]
BARS = (TQDMProgressBar, RichProgressBar)


class Spy(Callback):
    """What the bar is given at the end of each batch of training, and after each validation."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))


class Talkative(Classifier):
    """Logs a number to the bar, and has a validation."""

    name = "loss"

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log(self.name, loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)


class Sick(Rule):
    """Finds something from a step on, up to another."""

    condition = "always_sick"

    def check(self, record: StepRecord) -> Verdict | None:
        return Verdict("warning", "it is there", "wait") if 3 <= record.step < 7 else None


def sick_net() -> nn.Sequential:
    layers = [part for _ in range(12) for part in (nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def fit(bar: ProgressBar | None, *callbacks: Callback, model: pl.LightningModule | None = None, **options: Any) -> Any:
    options = {"max_epochs": 2, "log_every_n_steps": 2, "logger": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar is not None,
        callbacks=[*callbacks, *([bar] if bar is not None else [])],
        **options,
    )
    model = model or Talkative()
    trainer.fit(model, batches(), batches() if isinstance(model, Talkative) else None)
    return trainer


@pytest.mark.parametrize("bar", BARS)
def test_the_bar_says_healthy_or_what_is_wrong_since_when(bar: type[ProgressBar]) -> None:
    spy = Spy()
    fit(bar(), GradHealth(), spy)
    assert "grad_health" not in spy.shown[0]  # nothing is known before the first logged step
    assert spy.shown[-1]["grad_health"] == "healthy"
    assert isinstance(spy.shown[-1]["loss"], (float, Tensor))
    spy = Spy()
    fit(bar(), GradHealth(), spy, model=Talkative(sick_net()))
    assert spy.shown[-1]["grad_health"] == "vanishing gradients since 0"


@pytest.mark.parametrize("bar", BARS)
def test_nothing_but_the_bar_is_changed(bar: type[ProgressBar]) -> None:
    runs = []
    for callbacks in ((), (GradHealth(),)):
        torch.manual_seed(0)
        trainer = fit(bar(), *callbacks, model=Talkative(mlp()))
        metrics = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        runs.append([{name: float(value) for name, value in each.items()} for each in metrics])
    assert runs[0] == runs[1]
    assert "get_metrics" not in vars(trainer.progress_bar_callback)


def test_the_bar_reads_nothing_from_the_device() -> None:
    class Counter(Callback):
        def __init__(self) -> None:
            self.reads: list[int] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            with host_reads() as reads:
                trainer.progress_bar_callback.get_metrics(trainer, pl_module)
            self.reads.append(reads.count)

    counter = Counter()
    fit(TQDMProgressBar(), GradHealth(), counter, model=Classifier())
    assert counter.reads == [0] * 16


def test_what_is_over_is_healthy_again() -> None:
    spy = Spy()
    fit(TQDMProgressBar(), GradHealth(rules=[Sick()]), spy, log_every_n_steps=1, model=Classifier())
    lines = [shown.get("grad_health") for shown in spy.shown]
    assert lines[2] == "healthy"
    assert lines[4] == "always sick since 3"
    assert lines[-1] == "healthy again"


def test_the_line_stays_over_validation_and_comes_again_in_the_next_fit(tmp_path: Path) -> None:
    spy, health, bar = Spy(), GradHealth(), TQDMProgressBar()
    trainer = fit(bar, health, spy)
    of_validation = spy.shown[8]  # behind 8 batches
    assert of_validation["grad_health"] == "healthy"
    assert "val_loss" in of_validation
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for resumed in (None, tmp_path / "last.ckpt"):
        spy.shown.clear()
        trainer.fit_loop.max_epochs += 1
        trainer.fit(Talkative(), batches(), batches(), ckpt_path=resumed)
        assert spy.shown[-1]["grad_health"] == "healthy"
        assert "get_metrics" not in vars(bar)
    trainer.validate(Talkative(), batches(), verbose=False)


def test_an_interrupted_fit_leaves_the_bar_as_it_was() -> None:
    class Failing(Talkative):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 5:
                raise RuntimeError("no more")

    bar = TQDMProgressBar()
    with pytest.raises(RuntimeError, match="no more"):
        fit(bar, GradHealth(), model=Failing())
    assert "get_metrics" not in vars(bar)


def test_having_stepped_aside_it_says_so() -> None:
    class Aside(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 9:
                health.guard.step_aside("for the test")

    spy, health = Spy(), GradHealth()
    fit(TQDMProgressBar(), health, Aside(), spy, model=Classifier())
    assert spy.shown[7]["grad_health"] == "healthy"
    assert spy.shown[-1]["grad_health"] == "not watched"


def test_a_rule_that_failed_is_no_health() -> None:
    class Broken(Rule):
        condition = "broken"

        def check(self, record: StepRecord) -> None:
            raise ZeroDivisionError("oops")

    spy = Spy()
    fit(TQDMProgressBar(), GradHealth(rules=[Broken()]), spy, model=Classifier())
    assert spy.shown[-1]["grad_health"] == "partly watched"


def test_two_of_them_have_a_line_each() -> None:
    spy = Spy()
    trainer = fit(TQDMProgressBar(), GradHealth(), GradHealth(layers="parameter"), spy, model=Classifier())
    assert spy.shown[-1]["grad_health"] == spy.shown[-1]["grad_health-2"] == "healthy"
    assert "get_metrics" not in vars(trainer.progress_bar_callback)


def test_a_metric_of_the_users_with_this_name_is_shown() -> None:
    class Named(Talkative):
        name = "grad_health"

    spy = Spy()
    fit(TQDMProgressBar(), GradHealth(), spy, model=Named())
    assert isinstance(spy.shown[-1]["grad_health"], (float, Tensor))


class Formats(TQDMProgressBar):
    """Formats what it shows before anything else sees it."""

    def get_metrics(self, *arguments: Any) -> Any:
        return {name: f"{value:.3f}" for name, value in super().get_metrics(*arguments).items()}


class Draws(TQDMProgressBar):
    """Draws numbers, and cannot draw anything else."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        self.drawn = {name: f"{value:.3f}" for name, value in self.get_metrics(trainer, pl_module).items()}


class Bare(ProgressBar):
    """A bar of one's own."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        self.drawn = {name: f"{value:.3f}" for name, value in self.get_metrics(trainer, pl_module).items()}


class Strange(TQDMProgressBar):
    """Gives pairs, which tqdm takes as well."""

    def get_metrics(self, *arguments: Any) -> Any:
        return list(super().get_metrics(*arguments).items())


@pytest.mark.parametrize("bar", [Formats, Draws, Bare, Strange])
def test_bars_of_the_users_go_on(bar: type[ProgressBar]) -> None:
    spy = Spy()
    trainer = fit(bar(), GradHealth(), spy)
    assert trainer.global_step == 16
    shows = isinstance(spy.shown[-1], dict) and "grad_health" in spy.shown[-1]
    assert shows == (bar is Formats)


def test_without_a_bar_there_is_no_line() -> None:
    assert fit(None, GradHealth(), model=Classifier()).global_step == 16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bar: pickle.loads(pickle.dumps(bar))], ids=["copy", "pickle"])
def test_a_bar_can_be_copied_during_a_fit(copied: Any) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            mine = trainer.progress_bar_callback
            trainer_of, mine._trainer = mine._trainer, None
            self.copy = copied(mine)
            mine._trainer = trainer_of
            assert "get_metrics" in vars(mine)
            assert "grad_health" not in self.copy.get_metrics(trainer, pl_module)

    fit(TQDMProgressBar(), GradHealth(), Copies(), model=Classifier(), max_epochs=1)


def test_a_narrow_rich_bar_breaks_the_line_between_words() -> None:
    printed = io.StringIO()
    console = {"file": printed, "width": 80, "force_terminal": True, "color_system": None}
    fit(RichProgressBar(console_kwargs=console), GradHealth(), model=Talkative(sick_net()), max_epochs=1)
    drawn = [line.strip() for line in printed.getvalue().splitlines()]
    assert {"grad_health:", "vanishing"} <= set(drawn)
    assert any(line.startswith("gradients since 0") for line in drawn)
    assert not [line for line in drawn if line.endswith("…")]
    rich.reconfigure()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_progress_bar import *
for bar in BARS:
    fit(bar(), GradHealth(), model=Talkative(sick_net()), max_epochs=1)
"""


def test_it_is_seen_on_the_terminal() -> None:
    environment = {**os.environ, "COLUMNS": "200", "TTY_COMPATIBLE": "1", "PYTHONPATH": str(ROOT)}
    code = SCRIPT.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "grad_health=vanishing gradients since 0" in done.stdout
    assert "grad_health: vanishing gradients since 0" in done.stdout
