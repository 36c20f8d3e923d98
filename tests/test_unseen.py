"""Steps that a monitor does not see, or sees too late: each is measured rightly, or the report says why not."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_gradhealth import GradHealth, GradientMonitor, HealthSession, NormClip
from lightning_gradhealth.ceilings import Ceiling


def hooked(act: Callable[[nn.Module], Callable[[nn.Parameter], None]]) -> Callable[[nn.Module], None]:
    """Attach what `act` makes for a model to each of its parameters, to run once a gradient is there."""

    def attach(model: nn.Module) -> None:
        run = act(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(run)

    return attach


def own_optimizers(kind: type[torch.optim.Optimizer]) -> Callable[[nn.Module], Callable[[nn.Parameter], None]]:
    def act(model: nn.Module) -> Callable[[nn.Parameter], None]:
        optimizers = {parameter: kind([parameter], lr=1e-2) for parameter in model.parameters()}

        def run(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        return run

    return act


def by_hand(model: nn.Module) -> Callable[[nn.Parameter], None]:
    def run(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.data -= 0.01 * parameter.grad
        parameter.grad = None

    return run


def from_the_module(model: nn.Module) -> None:
    """No hook on any parameter: the module's own hook steps all that is there."""
    optimizer = SGD(model.parameters(), lr=1e-2)

    def step(*_: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    model.on_after_backward = step  # type: ignore[assignment]


IN_BACKWARD = {
    "SGD": hooked(own_optimizers(SGD)),
    "Adam": hooked(own_optimizers(Adam)),
    "by hand, through .data": hooked(by_hand),
    "after backward, without hooks": from_the_module,
}


@pytest.mark.parametrize("how", IN_BACKWARD)
def test_gradients_gone_before_the_step_are_not_missing_ones(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, health = Classifier(), GradHealth()
    IN_BACKWARD[how](model)
    before = copy.deepcopy(model.state_dict())
    trainer(health, max_steps=60).fit(model, batches())
    assert not torch.equal(before["net.0.weight"], model.net[0].weight)
    report = health.report()
    assert "no_gradient" not in {finding.condition for finding in report.findings}
    assert not report.healthy
    assert "steps in backward" in " ".join(report.unwatched)
    assert "GradientMonitor" in " ".join(report.unwatched)
    assert sum("gone before" in record.message for record in caplog.records) == 1


def test_what_the_report_advises_measures_them() -> None:
    model, norms = mlp(), []
    monitor = GradientMonitor(model)
    optimizers = {parameter: SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        norms.append(float(parameter.grad.norm()))  # type: ignore[union-attr]
        monitor.observe(optimizers[parameter])
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for x, y in batches():
        nn.functional.cross_entropy(model(x), y).backward()
    seen = sorted(stats.total_norm for stats in monitor.flush().window)
    assert seen == pytest.approx(sorted(norms))
    assert len(seen) == 8 * len(list(model.parameters()))


@pytest.mark.parametrize("hook", ["none", "one that looks", "one that scales"])
def test_an_unused_layer_is_found_beside_hooks_that_take_nothing(hook: str) -> None:
    model, health = Classifier(), GradHealth()
    model.unused = nn.Linear(2, 2)
    for parameter in model.parameters():
        if hook == "one that looks":
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)
        if hook == "one that scales":
            parameter.register_hook(lambda gradient: gradient * 0.5)
    trainer(health, max_steps=40).fit(model, batches())
    (finding,) = [f for f in health.report().findings if f.condition == "no_gradient"]
    assert finding.layers == ("unused",)
    assert health.report().unwatched == ()


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
def test_steps_that_lightning_tells_nobody_of() -> None:
    class Bare(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    class Fused(Bare):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))

        def configure_optimizers(self) -> None:
            return None

    for kind in (Bare, Fused):
        health, model = GradHealth(), kind()
        if kind is Fused:
            IN_BACKWARD["SGD"](model)
        trainer(health, max_epochs=2).fit(model, batches())
        report = health.report()
        assert (report.healthy, report.steps, report.aside) == (False, 0, "")
        assert report.notes[0].startswith("no optimizer step was seen in 16 batches")


# --- clipped before the step ---


class Manual(Classifier):
    """Manual optimization, with something done to the gradients before the step."""

    def __init__(self, act: Callable[[Manual, Any], None], raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.act, self.raw = act, raw

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx) * 10
        if self.raw:
            loss.backward()
        else:
            self.manual_backward(loss)
        self.act(self, optimizer)
        optimizer.step()
        return loss


def by_hand_by_norm(module: pl.LightningModule, optimizer: Any) -> None:
    total = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    for parameter in module.parameters():
        parameter.grad.mul_(min(1.0, 0.5 / float(total)))


CLIPPING: dict[str, Callable[[Manual, Any], Any]] = {
    "clip_gradients": lambda module, optimizer: module.clip_gradients(optimizer, 0.5, "norm"),
    "clip_gradients, by value": lambda module, optimizer: module.clip_gradients(optimizer, 0.01, "value"),
    "clip_grad_norm_": lambda module, _: nn.utils.clip_grad_norm_(module.parameters(), 0.5),
    "clip_grad_norm_, far above": lambda module, _: nn.utils.clip_grad_norm_(module.parameters(), 1e3),
    "clip_grad_value_": lambda module, _: nn.utils.clip_grad_value_(module.parameters(), 0.01),
    "one's own": by_hand_by_norm,
}


@pytest.mark.parametrize("how", CLIPPING)
def test_clipping_before_the_step_is_said(how: str) -> None:
    health = GradHealth()
    trainer(health, max_steps=12).fit(Manual(CLIPPING[how]), batches())
    (note,) = [line for line in health.report().notes if "clip" in line]
    assert "since step 0" in note
    assert "NormClip" in note


def test_what_the_note_advises_measures_before_clipping() -> None:
    health = GradHealth(clip=NormClip(0.5))
    raw: list[float] = []

    def look(module: Manual, _: Any) -> None:
        raw.append(float(torch.stack([p.grad.norm() for p in module.parameters()]).norm()))

    trainer(health, max_steps=12).fit(Manual(look), batches())
    assert max(norm for _, norm in health.report().trend) == pytest.approx(max(raw), rel=1e-5)
    assert max(raw) > 0.6
    assert not [line for line in health.report().notes if "clip" in line]


def test_clipping_in_the_modules_own_hook_is_said() -> None:
    class Clips(Classifier):
        def on_after_backward(self) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)

    health = GradHealth()
    trainer(health, max_steps=12).fit(Clips(), batches())
    assert [line for line in health.report().notes if "clip" in line]


