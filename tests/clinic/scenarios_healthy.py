"""Healthy trainings of less usual kinds: several inputs, several losses, several forwards a step."""

from __future__ import annotations

from typing import Any

import torch
from clinic import Built, scenario
from nets import CHAIN, HE, Task, adam, adamw, classes, classifier, digits, hidden, scaled, sgd, stack
from torch import Tensor, nn
from torch.nn import functional


class Siamese(Task):
    """One net sees both of a pair: are they of the same class?"""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (one, two), same = batch
        distance = (self.net(one) - self.net(two)).square().mean(-1)
        return torch.where(same, distance, functional.relu(1 - distance)).mean()


@scenario("siamese", 150, chain=CHAIN, units={hidden(4): "relu"}, falls=0.1)
def siamese() -> Built:
    pairs = zip(digits(150), digits(150), strict=True)
    data = [((a, b), y == z) for (a, y), (b, z) in pairs]
    return Siamese(scaled(stack(4, inputs=64, outputs=8), HE), functional.mse_loss, adam(1e-3)), data


class Contrastive(Task):
    """Two noisy views of every sample shall find each other."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views = [functional.normalize(self.net(batch[0] + 0.3 * torch.randn_like(batch[0])), dim=-1) for _ in range(2)]
        return functional.cross_entropy(views[0] @ views[1].T / 0.2, torch.arange(len(batch[0])))


@scenario("contrastive", 150, chain=CHAIN, units={hidden(4): "relu"}, falls=0.05)
def contrastive() -> Built:
    return Contrastive(stack(4, inputs=64, outputs=16), functional.mse_loss, adam(2e-3)), digits(150)


class Towers(nn.Module):
    """Two towers of different depth and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.user = stack(5, nn.GELU, inputs=16, outputs=12)
        self.item = stack(2, nn.ReLU, inputs=8, outputs=12)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return (self.user(x["user"]) * self.item(x["item"])).sum(-1)


@scenario("two towers, a dict for input", 200)
def towers() -> Built:
    taste = torch.randn(16, 8)
    data = []
    for _ in range(200):
        user, item = torch.randn(64, 16), torch.randn(64, 8)
        data.append(({"user": user, "item": item}, ((user @ taste) * item).sum(-1).gt(0).float()))
    return Task(Towers(), functional.binary_cross_entropy_with_logits, adam(5e-3)), data


class Tasks(nn.Module):
    """A shared trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = stack(3, inputs=16, outputs=32)
        self.kind, self.size = nn.Linear(32, 4), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shared = functional.silu(self.trunk(x))
        return {"kind": self.kind(shared), "size": self.size(shared)}


def both(output: dict[str, Tensor], y: Tensor) -> Tensor:
    loss = functional.cross_entropy(output["kind"], y)
    return loss + 0.1 * functional.mse_loss(output["size"].squeeze(-1), y.float())


@scenario("two heads, a dict for output", 150)
def heads() -> Built:
    return Task(Tasks(), both, adamw(3e-3)), classes(150)


class Policy(Task):
    """REINFORCE on a bandit with contexts: the gradient is mostly noise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        choices = torch.distributions.Categorical(logits=self.net(batch[0]))
        action = choices.sample()
        reward = (action == batch[1]).float()
        return -(choices.log_prob(action) * (reward - 0.25)).mean() - 0.01 * choices.entropy().mean()


@scenario("policy gradient", 200, chain=CHAIN, falls=None)
def policy() -> Built:
    return Policy(stack(4, nn.Tanh, width=32), functional.mse_loss, adam(2e-3)), classes(200)


class Maxout(nn.Module):
    """The larger of two linear pieces."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pieces = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces(x).unflatten(-1, (2, -1)).amax(-2)


@scenario("maxout", 150, chain=CHAIN)
def maxout() -> Built:
    return classifier(
        nn.Sequential(Maxout(16, 32), Maxout(32, 32), Maxout(32, 32), nn.Linear(32, 4)), sgd(0.2)
    ), classes(150)


class Gated(nn.Module):
    """A highway layer: sigmoid gates, biased towards carrying what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.tanh(self.change(x)) + (1 - gate) * x


@scenario("highway net, 12 layers", 100, chain=CHAIN, units={r"net\.\d+\.gate": "sigmoid", r"net\.\d+\.change": "tanh"})
def highway() -> Built:
    return classifier(
        nn.Sequential(nn.Linear(16, 32), *(Gated(32) for _ in range(12)), nn.Linear(32, 4)), adam(3e-3)
    ), classes(100)


@scenario("mixer of LayerNorm and ReLU6", 150, chain=CHAIN, units={hidden(5, first=1, each=3): "relu6"})
def layer_norm() -> Built:
    return classifier(stack(5, nn.ReLU6, width=48, norm=nn.LayerNorm), adamw(2e-3, weight_decay=0.05)), classes(150)


@scenario("unbalanced classes", 200, chain=CHAIN, units={hidden(3): "relu"}, falls=0.05)
def unbalanced() -> Built:
    """One sample in fifty is of the rare class."""
    direction = torch.randn(16) / 4
    data = [(x, (x @ direction > 2.05).long()) for x, _ in classes(200, batch=128)]
    return classifier(stack(3), adam(2e-3)), data


@scenario("inputs of very different scales", 150, chain=CHAIN, falls=0.1)
def scales() -> Built:
    factor = torch.logspace(-2, 1, 16)
    data = [(x * factor, y) for x, y in classes(150)]
    return classifier(stack(4, width=48), adam(1e-3)), data


@scenario("default cadence: an MLP logged every 50 steps", 300, chain=CHAIN, options={"log_every_n_steps": 50})
def cadence() -> Built:
    return classifier(stack(4), adam(1e-3)), classes(300, batch=32)


@scenario("SGD with warm restarts", 200, chain=CHAIN)
def restarts() -> Built:
    def cosine(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(stack(4, nn.ELU), cosine), classes(200)


@scenario("alternating batch sizes", 150, chain=CHAIN)
def ragged() -> Built:
    data = [(x[: 64 if i % 3 else 7], y[: 64 if i % 3 else 7]) for i, (x, y) in enumerate(classes(150))]
    return classifier(stack(4, nn.SiLU), adam(2e-3)), data
