"""`on_non_finite`: what is done about NaN and Inf, what it leaves untouched, and how the origin is named."""

from __future__ import annotations

import copy
import io
import logging
from collections import UserDict, deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from conftest import Classifier, trainer
from lightning.pytorch.plugins import MixedPrecision
from test_host_reads import CountReads
from test_resume import same
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader

import lightning_gradhealth as gh
from lightning_gradhealth import Condition, GradHealth, HealthSession, Severity, Thresholds, _lightning
from lightning_gradhealth.errors import GradHealthError, NonFiniteGradientError
from lightning_gradhealth.response import Response

Batch = list[Tensor]
ORIGIN = "the first output that is not finite is that of net.2 (Fragile); healthy before it: net.0, net.1"


class Fragile(nn.Module):
    """Divides by zero where its input is large."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax() < 50)


def fragile(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Fragile(), nn.Dropout(dropout), nn.Linear(16, 3))


def data(steps: int, bad: Sequence[int] = (), without_bad: bool = False, size: int = 8) -> list[Batch]:
    """Batches of which the bad ones are huge; or the same without them."""
    x = torch.randn(steps, size, 8, generator=torch.Generator().manual_seed(2))
    kept = [step for step in range(steps) if not (without_bad and step in bad)]
    return [[x[step] * (1e4 if step in bad else 1.0), x[step, :, :3].argmax(1)] for step in kept]


def fit(module: pl.LightningModule, batches: list[Batch], *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    run = trainer(*callbacks, **{"max_epochs": 1, **options})
    run.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return run


def everything(optimizer: Optimizer) -> Any:
    """All parameters and all that an optimizer remembers of them, by position."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy([(p.detach(), dict(optimizer.state.get(p, {}))) for p in parameters])


