"""Without a sample: a guess at what the first layer takes, where that goes through the whole model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradhealth.init import init_weights
from lightning_gradhealth.init.guess import guessed

HE = math.sqrt(2)


class Functional(nn.Module):
    """Activations as functions, which the order of the modules does not show."""

    def __init__(self, first: nn.Module, second: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


class TwoInputs(Functional):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x + y)


class Halves(Functional):
    """Takes no rows of an odd number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, 3, x.shape[-1]))


class OnlyFirst(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def linear(kind: type[Functional] = Functional) -> Functional:
    return kind(nn.Linear(12, 30), nn.Linear(30, 30), nn.Linear(30, 5))


def gains(report) -> list[float]:
    return [entry.gain for entry in report.entries if entry.gain is not None]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (linear(), "4×12"),
        (Functional(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 4)), "4×3×32×32"),
        (nn.Sequential(nn.Flatten(), linear()), "4×12"),
        (nn.Sequential(nn.Embedding(9, 12), linear()), "4×16"),
        (nn.Sequential(nn.Conv1d(2, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28, 3)), "4×2×32"),
    ],
)
def test_functions_are_seen_without_a_sample(model, shape):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    report = init_weights(model, seed=0, dry_run=True)
    assert report.source == f"trace (guessed {shape})"
    assert shape in report.notes[0]
    assert "give example_inputs=" in report.notes[0]
    assert HE in [pytest.approx(gain) for gain in gains(report)]
    assert report.depth
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_guess_gives_the_weights_that_a_sample_gives():
    model, twin = linear(), linear()
    init_weights(model, seed=3)
    init_weights(twin, torch.randn(7, 12), seed=3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("model", [linear(TwoInputs), linear(Halves), linear(OnlyFirst)])
def test_where_no_guess_goes_through_the_order_of_the_modules_serves(model):
    assert guessed(model) is None
    report = init_weights(model, seed=0)
    assert report.source == "module order"
    assert "order of the modules" in report.notes[0]
    assert gains(report) == [1, 1, 1]


def test_values_are_never_run_on_a_guess():
    """A real run could take long, or do things: only fake tensors are guessed with."""
    seen = []

    class Values(nn.Linear):
        def forward(self, x):
            seen.append(type(x).__name__)
            return super().forward(x) if x.sum().item() > 0 else x

    assert init_weights(Values(12, 5), seed=0).source == "module order"
    assert set(seen) == {"FakeTensor"}


def test_a_guess_is_no_sample_for_what_asks_for_one():
    with pytest.raises(ValueError, match="residual='depth' needs example_inputs"):
        init_weights(linear(), residual="depth")


def test_explicit_schemes_guess_nothing():
    report = init_weights(linear(), scheme="he", seed=0)
    assert report.source != "trace (guessed 4×12)"
    assert gains(report) == [pytest.approx(HE)] * 3


def test_a_model_on_meta_is_guessed_at_too():
    with torch.device("meta"):
        model = linear()
    report = init_weights(model, seed=0, dry_run=True)
    assert report.source == "trace (guessed 4×12)"


def test_models_without_weights_are_no_trouble():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guessed(nn.ReLU()) is None
        assert guessed(nn.Sequential(nn.LayerNorm(3))) is None
