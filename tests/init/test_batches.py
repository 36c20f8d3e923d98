"""`init_weights` given a batch as the DataLoader gives it: the training step shows what is called with what."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_gradhealth import init_weights

GAINS = [2**0.5, 2**0.5, 1.0]


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Pairs(pl.LightningModule):
    """No forward; the batch is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.steps = stack(), 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.log("loss", 1.0)
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class Named(Pairs):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return functional.cross_entropy(self.net(batch["x"]), batch.pop("y"))


class Forward(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])


class Fails(Pairs):
    """What comes after the call of the network does not work."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net(batch[0])
        raise RuntimeError("no trainer")


class ByHand(Pairs):
    """It steps its optimizers itself: to run its step would train."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


X, Y = torch.randn(8, 16), torch.randint(4, (8,))


def gains(model: nn.Module, batch: Any) -> list[float]:
    report = init_weights(model, batch, seed=0)
    assert report.source.startswith("trace")
    assert not report.uncovered
    return [entry.gain for entry in report.entries if entry.gain is not None]


@pytest.mark.parametrize("make", [Pairs, Forward, Fails, stack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair(make: Any, kind: Any) -> None:
    torch.manual_seed(0)
    assert gains(make(), kind((X, Y))) == pytest.approx(GAINS)


def test_a_dict_stays_whole() -> None:
    batch = {"x": X, "y": Y}
    assert gains(Named(), batch) == pytest.approx(GAINS)
    assert gains(stack(), {"input": X, "labels": Y}) == pytest.approx(GAINS)
    assert set(batch) == {"x", "y"}


def test_the_step_leaves_no_trace() -> None:
    model, state = Pairs(), torch.get_rng_state()
    init_weights(model, (X, Y), seed=0)
    assert (model.steps, model.training) == (0, True)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_weights_are_those_that_the_input_alone_gives() -> None:
    one, other = Pairs(), Pairs()
    init_weights(one, (X, Y), seed=3)
    init_weights(other.net, X, seed=3)
    drawn = {name: value.std() for name, value in one.net.named_parameters() if name.endswith("weight")}
    for name, value in other.net.named_parameters():
        if name.endswith("weight"):  # other names, other random numbers; the same distribution
            assert drawn[name].item() == pytest.approx(value.std().item(), rel=0.2)


def test_what_goes_nowhere_still_raises() -> None:
    with pytest.raises(ValueError, match=r"must go through model\.forward"):
        init_weights(stack(), (torch.randn(8, 5), Y))
    model = ByHand()
    with pytest.raises(ValueError, match=r"must go through model\.forward"):
        init_weights(model, (X, Y))
    assert model.steps == 0
