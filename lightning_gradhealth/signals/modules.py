"""Which modules of a model are watched, and what the probe has to know of each."""

from __future__ import annotations

import re

import torch
from torch import nn

from lightning_gradhealth.layers import clean_name, has_own_parameters, is_compiled
from lightning_gradhealth.makeup import applied_by_hand
from lightning_gradhealth.naming import name_of
from lightning_gradhealth.signals.kinds import kind_of_module
from lightning_gradhealth.signals.paths import Applied
from lightning_gradhealth.signals.places import NORMS, Watched

_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations(\.|$)")  # what it gives is a weight, not a signal


def watched_modules(model: nn.Module, *, compiled: bool) -> tuple[dict[nn.Module, Watched], tuple[str, ...]]:
    """The modules that can be hooked, and the names of those that hide what is inside.

    Args:
        model: The model.
        compiled: Compiled modules are looked into.

    Example:
        >>> found, hidden = watched_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), compiled=False)
        >>> [watched.name for watched in found.values()], hidden
        (['Sequential', '0', '1'], ())
    """
    hidden: list[str] = []
    found: dict[nn.Module, Watched] = {}
    for path, module in model.named_modules():
        if any(not top or path.startswith(f"{top}.") for top in hidden) or _PARAMETRIZATION.search(path):
            continue
        if hash(module) != object.__hash__(module):
            continue  # a metric: its hash changes with its state
        if isinstance(module, torch.jit.ScriptModule) or (is_compiled(module) and not compiled):
            hidden.append(path)
        else:
            measured = has_own_parameters(module) or isinstance(module, NORMS)
            found[module] = Watched(_name(model, path), measured, kind_of_module(module), not module._modules)
    return found, tuple(_name(model, path) for path in hidden)


def matrices_by_hand(model: nn.Module) -> dict[int, Applied]:
    """The matrices that no module of their own applies, by identity.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.ParameterList([torch.ones(2, 2), torch.ones(2, 2)])})
        >>> [applied.name for applied in matrices_by_hand(model).values()]
        ['mlp.0', 'mlp.1']
    """
    return {
        id(parameter): Applied(clean_name(f"{path}.{key}" if path else key), _name(model, path), module)
        for path, module in model.named_modules()
        for key, parameter in applied_by_hand(module).items()
    }


def _name(model: nn.Module, path: str) -> str:
    return clean_name(f"{path}.").rstrip(".") or name_of(model)