class Around(pl.Callback):
    """What a step changes: parameters and optimizer state before and after the bad one."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, i: int) -> None:
        if i == self.at:
            self.seen.append(everything(trainer.optimizers[0]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        assert "found_inf" not in vars(trainer.optimizers[0])
        if i == self.at:
            self.seen.append(everything(trainer.optimizers[0]))


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.05}),
    "SGD momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "foreach": False}),
    "SGD dampening, fused": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "fused": True}),
    "SGD Nesterov, foreach": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD, fused": (SGD, {"lr": 0.05, "weight_decay": 0.1, "fused": True}),
    "Adam": (Adam, {"lr": 1e-2, "foreach": False}),
    "Adam, foreach": (Adam, {"lr": 1e-2, "foreach": True}),
    "Adam, fused": (Adam, {"lr": 1e-2, "fused": True}),
    "Adam, amsgrad": (Adam, {"lr": 1e-2, "amsgrad": True}),
    "Adam, amsgrad, fused": (Adam, {"lr": 1e-2, "amsgrad": True, "fused": True}),
    "AdamW": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW, fused": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "Adagrad": (Adagrad, {"lr": 1e-2, "lr_decay": 0.1}),
    "Adagrad, fused": (Adagrad, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "RMSprop": (RMSprop, {"lr": 1e-3, "momentum": 0.9}),
}


def make(name: str = "Adam", net: nn.Module | None = None) -> Classifier:
    kind, options = OPTIMIZERS[name]
    return Classifier(net or fragile(), kind, **options)


def test_warn_dates_the_step_and_claims_nothing() -> None:
    health = GradHealth()
    fit(make("SGD"), data(12, bad=[7]), health)
    (finding,) = [f for f in health.report().findings if f.condition is Condition.NON_FINITE]
    assert (finding.first_step, finding.severity) == (7, Severity.CRITICAL)
    assert "origin unknown" in finding.summary
    assert "Fragile" not in str(finding) + str(finding.evidence)
    assert 'on_non_finite="skip"' in finding.remedy
    assert (health.report().non_finite_steps, health.report().skipped_steps) == (5, 0)


@pytest.mark.parametrize("bad", [[5], [0], [0, 1, 6]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_everything_as_it_was(name: str, bad: list[int]) -> None:
    health, around, model = GradHealth(on_non_finite="skip"), Around(bad[-1]), make(name)
    run = fit(model, data(12, bad), health, around)
    report = health.report()
    assert not report.aside
    if bad[-1]:
        before, after = around.seen
        assert same(before, after)
    without, twin = fit(bare := make(name), data(12, bad, without_bad=True)), bare
    assert same(everything(run.optimizers[0]), everything(without.optimizers[0]))
    assert same(model.state_dict(), twin.state_dict())
    assert all(p.isfinite().all() for p in model.parameters())
    assert (report.skipped_steps, report.non_finite_steps) == (len(bad), len(bad))
    (finding,) = [f for f in report.findings if f.condition is Condition.NON_FINITE]
    assert (finding.severity, finding.first_step, finding.evidence["skipped"]) == (Severity.WARNING, bad[0], len(bad))
    assert report.conditions == {Condition.NON_FINITE}
    if "fused" not in name:
        assert finding.evidence["origin"] == ORIGIN
        assert ORIGIN in finding.summary


def reads(name: str, batches: list[Batch], **options: Any) -> list[int]:
    """Host reads of each step beyond those of the bare run."""
    counts = []
    for callbacks in ([], [GradHealth(**options)]):
        counter = CountReads()
        fit(make(name), batches, *callbacks, counter, log_every_n_steps=4)
        counts.append(counter.per_step)
    return [seen - bare for bare, seen in zip(*counts, strict=True)]


LOGGED = [int((step + 1) % 4 == 0) for step in range(12)]


@pytest.mark.parametrize("name", ["Adam, fused", "AdamW, fused", "SGD, fused", "Adagrad, fused"])
@pytest.mark.parametrize("clip", [None, "adaptive", gh.NormClip(0.1)], ids=repr)
def test_fused_optimizers_skip_without_a_read(name: str, clip: Any) -> None:
    assert reads(name, data(12), on_non_finite="skip", clip=clip) == LOGGED


def test_the_first_step_of_fused_momentum_is_read() -> None:
    name = "SGD dampening, fused"  # torch would leave the momentum of a first step that is skipped uninitialised
    assert reads(name, data(12), on_non_finite="skip") == [1 + LOGGED[0], *LOGGED[1:]]


@pytest.mark.parametrize(("name", "mode"), [("Adam", "skip"), ("Adam, fused", "raise"), ("SGD momentum", "stop")])
def test_others_are_read_once_a_step(name: str, mode: Any) -> None:
    assert reads(name, data(12), on_non_finite=mode) == [1 + logged for logged in LOGGED]


def test_after_an_unread_skip_the_next_one_is_searched(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(CountReads):
        def __init__(self) -> None:
            super().__init__()
            self.origins: list[str] = []

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            findings = health.report().findings
            self.origins.append(findings[0].evidence["origin"] if findings else "")

    health, counter = GradHealth(on_non_finite="skip"), Reads()
    bad = [3, 13, 18]  # at none of these a probe sees it
    fit(make("Adam, fused"), data(24, bad), health, counter, log_every_n_steps=5)
    bare = CountReads()
    fit(make("Adam, fused"), data(24), bare, log_every_n_steps=5)
    extra = [seen - without for seen, without in zip(counter.per_step, bare.per_step, strict=True)]
    assert extra[:5] == [0, 0, 0, 0, 1]  # nobody knows before the log
    assert extra[5:13] == [1, 1, 1, 1, 2, 1, 1, 1]  # one flag a step
    assert extra[14:19] == [1, 0, 0, 0, 0]  # found: back to no read, whatever comes
    assert counter.origins[12] == ""
    assert counter.origins[14] == ORIGIN
    report = health.report()
    assert report.skipped_steps == 3
    (finding,) = report.findings
    assert (finding.first_step, finding.evidence["skipped"], finding.evidence["origin"]) == (3, 3, ORIGIN)
    assert sum(ORIGIN in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_raise(name: str) -> None:
    health, model = GradHealth(on_non_finite="raise"), make(name)
    with pytest.raises(NonFiniteGradientError) as error:
        fit(model, data(12, bad=[7]), health)
    assert f"at step 7 ({ORIGIN})" in str(error.value)
    assert "the weights are those before that step. Remedy: look for log(0)" in str(error.value)
    fit(before := make(name), data(12)[:7])
    assert same(model.state_dict(), before.state_dict())
    report = health.report()
    assert (report.aside, report.steps, report.skipped_steps) == ("", 8, 1)
    (finding,) = report.findings
    assert (finding.condition, finding.first_step, finding.evidence["origin"]) == (Condition.NON_FINITE, 7, ORIGIN)


@pytest.mark.parametrize("name", ["AdamW", "AdamW, fused"])
def test_stop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    health, model = GradHealth(on_non_finite="stop"), make(name)
    run = fit(model, data(12, bad=[7]), health, max_epochs=3)
    assert run.should_stop
    assert run.global_step == 8
    fit(before := make(name), data(12)[:7])
    assert same(model.state_dict(), before.state_dict())
    lines = [record.message for record in caplog.records if "ends the fit" in record.message]
    assert len(lines) == 1
    assert f"at step 7 ({ORIGIN})" in lines[0]
    assert health.report().findings[0].evidence["origin"] == ORIGIN


@pytest.mark.parametrize(("name", "last"), [("Adam", 27), ("Adam, fused", 29)])  # fused: seen at the log after it
def test_25_skips_in_a_row_end_the_run(name: str, last: int) -> None:
    health, model = GradHealth(on_non_finite="skip"), make(name)
    message = "NaN or Inf in 25 steps in a row, all skipped, the last at step 27: .*skipped_in_a_row"
    with pytest.raises(NonFiniteGradientError, match=message):
        fit(model, data(60, bad=range(3, 60)), health)
    assert health.report().step == last
    assert health.report().skipped_steps == last - 2
    fit(before := make(name), data(60)[:3])
    assert same(model.state_dict(), before.state_dict())
    assert health.report().findings[0].evidence["origin"] == ORIGIN  # the fused one found it at the second log's window


@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_skips_that_are_not_in_a_row_do_not(name: str) -> None:
    health = GradHealth(on_non_finite="skip", thresholds=Thresholds(skipped_in_a_row=3))
    bad = [step for step in range(40) if step % 3]
    fit(make(name), data(40, bad), health)
    assert health.report().skipped_steps == len(bad)
    with pytest.raises(NonFiniteGradientError, match="in 3 steps in a row"):
        fit(
            make(name), data(12, [4, 5, 6]), GradHealth(on_non_finite="skip", thresholds=Thresholds(skipped_in_a_row=3))
        )


@pytest.mark.parametrize("mode", ["skip", "raise", "stop"])
@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_a_loss_scaler_skips_by_itself(name: str, mode: Any) -> None:
    health, models = GradHealth(on_non_finite=mode), [make(name), make(name)]
    for model, callbacks in zip(models, ([], [health]), strict=True):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
        run = fit(model, data(12, bad=[5]), *callbacks, plugins=[plugin])
        assert not run.should_stop
    assert same(models[0].state_dict(), models[1].state_dict())
    assert all(p.isfinite().all() for p in models[1].parameters())
    assert health.report().skipped_steps == 0


class TakesTheScaler(SGD):
    """Says that it can be scaled, but looks for no flag, as optimizers of other packages do."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, grad_scaler: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_looks_for_no_flag_is_not_given_one() -> None:
    health, model = GradHealth(on_non_finite="skip"), Classifier(fragile(), TakesTheScaler, lr=0.05, momentum=0.9)
    fit(model, data(12, bad=[5]), health)
    assert all(p.isfinite().all() for p in model.parameters())
    assert health.report().skipped_steps == 1


