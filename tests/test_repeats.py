"""Modules that are applied to their own output, or several times: neural ODEs, loops by hand, shared towers."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from signal_twin import Twin, approx, rms
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhealth import Condition, FlowReport, GradHealth, diagnose

SIZE, STEPS = 8, 4


def field() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, 32), nn.Tanh(), nn.Linear(32, SIZE))


def plain(net: nn.Module, y: Tensor) -> Tensor:
    for _ in range(STEPS):
        y = net(y)
    return y


def euler(net: nn.Module, y: Tensor) -> Tensor:
    for _ in range(STEPS):
        y = y + net(y) / STEPS
    return y


def midpoint(net: nn.Module, y: Tensor) -> Tensor:
    for _ in range(STEPS):
        y = y + net(y + net(y) / (2 * STEPS)) / STEPS
    return y


def checkpointed(net: nn.Module, y: Tensor) -> Tensor:
    for _ in range(STEPS):
        y = y + checkpoint(net, y, use_reentrant=False) / STEPS
    return y


def stateless(net: nn.Module, y: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    for _ in range(STEPS):
        y = y + torch.func.functional_call(net, parameters, (y,)) / STEPS
    return y


def trajectory(net: nn.Module, y: Tensor) -> Tensor:
    places = [y]
    for _ in range(STEPS):
        places.append(places[-1] + net(places[-1]) / STEPS)
    return torch.stack(places).mean(0)


def refined(net: nn.Module, y: Tensor) -> Tensor:
    estimates = [y]
    for _ in range(STEPS):
        estimates.append(estimates[-1].detach() + net(estimates[-1].detach()))
    return torch.stack(estimates[1:]).mean(0)


def fixed_point(net: nn.Module, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = torch.zeros_like(y)
        for _ in range(10):
            z = torch.tanh(net(z) + y)
    return torch.tanh(net(z) + y)


def solved(net: nn.Module, y: Tensor) -> Tensor:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    found: Tensor = torchdiffeq.odeint(lambda t, y: net(y), y, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1]
    return found


class Stepped(nn.Module):
    """What the adjoint method wants: a module of time and place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def adjoint(net: nn.Module, y: Tensor) -> Tensor:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    found: Tensor = torchdiffeq.odeint_adjoint(Stepped(net), y, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1]
    return found


Loop = Callable[[nn.Module, Tensor], Tensor]
LOOPS = [plain, euler, midpoint, checkpointed, stateless, trajectory, refined, fixed_point, solved, adjoint]
# the adjoint method has a backward pass of its own, in which modules run again: no gradient is at their outputs
HIDDEN = [adjoint]


class Repeated(nn.Module):
    """A net applied to its own output, alone or between others."""

    def __init__(self, loop: Loop, between: bool, net: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Linear(SIZE, SIZE) if between else nn.Identity()
        self.net, self.loop = field() if net is None else net, loop
        self.head = nn.Linear(SIZE, SIZE) if between else nn.Identity()

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.head(self.loop(self.net, self.encoder(y)))
        return out


class Fitted(pl.LightningModule):
    """Trains a net that forward, or training_step itself, repeats."""

    def __init__(self, net: nn.Module, loop: Loop | None = None, rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.loop, self.rate = net, loop, rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out = self.net(batch[0]) if self.loop is None else self.loop(self.net, batch[0])
        return functional.mse_loss(out, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def pair(samples: int = 256) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, SIZE), torch.randn(samples, SIZE)


def data(inputs: Tensor, target: Tensor, size: int = 64) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(inputs, target), batch_size=size)


def unmeasured(report: FlowReport) -> list[str]:
    return [note for note in report.notes if "not measured" in note]


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_diagnose_measures_what_is_applied_to_its_own_output(loop: Loop, between: bool) -> None:
    report = diagnose(Repeated(loop, between), pair(), functional.mse_loss)
    assert report.verdict == "healthy"
    assert not unmeasured(report)
    layers = {layer.name: layer for layer in report.layers}
    for name in ("net.0", "net.2"):
        assert layers[name].forward_rms
        assert bool(layers[name].backward_rms) == (loop not in HIDDEN)


@pytest.mark.parametrize("where", ["forward", "between", "training_step"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_fit_measures_what_is_applied_to_its_own_output(loop: Loop, where: str) -> None:
    model = Fitted(field(), loop) if where == "training_step" else Fitted(Repeated(loop, where == "between"))
    watch = GradHealth(probe_every_n_steps=1, report_dir=None)
    trainer(watch, max_epochs=2).fit(model, data(*pair()))
    report = watch.report()
    assert report.healthy
    unseen = [note for note in report.notes if "not measured" in note]
    if loop in HIDDEN and where == "training_step":  # all calls are within no_grad
        assert unseen == ["signals: not measured (no call of the model in training was seen)"]
    else:
        assert not unseen


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between"])
@pytest.mark.parametrize("loop", [plain, euler, midpoint, trajectory, refined], ids=lambda loop: loop.__name__)
def test_what_is_measured_is_all_calls_together(loop: Loop, between: bool) -> None:
    model, (inputs, target) = Repeated(loop, between), pair()
    report = diagnose(model, (inputs, target), functional.mse_loss)
    twin = Twin(model)
    functional.mse_loss(model(inputs), target).backward()
    for layer in report.layers:
        assert layer.forward_rms == approx(rms(twin.outputs[layer.name]), 1e-5)
        assert layer.backward_rms == approx(rms(twin.gradients[layer.name]), 1e-5)  # None: detached behind it


# --- what is wrong with them is found ---


def twice(net: nn.Module, y: Tensor) -> Tensor:
    out: Tensor = net(net(y))
    return out


def deep(width: int, depth: int = 12) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())))


