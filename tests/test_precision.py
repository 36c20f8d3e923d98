"""Whatever the precision, the optimizer, the Trainer's own clipping: norms are the true ones, and clips are right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.plugins import MixedPrecision
from test_resume import same
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import lightning_gradhealth as gh
from lightning_gradhealth import GradHealth, HealthSession, Rule, StepRecord
from lightning_gradhealth.records import StepStats

LIMIT = 0.1
EVERY_STEP: dict[str, Any] = {"probe_every_n_steps": 1}


class Keep(Rule):
    """Keeps every step that was judged; sessions share it instead of copying it."""

    condition = "keep"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, int], StepStats] = {}

    def __deepcopy__(self, memo: Any) -> Keep:
        return self

    def check(self, record: StepRecord) -> None:
        self.kept |= {(step.step, step.optimizer): step for step in record.window}

    def steps(self, optimizer: int = 0) -> list[StepStats]:
        return [step for (_, number), step in sorted(self.kept.items()) if number == optimizer]


def true_norm(parameters: Any, scale: float = 1.0) -> float:
    squares = (float((p.grad.double() / scale).square().sum()) for p in parameters if p.grad is not None)
    return math.sqrt(sum(squares))


class Truth(pl.Callback):
    """The norm of what is in `p.grad` before anybody has touched it; `scaled`: nobody has unscaled it yet either."""

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        scale = trainer.precision_plugin.scaler.get_scale() if self.scaled else 1.0
        self.norms.append(true_norm((p for group in optimizer.param_groups for p in group["params"]), scale))


def fp16(**options: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **options}))


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (Adam, {"lr": 1e-2}),
    "fused Adam": (Adam, {"lr": 1e-2, "fused": True}),
    "fused AdamW": (AdamW, {"lr": 1e-2, "fused": True}),
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "fused SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
}


def watched(
    model: pl.LightningModule, clip: Any = None, steps: int = 12, scaled: bool = False, **options: Any
) -> tuple[list[StepStats], list[float], GradHealth]:
    keep, truth = Keep(), Truth(scaled)
    health = GradHealth(clip=clip, rules=[keep], **EVERY_STEP)
    trainer(truth, health, **{"max_steps": steps, "log_every_n_steps": 1, **options}).fit(model, batches())
    assert not health.report().aside
    return keep.steps(), truth.norms, health


def make(name: str) -> Classifier:
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(5)
    return Classifier(mlp(), kind, **options)


def loop(name: str, limit: float | None, steps: int) -> dict[str, Tensor]:
    """What every tutorial writes: scale, unscale, clip, step, update."""
    model, scaler = make(name), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = model.configure_optimizers()
    data = [batch for _ in range(steps) for batch in batches()][:steps]
    for number, batch in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = model.training_step(batch, number)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if limit is not None:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
    return model.state_dict()


def distance(model: nn.Module, name: str, other: dict[str, Tensor]) -> float:
    """How far two runs ended from each other, as a share of the way that they went (fp16 flips a last bit or two)."""
    start, end = make(name).state_dict(), model.state_dict()
    apart = sum(float((end[key] - other[key]).abs().sum()) for key in end)
    return apart / sum(float((end[key] - start[key]).abs().sum()) for key in end)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_a_scaler(name: str, clipped: bool) -> None:
    model, fused = make(name), "fused" in name
    steps, truth, health = watched(model, gh.NormClip(LIMIT) if clipped else None, scaled=fused, plugins=[fp16()])
    assert len(steps) == len(truth) == 12
    for step, norm in zip(steps, truth, strict=True):
        assert step.total_norm == pytest.approx(norm, rel=1e-6)
        if clipped:
            assert step.applied_norm == pytest.approx(min(norm, LIMIT), rel=1e-5)
            assert step.clip_coefficient == pytest.approx(min(1.0, LIMIT / norm), rel=1e-6)
        elif not fused:  # a fused optimizer unscales inside its step
            assert step.applied_norm == pytest.approx(norm, rel=1e-6)
    assert max(truth) < 2.0  # unscaled: the scale is 1,024
    assert health.report().clipped_steps == (sum(norm > LIMIT for norm in truth) if clipped else 0)
    assert sum(norm > LIMIT for norm in truth) > 6
    assert distance(model, name, loop(name, LIMIT if clipped else None, 12)) < 2e-3
    if "SGD" in name:  # Adam forgets the size
        assert distance(model, name, loop(name, None if clipped else LIMIT, 12)) > 0.3


class Overflows(pl.Callback):
    """Raises the loss scale beyond all bounds before step 25, and keeps what the clippers remember around it."""

    def __init__(self, at: int = 25) -> None:
        self.at = at
        self.health: GradHealth | None = None
        self.states: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.precision_plugin.scaler.update(2.0**40)
            self._keep()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped == self.at:
            self._keep()

    def _keep(self) -> None:
        assert self.health is not None
        assert self.health._session is not None
        self.states.append(copy.deepcopy(self.health._session.monitor.state_dict()["clippers"]))


CLIPPERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "adaptive": lambda: "adaptive",
    "norm": lambda: gh.NormClip(LIMIT),
    "value": lambda: gh.ValueClip(1e-3),
    "sign": gh.SignClip,
    "percentile": gh.PercentileClip,
    "z-score": gh.ZScoreClip,
    "unitwise": gh.UnitwiseClip,
    "layerwise": lambda: gh.LayerwiseClip(warmup=5),
    "chain": lambda: gh.Chain([gh.ZScoreClip(), gh.NormClip(LIMIT)]),
}


@pytest.mark.parametrize("name", ["Adam", "fused Adam"])
@pytest.mark.parametrize("clip", CLIPPERS)
def test_an_overflow_is_no_spike(name: str, clip: str) -> None:
    keep, forced = Keep(), Overflows()
    health = GradHealth(clip=CLIPPERS[clip](), rules=[keep], **EVERY_STEP)
    forced.health = health
    plugin = fp16(backoff_factor=2.0**-30)  # 2^40 back to 1,024 in one go
    options: dict[str, Any] = {"max_steps": 40, "log_every_n_steps": 1, "plugins": [plugin]}
    trainer(health, forced, **options).fit(make(name), batches())
    steps, report = keep.steps(), health.report()
    assert not report.aside
    assert [step.step for step in steps if step.overflow] == [25]
    assert steps[25].total_norm is None
    assert steps[25].applied_norm is None
    assert not steps[25].clipped
    assert steps[25].clip_coefficient is None
    assert report.clipped_steps == sum(bool(step.clipped) for step in steps)
    assert report.skipped_steps == report.non_finite_steps == 0
    assert "non_finite" not in {f.condition for f in report.findings}
    assert "exploding_gradients" not in {f.condition for f in report.findings}
    before, after = forced.states
    assert same(before, after)
    assert all(step.total_norm is not None and step.total_norm < 5 for step in steps if step.step != 25)


@pytest.mark.parametrize("clip", [name for name in CLIPPERS if name != "none"])
def test_an_overflow_in_one_element_leaves_all_statistics_alone(clip: str) -> None:
    model, scaler = make("SGD"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = model.configure_optimizers()
    monitor = gh.GradientMonitor(model, clip=CLIPPERS[clip]())
    for number, batch in enumerate([*batches(), *batches()]):
        optimizer.zero_grad()
        scaler.scale(model.training_step(batch, number)).backward()
        if number == 12:
            model.net[2].weight.grad[0, 0] = math.inf
            before = copy.deepcopy(monitor.state_dict()["clippers"])
        monitor.apply(monitor.observe(optimizer, grad_scaler=scaler))
        if number == 12:
            assert same(before, monitor.state_dict()["clippers"])
        scaler.step(optimizer)
        scaler.update()
    window = monitor.flush().window
    assert [step.step for step in window if step.overflow] == [12]
    assert not window[12].clipped


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["SGD", "fused Adam"])
def test_other_precisions(precision: str, name: str) -> None:
    steps, truth, _ = watched(make(name), gh.NormClip(LIMIT), precision=precision)
    rounding = 1e-2 if precision == "bf16-true" else 1e-6
    for step, norm in zip(steps, truth, strict=True):
        assert step.total_norm == pytest.approx(norm, rel=1e-6)
        assert step.applied_norm == pytest.approx(min(norm, LIMIT), rel=rounding)
    assert max(truth) > LIMIT


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulation(scaled: bool) -> None:
    twin, x = make("SGD"), list(batches())[:4]
    twin.training_step([torch.cat([b[0] for b in x]), torch.cat([b[1] for b in x])], 0).backward()
    options = {"plugins": [fp16()]} if scaled else {}
    keep = watched(make("SGD"), gh.NormClip(LIMIT), steps=4, accumulate_grad_batches=4, **options)
    steps, truth, _ = keep
    assert steps[0].total_norm == pytest.approx(true_norm(twin.parameters()), rel=5e-3 if scaled else 1e-6)
    assert [step.total_norm for step in steps] == pytest.approx(truth, rel=1e-6)
    assert [step.applied_norm for step in steps] == pytest.approx([min(norm, LIMIT) for norm in truth], rel=1e-5)


class Halves(Classifier):
    """Clips in its own way."""

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


@pytest.mark.parametrize(("ours", "theirs"), [(0.5, 0.2), (0.2, 0.5), (None, 0.2)])
def test_the_trainers_own_clipping_comes_on_top(ours: float | None, theirs: float) -> None:
    clip = None if ours is None else gh.NormClip(ours)
    steps, truth, health = watched(make("SGD"), clip, gradient_clip_val=theirs)
    for step, norm in zip(steps, truth, strict=True):
        assert step.total_norm == pytest.approx(norm, rel=1e-6)
        assert step.applied_norm == pytest.approx(min(norm, theirs, ours or math.inf), rel=1e-4)
    (note,) = [note for note in health.report().notes if "gradient_clip_val" in note]
    assert f"gradient_clip_val={theirs}) clips by norm after" in note


def test_clipping_that_is_overridden_is_noted() -> None:
    steps, truth, health = watched(Halves(mlp()), gh.NormClip(0.2))
    assert [step.applied_norm for step in steps] == pytest.approx([min(n, 0.2) / 2 for n in truth], rel=1e-5)
    assert any("Halves.configure_gradient_clipping is overridden" in note for note in health.report().notes)
    assert not any("configure_gradient_clipping" in note for note in watched(make("SGD"))[2].report().notes)


class Gan(Classifier):
    """Two optimizers in turn; the second steps every other time."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(Classifier.training_step(self, batch, batch_idx))
        first.step()
        if batch_idx % 2:
            second.zero_grad()
            self.manual_backward(1e3 * self.critic(self.net(batch[0]).detach()).square().mean())
            second.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [SGD(self.net.parameters(), lr=0.05), Adam(self.critic.parameters(), lr=1e-4, fused=True)]