@pytest.mark.parametrize("clip", [gh.ValueClip(0.1), gh.SignClip(1e-3), gh.NormClip(0.1), "adaptive"], ids=repr)
@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_a_skipped_step_is_not_clipped(name: str, clip: Any) -> None:
    health, model = GradHealth(on_non_finite="skip", clip=clip), make(name)
    fit(model, data(12, bad=[5]), health, gradient_clip_val=0.5)
    fit(twin := make(name), data(12, [5], True), without := GradHealth(clip=clip), gradient_clip_val=0.5)
    assert health.report().skipped_steps == 1
    assert health.report().clipped_steps == without.report().clipped_steps
    assert same(model.state_dict(), twin.state_dict())
    clippers = [h.state_dict()["monitor"]["clippers"] for h in (health, without)]
    assert same(*clippers)


@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_a_streak_is_searched_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], Response._find_origin
    monkeypatch.setattr(Response, "_find_origin", lambda self, sharded: calls.append(0) or original(self, sharded))
    bad = [*range(2, 20), *range(30, 40)]
    health = GradHealth(on_non_finite="skip")
    fit(make(name), data(44, bad), health)
    assert len(calls) == 2
    assert health.report().skipped_steps == 28


class Chance(nn.Module):
    """Divides by zero now and then."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.rand(()) > 0.1)


@pytest.mark.parametrize("loop", ["Trainer", "plain"])
def test_the_rerun_draws_the_same_random_numbers(loop: str) -> None:
    net = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.1), Chance())
    torch.manual_seed(4)
    if loop == "Trainer":
        health = GradHealth(on_non_finite="skip")
        fit(Classifier(net, lr=0.01), data(24), health)
        report = health.report()
    else:
        report = plain_loop("SGD", data(24), net=net)[1].report()
    assert 0 < report.skipped_steps < 8
    assert "(Chance)" in report.findings[0].evidence["origin"]


@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_a_search_goes_on_after_a_resume(name: str, tmp_path: Path) -> None:
    health = GradHealth(on_non_finite="skip")
    run = fit(make(name), data(12, bad=[2]), health, max_steps=8)
    run.save_checkpoint(tmp_path / "at8.ckpt")
    again, model = GradHealth(on_non_finite="skip"), make(name)
    options = {"ckpt_path": tmp_path / "at8.ckpt", "weights_only": True}
    more = trainer(again, max_epochs=2)
    more.fit(model, DataLoader(data(12, bad=[10]), batch_size=None), **options)  # type: ignore[arg-type]
    assert again.report().findings[0].evidence["origin"] == ORIGIN
    assert again.report().findings[0].first_step == 2
    assert again.report().skipped_steps >= 2


class Shapes(Classifier):
    """The ways in which people write `training_step`."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "batch": batch_idx}


