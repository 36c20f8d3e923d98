"""One matrix among several that a module applies by hand: where it swallows the signal it is named, else nothing is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import lightning_gradhealth as gh
from lightning_gradhealth import Finding, GradHealth, HealthReport, HealthSession
from lightning_gradhealth.signals import SignalProbe

WIDTH = 32


def matrix(inputs: int = WIDTH, outputs: int = WIDTH, size: float = 1.0) -> nn.Parameter:
    return nn.Parameter(size * torch.randn(inputs, outputs) * (2 / inputs) ** 0.5)


def matrices(place: int | None = None, size: float = 1.0, count: int = 8) -> list[nn.Parameter]:
    """The first reads 8 features; the one at `place` is of another size."""
    return [matrix(8 if n == 0 else WIDTH, WIDTH, size if n == place else 1.0) for n in range(count)]


class Listed(nn.Module):
    """Matrices in an nn.ParameterList, something behind each product, and a head."""

    def __init__(self, held: list[nn.Parameter], behind: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.weights, self.head, self.behind = nn.ParameterList(held), nn.Linear(WIDTH, 1), behind

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = self.behind(x @ weight)
        return self.head(x)


class Owned(nn.Module):
    """A module that owns them itself, with biases, and has no head."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        super().__init__()
        for number, weight in enumerate(held):
            self.register_parameter(f"w{number}", weight)
            self.register_parameter(f"b{number}", nn.Parameter(0.1 * torch.randn(WIDTH)))
        self.count = len(held)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.count):
            x = torch.tanh(torch.addmm(getattr(self, f"b{number}"), x, getattr(self, f"w{number}")))
        return x.sum(1, keepdim=True)


class Named(nn.Module):
    """In an nn.ParameterDict, by einsum, the weights first."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({f"layer{number}": weight for number, weight in enumerate(held)})
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights.values():
            x = functional.gelu(torch.einsum("io,bi->bo", weight, x))
        return self.head(x)


class Images(nn.Module):
    """Kernels of convolutions."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(weight.T.reshape(WIDTH, -1, 1).repeat(1, 1, 3) / 3**0.5 for weight in held)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(2).expand(-1, -1, 6)
        for kernel in self.kernels:
            x = functional.silu(functional.conv1d(x, kernel, padding=1))
        return self.head(x.mean(2))


class Sequences(Listed):
    """Of three dimensions, through functional.linear."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).expand(-1, 5, -1)
        for weight in self.weights:
            x = functional.elu(functional.linear(x, weight.t()))
        return self.head(x.mean(1))


def train(model: nn.Module, rate: float = 1e-3, steps: int = 40) -> HealthReport:
    session = HealthSession(model, probe_every_n_steps=10, announce=lambda line: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
    session.flush()
    return session.report()


def swallowed(report: Any) -> Finding | None:
    return next((found for found in report.findings if "swallows" in found.summary), None)


SICK = [
    (Listed, "weights.3", "weights"),
    (Owned, "w3", "Owned"),
    (Named, "weights.layer3", "weights"),
    (Images, "kernels.3", "kernels"),
    (Sequences, "weights.3", "weights"),
]


@pytest.mark.parametrize(("make", "name", "layer"), SICK)
def test_the_matrix_that_swallows_the_signal_is_named_and_the_code_mends_it(make: Any, name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = make(matrices(3, 1e-5))
    finding = swallowed(train(model))
    assert finding is not None
    assert finding.summary.startswith(f"{name} alone")
    assert finding.layers == (layer,)
    assert finding.evidence["parameter"] == name
    assert finding.evidence["weight_rms"] < 1e-3 * finding.evidence["neighbours_rms"]
    exec(finding.code, {"model": model})
    assert swallowed(train(model)) is None


@pytest.mark.parametrize(("make", "name", "layer"), SICK)
def test_diagnose_names_it_and_the_healthy_net_is_left_alone(make: Any, name: str, layer: str) -> None:
    batch = torch.randn(32, 8), torch.ones(32, 1)
    torch.manual_seed(0)
    finding = swallowed(gh.diagnose(make(matrices(5, 1e-5)), batch, functional.mse_loss))
    assert finding is not None
    assert finding.evidence["parameter"] == name.replace("3", "5")
    torch.manual_seed(0)
    assert swallowed(gh.diagnose(make(matrices()), batch, functional.mse_loss)) is None


class InTrainingStep(pl.LightningModule):
    """Nothing but the training step applies them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.head = nn.ParameterList(matrices(4, 1e-5)), nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for weight in self.weights:
            x = torch.relu(x @ weight)
        return (self.head(x) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_training_step_that_applies_them_itself_is_looked_into() -> None:
    health = GradHealth()
    batches = DataLoader([torch.randn(32, 8) for _ in range(20)], batch_size=None)
    trainer(health, max_steps=20, log_every_n_steps=5).fit(InTrainingStep(), batches)
    finding = swallowed(health.report())
    assert finding is not None
    assert finding.evidence["parameter"] == "weights.4"


# --- what only looks like it -----------------------------------------------------------------------------------


def by_hand_norm(x: Tensor) -> Tensor:
    return torch.relu(x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-12))


def layer_norm(x: Tensor) -> Tensor:
    return torch.relu(functional.layer_norm(x, x.shape[-1:], eps=1e-14))


