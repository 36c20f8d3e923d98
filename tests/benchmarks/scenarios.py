"""Trainings to try clippers on: two that explode, twenty that are calm. All of them small, on real or made data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lightning_gradhealth import Clipper, GradientMonitor

CALM_NETS = ("mlp", "batch norm mlp", "cnn", "lstm", "transformer")


@dataclass
class Outcome:
    """What came of a training.

    Attributes:
        score: The lower, the better.
        clipped: Steps that were clipped.
        steps: All steps.
        weights: The parameters at the end.
    """

    score: float
    clipped: int = 0
    steps: int = 0
    weights: list[Tensor] = field(default_factory=list)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterator[Callable[[], Tensor]],
    steps: int,
    warmup: int,
    clip: Clipper | str | None,
    scale: float = 1.0,
) -> tuple[list[float], Outcome]:
    """Train with a linear warm-up, one clipper, and the loss and the rate rescaled against one another."""
    monitor = None if clip is None else GradientMonitor(model, clip=clip)
    rate = optimizer.param_groups[0]["lr"] / scale
    history, clipped = [], 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warmup)
        optimizer.zero_grad()
        loss = next(losses)()
        (loss * scale).backward()
        if monitor is not None:
            decision = monitor.observe(optimizer)
            monitor.apply(decision)
            clipped += decision.action == "clip"
            monitor.rows.clear()
        optimizer.step()
        history.append(loss.item())
    return history, Outcome(math.nan, clipped, steps, [p.detach().clone() for p in model.parameters()])


# --- two that explode ----------------------------------------------------------------------------------------------


@functools.cache
def characters() -> tuple[Tensor, int]:
    """The first 300,000 characters of Python's own documentation, as numbers, and how many kinds there are."""
    from pydoc_data.topics import topics

    text = "".join(sorted(topics.values()))[:300_000]
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


class CharacterRNN(nn.Module):
    """A tanh RNN whose recurrent weights stretch by 1.2 a step."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, 32)
        self.rnn = nn.RNN(32, 128, batch_first=True)
        self.head = nn.Linear(128, kinds)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)
        self.rnn.weight_hh_l0.data.mul_(1.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


def character_rnn(clip: Clipper | str | None, seed: int, scale: float = 1.0) -> Outcome:
    """Next-character prediction at a rate far too high; the score is the mean loss of the last 50 steps."""
    text, kinds = characters()
    torch.manual_seed(seed)
    model = CharacterRNN(kinds)
    generator = torch.Generator().manual_seed(seed + 1000)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            starts = torch.randint(0, len(text) - 65, (32, 1), generator=generator)
            batch = text[starts + torch.arange(65)]
            yield lambda: functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())  # noqa: B023

    history, outcome = _train(model, torch.optim.SGD(model.parameters(), 3.0), losses(), 500, 100, clip, scale)
    outcome.score = sum(history[-50:]) / 50
    return outcome


def deep_mlp(clip: Clipper | str | None, seed: int) -> Outcome:
    """Regression on targets with heavy-tailed noise; the score is the squared error against clean ones."""
    torch.manual_seed(seed)
    widths = [16] + [64] * 10
    layers = [m for pair in zip(widths, widths[1:]) for m in (nn.Linear(*pair), nn.ReLU())]  # noqa: B905
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    generator = torch.Generator().manual_seed(seed + 1000)
    direction = torch.randn(16, generator=generator)
    direction /= direction.norm()
    clean = torch.randn(2048, 16, generator=generator)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            x = torch.randn(64, 16, generator=generator)
            noise = torch.randn(64, generator=generator) / torch.randn(64, generator=generator)  # Student-t(1)
            y = torch.sin(2 * x @ direction) + 0.1 * noise
            yield lambda: functional.mse_loss(model(x).squeeze(1), y)  # noqa: B023

    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    _, outcome = _train(model, optimizer, losses(), 1500, 100, clip)
    with torch.no_grad():
        outcome.score = functional.mse_loss(model(clean).squeeze(1), torch.sin(2 * clean @ direction)).item()
    return outcome


# --- and twenty that are calm ----------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16).float(), torch.tensor(labels)


class _Rows(nn.Module):
    """Reads an image row by row."""

    def __init__(self, reader: nn.Module, width: int) -> None:
        super().__init__()
        self.reader = reader
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        read = self.reader(x.view(-1, 8, 8))
        return self.head(read[0][:, -1] if isinstance(read, tuple) else read.mean(1))


def _calm(net: str) -> tuple[nn.Module, Callable[..., torch.optim.Optimizer], float, int]:
    """Model, optimizer, rate and warm-up."""
    adam = torch.optim.Adam
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    if net == "mlp":
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers), adam, 1e-3, 1
    if net == "batch norm mlp":
        hidden = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(64, 10)), adam, 1e-3, 1
    if net == "cnn":
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
        layers = [nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
        return nn.Sequential(*layers), momentum, 0.05, 1
    if net == "lstm":
        return _Rows(nn.LSTM(8, 64, batch_first=True), 64), adam, 2e-3, 1
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return _Rows(nn.Sequential(nn.Linear(8, 32), encoder), 32), adam, 1e-3, 200


def calm(net: str, clip: Clipper | str | None, seed: int, steps: int = 2_000) -> Outcome:
    """A sensible training on scikit-learn's digits, far beyond the point where it has learned them by heart."""
    x, y = digits()
    torch.manual_seed(seed)
    model, optimizer, rate, warmup = _calm(net)
    generator = torch.Generator().manual_seed(seed)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            chosen = torch.randint(0, len(x), (64,), generator=generator)
            yield lambda: functional.cross_entropy(model(x[chosen]), y[chosen])  # noqa: B023

    _, outcome = _train(model, optimizer(model.parameters(), rate), losses(), steps, warmup, clip)
    with torch.no_grad():
        outcome.score = (model(x).argmax(1) != y).float().mean().item()
    return outcome
