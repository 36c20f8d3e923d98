"""Two views and two nets, gates, queues and whatever is set by the first batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture

Batch = tuple[Any, Any]


def encoder(size: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, size, 3, 2, 1, bias=False),
        nn.BatchNorm2d(size),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mlp(inputs: int, outputs: int, width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, outputs))


def views() -> Batch:
    picture = torch.randn(16, 3, 16, 16)
    return (picture + 0.3 * torch.randn_like(picture), picture.flip(-1)), None


def itself(outputs: Tensor, target: None) -> Tensor:
    return outputs


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float = 0.9) -> None:
    """The teacher is a running mean of the student."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)


def frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


class MoCo(nn.Module):
    """Contrast against a queue of keys of a teacher that forward moves."""

    def __init__(self, size: int = 16, keys: int = 64) -> None:
        super().__init__()
        self.student = nn.Sequential(encoder(), nn.Linear(32, size))
        self.teacher = frozen(self.student)
        self.register_buffer("queue", functional.normalize(torch.randn(keys, size), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        query = functional.normalize(self.student(one), dim=1)
        with torch.no_grad():
            follow(self.teacher, self.student)
            key = functional.normalize(self.teacher(other), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], 1) / 0.2
        start = int(self.place)
        self.queue[start : start + len(key)] = key
        self.place.fill_((start + len(key)) % len(self.queue))
        return functional.cross_entropy(logits, torch.zeros(len(one), dtype=torch.long))


class BYOL(nn.Module):
    """One view predicts what a teacher says of the other."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.student = nn.Sequential(encoder(), mlp(32, size))
        self.predictor, self.teacher = mlp(size, size), frozen(self.student)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            follow(self.teacher, self.student)
            aims = self.teacher(other), self.teacher(one)
        guesses = self.predictor(self.student(one)), self.predictor(self.student(other))
        alike = [functional.cosine_similarity(*pair).mean() for pair in zip(guesses, aims, strict=True)]
        return 2 - 2 * torch.stack(alike).mean()


class SimCLR(nn.Module):
    """Two views of each picture in one encoder, told from all other pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(encoder(), mlp(32, 16))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        a, b = functional.normalize(self.net(one), dim=1), functional.normalize(self.net(other), dim=1)
        return functional.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


class Siamese(nn.Module):
    """The same ReLU net on both; the distance is small where the labels agree."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.net(one) - self.net(other)).square().sum(1).add(1e-6).sqrt()


def pairs() -> Batch:
    one, same = torch.randn(64, 8), torch.rand(64) < 0.5
    near = one + 0.1 * torch.randn_like(one)
    return (one, torch.where(same[:, None], near, torch.randn_like(one))), same


def contrastive(distance: Tensor, same: Tensor) -> Tensor:
    return torch.where(same, distance.square(), (1 - distance).relu().square()).mean()


class SpatialGate(nn.Module):
    """Half of the channels, mixed over the places, gates the other half; the gate starts at 1."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width // 2), nn.Linear(places, places)
        nn.init.normal_(self.mix.weight, std=1e-6)
        nn.init.ones_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        through, gate = x.chunk(2, -1)
        return through * self.mix(self.norm(gate).transpose(1, 2)).transpose(1, 2)


class GatedBlock(nn.Module):
    def __init__(self, size: int, width: int, places: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, width), nn.Linear(width // 2, size)
        self.gate = SpatialGate(width, places)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gate(functional.gelu(self.up(self.norm(x)))))


class GatedMLP(nn.Module):
    """gMLP."""

    def __init__(self, size: int = 24, places: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size, 4, 4)
        self.blocks = nn.Sequential(*(GatedBlock(size, 2 * size, places) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head[1](self.head[0](self.blocks(x)).mean(1))


class ActNorm(nn.Module):
    """Scale and shift that the first batch sets."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.data = -x.mean(0)
                self.log_scale.data = -x.std(0).add(1e-6).log()
                self.ready.data = torch.tensor(True)
        return (x + self.shift) * self.log_scale.exp()


def actnorm() -> nn.Module:
    layers = [part for _ in range(3) for part in (nn.Linear(32, 32), ActNorm(32), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 32), ActNorm(32), nn.ReLU(), *layers, nn.Linear(32, 5))


class HyperNet(nn.Module):
    """A net that draws the weights of another from its input."""

    def __init__(self, size: int = 8, width: int = 16) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.hyper = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2 * size * width))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        first, second = self.hyper(task).chunk(2, 1)
        hidden = torch.bmm(x, first.view(-1, self.size, self.width)).relu()
        return torch.bmm(hidden, second.view(-1, self.width, self.size))


def tasks() -> Batch:
    x, task = torch.randn(16, 4, 8), torch.randn(16, 4)
    return (x, task), x * task.repeat(1, 2)[:, None]


def pictures() -> Batch:
    return (torch.randn(16, 3, 16, 16),), torch.randint(0, 5, (16,))


def rows() -> Batch:
    return (torch.randn(64, 8),), torch.randint(0, 5, (64,))


CROSS = functional.cross_entropy

ARCHITECTURES = (
    Architecture("by hand/MoCo", "two views", MoCo, views, itself),
    Architecture("by hand/BYOL", "two views", BYOL, views, itself),
    Architecture("by hand/SimCLR", "two views", SimCLR, views, itself),
    Architecture("by hand/Siamese", "two views", Siamese, pairs, contrastive, daily=True),
    Architecture("by hand/gMLP", "vision", GatedMLP, pictures, CROSS),
    Architecture("by hand/ActNorm", "other", actnorm, rows, CROSS),
    Architecture("by hand/hypernetwork", "other", HyperNet, tasks, functional.mse_loss),
)
