"""Normalizing flows of nflows and zuko, and NICE by hand: `forward` gives the log likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

flows, nets, transforms = Library("nflows.flows"), Library("nflows.nn.nets"), Library("nflows.transforms")
distributions, zuko = Library("nflows.distributions"), Library("zuko.flows")
SIZE = 6
Batch = tuple[Any, Any]


class Likelihood(nn.Module):
    """The log likelihood that a flow gives to each sample."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        log_prob = getattr(self.flow, "log_prob", None)
        return log_prob(x) if log_prob else self.flow().log_prob(x)


def bananas() -> Batch:
    """Coordinates in pairs, the second a parabola of the first."""
    first = torch.randn(128, SIZE // 2)
    second = first.square() - 1 + 0.3 * torch.randn(128, SIZE // 2)
    return (torch.cat([first, second], 1),), None


def pictures() -> Batch:
    smooth = functional.interpolate(torch.randn(16, 2, 4, 4), scale_factor=2, mode="bilinear")
    return (smooth + 0.1 * torch.randn(16, 2, 8, 8),), None


def negative(log_prob: Tensor, target: None) -> Tensor:
    return -log_prob.mean()


def residual_net(inputs: int, outputs: int) -> nn.Module:
    return nets.ResidualNet(inputs, outputs, hidden_features=32, num_blocks=1)


def convolutional_net(inputs: int, outputs: int) -> nn.Module:
    return nets.ConvResidualNet(inputs, outputs, hidden_channels=16, num_blocks=1)


def flow(*layers: nn.Module, shape: tuple[int, ...] = (SIZE,)) -> nn.Module:
    return Likelihood(flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal(shape)))


def half(number: int) -> Tensor:
    """A mask that lets one half of the features through, the other at odd numbers."""
    mask = torch.ones(SIZE)
    mask[number % 2 :: 2] = -1
    return mask


def realnvp() -> nn.Module:
    coupling = transforms.AffineCouplingTransform
    return flow(*(coupling(half(number), residual_net) for number in range(4)))


def rqs_coupling() -> nn.Module:
    layers: list[nn.Module] = []
    for number in range(3):
        layers += [
            transforms.RandomPermutation(SIZE),
            transforms.LULinear(SIZE, identity_init=True),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                half(number), residual_net, num_bins=4, tails="linear", tail_bound=3.0
            ),
        ]
    return flow(*layers)


def glow() -> nn.Module:
    layers: list[nn.Module] = [transforms.SqueezeTransform()]
    mask = torch.tensor([1.0] * 4 + [-1.0] * 4)
    for _ in range(3):
        layers += [
            transforms.ActNorm(8),
            transforms.OneByOneConvolution(8),
            transforms.AffineCouplingTransform(mask, convolutional_net),
        ]
    return flow(*layers, shape=(8, 4, 4))


def autoregressive() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [
            transforms.BatchNorm(SIZE),
            transforms.ReversePermutation(SIZE),
            transforms.MaskedAffineAutoregressiveTransform(SIZE, hidden_features=32, num_blocks=1),
        ]
    return flow(*layers)


def rqs_autoregressive() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [
            transforms.SVDLinear(SIZE, num_householder=4, identity_init=True),
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                SIZE, hidden_features=32, num_bins=4, tails="linear", tail_bound=3.0
            ),
        ]
    return flow(*layers)


class Additive(nn.Module):
    """NICE: one half is shifted by a net of the other; the volume stays but for the scale at the end."""

    def __init__(self, couplings: int = 4, width: int = 64) -> None:
        super().__init__()
        half = SIZE // 2
        self.shifts = nn.ModuleList(
            nn.Sequential(nn.Linear(half, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, half))
            for _ in range(couplings)
        )
        self.log_scale = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        for shift in self.shifts:
            first, second = second + shift(first), first
        z = torch.cat([first, second], 1) * self.log_scale.exp()
        normal = -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi)))
        return normal.sum(1) + self.log_scale.sum()


def of_zuko(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Likelihood(getattr(zuko, kind)(SIZE, **options))


def of_tabular(name: str, model: Callable[[], nn.Module], daily: bool = False) -> Architecture:
    return Architecture(name, "flow", model, bananas, negative, daily=daily)


WIDE = (32, 32)
TRIANGLES = r"flow\.phi\.[123]"  # of the covariances: the inverse of a triangle multiplies the signal

ARCHITECTURES = (
    of_tabular("nflows/RealNVP", realnvp),
    of_tabular("nflows/RQS coupling", rqs_coupling),
    Architecture("nflows/Glow", "flow", glow, pictures, negative),
    of_tabular("nflows/MAF", autoregressive),
    of_tabular("nflows/RQS autoregressive", rqs_autoregressive),
    of_tabular("by hand/NICE", Additive),
    of_tabular("zuko/NICE", of_zuko("NICE", transforms=4, hidden_features=WIDE)),
    of_tabular("zuko/MAF", of_zuko("MAF", transforms=3, hidden_features=WIDE)),
    of_tabular("zuko/NSF", of_zuko("NSF", transforms=2, bins=4, hidden_features=WIDE)),
    of_tabular("zuko/NCSF", of_zuko("NCSF", transforms=2, bins=4, hidden_features=WIDE)),
    of_tabular("zuko/SOSPF", of_zuko("SOSPF", transforms=2, hidden_features=WIDE)),
    of_tabular("zuko/BPF", of_zuko("BPF", transforms=2, degree=4, hidden_features=WIDE)),
    of_tabular("zuko/NAF", of_zuko("NAF", transforms=2, signal=8, network={"hidden_features": WIDE})),
    of_tabular("zuko/UNAF", of_zuko("UNAF", transforms=1, signal=8, network={"hidden_features": WIDE})),
    of_tabular("zuko/CNF", of_zuko("CNF", hidden_features=WIDE)),
    replace(
        of_tabular("zuko/GMM", of_zuko("GMM", components=4)),
        uncovered=TRIANGLES,
        sick="parameters alone, no module is called: diagnose says that nothing was measured",
    ),
)
