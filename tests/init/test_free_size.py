"""Weights whose scale the forward pass leaves open: a norm takes it, or what they give is a factor near 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_gradhealth import init_weights

THIRD = 1 / math.sqrt(3)


def gains(model: nn.Module, *inputs: torch.Tensor, **more: object) -> dict[str, float]:
    report = init_weights(model, inputs, seed=0, dry_run=True, **more)
    return {
        e.name.removesuffix(".weight"): e.target_std * math.sqrt(e.fan)
        for e in report.entries
        if e.target_std and e.fan
    }


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.into, self.back = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(functional.gelu(self.into(self.norm(x))))


def test_what_a_norm_reads_has_the_size_of_torchs_own_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    found = gains(model, torch.randn(4, 3, 8, 8))
    assert found["0"] == pytest.approx(THIRD, rel=1e-3)
    assert found["3"] == pytest.approx(2, rel=1e-3), "rectifiers on both sides, and no norm behind it"


def test_what_is_added_to_a_stream_that_norms_read_too() -> None:
    model = nn.Sequential(nn.Linear(4, 16), Block(), Block(), nn.LayerNorm(16), nn.Linear(16, 2))
    found = gains(model, torch.randn(8, 4))
    assert found["0"] == pytest.approx(THIRD, rel=1e-3)
    assert found["1.back"] == found["2.back"] == pytest.approx(1.5335 * THIRD, rel=1e-3)
    assert found["1.into"] == found["4"] == pytest.approx(1, rel=1e-3), "an activation sees the one, a loss the other"


def test_a_stream_that_no_norm_reads_keeps_its_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 16), Block())
    assert gains(model, torch.randn(8, 4))["1.back"] == pytest.approx(1.5335, rel=1e-3)


@pytest.mark.parametrize("between", [nn.Tanh(), nn.Linear(16, 16)], ids=["bends", "another weight"])
def test_only_where_nothing_that_knows_a_scale_comes_first(between: nn.Module) -> None:
    found = gains(nn.Sequential(nn.Linear(4, 16), between, nn.LayerNorm(16)), torch.randn(8, 4))
    assert found["0"] == pytest.approx(1, rel=1e-3)


class Views(nn.Module):
    """What one net says of two views, compared at the end."""

    def __init__(self, compare) -> None:
        super().__init__()
        self.net, self.compare = nn.Linear(8, 16), compare

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.compare(self.net(one), self.net(other))


def contrast(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    logits = functional.normalize(one, dim=-1) @ functional.normalize(other, dim=-1).T
    return functional.cross_entropy(10 * logits, torch.arange(len(logits)))


@pytest.mark.parametrize(
    ("compare", "size"),
    [
        (lambda one, other: functional.normalize(one, dim=-1), THIRD),
        (functional.cosine_similarity, THIRD),
        (contrast, THIRD),
        (lambda one, other: (one, functional.normalize(one, dim=-1)), 1),
        (lambda one, other: one - other, 1),
    ],
    ids=["normalised", "cosine", "a loss of cosines", "both", "difference"],
)
def test_what_leaves_the_model_without_its_scale(compare, size: float) -> None:
    assert gains(Views(compare), torch.randn(8, 8), torch.randn(8, 8))["net"] == pytest.approx(size, rel=1e-3)


def test_an_explicit_scheme_or_gain_is_final() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    x = torch.randn(8, 4)
    assert gains(model, x, scheme="he")["0"] == pytest.approx(2**0.5)
    assert gains(model, x, nonlinearity="relu")["0"] == pytest.approx(2**0.5)
    assert gains(model, x, overrides={r"0\.weight": 1.0})["0"] == 1.0


class Modulated(nn.Module):
    """A norm whose scale and shift a condition gives."""

    def __init__(self, about: float) -> None:
        super().__init__()
        self.about, self.body = about, nn.Linear(16, 16)
        self.condition, self.out = nn.Linear(8, 32), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift = self.condition(c).chunk(2, -1)
        x = functional.layer_norm(self.body(x), (16,)) * (self.about + scale) + shift
        return self.out(x)


def test_a_factor_near_one_begins_near_one() -> None:
    x, c = torch.randn(256, 16), torch.randn(256, 8)
    model = Modulated(1.0)
    assert gains(model, x, c)["condition"] == pytest.approx(0.1**0.5, rel=1e-3)
    init_weights(model, (x, c), seed=0)
    with torch.no_grad():
        assert float(model(x, c).square().mean()) == pytest.approx(1.2, rel=0.3), "not 3"


def test_a_gate_is_none() -> None:
    assert gains(Modulated(0.0), torch.randn(8, 16), torch.randn(8, 8))["condition"] == pytest.approx(1, rel=1e-3)


class Coupling(nn.Module):
    """One half of a signal is scaled and shifted by what the other half says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.condition = nn.Linear(8, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        log_scale, shift = self.condition(functional.relu(self.inner(first))).chunk(2, -1)
        return torch.cat([second * log_scale.exp() + shift, first], -1)


class Polynomial(nn.Module):
    """Each number is multiplied by the square of a polynomial in it, 1 + a x + b x^2, whose coefficients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        powers = torch.stack([second, second.square()], -1)[..., None].tanh()
        factor = 1 + (self.condition(first).unflatten(-1, (8, 1, 4))[..., :2] @ powers)[..., 0, 0]
        return torch.cat([second * factor.square(), first], -1)


@pytest.mark.parametrize("part", [Coupling, Polynomial])
def test_factors_of_the_models_own_input_begin_near_one(part: type[nn.Module]) -> None:
    """Of the first of several couplings, too, whose other half no weight has seen."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(part() for _ in range(2))), torch.randn(512, 16)
    found = gains(model, x)
    assert max(found[f"{number}.condition"] for number in range(2)) < 0.5
    init_weights(model, x, seed=0)
    with torch.no_grad():
        assert 0.5 < float(model(x).square().mean()) < 8


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = functional.elu(self.query(x)) + 1, functional.elu(self.key(x)) + 1
        shares = query @ key.mT
        return self.out(shares / shares.sum(-1, keepdim=True) @ self.value(x))


def test_shares_are_no_factors_near_one() -> None:
    found = gains(LinearAttention(), torch.randn(4, 12, 16))
    assert found["query"] == found["key"] == found["value"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(64), lambda: nn.BatchNorm1d(64)], ids=["layer", "batch"])
def test_it_learns_faster_at_a_usual_rate(norm: object) -> None:
    def trained(size: float) -> float:
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), norm(), nn.ReLU())]  # type: ignore[operator]
        model = nn.Sequential(nn.Linear(20, 64), *layers, nn.Linear(64, 5))
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 20, generator=generator), torch.randint(0, 5, (64,), generator=generator)
        init_weights(model, x, seed=0, overrides={r"(1|4|7|10)\.weight": {"gain": size}})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert trained(THIRD * 2**0.5) < 0.8 * trained(2**0.5)
