"""Runs with peculiar steps, optimizers and losses: what is wrong is found all the same, and what is well is let be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from lightning_gradhealth import GradHealth, HealthReport, HealthSession, LayerStats, NormClip

Data = list[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, tuple[Tensor, Tensor], int], Tensor]


def data(steps: int = 100, inputs: int = 16) -> Data:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(inputs, 4, generator=generator)
    xs = [torch.randn(32, inputs, generator=generator) for _ in range(steps)]
    return [(x, (x @ weight).argmax(1)) for x in xs]


def net(dead: bool = False, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), act(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    if dead:
        made[2].bias.data[:30] = -50.0
    return made


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def loop(
    model: nn.Module,
    optimizer: Any = None,
    loss_of: Loss = entropy,
    steps: int = 100,
    within: Callable[[nn.Module, int], Any] = lambda model, step: None,
    **options: Any,
) -> HealthReport:
    """A plain loop; `within` is called before the backward pass, and may raise, which costs the step."""
    optimizer = SGD(model.parameters(), 0.05) if optimizer is None else optimizer
    session = HealthSession(model, **{"probe_every_n_steps": 10, "announce": lambda line: None, **options})
    for step, batch in enumerate(data(steps)):
        optimizer.zero_grad()
        with contextlib.suppress(RuntimeError):
            loss = loss_of(model, batch, step)
            within(model, step)
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
        if step % 10 == 9:
            session.flush()
    session.close()
    return session.report()


def conditions(report: HealthReport) -> set[str]:
    return {str(finding.condition) for finding in report.findings if finding.severity != "info"}


def layers(report: HealthReport) -> dict[str, LayerStats]:
    return {layer.name: layer for layer in report.layers}


# --- passes without a backward pass ---


def bad_batch(model: nn.Module, step: int) -> None:
    if step in (0, 1, 4, 9, 49):
        raise RuntimeError("a bad batch")


def acting(model: nn.Module, step: int) -> None:
    model(torch.randn(1, 16))  # with gradients, which nobody asks for


def averaging(model: nn.Module, step: int) -> None:
    if step in (0, 1, 49):
        torch.optim.swa_utils.update_bn([(torch.randn(8, 16),)], model)


def penalty(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    out = entropy(model, batch, step)
    return out if step % 3 == 2 else 1e-3 * sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize(
    ("within", "loss_of"),
    [(bad_batch, entropy), (acting, entropy), (averaging, entropy), (lambda model, step: None, penalty)],
)
def test_passes_without_a_way_back_hide_no_dead_layer(within: Any, loss_of: Loss, dead: bool) -> None:
    report = loop(net(dead), loss_of=loss_of, within=within)
    assert conditions(report) == ({"dead_units"} if dead else set())
    assert report.unwatched == ()
    assert not any("Error" in note for note in report.notes)


# --- a measured 0 ---


def blocked(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    return entropy(model, batch, step) * (0.0 if step >= 50 else 1.0)


def test_a_gradient_that_is_exactly_0_is_shown_as_0() -> None:
    for layer in layers(loop(net(), loss_of=blocked)).values():
        assert (layer.grad_norm, layer.backward_rms, layer.update_to_weight) == (0.0, 0.0, 0.0)
        assert "grad_norm=0," in repr(layer)


def test_a_rate_of_0_is_shown_as_an_update_of_0() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def stop(model: nn.Module, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 50 else 0.0

    assert all(layer.update_to_weight == 0.0 for layer in loop(model, optimizer, within=stop).layers)


def test_units_that_revive_are_said_to_have_healed() -> None:
    def revive(model: nn.Module, step: int) -> None:
        if step == 50:
            model[2].bias.data.zero_()  # type: ignore[operator,union-attr,index]

    report = loop(net(dead=True), within=revive, steps=200)
    (finding,) = [finding for finding in report.findings if finding.condition == "dead_units"]
    assert finding.healed == ("2",)
    assert (layers(report)["2"].dead_fraction or 0.0) < 0.5


# --- what loggers get ---


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.points: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, *_: Any) -> None:  # type: ignore[override]
        self.points.setdefault(step or 0, {}).update(metrics)


class Norms(pl.Callback):
    """All norms, by plain arithmetic."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        squares = [float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None]
        self.rows.append((trainer.fit_loop.epoch_loop._batches_that_stepped, math.sqrt(sum(squares))))


