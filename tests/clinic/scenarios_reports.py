"""What public reports tell of, rebuilt: each sick, and cured as its thread says."""

from __future__ import annotations

from typing import Any

import torch
from clinic import Built, must, scenario
from nets import Task, adam, classes, classifier, regressor, sgd, stack, values
from torch import Tensor, nn
from torch.nn import functional

IGNORED = "pytorch/pytorch#116349, #70348, #75181"
ZERO_NORM = "pytorch/pytorch#2421, #37154"

# --- a batch of which all labels are ignored -----------------------------------------------------------------


def _ignoring() -> list[Any]:
    """The labels of step 40 are all to be ignored, of others a tenth."""
    batches = [(x, torch.where(torch.rand(y.shape) < 0.1, -100, y)) for x, y in classes(100)]
    batches[40] = batches[40][0], torch.full_like(batches[40][1], -100)
    return batches


def _by_count(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits, target, reduction="sum") / (target != -100).sum().clamp(min=1)


@scenario("all labels of a batch ignored", must=(must("non_finite", since=40, by=50),), report=IGNORED)
def ignored() -> Built:
    return classifier(stack(3), adam(3e-3)), _ignoring()


@scenario("all labels of a batch ignored, divided by their number", report=IGNORED)
def ignored_by_count() -> Built:
    return Task(stack(3), _by_count, adam(3e-3)), _ignoring()


# --- NaN out of calm: the distance of two that are the same --------------------------------------------------


class Twins(nn.Module):
    """The distance of the embeddings of two inputs."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.embed, self.eps = stack(2), eps

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embed(x).chunk(2)
        return ((first - second).square().sum(1) + self.eps).sqrt()


def _pairs() -> list[Any]:
    batches = [(x, torch.rand(len(x) // 2)) for x, _ in classes(100)]
    batches[49][0][32] = batches[49][0][0]  # one of its pairs is the same sample twice
    return batches


@scenario("distance of a sample from itself", must=(must("non_finite", since=49, by=59),), report=ZERO_NORM)
def from_itself() -> Built:
    return regressor(Twins(0.0), adam()), _pairs()


@scenario("distance of a sample from itself, with an epsilon", falls=0.1, report=ZERO_NORM)
def from_itself_with_epsilon() -> Built:
    return regressor(Twins(1e-6), adam()), _pairs()


# --- inputs that nobody has scaled ---------------------------------------------------------------------------

BLOWN = ("exploding_gradients", "non_finite", "loss_spike", "dead_units", "stalled_loss", "growing_weights")


@scenario("inputs of size 1e4", 60, must=(must("oversized_updates", by=5),), allow=BLOWN)
def unscaled() -> Built:
    return regressor(stack(2), sgd(1e-2)), [(1e4 * x, y) for x, y in values(60)]


@scenario("inputs of size 1e4, scaled", 200, falls=0.1)
def scaled_inputs() -> Built:
    return regressor(stack(2), sgd(1e-1)), values(200)


# --- steps without a backward pass ---------------------------------------------------------------------------


class Skipping(Task):
    """Every seventh training_step gives no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 7 == 0 else loss


def _mostly_dead(dead: int) -> nn.Module:
    net = stack(3, width=64)
    with torch.no_grad():
        net[2].bias[:dead] = -50.0
    return net


@scenario(
    "60 of 64 units dead, steps without a loss",
    150,
    must=(must("dead_units", layers=r"net\.2", by=100),),
    units={r"net\.2": "relu"},
)
def dead_and_skipping() -> Built:
    return Skipping(_mostly_dead(60), functional.cross_entropy, adam(3e-3)), classes(200)


@scenario("steps without a loss", 150)
def skipping() -> Built:
    return Skipping(_mostly_dead(0), functional.cross_entropy, adam(3e-3)), classes(200)


@scenario("half of the units dead, and learning", 150, noted=("dead_units",))
def half_dead() -> Built:
    return classifier(_mostly_dead(42), adam(3e-3)), classes(150)