class Branches(nn.Module):
    """x + f(x) with two raw matrices each; all of what one branch adds is tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1)
        self.weights = nn.ParameterList(matrix(size=1e-5 if n == 3 else 0.3) for n in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for first, second in zip(self.weights[::2], self.weights[1::2], strict=True):
            x = x + torch.relu(x @ first) @ second
        return self.head(x)


class Adapter(nn.Module):
    """LoRA by hand on frozen weights: its second factor starts at 0, or near it."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.base = nn.ParameterList(nn.Parameter(matrix().data, requires_grad=False) for _ in range(4))
        self.down = nn.ParameterList(matrix(WIDTH, 4) for _ in range(4))
        self.up = nn.ParameterList(matrix(4, WIDTH, start) for _ in range(4))
        self.enter, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = torch.relu(x @ base + x @ down @ up)
        return self.head(x)


class Gated(nn.Module):
    """Gates whose weights are tiny, so that they stand half open, and tables and scales beside."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList(matrices(count=6))
        self.gates = nn.ParameterList(matrix(8 if n == 0 else WIDTH, size=1e-5) for n in range(6))
        self.scales = nn.ParameterList(torch.full((1, WIDTH), 1e-5) for _ in range(6))  # LayerScale, on a branch
        self.table = nn.Parameter(1e-5 * torch.randn(10, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for value, gate, scale in zip(self.values, self.gates, self.scales, strict=True):
            x = 2 * torch.sigmoid(x @ gate) * torch.relu(x @ value)
            x = x + scale * torch.tanh(x) + self.table[3]
        return self.head(x)


class Looking(nn.Module):
    """Attention by hand, the queries tiny: it averages at first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = matrix(size=1e-5), matrix(), matrix(), matrix()
        self.enter, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).view(8, 4, WIDTH)
        weights = torch.softmax(x @ self.query @ (x @ self.key).mT / WIDTH**0.5, -1)
        x = weights @ (x @ self.value) @ self.out
        return self.head(x).view(32, 1)


class Again(nn.Module):
    """A recurrent net by hand: the weights of its memory are tiny, and applied again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.memory, self.out, self.more = matrix(1), matrix(size=1e-5), matrix(), matrix()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for feature in x.unbind(1):
            state = torch.tanh(feature.unsqueeze(1) @ self.inner + state @ self.memory)
        return self.head(torch.relu(state @ self.out) @ self.more)


class Equalized(Listed):
    """Small parameters, made large where they are applied."""

    def forward(self, x: Tensor) -> Tensor:
        for number, weight in enumerate(self.weights):
            x = torch.relu(x @ (weight * 1e5 if number == 3 else weight))
        return self.head(x)


class Experts(nn.Module):
    """Side by side, one of them not yet worth anything."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(matrix(size=1e-5 if n == 2 else 1.0) for n in range(5))
        self.enter, self.head, self.router = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        shares = self.router(x).softmax(-1)
        each = torch.stack([torch.relu(x @ weight) for weight in self.experts], -1)
        return self.head((each * shares.unsqueeze(1)).sum(-1))


class PolicyHead(nn.Module):
    """The last matrix may have any size."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([*matrices(count=5), matrix(WIDTH, 1, 1e-5)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights[:-1]:
            x = torch.relu(x @ weight)
        return x @ self.weights[-1]


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "all of one size": lambda: Listed(matrices()),
    "a tenth": lambda: Listed(matrices(3, 0.1)),
    "the first one": lambda: Listed(matrices(0, 1e-5), lambda x: torch.relu(x) if x.std() > 1e-3 else 1e5 * x),
    "layer_norm behind": lambda: Listed(matrices(3, 1e-5), layer_norm),
    "a norm by hand behind": lambda: Listed(matrices(3, 1e-5), by_hand_norm),
    "branches": Branches,
    "LoRA from 0": lambda: Adapter(0.0),
    "LoRA from 1e-5": lambda: Adapter(1e-5),
    "gates, scales, a table": Gated,
    "tiny queries": Looking,
    "memory by hand": Again,
    "equalized": lambda: Equalized(matrices(3, 1e-5)),
    "experts": Experts,
    "policy head": PolicyHead,
    "owned, the last one": lambda: Owned(matrices(7, 1e-5)),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
def test_what_only_looks_like_it_is_left_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    assert swallowed(gh.diagnose(model, (torch.randn(32, 8), torch.ones(32, 1)), functional.mse_loss)) is None
    assert swallowed(train(model)) is None


# --- what is measured ------------------------------------------------------------------------------------------


def test_the_gradient_before_and_behind_each_matrix_is_what_autograd_gives() -> None:
    torch.manual_seed(0)
    held = matrices(count=5)
    model, x = Listed(held, torch.tanh), torch.randn(16, 8)
    probe = SignalProbe(model)
    probe.open()
    model(x).square().mean().backward()
    reading = probe.close()
    assert reading is not None
    seen = reading.read(reading.vector.tolist())
    probe.pause()

    points = [x]
    for weight in held:
        points.append(torch.tanh(points[-1] @ weight))
    output = model.head(points[-1])
    gradients = torch.autograd.grad(output.square().mean(), [*points[1:-1], output])  # what a module reads is no point
    rms = [gradient.square().mean().sqrt().item() for gradient in gradients]
    wanted = {f"weights.{number}": rms[number - 1] / min(rms[number:]) for number in range(1, 5)}
    assert seen.of_matrices() == pytest.approx(wanted, rel=1e-6)


def test_a_net_of_nothing_but_matrices_is_not_said_to_have_seen_no_call() -> None:
    torch.manual_seed(0)
    assert not [note for note in train(PolicyHead()).notes if "no call" in note]


def test_the_hooks_change_nothing_in_the_gradients() -> None:
    torch.manual_seed(0)
    model, x = Listed(matrices(3, 1e-5)), torch.randn(16, 8)
    (model(x).square().mean()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    probe = SignalProbe(model)
    probe.open()
    model(x).square().mean().backward()
    probe.close()
    probe.pause()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))
