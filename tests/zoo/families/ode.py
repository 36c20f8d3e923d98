"""Modules that are applied to their own output: neural ODEs, fixed points, iterations that share weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zoo.architecture import Architecture, Library

torchdiffeq = Library("torchdiffeq")
Batch = tuple[Any, Any]
MSE = functional.mse_loss


def spirals() -> Batch:
    """Where a point on a spiral is a while later."""
    angle, radius = 6 * torch.rand(64), 0.5 + torch.rand(64)
    start = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    later = torch.stack([radius * (angle + 1).cos(), radius * (angle + 1).sin()], 1)
    return (start,), 0.7 * later


def field(width: int = 32, size: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, size))


class Timed(nn.Module):
    """A field that does not look at the time."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.net = field(size=size)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class NeuralODE(nn.Module):
    """The field alone, from time 0 to 1."""

    def __init__(self, method: str, adjoint: bool = False) -> None:
        super().__init__()
        self.field, self.method = Timed(), method
        self.solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    def forward(self, y: Tensor) -> Tensor:
        options = {"options": {"step_size": 0.25}} if self.method in ("euler", "rk4") else {"rtol": 1e-3, "atol": 1e-4}
        return self.solve(self.field, y, torch.tensor([0.0, 1.0]), method=self.method, **options)[-1]


class Between(nn.Module):
    """A neural ODE between an encoder and a head."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.encoder, self.field, self.head = nn.Linear(2, size), Timed(size), nn.Linear(size, 2)

    def forward(self, y: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0])
        inner = torchdiffeq.odeint(self.field, self.encoder(y), times, method="rk4", options={"step_size": 0.5})
        return self.head(inner[-1])


class Euler(nn.Module):
    """A loop by hand."""

    def __init__(self, steps: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        self.field, self.steps, self.checkpointed = field(), steps, checkpointed

    def forward(self, y: Tensor) -> Tensor:
        for _ in range(self.steps):
            slope = checkpoint(self.field, y, use_reentrant=False) if self.checkpointed else self.field(y)
            y = y + slope / self.steps
        return y


class FixedPoint(nn.Module):
    """A deep equilibrium: one layer until it no longer moves, and one step more for the gradient."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.given, self.again, self.head = nn.Linear(2, size), nn.Linear(size, size, bias=False), nn.Linear(size, 2)
        nn.init.orthogonal_(self.again.weight, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        given = self.given(x)
        with torch.no_grad():
            z = torch.zeros_like(given)
            for _ in range(20):
                z = torch.tanh(self.again(z) + given)
        return self.head(torch.tanh(self.again(z) + given))


class Universal(nn.Module):
    """One Transformer layer, again and again."""

    def __init__(self, size: int = 16, steps: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, size)
        self.layer = nn.TransformerEncoderLayer(size, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head, self.steps = nn.LayerNorm(size), nn.Linear(size, 12), steps

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for _ in range(self.steps):
            x = self.layer(x)
        return self.head(self.norm(x)).transpose(1, 2)


def reversed_words() -> Batch:
    words = torch.randint(0, 12, (8, 10))
    return (words,), words.flip(1)


class Refinement(nn.Module):
    """Recurrent refinement of an estimate, as flow estimators do: a GRU cell sees its own last estimate."""

    def __init__(self, size: int = 16, steps: int = 5) -> None:
        super().__init__()
        self.context, self.cell = nn.Linear(2, size), nn.GRUCell(size + 2, size)
        self.delta, self.steps = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2)), steps

    def forward(self, x: Tensor) -> Tensor:
        context, estimate = self.context(x).relu(), torch.zeros_like(x)
        hidden, estimates = context.tanh(), []
        for _ in range(self.steps):
            hidden = self.cell(torch.cat([context, estimate.detach()], 1), hidden)
            estimate = estimate.detach() + self.delta(hidden)
            estimates.append(estimate)
        return torch.stack(estimates)


def all_alike(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.l1_loss(outputs, target.expand_as(outputs))


ARCHITECTURES = (
    Architecture("torchdiffeq/dopri5", "ode", lambda: NeuralODE("dopri5"), spirals, MSE),
    Architecture("torchdiffeq/rk4", "ode", lambda: NeuralODE("rk4"), spirals, MSE, daily=True),
    Architecture("torchdiffeq/adjoint", "ode", lambda: NeuralODE("dopri5", adjoint=True), spirals, MSE),
    Architecture("torchdiffeq/between layers", "ode", Between, spirals, MSE),
    Architecture("by hand/Euler", "ode", Euler, spirals, MSE),
    Architecture("by hand/Euler, checkpointed", "ode", lambda: Euler(checkpointed=True), spirals, MSE),
    Architecture("by hand/deep equilibrium", "ode", FixedPoint, spirals, MSE),
    Architecture("by hand/universal Transformer", "ode", Universal, reversed_words, functional.cross_entropy),
    Architecture("by hand/iterative refinement", "ode", Refinement, spirals, all_alike),
)