@pytest.mark.parametrize("scaled", [False, True])
def test_each_optimizer_has_statistics_of_its_own(scaled: bool) -> None:
    keep, truth = Keep(), Truth()
    health = GradHealth(clip=gh.ZScoreClip(z_threshold=0.5, warmup=3), rules=[keep], **EVERY_STEP)
    options = {"plugins": [fp16(init_scale=1.0)]} if scaled else {}
    options = {**options, "max_steps": 24, "log_every_n_steps": 1}
    trainer(truth, health, **options).fit(Gan(), batches())
    clippers = [clipper["state"] for _, clipper in sorted(health.state_dict()["monitor"]["clippers"].items())]
    first, second = keep.steps(0), keep.steps(1)
    assert (clippers[0]["count"], clippers[1]["count"]) == (len(first), len(second)) == (16, 8)
    assert clippers[1]["mean"] > 30 * clippers[0]["mean"]
    both = [step.total_norm for step in (*first, *second)]
    assert sorted(both) == pytest.approx(sorted(truth.norms), rel=1e-6)
    assert any(step.clipped for step in (*first, *second))


def test_lbfgs_is_clipped_at_every_evaluation() -> None:
    model = Classifier(mlp(), torch.optim.LBFGS, lr=0.1, max_iter=3)
    steps, truth, health = watched(model, gh.NormClip(0.1), steps=6)
    assert len(truth) > 6
    assert all(step.applied_norm is not None and step.applied_norm <= 0.1 * (1 + 1e-5) for step in steps)
    assert health.report().clipped_steps > 6


