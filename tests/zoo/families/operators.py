"""Neural operators, equivariant nets, and nets of coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

gated, o3, points_of = Library("e3nn.nn"), Library("e3nn.o3"), Library("e3nn.nn.models.gate_points_2101")
models = Library("neuralop.models")
Batch = tuple[Any, Any]
MSE = functional.mse_loss


def fields(size: int = 16) -> Batch:
    """A smooth field and what diffusion makes of it."""
    smooth = functional.interpolate(torch.randn(8, 1, 4, 4), size=(size, size), mode="bilinear")
    return (smooth,), functional.avg_pool2d(smooth, 5, 1, 2)


def lines() -> Batch:
    smooth = functional.interpolate(torch.randn(8, 1, 6), size=32, mode="linear")
    return (smooth,), functional.avg_pool1d(smooth, 5, 1, 2)


def fno() -> nn.Module:
    return models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=12, n_layers=3)


def fno_of_lines() -> nn.Module:
    return models.FNO(n_modes=(8,), in_channels=1, out_channels=1, hidden_channels=12, n_layers=3)


def tfno() -> nn.Module:
    return models.TFNO(
        n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=12, n_layers=3, factorization="Tucker", rank=0.3
    )


def uno() -> nn.Module:
    return models.UNO(
        in_channels=1,
        out_channels=1,
        hidden_channels=12,
        n_layers=3,
        uno_out_channels=[12, 16, 12],
        uno_n_modes=[[4, 4], [4, 4], [4, 4]],
        uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]],
        horizontal_skips_map={2: 0},
        channel_mlp_skip="linear",
    )


class Equivariant(nn.Module):
    """Products of features with the spherical harmonics of a direction, weighted, each behind a gate."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.harmonics = o3.Irreps.spherical_harmonics(2)
        features, self.products, self.gates = o3.Irreps("4x0e"), nn.ModuleList(), nn.ModuleList()
        for _ in range(layers):
            gate = gated.Gate("8x0e", [torch.nn.functional.silu], "8x0e", [torch.sigmoid], "4x1o + 4x2e")
            self.products.append(o3.FullyConnectedTensorProduct(features, self.harmonics, gate.irreps_in))
            self.gates.append(gate)
            features = gate.irreps_out
        self.head = o3.Linear(features, "1x0e + 1x1o")

    def forward(self, x: Tensor, direction: Tensor) -> Tensor:
        harmonics = o3.spherical_harmonics(self.harmonics, direction, normalize=True, normalization="component")
        for product, gate in zip(self.products, self.gates, strict=True):
            x = gate(product(x, harmonics))
        return self.head(x)


def directions() -> Batch:
    x, direction = torch.randn(64, 4), torch.randn(64, 3)
    return (x, direction), torch.cat([x[:, :1], x[:, 1:2] * direction], 1)


class Messages(nn.Module):
    """Point clouds: convolutions whose weights a small net draws from the length of each edge."""

    def __init__(self) -> None:
        super().__init__()
        self.harmonics = o3.Irreps.spherical_harmonics(2)
        inner = o3.Irreps("8x0e + 4x1o")
        self.first = points_of.Convolution(o3.Irreps("4x0e"), o3.Irreps("1x0e"), self.harmonics, inner, 8, 1, 16, 7.0)
        self.second = points_of.Convolution(inner, o3.Irreps("1x0e"), self.harmonics, o3.Irreps("4x0e"), 8, 1, 16, 7.0)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        source, target = (~torch.eye(len(places), dtype=torch.bool)).nonzero().T
        vectors = places[source] - places[target]
        harmonics = o3.spherical_harmonics(self.harmonics, vectors, normalize=True, normalization="component")
        lengths = (
            points_of.soft_one_hot_linspace(vectors.norm(dim=1), 0.0, 4.0, 8, basis="smooth_finite", cutoff=True)
            * 8**0.5
        )
        attributes = x.new_ones(len(x), 1)
        x = self.first(x, attributes, source, target, harmonics, lengths)
        return self.second(x, attributes, source, target, harmonics, lengths)


def points() -> Batch:
    return (torch.randn(8, 4), torch.randn(8, 3)), torch.randn(8, 4)


class Sine(nn.Module):
    """A layer of SIREN, with the init of its paper."""

    def __init__(self, inputs: int, outputs: int, first: bool = False, frequency: float = 30.0) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(inputs, outputs), frequency
        bound = 1 / inputs if first else (6 / inputs) ** 0.5 / frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * self.linear(x))


def siren(width: int = 64) -> nn.Module:
    last = nn.Linear(width, 1)
    bound = (6 / width) ** 0.5 / 30
    nn.init.uniform_(last.weight, -bound, bound)
    return nn.Sequential(Sine(2, width, first=True), Sine(width, width), Sine(width, width), last)


def coordinates() -> Batch:
    """A picture with fine detail, as a function of the place."""
    place = torch.cartesian_prod(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24))
    value = torch.sin(12 * place[:, :1]) * torch.cos(9 * place[:, 1:]) + 0.5 * torch.sin(
        20 * place.prod(1, keepdim=True)
    )
    return (place,), value


class FourierFeatures(nn.Module):
    """Random frequencies that stay, and a ReLU net on their sines and cosines."""

    def __init__(self, count: int = 32, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 3 * torch.randn(2, count))
        self.net = nn.Sequential(
            nn.Linear(2 * count, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, place: Tensor) -> Tensor:
        angle = 2 * torch.pi * place @ self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], 1))


class DeepONet(nn.Module):
    """A net of the function and one of the place, multiplied."""

    def __init__(self, sensors: int = 16, width: int = 32) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(sensors, width), nn.Tanh(), nn.Linear(width, width))
        self.trunk = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, function: Tensor, place: Tensor) -> Tensor:
        return torch.einsum("bw,pw->bp", self.branch(function), self.trunk(place)) + self.bias


def integrals() -> Batch:
    function = functional.interpolate(torch.randn(32, 1, 4), size=16, mode="linear")[:, 0]
    return (function, torch.linspace(0, 1, 16)[:, None]), function.cumsum(1) / 16


class Splines(nn.Module):
    """A layer of a Kolmogorov-Arnold net: on each edge a function, a sum of bumps beside SiLU."""

    def __init__(self, inputs: int, outputs: int, bumps: int = 8) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, bumps))
        self.base = nn.Linear(inputs, outputs)
        self.splines = nn.Parameter(0.1 * torch.randn(inputs, bumps, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-((x[..., None] - self.centres) / 0.5).square())
        return self.base(functional.silu(x)) + torch.einsum("nib,ibo->no", bumps, self.splines)


def kan() -> nn.Module:
    return nn.Sequential(Splines(2, 16), Splines(16, 16), Splines(16, 1))


ARCHITECTURES = (
    Architecture("neuralop/FNO", "operator", fno, fields, MSE, daily=True),
    Architecture("neuralop/FNO, one dimension", "operator", fno_of_lines, lines, MSE),
    Architecture("neuralop/TFNO", "operator", tfno, fields, MSE),
    Architecture("neuralop/UNO", "operator", uno, fields, MSE),
    Architecture("by hand/DeepONet", "operator", DeepONet, integrals, MSE),
    Architecture("e3nn/tensor products", "equivariant", Equivariant, directions, MSE),
    Architecture("e3nn/point clouds", "equivariant", Messages, points, MSE),
    Architecture("by hand/SIREN", "coordinates", siren, coordinates, MSE, daily=True),
    Architecture("by hand/Fourier features", "coordinates", FourierFeatures, coordinates, MSE),
    Architecture("by hand/KAN", "coordinates", kan, coordinates, MSE),
)
