"""What a unit of a weight is, whatever its layout; and gradients that have to be summed up first."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_gradhealth import Clipper, GradientMonitor, Gradients, NormClip, SignClip, UnitwiseClip, ValueClip
from lightning_gradhealth.init import Axes


def unit_norms(parameter: Tensor, kept: tuple[int, ...], groups: int = 1) -> Tensor:
    """The slow twin: for every element the norm of its unit, by looking at all elements one after the other."""
    squares: dict[tuple[int, ...], float] = {}
    block = parameter.shape[0] // groups

    def unit(index: tuple[int, ...]) -> tuple[int, ...]:
        return (index[0] // block if groups > 1 else 0, *(index[axis] for axis in kept))

    places = list(itertools.product(*map(range, parameter.shape)))
    for place in places:
        squares[unit(place)] = squares.get(unit(place), 0.0) + parameter[place].item() ** 2
    return torch.tensor([squares[unit(place)] ** 0.5 for place in places]).reshape(parameter.shape)


class Transposed(nn.Module):
    """A weight of shape (inputs, outputs), as in GPT-2, and one with experts side by side; both say so."""

    gradhealth_axes: ClassVar = {"weight": Axes(0, 1), "experts": Axes(1, -1, split=(0, 2))}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.experts = nn.Parameter(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("module", "name", "kept", "groups"),
    [
        (nn.ConvTranspose1d(3, 2, 2), "weight", (1,), 1),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), "weight", (1,), 2),
        (nn.ConvTranspose3d(3, 3, 2, groups=3), "weight", (1,), 3),
        (weight_norm(nn.ConvTranspose2d(3, 2, 2)), "parametrizations.weight.original1", (1,), 1),
        (spectral_norm(nn.ConvTranspose1d(4, 2, 2, groups=2)), "parametrizations.weight.original", (1,), 2),
        (nn.Conv2d(4, 6, 2, groups=2), "weight", (0,), 1),
        (nn.Bilinear(2, 3, 4), "weight", (0,), 1),
        (nn.LSTM(3, 2), "weight_hh_l0", (0,), 1),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (0,), 1),
        (nn.Embedding(5, 2), "weight", (0,), 1),
        (Transposed(), "weight", (1,), 1),
        (Transposed(), "experts", (0, 2), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_unit_is_an_output_whatever_the_layout(
    module: nn.Module, name: str, kept: tuple[int, ...], groups: int
) -> None:
    clipper = UnitwiseClip(0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parameter = dict(module.named_parameters())[name]
    with torch.no_grad():
        parameter.copy_(torch.randn_like(parameter))
    given = torch.randn_like(parameter) * torch.rand(parameter.shape).mul(6).sub(4).exp()
    parameter.grad = given.clone()
    monitor = GradientMonitor(module, clip=clipper)
    monitor.apply(monitor.observe(torch.optim.SGD(module.parameters(), lr=0.1)))
    ratio = 0.1 * unit_norms(parameter, kept, groups).clamp(min=1e-3) / unit_norms(given, kept, groups)
    assert (ratio < 1).any()
    torch.testing.assert_close(parameter.grad, given * ratio.clamp(max=1.0), rtol=1e-5, atol=0)


def test_a_quiet_channel_of_a_transposed_convolution_is_left_alone() -> None:
    model = nn.ConvTranspose2d(3, 2, 2, bias=False)
    nn.init.ones_(model.weight)
    model.weight.grad = torch.full_like(model.weight, 1e-4)
    model.weight.grad[:, 1] = 10.0
    monitor = GradientMonitor(model, clip=UnitwiseClip(0.01))
    monitor.apply(monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert (model.weight.grad[:, 0] == 1e-4).all()
    assert model.weight.grad[:, 1].norm().item() == pytest.approx(0.01 * 12**0.5)


@pytest.mark.parametrize("clipper", [ValueClip(0.5), SignClip(2.0), UnitwiseClip(0.1), NormClip(0.5)], ids=repr)
def test_repeated_rows_are_summed_before_they_are_clipped(clipper: Clipper) -> None:
    sparse, plain = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    sparse.grad = torch.sparse_coo_tensor([[1, 1, 2]], [[0.4, -0.4], [0.4, 0.4], [0.1, 0.1]], (3, 2))
    plain.grad = sparse.grad.to_dense()
    for weight in (sparse, plain):
        gradients = Gradients.of(weight)
        clipper.apply(gradients, clipper.decide(gradients))
    torch.testing.assert_close(sparse.grad.to_dense(), plain.grad)


def test_parametrized_layers_are_left_out_by_the_class_that_was_written() -> None:
    model = nn.ModuleDict({"body": nn.Conv1d(2, 2, 2), "head": weight_norm(nn.Linear(2, 2))})
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    monitor = GradientMonitor(model, clip=UnitwiseClip(exclude=nn.Linear))
    monitor.apply(monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1)))
    left = {name for name, parameter in model.named_parameters() if (parameter.grad == 100).all()}
    assert left == {name for name, _ in model.named_parameters() if name.startswith("head")}