def he(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


class Towers(nn.Module):
    """One net on both inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(one), self.net(other)


def apart(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return functional.mse_loss(outputs[0], outputs[1] + target)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between"])
@pytest.mark.parametrize("healthy", [False, True], ids=["library's init", "He"])
def test_a_deep_net_applied_twice(healthy: bool, between: bool) -> None:
    """An encoder lies behind twice the layers that the chain shows: that is no matter of a single layer."""
    model = Repeated(twice, between, deep(32))
    model.encoder = nn.Linear(SIZE, 32)
    model.head = nn.Linear(32, SIZE)
    report = diagnose(he(model) if healthy else model, pair(), functional.mse_loss)
    assert (Condition.VANISHING_GRADIENTS in report.conditions) == (not healthy)


@pytest.mark.parametrize("healthy", [False, True], ids=["library's init", "He"])
def test_towers_that_share_their_weights(healthy: bool) -> None:
    model = Towers(deep(32, 20))
    inputs = torch.randn(256, 32), torch.randn(256, 32)
    report = diagnose(he(model) if healthy else model, (inputs, torch.ones(())), apart)
    assert (Condition.VANISHING_GRADIENTS in report.conditions) == (not healthy)


@pytest.mark.parametrize("healthy", [False, True], ids=["library's init", "He"])
def test_a_fit_of_a_deep_net_that_training_step_applies_twice(healthy: bool) -> None:
    net = he(deep(SIZE * 4, 16)) if healthy else deep(SIZE * 4, 16)
    watch = GradHealth(probe_every_n_steps=1, report_dir=None)
    inputs = torch.randn(256, SIZE * 4)
    trainer(watch, max_epochs=12).fit(Fitted(net, twice, rate=1e-4), data(inputs, inputs.roll(1, 1)))
    conditions = {finding.condition for finding in watch.report().findings}
    assert (Condition.VANISHING_GRADIENTS in conditions) == (not healthy)


class Readout(nn.Module):
    """A shared layer again and again, each of whose states is read: the last the least, or nothing but the last."""

    def __init__(self, gain: float, falling: bool, steps: int = 10) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE)
        nn.init.orthogonal_(self.cell.weight, gain)
        self.weights = [0.4**step for step in range(steps)] if falling else [0.0] * (steps - 1) + [1.0]

    def forward(self, y: Tensor) -> Tensor:
        read = torch.zeros_like(y)
        for weight in self.weights:
            y = self.cell(y)
            read = read + weight * y
        out: Tensor = self.head(read)
        return out


@pytest.mark.parametrize(("gain", "falling", "explodes"), [(1.0, True, False), (1.0, False, False), (2.5, False, True)])
def test_calls_explode_where_the_gradient_grows_not_where_the_last_are_hardly_read(
    gain: float, falling: bool, explodes: bool
) -> None:
    model, (inputs, target) = Readout(gain, falling), pair()
    report = diagnose(model, (inputs, target), functional.mse_loss)
    through_time = [finding for finding in report.findings if "through time" in finding.summary]
    assert bool(through_time) == explodes
    twin = Twin(model)
    functional.mse_loss(model(inputs), target).backward()
    calls = [rms([gradient]) or 0.0 for gradient in reversed(twin.gradients["cell"])]
    assert calls[0] / calls[-1] > 1e3 or not (falling or explodes)  # a crude ratio cries in both
    assert (calls[0] > (rms(twin.gradients["head"]) or 0.0)) == explodes or not falling


# --- what cannot be seen is said ---


@pytest.mark.parametrize("kind", ["vmap", "jvp"])
def test_transforms_are_named(kind: str) -> None:
    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = field()

        def forward(self, y: Tensor) -> Tensor:
            if kind == "vmap":
                out: Tensor = torch.vmap(self.net)(y)
                return out
            return y + torch.func.jvp(self.net, (y,), (torch.ones_like(y),))[1]

    report = diagnose(Transformed(), pair(), functional.mse_loss)
    assert any("torch.func" in note for note in report.notes)
    assert not any("no call" in note for note in report.notes)


def test_a_head_that_begins_at_zero_leaves_the_gradient_unjudged() -> None:
    net = he(nn.Sequential(deep(16, 6), nn.Linear(16, 3)))
    labels = torch.randint(0, 3, (256,))
    batch = torch.randn(256, 16), labels
    assert not [n for n in diagnose(net, batch, functional.cross_entropy).notes if "gradient is not judged" in n]
    nn.init.zeros_(net[1].weight)
    report = diagnose(net, batch, functional.cross_entropy)
    assert report.verdict == "healthy"
    assert [note for note in report.notes if "gradient is not judged, it is 0 before 1" in note]


class Spectral(nn.Module):
    """Complex weights applied by hand between two transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(SIZE, SIZE, dtype=torch.complex64) / SIZE**0.5 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(x).unsqueeze(1)
        for weight in self.weights:
            z = torch.matmul(z, weight)
        return torch.fft.ifft(z.squeeze(1)).real


def test_complex_signals_between_matrices_by_hand_are_measured() -> None:
    report = diagnose(Spectral(), pair(), functional.mse_loss)
    assert report.verdict == "healthy"
    assert not unmeasured(report)
    (layer,) = report.layers
    gains = [matrix.backward_gain for matrix in layer.matrices]
    assert all(0.3 < (gain or 0.0) < 3 for gain in gains[1:-1])
