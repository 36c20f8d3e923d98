"""Which activations can die or saturate, and how one sees it: by their class, or by what autograd has kept of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

FLAT = 0.05  # a unit whose slope is on average below this share of the greatest is saturated


@dataclass(frozen=True)
class Kind:
    """A family of activations.

    Attributes:
        name: As "relu" or "tanh".
        active: For rectifiers: whether each element passes any gradient, from the output.
        slope: For saturating ones: the local derivative over the greatest there is, from the output.
        flat: A unit whose slope is on average below this is saturated.

    Example:
        >>> KINDS["tanh"].slope(torch.tensor([0.0, 1.0])).tolist()
        [1.0, 0.0]
    """

    name: str
    active: Callable[[Tensor], Tensor] | None = None
    slope: Callable[[Tensor], Tensor] | None = None
    flat: float = FLAT

    @property
    def is_rectifier(self) -> bool:
        """Whether its units can die; those of the others can saturate."""
        return self.active is not None


def _inside(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda y: ~((y <= low) | (y >= high))


# a NaN is no sign of death or saturation: the tests are such that it passes for neither
# rectifiers are flat on one side for good: a unit that stays there is dead; NaN is a matter of its own, and not flat
KINDS = {
    kind.name: kind
    for kind in (
        Kind("relu", active=lambda y: ~(y <= 0)),
        Kind("relu6", active=_inside(0.0, 6.0)),
        Kind("sigmoid", slope=lambda y: 4 * y * (1 - y)),
        Kind("tanh", slope=lambda y: 1 - y * y),
        Kind("hardtanh", slope=lambda y: (~(y.abs() >= 1)).to(y.dtype)),
        Kind("hardsigmoid", slope=lambda y: _inside(0.0, 1.0)(y).to(y.dtype)),
        Kind("softsign", slope=lambda y: (1 - y.abs()) ** 2),
    )
}


def _threshold(limit: float) -> Kind:
    return Kind("threshold", active=lambda y: ~(y <= limit))


def _hardtanh(low: float, high: float) -> Kind:
    if low == 0.0:
        return Kind("relu6", active=_inside(0.0, high))
    return Kind("hardtanh", slope=lambda y: _inside(low, high)(y).to(y.dtype))


def kind_of_module(module: nn.Module) -> Kind | None:
    """The kind of an activation module, or None where it can neither die nor saturate.

    Recurrent modules of the plain kind end in their nonlinearity.

    Args:
        module: Any module.

    Example:
        >>> kind_of_module(nn.ReLU()).name, kind_of_module(nn.GELU())
        ('relu', None)
    """
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return _hardtanh(float(module.min_val), float(module.max_val))
    if isinstance(module, nn.Threshold):
        return _threshold(float(module.threshold)) if module.value <= module.threshold else None
    if isinstance(module, (nn.RNN, nn.RNNCell)):
        return KINDS.get(str(module.nonlinearity))
    return next((KINDS[name] for kind, name in _MODULES.items() if isinstance(module, kind)), None)


_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softsign: "softsign",
}


def shown_name(node: Any) -> str:
    """The operation of an autograd node, as "Relu".

    Example:
        >>> shown_name(torch.relu(torch.ones(1, requires_grad=True)).grad_fn)
        'Relu'
    """
    return _shown(node.name())


@functools.cache
def _shown(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name)


def saved(node: Any, name: str) -> Tensor | None:
    """A tensor that autograd has kept for the backward pass, unless to look at it would compute it anew."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", None) is not None:  # activation checkpointing, offloading
        return None
    try:
        value = getattr(node, f"_saved_{name}")
    except RuntimeError:  # written over since, or freed: nobody will go back through here
        return None
    return value.detach() if isinstance(value, Tensor) else None


def kind_of_node(node: Any) -> tuple[Kind, Tensor] | None:
    """The kind and the output of an activation that an autograd node stands for, functional ones included.

    Args:
        node: A node of the graph, its saved tensors not freed yet.

    Returns:
        None where it is no activation that can die or saturate, or where its output was not kept as it is.

    Example:
        >>> kind, output = kind_of_node(torch.relu(torch.tensor([-1.0, 2.0], requires_grad=True)).grad_fn)
        >>> kind.name, output.tolist()
        ('relu', [0.0, 2.0])
    """
    reader = _NODES.get(shown_name(node))
    is_own = isinstance(node, BackwardCFunction)  # a function of the user's that happens to have such a name
    return None if reader is None or is_own else reader(node)


def _of_result(name: str) -> Callable[[Any], tuple[Kind, Tensor] | None]:
    def read(node: Any) -> tuple[Kind, Tensor] | None:
        result = saved(node, "result")
        return None if result is None else (KINDS[name], result)

    return read


def _of_hardtanh(node: Any) -> tuple[Kind, Tensor] | None:
    low, high = float(node._saved_min_val), float(node._saved_max_val)
    given = saved(node, "self")
    return None if given is None else (_hardtanh(low, high), given.clamp(low, high))


def _of_hardsigmoid(node: Any) -> tuple[Kind, Tensor] | None:
    given = saved(node, "self")
    return None if given is None else (KINDS["hardsigmoid"], torch.nn.functional.hardsigmoid(given))


def _of_clamp(node: Any) -> tuple[Kind, Tensor] | None:
    """`clamp(min=0)` is a ReLU; any other bound of one side is taken for a guard against extremes."""
    low, high = node._saved_min, getattr(node, "_saved_max", None)
    if low is None or isinstance(low, Tensor) or isinstance(high, Tensor) or float(low) != 0.0:
        return None  # bounds that are tensors stand on the device
    given = saved(node, "self")
    if given is None:
        return None
    kind = KINDS["relu"] if high is None else _hardtanh(0.0, float(high))
    return kind, given.clamp(0.0, None if high is None else float(high))


def _of_threshold(node: Any) -> tuple[Kind, Tensor] | None:
    given = saved(node, "self")
    limit = float(node._saved_threshold)
    return None if given is None else (_threshold(limit), given)


def _of_softsign(node: Any) -> tuple[Kind, Tensor] | None:
    """Softsign is no operator of its own: x / (1 + |x|)."""
    before = [other for other, _ in node.next_functions]
    if len(before) != 2:
        return None
    above, below = before
    if above is None or below is None or shown_name(below) != "Add":
        return None
    inner = next((after for after, _ in below.next_functions if after is not None), None)
    if inner is None or shown_name(inner) != "Abs" or inner.next_functions[0][0] is not above:
        return None
    given, divisor = saved(node, "self"), saved(node, "other")
    return None if given is None or divisor is None else (KINDS["softsign"], given / divisor)


_NODES: dict[str, Callable[[Any], tuple[Kind, Tensor] | None]] = {
    "Relu": _of_result("relu"),
    "Sigmoid": _of_result("sigmoid"),
    "Tanh": _of_result("tanh"),
    "Hardtanh": _of_hardtanh,
    "Hardsigmoid": _of_hardsigmoid,
    "ClampMin": _of_clamp,
    "Clamp": _of_clamp,
    "Threshold": _of_threshold,
    "Div": _of_softsign,
}