class Spiky(Classifier):
    """One batch whose loss is 60 times as large."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (60.0 if batch_idx == 9 else 1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("probe", [1, 3, 50])
@pytest.mark.parametrize("kind", [SGD, torch.optim.LBFGS])
def test_the_greatest_norm_of_a_window_reaches_the_loggers(kind: Any, probe: int, accumulate: int) -> None:
    torch.manual_seed(0)
    options = {"max_iter": 3, "lr": 0.01} if kind is torch.optim.LBFGS else {"lr": 0.01}
    logger, norms = Recorder(), Norms()
    run = trainer(
        GradHealth(probe_every_n_steps=probe),
        norms,
        logger=logger,
        max_epochs=1,
        log_every_n_steps=4,
        accumulate_grad_batches=accumulate,
    )
    run.fit(Spiky(None, kind, **options), batches(samples=128))
    key = "gradhealth/log10_total_norm"
    logged = {step: point[key] for step, point in logger.points.items() if key in point and (step + 1) % 4 == 0}
    assert logged
    for step, value in logged.items():
        assert 10**value == pytest.approx(max(norm for at, norm in norms.rows if step - 4 < at <= step), rel=1e-5)


# --- gradients beside the backward pass ---


def saliency(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    out = model(x)
    torch.autograd.grad(100 * out.square().sum(), x, retain_graph=True)
    return functional.cross_entropy(out, batch[1])


def balanced(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    out = model(batch[0])
    loss = functional.cross_entropy(out, batch[1])
    torch.autograd.grad(50 * loss, list(model.parameters()), retain_graph=True)  # as GradNorm weighs its tasks
    return loss


def flat_minima(model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    out = model(x)
    torch.autograd.grad(out.sum(), x, create_graph=True)  # a penalty that is computed and not used
    return functional.cross_entropy(out, batch[1])


@pytest.mark.parametrize("loss_of", [saliency, balanced, flat_minima])
def test_only_what_accumulates_counts_in_the_gradient_of_an_output(loss_of: Loss) -> None:
    twin = net(act=nn.Tanh)
    optimizer, truth = SGD(twin.parameters(), 0.05), 0.0
    for x, y in data(20):
        optimizer.zero_grad()
        first = twin[0](x)
        first.retain_grad()
        functional.cross_entropy(twin[1:](first), y).backward()
        truth = first.grad.double().square().mean().sqrt().item()
        optimizer.step()
    report = loop(net(act=nn.Tanh), loss_of=loss_of, steps=20, probe_every_n_steps=1)
    assert layers(report)["0"].backward_rms == pytest.approx(truth, rel=1e-4)


# --- optimizers that are none of torch's ---


class Wrapper:
    """Offers what a loop calls, and no hooks."""

    def __init__(self, inner: Any) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> None:
        self.optimizer.step()


class OnItsOwn:
    """No optimizer of torch at all."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.05}]
        self.state: dict[Any, Any] = {}

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.05 * parameter.grad


class Averaged(torch.optim.Optimizer):
    """Without `super().__init__`, as wrappers are written."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "wrapped": lambda model: Wrapper(SGD(model.parameters(), 0.05)),
    "wrapped twice": lambda model: Wrapper(Wrapper(torch.optim.Adam(model.parameters(), 1e-3))),
    "on its own": lambda model: OnItsOwn(model.parameters()),
    "without an own init": lambda model: Averaged(SGD(model.parameters(), 0.05)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dead", [True, False])
def test_any_optimizer_is_watched_and_clipped(name: str, dead: bool) -> None:
    model = net(dead)
    report = loop(model, OPTIMIZERS[name](model), clip=NormClip(0.01))
    assert (report.steps, report.clipped_steps, report.aside) == (100, 100, "")
    assert ("dead_units" in conditions(report)) is dead
    updates = [layer.update_to_weight for layer in report.layers]
    assert all(updates) or any("update/weight" in note for note in report.notes)


# --- catastrophes in the first steps ---


def at(step: int, factor: float) -> Loss:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], now: int) -> Tensor:
        return entropy(model, batch, now) * (factor if now == step else 1.0)

    return loss


@pytest.mark.parametrize("flushed", [50, 10])
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_blow_in_the_first_steps_is_found(step: int, flushed: int) -> None:
    report = loop(net(), loss_of=at(step, 1e5), probe_every_n_steps=flushed)
    assert any(f.first_step <= step + 1 for f in report.findings if f.severity != "info")


def test_a_warm_up_is_healthy() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.2, momentum=0.9)

    def warm(model: nn.Module, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.2 * min(1.0, (step + 1) / 50)

    assert not conditions(loop(model, optimizer, within=warm))