class NoIndex(Classifier):
    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class AnyArguments(Classifier):
    def training_step(self, *args: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx = args
        return super().training_step(batch, batch_idx)


class OtherName(Classifier):
    def training_step(self, batch: Batch, _: int) -> Tensor:
        return super().training_step(batch, _)


@pytest.mark.parametrize("kind", [Shapes, NoIndex, AnyArguments, OtherName])
def test_every_kind_of_training_step_is_rerun(kind: type[Classifier]) -> None:
    health = GradHealth(on_non_finite="skip")
    fit(kind(fragile(), Adam, lr=1e-2), data(12, bad=[6]), health)
    assert health.report().findings[0].evidence["origin"] == ORIGIN


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_bad_micro_batch_is_found(place: int) -> None:
    health, model = GradHealth(on_non_finite="skip"), make("Adam")
    bad = [4 + place]
    run = fit(model, data(16, bad), health, accumulate_grad_batches=4)
    assert (run.global_step, health.report().skipped_steps) == (4, 1)
    assert health.report().findings[0].evidence["origin"] == ORIGIN
    assert health.report().findings[0].first_step == 1
    kept = data(16)
    fit(twin := make("Adam"), kept[:4] + kept[8:], accumulate_grad_batches=4)
    assert same(model.state_dict(), twin.state_dict())


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_manual_optimization_skips_and_claims_nothing(fused: bool) -> None:
    health, model = GradHealth(on_non_finite="skip"), Manual(fragile(), Adam, lr=1e-2, fused=fused)
    fit(model, data(12, bad=[6]), health)
    fit(twin := Manual(fragile(), Adam, lr=1e-2, fused=fused), data(12, [6], without_bad=True))
    assert same(model.state_dict(), twin.state_dict())
    (finding,) = health.report().findings
    assert "origin unknown" in finding.summary
    if not fused:  # a fused optimizer takes the flag: nothing was searched yet
        assert "(manual optimization: training_step would step the optimizers)" in finding.summary
    assert finding.severity is Severity.WARNING


class Bag:
    """A batch of a class of one's own, from which things are taken."""

    def __init__(self, **content: Any) -> None:
        self.content = content

    def take(self, name: str) -> Tensor:
        return self.content.pop(name)


class Pair(NamedTuple):
    parts: list[Tensor]
    labels: deque[Tensor]


class Pops(Classifier):
    """Takes its batch apart, as is usual for batches that are dicts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, Bag):
            x, labels = batch.take("x"), batch.take("labels")
        elif isinstance(batch, Pair):
            x, labels = batch.parts.pop(), batch.labels.popleft()
        elif isinstance(batch, SimpleNamespace):
            x, labels = vars(batch).pop("x"), vars(batch).pop("labels")
        else:
            labels, x = batch.pop("labels"), batch["parts"].pop()
        return super().training_step([x, labels], batch_idx)


def wrapped(batch: Batch, kind: str) -> Any:
    if kind == "object":
        return SimpleNamespace(x=batch[0], labels=batch[1])
    if kind == "bag":
        return Bag(x=batch[0], labels=batch[1])
    if kind == "named tuple":
        return Pair([batch[0]], deque([batch[1]]))
    content = {"labels": batch[1], "parts": [batch[0]]}
    return content if kind == "dict" else UserDict(content)


@pytest.mark.parametrize("kind", ["dict", "UserDict", "object", "bag", "named tuple"])
def test_a_batch_that_is_taken_apart_is_run_again_as_it_was(kind: str) -> None:
    health = GradHealth(on_non_finite="skip", preflight=True)
    fit(Pops(fragile(), Adam, lr=1e-2), [wrapped(batch, kind) for batch in data(12, bad=[6])], health)
    assert health.report().findings[0].evidence["origin"] == ORIGIN
    assert health.preflight_report is not None


class Overwrites(Classifier):
    """Writes into its batch, so that it cannot be had as it was."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
        batch[0].zero_()
        return loss


def test_a_batch_that_was_written_to_is_the_reason_why_the_origin_is_unknown() -> None:
    health = GradHealth(on_non_finite="skip")
    fit(Overwrites(fragile(), Adam, lr=1e-2), data(12, bad=[6]), health)
    (finding,) = health.report().findings
    assert "origin unknown (the rerun was finite; the batch was written to in place" in finding.summary
    with pytest.raises(NonFiniteGradientError, match="origin unknown: the rerun was finite; the batch was written"):
        fit(Overwrites(fragile(), Adam, lr=1e-2), data(12, bad=[6]), GradHealth(on_non_finite="raise"))


def test_an_interrupted_search_does_not_end_all_searching() -> None:
    calls: list[None] = []  # an attribute would be as before after the rerun

    class Interrupted(Fragile):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) == 6:  # in the rerun of the fifth batch
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Interrupted(), nn.Linear(16, 3))
    optimizer = Adam(net.parameters(), lr=1e-2)
    session = HealthSession(net, on_non_finite="skip")
    interrupted = 0
    for x, y in data(12, bad=[4, 8]):
        nn.functional.cross_entropy(net(x), y).backward()
        try:
            session.apply(session.observe(optimizer))
        except KeyboardInterrupt:
            interrupted += 1
        optimizer.step()
        optimizer.zero_grad()
    assert interrupted == 1
    origins = [step.origin for record in session._records() for step in record.window if step.origin]
    assert origins == ["the first output that is not finite is that of 2 (Interrupted); healthy before it: 0, 1"]