def plain_loop(name: str, when: str, accumulate: int, clip: Any) -> tuple[nn.Module, list[StepStats], list[float]]:
    model, scaler, keep, truth = make(name), torch.amp.GradScaler("cpu", init_scale=1024.0), Keep(), []
    optimizer = model.configure_optimizers()
    session = HealthSession(model, clip=clip, rules=[keep], **EVERY_STEP)
    data: Iterator[list[Tensor]] = iter([batch for _ in range(2 * accumulate) for batch in batches()])
    for _ in range(12):
        optimizer.zero_grad()
        for _ in range(accumulate):
            with torch.autocast("cpu", torch.float16):
                loss = model.training_step(next(data), 0) / accumulate
            scaler.scale(loss).backward()
        truth.append(true_norm(model.parameters(), scaler.get_scale()))
        if when == "after unscale_":
            scaler.unscale_(optimizer)
        session.apply(session.observe(optimizer, loss, scaler))
        scaler.step(optimizer)
        scaler.update()
        session.flush()
    session.close()
    return model, keep.steps(), truth


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("when", ["before unscale_", "after unscale_"])
@pytest.mark.parametrize("name", ["Adam", "fused Adam", "fused SGD"])
def test_a_plain_loop_with_a_scaler(name: str, when: str, accumulate: int) -> None:
    model, steps, truth = plain_loop(name, when, accumulate, gh.NormClip(LIMIT))
    assert [step.total_norm for step in steps] == pytest.approx(truth, rel=1e-6)
    assert [step.applied_norm for step in steps] == pytest.approx([min(n, LIMIT) for n in truth], rel=1e-5)
    _, unclipped, truth = plain_loop(name, when, accumulate, None)
    assert [step.total_norm for step in unclipped] == pytest.approx(truth, rel=1e-6)
    if accumulate == 1:
        assert distance(model, name, loop(name, LIMIT, 12)) < 2e-3