@pytest.mark.parametrize("limit", [0.5, 0.05])
def test_clipping_that_nobody_was_told_of_shows_in_the_norms(limit: float) -> None:
    model = Manual(lambda module, _: nn.utils.clip_grad_norm_(module.parameters(), limit), raw=True)
    health = GradHealth()
    trainer(health, max_steps=20).fit(model, batches())
    assert any(f"none above {limit:g}" in line for line in health.report().notes)

    net = mlp()
    optimizer, session = SGD(net.parameters(), lr=0.01), HealthSession(net)
    for _ in range(3):
        for x, y in batches():
            optimizer.zero_grad()
            (100 * nn.functional.cross_entropy(net(x), y)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), limit)
            session.apply(session.observe(optimizer))
            optimizer.step()
    state = session.state_dict()
    session.flush()
    assert any(f"none above {limit:g}" in line for line in session.report().notes)
    again = HealthSession(net)
    again.load_state_dict(state)
    assert again.report().notes == session.report().notes
    session.close()


def test_nothing_is_said_of_clipping_where_nobody_clips() -> None:
    scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    fits: list[tuple[pl.LightningModule, dict[str, Any]]] = [
        (Manual(lambda *_: None), {}),
        (Manual(lambda *_: None), scaled),
        (Manual(lambda *_: None, raw=True), {}),
        (Classifier(), {"accumulate_grad_batches": 3}),
        (Classifier(), scaled),
        (Classifier(), {"gradient_clip_val": 0.01}),
        (Classifier(None, torch.optim.LBFGS, lr=0.1, max_iter=3), {}),
    ]
    for model, options in fits:
        health = GradHealth(clip=NormClip(0.01))
        trainer(health, max_steps=12, **options).fit(model, batches())
        assert not [line for line in health.report().notes if "between backward" in line or "look clipped" in line]


