"""Everyday trainings: with a GradHealth nothing changes, every step is watched, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from everyday import SITUATIONS
from lightning_suite import left_behind
from torch.optim import Optimizer

from lightning_gradhealth import GradHealth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NOTHING_TO_SEE = {"no batch"}


class Steps(pl.Callback):
    """Counts what an optimizer does in the last fit, and keeps the losses."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.count, self.losses = 0, list[Any]()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.count += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone() if isinstance(outputs, dict) and outputs else outputs)


def train(name: str, path: Path, *watching: pl.Callback) -> tuple[dict[str, Any], torch.Tensor, Steps, list[str]]:
    case = SITUATIONS[name]
    torch.manual_seed(5)
    model, steps = case.model(), Steps()
    options: dict[str, Any] = {"max_epochs": 2, "default_root_dir": path, "logger": case.loggers(path), **case.options}
    if options.pop("barebones", False):
        run = pl.Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[*watching, steps])
    else:
        others = case.callbacks(path)
        options["enable_checkpointing"] = any(isinstance(other, pl.callbacks.Checkpoint) for other in others)
        run = trainer(*watching, steps, *others, **options)
    case.run(run, model, case.data())
    weights = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return weights, torch.get_rng_state(), steps, left_behind(model, run.optimizers)


@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_changes_and_every_step_is_watched(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    health = GradHealth()
    weights, random, steps, _ = train(name, tmp_path / "without")
    caplog.clear()
    weights_seen, random_seen, steps_seen, left = train(name, tmp_path / "with", health)
    assert weights.keys() == weights_seen.keys()
    assert all(torch.equal(weights[key], weights_seen[key]) for key in weights)
    assert torch.equal(random, random_seen)
    assert steps.count == steps_seen.count
    assert repr(steps.losses) == repr(steps_seen.losses)
    report = health.report()
    expected = steps_seen.count
    if name == "resumed within an epoch":  # what was before the checkpoint counts
        expected += 3
    assert report.steps == expected
    assert (expected > 0) is (name not in NOTHING_TO_SEE)
    assert report.aside == ""
    assert report.unwatched == ()
    assert left == []
    assert not [r.getMessage() for r in caplog.records if r.exc_info or "steps aside" in r.getMessage()]
