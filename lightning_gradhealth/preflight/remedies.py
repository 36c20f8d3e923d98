"""What `init_weights` would change in a model, in a sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradhealth.init import plan_init
from lightning_gradhealth.layers import clean_name
from lightning_gradhealth.norms import read_once
from lightning_gradhealth.preflight.passes import FirstCall
from lightning_gradhealth.records import InitEntry

TOLERANCE = 0.1  # a weight whose standard deviation is as near as this to what init_weights gives is left unsaid
SHOWN = 3


def of_init(model: nn.Module, call: FirstCall) -> str:
    """Which weights `init_weights` would draw with another standard deviation; "" where it would not.

    Args:
        model: The model.
        call: Its outermost call, or that of a part of it: what is initialised then is that part.

    Raises:
        Exception: Whatever making a plan raises.

    Example:
        >>> net, call = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2)), FirstCall()
        >>> net[0].weight.data = torch.linspace(-(3**0.5), 3**0.5, 2500).view(50, 50)
        >>> _ = nn.init.normal_(net[2].weight, std=0.141)
        >>> call(net, (torch.randn(8, 50),), {})
        >>> of_init(net, call)
        'gh.init_weights(model, x) would draw 1 weight anew: 0.weight with std 0.2 in place of 1'
    """
    module = call.module if call.module is not None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a plan warns of is no news of the model as it is
        entries = plan_init(module, call.example_inputs(), seed=0, on_uncovered="ignore").report.entries
    targets = _targets(entries)
    weights = {clean_name(name): parameter for name, parameter in module.named_parameters(remove_duplicate=False)}
    present = _present({name: weights[name] for name in targets})
    path = next((clean_name(f"{path}.").rstrip(".") for path, part in model.named_modules() if part is module), "")
    changes = [
        f"{f'{path}.' if path else ''}{name} with std {target:.3g} in place of {present[name]:.3g}"
        for name, target in targets.items()
        if _differs(target, present[name], weights[name].numel())
    ]
    if not changes:
        return ""
    shown = ", ".join(changes[:SHOWN]) + (", ..." if len(changes) > SHOWN else "")
    noun = "weight" if len(changes) == 1 else "weights"
    return f"gh.init_weights(model{f'.{path}' if path else ''}, x) would draw {len(changes)} {noun} anew: {shown}"


def _targets(entries: Sequence[InitEntry]) -> dict[str, float]:
    """The standard deviation of every weight that would be drawn, all blocks of it taken together."""
    squares: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for entry in entries:
        name = entry.name.partition("[")[0]
        if entry.distribution and entry.target_std is not None and "gives " not in entry.note:
            squares[name] = squares.get(name, 0.0) + entry.target_std**2 * math.prod(entry.shape)
            sizes[name] = sizes.get(name, 0) + math.prod(entry.shape)
    return {name: math.sqrt(total / sizes[name]) for name, total in squares.items() if sizes[name] > 1}


@torch.no_grad()
def _present(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The standard deviations that weights have now."""
    found = [(weight if weight.itemsize > 2 else weight.float()).std() for weight in weights.values()]
    return {name: value for name, [value] in zip(weights, read_once(found), strict=True)} if found else {}


def _differs(target: float, present: float, size: int) -> bool:
    """Whether two standard deviations differ by more than the tolerance, and by more than chance explains."""
    if target <= 0.0 or not present > 0.0:
        return target != present
    return abs(math.log(target / present)) > math.log1p(TOLERANCE) + 3.0 / math.sqrt(2.0 * size)