def test_lbfgs_is_refused_a_skip_that_it_cannot_keep() -> None:
    model = Classifier(fragile(), torch.optim.LBFGS, lr=0.1, max_iter=3)
    with pytest.raises(GradHealthError, match=r'"skip" cannot be kept with LBFGS.*use "raise" or "stop"'):
        fit(model, data(8), GradHealth(on_non_finite="skip"))
    with pytest.raises(NonFiniteGradientError, match="at step 3"):
        fit(model, data(8, bad=[3]), GradHealth(on_non_finite="raise"))


@pytest.mark.parametrize("mode", ["raise", "stop"])
def test_a_loss_scaler_that_skips_for_ever_ends_the_run(mode: Any) -> None:
    health = GradHealth(on_non_finite=mode)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    run = trainer(health, max_epochs=1, log_every_n_steps=10, plugins=[plugin])
    nan_from_10 = DataLoader(data(60, bad=range(10, 60)), batch_size=None)
    with pytest.raises(NonFiniteGradientError, match="25 steps in a row") if mode == "raise" else nullcontext():
        run.fit(make("Adam"), nan_from_10)
    assert run.global_step < 60


class Busy(Classifier):
    """Has everything that a second forward pass could disturb."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), Fragile(), nn.Dropout(0.5), nn.Linear(16, 3))
        super().__init__(net, Adam, lr=1e-2)
        self.accuracy = torchmetrics.MeanMetric()
        self.calls = 0
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.calls += 1
        out = self(batch[0])
        self.accuracy.update(out.detach().nan_to_num().mean())
        self.seen.append(torch.rand(1))
        loss = nn.functional.cross_entropy(out, batch[1]) * (torch.nan if batch_idx == 6 else 1.0)
        self.log("calls", float(self.calls), on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss


def test_the_rerun_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    results, searched = [], []
    original = Response._find_origin
    for search in (True, False):

        def find(self: Response, sharded: bool, search: bool = search) -> tuple[str, str]:
            found, unknown = original(self, sharded) if search else ("", "")
            searched.append(found)
            return found, unknown

        monkeypatch.setattr(Response, "_find_origin", find)
        torch.manual_seed(3)
        health, model = GradHealth(on_non_finite="skip"), Busy()
        run = fit(model, data(12), health)
        numbers = {name: value.clone() for name, value in run.callback_metrics.items()}
        results.append((model.state_dict(), numbers, model.seen, model.calls, torch.get_rng_state()))
        assert health.report().skipped_steps == 1
    assert len(searched) == 2
    assert searched == [
        "the loss of Busy is not finite, although the outputs of its modules are; healthy before it:"
        " net.2, net.3, net.4",
        "",
    ]
    assert results[0][3] == 12
    assert same(results[0], results[1])
    assert results[0][0]["net.1.num_batches_tracked"] == 12


# --- plain loops ---


def plain_loop(
    name: str,
    batches: list[Batch],
    mode: Any = "skip",
    each: int = 1,
    autocast: bool = False,
    net: Any = None,
    **options: Any,
) -> tuple[nn.Module, HealthSession]:
    net = net or fragile()
    kind, optimizer_options = OPTIMIZERS[name]
    optimizer = kind(net.parameters(), **optimizer_options)
    session = HealthSession(net, on_non_finite=mode, **options)
    for number, (x, y) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if (number + 1) % each:
            continue
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        optimizer.zero_grad()
        if session.should_stop:
            break
        if number % 5 == 4:
            session.flush()
    return net, session


INNER = ORIGIN.replace("net.", "")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["Adam", "SGD momentum", "Adam, fused"])
def test_a_plain_loop_skips_and_names_the_origin(name: str, autocast: bool) -> None:
    net, session = plain_loop(name, data(12, bad=[3, 7]), autocast=autocast)
    twin, _ = plain_loop(name, data(12, bad=[3, 7], without_bad=True), mode="warn", autocast=autocast)
    assert same(net.state_dict(), twin.state_dict())
    report = session.report()
    assert report.skipped_steps == 2
    assert report.findings[0].evidence["origin"] == INNER


def test_a_plain_loop_that_accumulates() -> None:
    _, session = plain_loop("Adam", data(12, bad=[4]), each=4)
    assert session.report().findings[0].evidence["origin"] == INNER


def test_a_plain_loop_raises_and_stops() -> None:
    with pytest.raises(NonFiniteGradientError, match="at step 7"):
        plain_loop("Adam", data(12, bad=[7]), "raise")
    _, session = plain_loop("Adam", data(12, bad=[7]), "stop")
    assert session.should_stop.startswith(f"gradients are NaN or Inf at step 7 ({INNER})")
    assert session.report().step == 7


def test_a_watched_model_can_be_copied_and_saved_and_forgets_its_hooks() -> None:
    net, session = plain_loop("Adam", data(3))
    torch.save(net, io.BytesIO())
    twin = copy.deepcopy(net)
    twin(torch.randn(2, 8))
    session.close()
    assert not net._forward_pre_hooks
    for name in ("Adam, fused", "SGD, fused"):
        kind, options = OPTIMIZERS[name]
        optimizer = kind(net.parameters(), **options)
        session = HealthSession(net, on_non_finite="skip")
        net(torch.randn(2, 8)).sum().backward()
        session.apply(session.observe(optimizer))
        assert vars(optimizer)["found_inf"] == 0
        session.close()
        assert "found_inf" not in vars(optimizer)
        assert not optimizer._optimizer_step_post_hooks


def test_calls_that_nobody_steps_on_are_not_hoarded() -> None:
    net = fragile()
    session = HealthSession(net, on_non_finite="skip")
    for _ in range(400):
        net(torch.zeros(1, 8))
    assert len(session.response._forwards) == 256
    assert not HealthSession(net).response._hooks
    assert not HealthSession(net, on_non_finite="skip", watch_calls=False).response._hooks


# --- stop_on ---


class Explodes(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1e6 if batch_idx == 22 else 1.0)


@pytest.mark.parametrize(
    "stop_on",
    ["exploding_gradients", Condition.EXPLODING_GRADIENTS, [Condition.DEAD_UNITS, "exploding_gradients"]],
    ids=str,
)
def test_stop_on_ends_the_fit_at_the_log_that_shows_it(stop_on: Any, caplog: pytest.LogCaptureFixture) -> None:
    health = GradHealth(stop_on=stop_on)
    run = fit(Explodes(fragile(), lr=1e-8), data(60), health, max_epochs=3)
    assert run.should_stop
    assert run.global_step == 25
    lines = [record.message for record in caplog.records if "ends the fit" in record.message]
    assert len(lines) == 1
    assert "exploding_gradients" in lines[0]
    assert health.report().step == 24


def test_stop_on_something_else_does_not() -> None:
    run = fit(Explodes(fragile(), lr=1e-8), data(40), GradHealth(stop_on=["dead_units", "non_finite"]))
    assert run.global_step == 40


def test_stop_on_a_rule_of_ones_own_and_its_spelling() -> None:
    class Mine(gh.Rule):
        condition = "mine"

        def check(self, record: gh.StepRecord) -> gh.Verdict | None:
            return gh.Verdict("warning", "it is", "none") if record.step >= 9 else None

    run = fit(make(), data(40), GradHealth(stop_on="mine", rules=[Mine()]))
    assert run.global_step == 10
    message = "stop_on: 'explosion' is no condition; the conditions are .*exploding_gradients"
    for make_it in (GradHealth, lambda **options: HealthSession(fragile(), **options)):
        with pytest.raises(ValueError, match=message):
            make_it(stop_on="explosion")  # type: ignore[operator]
        with pytest.raises(TypeError, match="stop_on must be a condition or several, got 3"):
            make_it(stop_on=3)  # type: ignore[operator]


# --- errors ---


class Breaks(GradHealth):
    """Fails by mistake, or on purpose."""

    error: ClassVar[Exception] = ValueError("a mistake")

    def _remember(self, *args: Any) -> None:
        if self._session is not None and self._session.monitor.rows:
            raise self.error


@pytest.mark.parametrize("options", [{}, {"clip": gh.NormClip(1.0)}, {"on_non_finite": "skip"}], ids=str)
@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_a_mistake_of_its_own_is_told_once(name: str, options: Any, caplog: pytest.LogCaptureFixture) -> None:
    health, around = Breaks(**options), Around(5)
    run = fit(make(name), data(12), health, around)
    assert run.global_step == 12
    lines = [record.message for record in caplog.records if "steps aside" in record.message]
    assert len(lines) == 1
    assert "a mistake" in lines[0]
    assert ("WITHOUT clipping" in lines[0]) == ("clip" in options)
    assert ("WITHOUT on_non_finite" in lines[0]) == ("on_non_finite" in options)
    assert "a mistake" in health.report().aside


@pytest.mark.parametrize("error", [GradHealthError("asked for"), NonFiniteGradientError("asked for")], ids=repr)
def test_an_error_on_purpose_goes_through(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaks, "error", error)
    with pytest.raises(type(error), match="asked for"):
        fit(make(), data(12), Breaks())


@pytest.mark.parametrize(
    "options", [{"clip": "adaptive"}, {"on_non_finite": "skip"}, {"on_non_finite": "stop"}], ids=str
)
def test_deepspeed_is_refused_where_it_would_be_in_vain(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lightning, "hides_gradients", lambda trainer: True)
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GradHealthError, match=r"DeepSpeed keeps .*leave them out.*gradient_clip_val"):
        fit(model, data(4), GradHealth(**options))
    assert same(model.state_dict(), before)


def test_deepspeed_is_unavailable_otherwise(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_lightning, "hides_gradients", lambda trainer: True)
    health = GradHealth()
    run = fit(make(), data(4), health)
    assert run.global_step == 4
    report = health.report()
    assert "unavailable under DeepSpeed" in report.aside
    assert (report.healthy, report.steps, report.layers) == (False, 0, ())
    assert sum("unavailable under DeepSpeed" in record.message for record in caplog.records) == 1


def test_the_mode_is_checked() -> None:
    with pytest.raises(ValueError, match="on_non_finite must be one of 'warn', 'skip', 'raise', 'stop', got 'ignore'"):
        GradHealth(on_non_finite="ignore")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def warnings_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="lightning_gradhealth")


@pytest.mark.parametrize("clip", [gh.ValueClip(0.1), gh.SignClip(), gh.UnitwiseClip(), gh.NormClip(0.1)], ids=repr)
@pytest.mark.parametrize("name", ["Adam", "Adam, fused"])
def test_an_inf_that_is_skipped_was_not_clipped(name: str, clip: Any) -> None:
    net, (kind, options) = fragile(), OPTIMIZERS[name]
    optimizer = kind(net.parameters(), **options)
    session = HealthSession(net, clip=clip, on_non_finite="skip")
    for step in range(3):
        net(torch.randn(4, 8)).sum().backward()
        if step == 1:
            net[0].weight.grad[0, 0] = torch.inf
        before = copy.deepcopy(net.state_dict())
        decision = session.observe(optimizer)
        session.apply(decision)
        assert decision.action == ("skip" if step == 1 else "clip")
        optimizer.step()
        assert same(before, net.state_dict()) == (step == 1)
        optimizer.zero_grad()
        (stats,) = session.flush().window
        assert (stats.clipped, stats.skipped) == (step != 1, step == 1)
        if isinstance(clip, gh.NormClip):
            assert (stats.clip_coefficient is None) == (step == 1)
    assert (session.report().clipped_steps, session.report().skipped_steps) == (2, 1)


class FragileInHalf(Fragile):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == torch.bfloat16 else x


def test_the_rerun_of_a_plain_loop_has_its_autocast() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), FragileInHalf(), nn.Linear(16, 3))
    _, session = plain_loop("Adam", data(12, bad=[3]), autocast=True, net=net)
    assert "2 (FragileInHalf)" in session.report().findings[0].evidence["origin"]