def test_a_ceiling_is_round_and_often_reached() -> None:
    def limit(*norms: float) -> float | None:
        ceiling = Ceiling()
        for norm in norms:
            ceiling.add(norm)
        return ceiling.limit

    assert limit(*[0.3, 1.0] * 5) == 1.0
    assert limit(*[2.5, 1.0, 2.5 * (1 - 1e-5)] * 5) == 2.5
    assert limit(*[1.0] * 4, 0.3) is None  # not often enough
    assert limit(*[1.0] * 9, 1.1) is None  # exceeded
    assert limit(*[1.2345] * 20) is None  # a constant gradient
    assert limit(*[0.0] * 20, float("nan"), float("inf")) is None


# --- stops that are held back ---


class Breaks(Classifier):
    """One bad batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 3 else loss


@pytest.mark.parametrize("least", [{"min_epochs": 2}, {"min_steps": 14}, {}])
@pytest.mark.parametrize("asked", [{"on_non_finite": "stop"}, {"on_non_finite": "skip", "stop_on": "non_finite"}])
def test_a_stop_that_the_trainer_holds_back_says_so(
    least: dict[str, int], asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batches_run: list[int] = []
    counter = LambdaCallback(on_train_batch_end=lambda *_: batches_run.append(1))
    health = GradHealth(**asked)
    trainer(health, counter, log_every_n_steps=4, max_epochs=5, **least).fit(Breaks(), batches())
    said = [record.message for record in caplog.records if "ends the fit" in record.message]
    noted = [note for note in health.report().notes if note.startswith("stopping: at step 3")]
    assert len(said) == 1
    if not least:
        assert len(batches_run) == 4
        assert "lets it" not in said[0]
        assert not noted
        return
    ((name, value),) = least.items()
    assert f"as soon as Trainer({name}={value}) lets it" in noted[0]
    assert f"as soon as Trainer({name}={value}) lets it" in said[0]
    assert len(batches_run) == {"min_epochs": 16, "min_steps": 14}[name]


# --- no logging ---


@pytest.mark.parametrize("how", ["log_every_n_steps=0", "fast_dev_run", "barebones"])
def test_a_trainer_that_logs_no_step_is_judged_all_the_same(how: str, tmp_path: Path) -> None:
    model, health, logger = Classifier(), GradHealth(), CSVLogger(tmp_path)
    model.unused = nn.Linear(2, 2)
    if how == "barebones":
        run = pl.Trainer(barebones=True, max_epochs=15, callbacks=[health], accelerator="cpu")
    elif how == "fast_dev_run":
        run = trainer(health, logger=logger, fast_dev_run=30)
    else:
        run = trainer(health, logger=logger, log_every_n_steps=0, max_epochs=15)
    run.fit(model, batches(samples=240))
    report = health.report()
    assert report.steps == (30 if how == "fast_dev_run" else 450)
    assert "no_gradient" in report.conditions
    assert report.aside == ""
    assert [path for path in tmp_path.rglob("metrics.csv") if "gradhealth" in path.read_text()] == []


# --- copies ---


def test_the_report_of_a_deep_copy_is_had_from_the_original() -> None:
    mine = GradHealth(preflight=True)
    assert mine.report().steps == 0
    options = copy.deepcopy({"callbacks": [mine], "max_steps": 7})  # as a library does that keeps its arguments
    theirs = options["callbacks"][0]
    trainer(*options.pop("callbacks"), **options).fit(Classifier(), batches())
    assert theirs is not mine
    assert (mine.report().steps, theirs.report().steps) == (7, 7)
    assert "deep copy" in mine.report().notes[0]
    assert mine.report().findings == theirs.report().findings
    assert mine.preflight_report is theirs.preflight_report is not None
    assert not any("deep copy" in note for note in theirs.report().notes)

    last = copy.deepcopy(mine)
    trainer(last, max_steps=9).fit(Classifier(), batches())
    assert (mine.report().steps, theirs.report().steps, last.report().steps) == (9, 7, 9)  # the last one wins
    trainer(mine, max_steps=5).fit(Classifier(), batches())
    assert mine.report().steps == 5
    assert not any("deep copy" in note for note in mine.report().notes)
    copy.deepcopy(mine)
    trainer(copy.deepcopy(mine), max_steps=3).fit(Classifier(), batches())
    assert mine.report().steps == 5  # it has a run of its own


def test_the_report_of_a_copy_that_is_running_or_has_failed() -> None:
    mine = GradHealth()
    during: list[int] = []

    class Fails(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            during.append(mine.report().steps)
            if batch_idx == 4:
                raise RuntimeError("mine")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="mine"):
        trainer(copy.deepcopy(mine), max_steps=7).fit(Fails(), batches())
    assert during == [0, 1, 2, 3, 4]
    assert mine.report().steps == 4


def test_another_process_has_runs_of_its_own() -> None:
    mine = GradHealth()
    trainer(copy.deepcopy(mine), max_steps=3).fit(Classifier(), batches())
    assert mine.report().steps == 3
    assert pickle.loads(pickle.dumps(mine)).report().steps == 0


# --- a checkpoint from the end of a run ---


def test_a_run_resumed_at_its_end_reports_what_the_checkpoint_holds(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 10}  # 24 steps: a window is not over
    model = Classifier()
    model.unused = nn.Linear(2, 2)
    first = GradHealth()
    run = trainer(first, **options)
    run.fit(model, batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    found = first.report()
    assert "no_gradient" in found.conditions

    def fresh() -> Classifier:
        model = Classifier()
        model.unused = nn.Linear(2, 2)
        return model

    resumed = GradHealth()
    run = trainer(resumed, **options)
    run.fit(model := fresh(), batches(), ckpt_path=tmp_path / "end.ckpt")
    report = resumed.report()
    assert (report.findings, report.steps, report.layers) == (found.findings, 24, found.layers)
    assert "nothing was trained" in report.notes[0]
    assert left_hooks(model) == []
    run.save_checkpoint(tmp_path / "again.ckpt")

    tested = GradHealth()
    trainer(tested, **options).validate(with_validation(fresh()), batches(), ckpt_path=tmp_path / "again.ckpt")
    assert tested.report().findings == found.findings

    going_on = GradHealth()
    trainer(going_on, **{**options, "max_epochs": 4}).fit(fresh(), batches(), ckpt_path=tmp_path / "again.ckpt")
    assert going_on.report().steps == 32
    assert not any("nothing was trained" in note for note in going_on.report().notes)
    (finding,) = [f for f in going_on.report().findings if f.condition == "no_gradient"]
    assert finding.first_step == 0


def with_validation(model: Classifier) -> Classifier:
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[attr-defined]
    return model


def test_a_checkpoint_that_does_not_fit_is_told_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(GradHealth(), max_epochs=1)
    run.fit(Classifier(), batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    (key,) = [key for key in saved["callbacks"] if "GradHealth" in key]
    saved["callbacks"][key] = {"from": "another version"}
    torch.save(saved, tmp_path / "end.ckpt")
    caplog.set_level(logging.WARNING)
    health = GradHealth()
    trainer(health, max_epochs=1).fit(Classifier(), batches(), ckpt_path=tmp_path / "end.ckpt")
    assert sum("does not fit" in record.message for record in caplog.records) == 1
    assert (health.report().steps, health.report().healthy) == (0, False)


def left_hooks(model: nn.Module) -> list[str]:
    """Names of the modules on which hooks were left."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]
