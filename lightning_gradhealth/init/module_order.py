"""Where there is no sample to run: what follows a weight, told by the order in which the modules are registered."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.advice import Advice, Advised
from lightning_gradhealth.init.fans import fans
from lightning_gradhealth.init.gains import gain, name_of, normal_nodes
from lightning_gradhealth.init.surroundings import BEFORE_NORM, FREE

NOTE = (
    "no sample was given: what follows a weight is told by the order of the modules, and activations that are called as"
    " functions are not seen; give example_inputs= to have it measured"
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_STOPS = (
    *_NORMS,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Embedding,
    nn.EmbeddingBag,
)


@dataclass
class _Weight:
    """A weighted module, and the activations up to the next one."""

    module: nn.Module
    activations: list[nn.Module] = field(default_factory=list)
    fresh: bool = True  # it reads an input or what a norm gives
    last: bool = False
    stopped: bool = False  # a norm or the like is behind it, before the next weight
    normed: bool = False  # it is a norm


def by_module_order(model: nn.Module, fixed: float | None) -> Advised:
    """Say of every weighted module what follows it, as far as its neighbours tell.

    Args:
        model: The model.
        fixed: The gain of the one activation that the call has named; None: told by the modules.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        >>> advised = by_module_order(net, None)
        >>> [round(advised.advice[id(net[i].weight)].gain, 4) for i in (0, 2, 4)]
        [1.0, 1.5335, 1.0]
    """
    advice: dict[int, Advice] = {}
    moment = 1.0
    for weight in _weights(model):
        moment = 1.0 if weight.fresh else moment
        curve = _curve(weight.activations)
        after, target = _second_moment(curve), 1.0
        follows_norm = isinstance(weight.module, nn.Identity)  # no weight is there to make up for the activation
        if _is_homogeneous(weight.activations, curve) and not weight.stopped and not follows_norm:
            target = 1 / after
        label = (
            f"{name_of(curve) or type(weight.activations[-1]).__name__} {after**-0.5:.4g}" if weight.activations else ""
        )
        value, found = math.sqrt(target / moment), "module order"
        if fixed is not None:
            value, found = fixed, "given"
        if weight.last and not weight.activations:
            value, found, target = 1.0, "output", moment
        size, why_size = 1.0, ""
        if weight.normed and fixed is None and _is_homogeneous(weight.activations, curve):
            size, target, why_size = FREE, target * FREE**2, BEFORE_NORM
        bends = bool(weight.activations) or moment != 1.0
        saturates = bool(curve.abs().max() < 1.2 * curve[::7].abs().quantile(0.7)) and bool(weight.activations)
        scheme = "xavier" if saturates else ("he" if bends and abs(value - 1) > 1e-3 else "lecun")
        told = Advice("weight", scheme=scheme, gain=value, size=size, why_size=why_size, found=found, follows=label)
        for parameter in weight.module.parameters(recurse=False):
            advice.setdefault(id(parameter), told)
        moment = after * target
    return Advised(advice=advice, source="module order", notes=(NOTE,))


def _weights(model: nn.Module) -> list[_Weight]:
    found: list[_Weight] = []
    fresh = True
    for module in model.modules():
        if isinstance(module, _STOPS):
            fresh = True
            if found:
                found[-1].normed = found[-1].normed or (isinstance(module, _NORMS) and not found[-1].stopped)
                found[-1].stopped = True
        elif type(module) in fans.registry or any(kind in fans.registry for kind in type(module).__mro__[:-2]):
            found.append(_Weight(module, fresh=fresh))
            fresh = False
        elif found and _is_activation(module):
            if found[-1].stopped:  # behind a norm: the next weight reads it, the one before does not see it
                found.append(_Weight(nn.Identity(), [module], fresh=True))
                fresh = False
            else:
                found[-1].activations.append(module)
    weights = [weight for weight in found if not isinstance(weight.module, nn.Identity)]
    if weights:
        weights[-1].last = found[-1] is weights[-1] and not weights[-1].stopped
    return found


def _is_activation(module: nn.Module) -> bool:
    if next(module.children(), None) is not None:
        return False
    if next(module.parameters(), None) is not None and not isinstance(module, nn.PReLU):
        return False
    try:
        return abs(gain(module) - 1) > 1e-9 or not isinstance(module, nn.Identity)
    except ValueError:  # dropout, flatten, pooling: no functions of one number
        return False


def _curve(activations: list[nn.Module]) -> Tensor:
    z, _ = normal_nodes()
    with torch.no_grad():
        for activation in activations:
            z = _apply(activation, z)
    return z


def _apply(activation: nn.Module, z: Tensor) -> Tensor:
    if isinstance(activation, nn.PReLU):
        slope = 0.25 if activation.weight.is_meta else float(activation.weight.mean())
        return torch.where(z > 0, z, slope * z)
    values: Tensor = activation(z.clone())
    return values


def _second_moment(curve: Tensor) -> float:
    _, weight = normal_nodes()
    return float((curve.square() * weight).sum())


def _is_homogeneous(activations: list[nn.Module], curve: Tensor) -> bool:
    z, _ = normal_nodes()
    doubled = 2 * z
    with torch.no_grad():
        for activation in activations:
            doubled = _apply(activation, doubled)
    bulk = z.abs() < 3
    return bool(torch.allclose(doubled[bulk], 2 * curve[bulk], atol=1e-6))
