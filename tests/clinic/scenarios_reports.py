"""What public reports tell of, rebuilt: each sick, and cured as its thread says."""

from __future__ import annotations

from typing import Any

import torch
from clinic import Built, must, scenario
from nets import HE, Task, adam, classes, classifier, regressor, scaled, sgd, stack, values
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


# --- the rate of eight GPUs on one ---------------------------------------------------------------------------

BROKEN = (
    *("dead_units", "vanishing_gradients", "vanishing_activations", "exploding_gradients", "exploding_activations"),
    *("loss_spike", "stalled_loss", "stalled_layers"),
)
EIGHT_GPUS = "open-mmlab/mmdetection#1710, #4616"


def _boxes(steps: int, batch: int = 4) -> list[Any]:
    """Images with one square each; the targets are its place and its brightness, in tens."""
    batches = []
    for _ in range(steps):
        y, x = torch.rand(batch, 4), torch.zeros(batch, 3, 8, 8)
        for image, (row, column, light, _) in zip(x, y.tolist(), strict=True):
            image[:, int(6 * row) : int(6 * row) + 2, int(6 * column) : int(6 * column) + 2] = 1 + light
        batches.append((3 * x, 10 * y))
    return batches


def _detector(lr: float) -> Built:
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)]
    parts = [convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.MaxPool2d(2), convs[2], nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*parts, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 4))
    loss = lambda output, y: functional.smooth_l1_loss(output, y, beta=1 / 9, reduction="sum")  # noqa: E731
    return Task(net, loss, sgd(lr, momentum=0.9)), _boxes(150)


@scenario(
    "detector at eight times the rate",
    150,
    must=(must("dead_units", "oversized_updates", by=40),),
    allow=(*BROKEN, "oversized_updates"),
    units={r"net\.[0258]": "relu"},
    report=EIGHT_GPUS,
)
def detector_too_fast() -> Built:
    return _detector(0.1)


@scenario("detector at its rate", 150, report=EIGHT_GPUS)
def detector() -> Built:
    return _detector(2.5e-4)


# --- a schedule that rises too high --------------------------------------------------------------------------


def _one_cycle(top: float) -> Built:
    def cycle(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=top, total_steps=150)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(stack(4), cycle), classes(150)


RISEN = (*BROKEN, "oversized_updates", "growing_weights", "non_finite")


@scenario(
    "one-cycle schedule up to a rate of 30", 100, must=(must("oversized_updates", "exploding_gradients"),), allow=RISEN
)
def one_cycle_too_high() -> Built:
    return _one_cycle(30.0)


@scenario("warm-up to a rate of 10 with Adam", 100, must=(must("oversized_updates", by=20),), allow=BROKEN)
def warm_up_too_high() -> Built:
    def rising(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.Adam(net.parameters(), lr=10.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(stack(4), rising), classes(100)


# --- decay that spares the biases ----------------------------------------------------------------------------

SHRUNK = ("vanishing_gradients", "vanishing_activations", "stalled_loss", "stalled_layers", "collapsing_weights")


def _sparing(kind: Any, decay: float, lr: float) -> Built:
    """Weights decay, biases do not: where the weights are gone, units with negative biases are never active."""

    def groups(net: nn.Module) -> torch.optim.Optimizer:
        weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
        biases = [parameter for parameter in net.parameters() if parameter.ndim < 2]
        return kind([{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}], lr=lr)

    return classifier(scaled(stack(4), HE, bias=-0.2), groups), classes(200)


DIED = {r"net\.[024]": "relu"}


@scenario(
    "decay of SGD kills units",
    200,
    must=(must("dead_units", layers=r"net\.[024]", by=150),),
    allow=SHRUNK,
    units=DIED,
)
def decay_kills() -> Built:
    return _sparing(torch.optim.SGD, 0.5, 0.05)


@scenario(
    "decay inside Adam kills units",
    200,
    must=(must("dead_units", layers=r"net\.[024]", by=190),),
    allow=SHRUNK,
    units=DIED,
)
def decay_inside_adam_kills() -> Built:
    return _sparing(torch.optim.Adam, 0.5, 3e-3)


@scenario("decay of AdamW that spares the biases", 200, units=DIED)
def decay_spares() -> Built:
    return _sparing(torch.optim.AdamW, 0.1, 3e-3)
