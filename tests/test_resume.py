"""A run stopped and resumed from its checkpoint ends with the same state and findings as the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradhealth import GradHealth, HealthSession, NormClip, Rule, StepRecord, Verdict
from lightning_gradhealth.pages import recorded


class CountsRecords(Rule):
    """A rule of the user's own, with a memory."""

    condition = "many_records"

    def check(self, record: StepRecord) -> Verdict | None:
        self.memory["records"] = self.memory.get("records", 0) + 1
        if self.memory["records"] < 9:
            return None
        return Verdict("info", f"{self.memory['records']} records", "none needed")


class Sick(Classifier):
    """Vanishes over depth, gets one NaN batch's worth of loss spike, and has an unused layer."""

    def __init__(self) -> None:
        super().__init__(mlp(depth=24), torch.optim.Adam, lr=1e-3)
        self.unused = nn.Linear(3, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # mid-epoch, Lightning cannot resume a loader where it stopped: the data follow the step instead
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(self.global_step))
        loss = super().training_step([x, x[:, :3].argmax(1)], batch_idx)
        return loss * 50 if self.global_step == 75 else loss


def same(left: Any, right: Any) -> bool:
    """Deep equality of states; NaN equals NaN."""
    if isinstance(left, Tensor):
        return torch.equal(left.double().nan_to_num(-1.0), right.double().nan_to_num(-1.0))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)


def fit(steps: int, every: int, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any) -> GradHealth:
    torch.manual_seed(0)
    health = GradHealth(rules=[CountsRecords()])
    run = trainer(
        health, *callbacks, max_steps=steps, log_every_n_steps=every, enable_checkpointing=bool(callbacks), **options
    )
    run.fit(Sick(), batches(samples=104), ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return health


def test_the_report_of_a_resumed_run_shows_all_of_it(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=60, save_top_k=-1, filename="{step}")
    fit(70, 10, saver)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    resumed, whole = (recorded(fit(120, 10, ckpt_path=path).report()) for path in (checkpoint, None))
    assert (resumed.first_step, resumed.last_step) == (whole.first_step, whole.last_step) == (9, 119)
    for name in ("grad_norm", "forward_rms"):
        ours, theirs = resumed.load(name), whole.load(name)
        assert ours.steps.tolist() == theirs.steps.tolist()
        assert ours.values.tolist() == theirs.values.tolist()
    assert [f["first_step"] for f in resumed.findings] == [f["first_step"] for f in whole.findings]


@pytest.mark.parametrize("every", [7, 10, 50])  # 60 lies inside a window of 7 and of 50, and on the border of 10
@pytest.mark.parametrize("how", ["saved after the fit", "saved by ModelCheckpoint", "with accumulation"])
def test_resumed_equals_unbroken(tmp_path: Path, every: int, how: str) -> None:
    options = {"accumulate_grad_batches": 2} if how == "with accumulation" else {}
    whole = fit(120, every, **options)
    if how == "saved by ModelCheckpoint":
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=60, save_top_k=-1, filename="{step}")
        fit(60, every, saver, **options)
        (checkpoint,) = tmp_path.glob("*.ckpt")
    else:
        torch.manual_seed(0)
        health = GradHealth(rules=[CountsRecords()])
        first = trainer(health, max_steps=60, log_every_n_steps=every, **options)
        first.fit(Sick(), batches(samples=104))
        checkpoint = tmp_path / "after.ckpt"
        first.save_checkpoint(checkpoint)
    resumed = fit(120, every, ckpt_path=checkpoint, **options)
    assert {"vanishing_gradients", "no_gradient", "loss_spike"} <= {f.condition for f in whole.report().findings}
    assert resumed.report().findings == whole.report().findings
    assert same(resumed.state_dict(), whole.state_dict())
    assert resumed.report() == whole.report()


def test_the_state_is_primitives_and_tensors(tmp_path: Path) -> None:
    state = fit(30, 7).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), state)


def test_a_state_that_does_not_fit_is_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    health = GradHealth(clip=NormClip(1e-3))
    run = trainer(health, max_steps=12)
    health.setup(run, Classifier(), "fit")
    health.load_state_dict({"from": "another version"})
    health.setup = lambda *_, **__: None  # type: ignore[method-assign]
    run.fit(Classifier(), batches())
    assert run.global_step == 12
    report = health.report()
    assert (report.aside, report.steps, report.clipped_steps) == ("", 12, 12)  # it does what was asked for
    assert sum("does not fit" in record.message for record in caplog.records) == 1


def test_stop_on_does_not_stop_again_for_what_was_before_the_checkpoint(tmp_path: Path) -> None:
    def data(bad: int | None) -> DataLoader:
        pairs = enumerate(batches(samples=240))
        return DataLoader([[x * (float("nan") if i == bad else 1.0), y] for i, (x, y) in pairs], batch_size=None)

    options = {"log_every_n_steps": 4, "max_epochs": 1}
    first = GradHealth(on_non_finite="skip", stop_on="non_finite")
    run = trainer(first, **options)
    run.fit(model := Classifier(), data(bad=2))
    assert run.global_step == 4
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    second = GradHealth(on_non_finite="skip", stop_on="non_finite")
    run = trainer(second, **{**options, "max_epochs": 3})
    run.fit(model, data(bad=None), ckpt_path=tmp_path / "stopped.ckpt")
    assert run.global_step > 30
    assert "non_finite" in second.report().conditions
    third = GradHealth(on_non_finite="skip", stop_on="non_finite")
    run = trainer(third, **{**options, "max_epochs": 3})
    run.fit(model, data(bad=20), ckpt_path=tmp_path / "stopped.ckpt")
    assert run.global_step < 30


def test_session_state_in_a_plain_loop() -> None:
    def loop(session: HealthSession, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
            if step % 8 == 7:
                session.flush()

    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = mlp(depth=20)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    model, optimizer = parts()
    whole = HealthSession(model, probe_every_n_steps=5)
    loop(whole, model, optimizer, range(40))
    model, optimizer = parts()
    first = HealthSession(model, probe_every_n_steps=5)
    loop(first, model, optimizer, range(13))
    second = HealthSession(model, probe_every_n_steps=5)
    second.load_state_dict(first.state_dict())
    first.close()
    loop(second, model, optimizer, range(13, 40))
    assert same(second.state_dict(), whole.state_dict())
    assert second.report() == whole.report()
