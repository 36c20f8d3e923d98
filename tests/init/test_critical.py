"""Deep chains of saturating activations begin at the edge of chaos; all others do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradhealth.init import init_weights
from lightning_gradhealth.init.critical import DEEP, EDGE


def chain(depth, activation=nn.Tanh, width=48, between=nn.Identity):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), between(), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 4)), torch.randn(8, width)


def schemes(model, x):
    report = init_weights(model, x, seed=0)
    return [entry.scheme for entry in report.entries if entry.gain is not None], report


class Scaled(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(2 * x)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softsign, nn.Hardtanh, Scaled])
def test_deep_odd_chains_are_orthogonal_at_the_edge_of_chaos(activation):
    model, x = chain(DEEP, activation)
    found, report = schemes(model, x)
    assert found == ["orthogonal"] * DEEP + ["lecun"]
    slope = 6 if activation is Scaled else 1
    for entry in report.entries[:-2:2]:
        assert entry.gain == pytest.approx(EDGE / slope, rel=2e-3)
        assert entry.found == "edge of chaos"
    singular = torch.linalg.svdvals(model[3].weight)
    assert torch.allclose(singular, torch.full_like(singular, EDGE / slope), rtol=5e-3)


@pytest.mark.parametrize(
    ("activation", "between", "depth"),
    [
        (nn.Tanh, nn.Identity, DEEP - 1),
        (nn.Sigmoid, nn.Identity, 2 * DEEP),
        (nn.ReLU, nn.Identity, 2 * DEEP),
        (nn.Tanh, lambda: nn.LayerNorm(48), 2 * DEEP),
    ],
)
def test_what_is_shallow_one_sided_or_normed_is_not(activation, between, depth):
    model, x = chain(depth, activation, between=between)
    assert not {"orthogonal", "delta_orthogonal"} & {*schemes(model, x)[0]}


def test_two_short_chains_do_not_make_a_long_one():
    first, x = chain(DEEP - 5)
    model = nn.Sequential(first[:-1], nn.Linear(48, 48), nn.ReLU(), chain(DEEP - 5)[0])
    assert "orthogonal" not in schemes(model, x)[0]


def test_convolutions_are_delta_orthogonal():
    convolutions = [nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular") for _ in range(DEEP)]
    layers = [part for convolution in convolutions for part in (convolution, nn.Tanh())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Flatten(), nn.Linear(8 * 16, 4))
    found, _ = schemes(model, torch.randn(4, 3, 4, 4))
    assert found[1 : DEEP + 1] == ["delta_orthogonal"] * DEEP
    assert int((convolutions[3].weight.abs().sum((0, 1)) > 0).sum()) == 1


def test_gradients_reach_the_bottom_of_fifty_layers():
    """At variance 1 they explode by 1.178 a layer in variance: 60 times in RMS over 50 layers."""
    model, x = chain(50, width=64)
    rms = {}
    for init in ("auto", "xavier"):
        init_weights(model, x, seed=0, scheme=init, **({} if init == "auto" else {"nonlinearity": "tanh"}))
        outputs = [x]
        for layer in model:
            outputs.append(layer(outputs[-1]))
        behind = [output for layer, output in zip(model, outputs[1:], strict=True) if isinstance(layer, nn.Linear)]
        gradients = torch.autograd.grad(behind[-1], behind, torch.randn_like(behind[-1]))
        rms[init] = float(gradients[0].square().mean().sqrt() / gradients[-2].square().mean().sqrt())
    assert 0.1 < rms["auto"] < 5
    assert rms["xavier"] > 15
