"""The gain of any activation function: what keeps the variance of pre-activations at 1."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_gradhealth.validation import check_choice, shown

Nonlinearity = str | nn.Module | Callable[[Tensor], Tensor] | None

_NAMED: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
}


def gain(nonlinearity: Nonlinearity) -> float:
    """Return the gain that keeps the forward signal: `E[f(z)^2] ** -0.5` for a standard normal z.

    Exact for the piecewise linear ones (linear, ReLU, LeakyReLU, PReLU with its present slopes); an
    integral in float64 for all others. RReLU counts with its mean slope, as in eval mode. A module is copied
    first: it, its gradients and the state of the random generators stay as they are.

    Args:
        nonlinearity: A name ("relu", "tanh", "gelu", ...), an activation module, or any function of a tensor
            that works element by element; None: linear.

    Returns:
        The gain, without unit: `std = gain / sqrt(fan_in)` keeps the variance of pre-activations at 1.

    Raises:
        ValueError: The name is unknown, or the thing is no activation: it fails on a vector, gives another
            shape, NaN or Inf, zeros only, random values, or mixes elements.
        TypeError: It is a class, or cannot be called.

    Example:
        >>> round(gain("relu"), 4), round(gain(nn.LeakyReLU(0.2)), 4), round(gain(torch.tanh), 4)
        (1.4142, 1.3868, 1.5925)
        >>> round(gain(lambda z: z * torch.sigmoid(z)), 4)
        1.6765

    Paper: He et al. 2015 (arXiv:1502.01852) for rectifiers; the integral is their condition for any f.
    """
    return 1 / math.sqrt(_second_moment(nonlinearity, derivative=False))


def backward_gain(nonlinearity: Nonlinearity) -> float:
    """Return the gain that keeps the backward signal: `E[f'(z)^2] ** -0.5` for a standard normal z.

    Args:
        nonlinearity: As for `gain`; it must be differentiable by autograd.

    Returns:
        The gain, without unit: `std = gain / sqrt(fan_out)` keeps the variance of gradients.

    Raises:
        ValueError: As for `gain`, or the derivative is zero, infinite or missing.

    Example:
        >>> round(backward_gain("relu"), 4), round(backward_gain("sigmoid"), 4)
        (1.4142, 4.7226)
    """
    return 1 / math.sqrt(_second_moment(nonlinearity, derivative=True))


def _second_moment(nonlinearity: Nonlinearity, *, derivative: bool) -> float:
    """E[f(z)^2], or E[f'(z)^2], for a standard normal z."""
    if isinstance(nonlinearity, type):
        raise TypeError(_no_activation(nonlinearity, "it is a class, not an instance of it"))
    if nonlinearity is None:
        return 1.0
    if isinstance(nonlinearity, str):
        check_choice("nonlinearity", nonlinearity, _NAMED)
        with torch.device("cpu"):
            function: Callable[[Tensor], Tensor] = _NAMED[nonlinearity]()
    elif callable(nonlinearity):
        function = nonlinearity
    else:
        raise TypeError(_no_activation(nonlinearity, "it cannot be called"))
    slope = _square_slope(function)
    if slope is not None:
        if not slope < math.inf:
            raise _no_activation(nonlinearity, "its slope is NaN or too large")
        return (1 + slope) / 2  # slope 1 above 0 and `slope` below: forward and backward alike
    z, density = normal_nodes()
    try:
        values = _evaluate(function, z, derivative)
    except _NoActivation as error:
        raise _no_activation(nonlinearity, str(error)) from error
    except Exception as error:
        raise _no_activation(nonlinearity, f"it fails on a float64 vector ({error})") from error
    moment = float((values.square() * density).sum())
    if not 0 < moment < math.inf:
        what = "its derivative" if derivative else "it"
        why = "zero everywhere" if moment == 0 else "NaN or Inf somewhere"
        raise _no_activation(nonlinearity, f"{what} is {why} within +-12")
    return moment


def _square_slope(function: Callable[[Tensor], Tensor]) -> float | None:
    """The (mean) square of the slope below 0 where f is known to be `max(z, 0) + slope * min(z, 0)`.

    By exact type: a subclass may have overridden `forward`.
    """
    kind = type(function)
    if kind is nn.Identity:
        return 1.0
    if kind is nn.ReLU:
        return 0.0
    if isinstance(function, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return float(function.negative_slope) * float(function.negative_slope)
    if isinstance(function, nn.PReLU) and kind is nn.PReLU and not function.weight.is_meta:
        return float(function.weight.detach().double().square().mean())
    return None


class _NoActivation(Exception):
    """Why something is no activation function."""


def _no_activation(nonlinearity: object, why: str) -> ValueError:
    return ValueError(
        f"nonlinearity must be an activation that works element by element, got {shown(nonlinearity)}: {why};"
        ' pass a name such as "relu", an activation module or an elementwise function'
    )


def _evaluate(function: Callable[[Tensor], Tensor], z: Tensor, derivative: bool) -> Tensor:
    """The values of f, or of its derivative, at z."""
    if isinstance(function, nn.Module):
        module = copy.deepcopy(function).to("cpu", torch.float64).train()  # dropout must show that it is random
        for part in module.modules():
            if isinstance(part, nn.RReLU):
                part.eval()
        function = module.forward  # the hooks of the module are its owner's affair
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        leaf = z.clone().requires_grad_(derivative)
        output = function(leaf.clone())  # another clone, since f may work in place
        if not isinstance(output, Tensor) or output.shape != z.shape or output.is_complex():
            raise _NoActivation("it gives no real tensor of the input's shape")
        values = output.detach().to("cpu", torch.float64)
        some = slice(len(z) // 3, None, 3)  # lopsided, so that it moves a mean, too
        again = function(z[some].flip(0)).detach().to("cpu", torch.float64).flip(0)
        if not torch.allclose(again, values[some], rtol=1e-4, atol=1e-6, equal_nan=True):
            raise _NoActivation("it gives an element other values in other company: random, or mixing elements")
        return torch.autograd.grad(output.sum(), leaf)[0] if derivative else values


def name_of(curve: Tensor) -> str:
    """The activation whose values at `normal_nodes()` these are; "" for none that has a name here.

    Example:
        >>> name_of(normal_nodes()[0].tanh()), name_of(normal_nodes()[0].cos())
        ('tanh', '')
    """
    z, _ = normal_nodes()
    below, above = (float((curve / z)[part].mean()) for part in (z < 0, z > 0))
    if bool(torch.allclose(curve, torch.where(z > 0, above * z, below * z), atol=1e-9)) and above == 1:
        return {0.0: "relu", 1.0: "linear"}.get(below, f"leaky_relu({below:.3g})")
    some = slice(None, None, 97)  # what differs does so nearly everywhere
    for name, values in _named_curves().items():
        near = values[some].sub(curve[some]).abs_().max() <= 1e-2
        if near and bool(torch.allclose(curve, values, atol=1e-9)):
            return name
    return "gelu" if bool(torch.allclose(curve, nn.functional.gelu(z), atol=2e-3)) else ""


@functools.cache
def _named_curves() -> dict[str, Tensor]:
    with torch.no_grad(), torch.device("cpu"):
        z = normal_nodes()[0]
        return {name: make()(z.clone()) for name, make in _NAMED.items() if name not in ("rrelu", "prelu")}


@functools.cache
def normal_nodes() -> tuple[Tensor, Tensor]:
    """Nodes in [-12, 12], and their weights for an integral over the normal density.

    Gauss-Legendre in panels of 0.01, so that the kinks of the usual activations fall on borders of panels,
    where they cost no accuracy. Beyond +-12 lies less than 1e-32 of the probability.
    """
    # Legendre's 5 points are exact up to degree 9: over 0.01 that is more than float64 can show.
    inner, outer = (math.sqrt(5 + sign * 2 * math.sqrt(10 / 7)) / 3 for sign in (-1, 1))
    w_inner, w_outer = ((322 + sign * 13 * math.sqrt(70)) / 900 for sign in (1, -1))
    float64 = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")
    points = float64([-outer, -inner, 0.0, inner, outer])
    weights = float64([w_outer, w_inner, 128 / 225, w_inner, w_outer])
    middles = torch.arange(-2399, 2400, 2, dtype=torch.float64, device="cpu") / 200
    z = (middles[:, None] + points / 200).flatten()
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z, density * (weights / 200).repeat(len(middles))
