"""Frozen copies of parts that are trained: teachers that follow a student, target networks, references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_gradhealth.sharding import is_sharded


def copies_in(model: nn.Module) -> dict[int, Tensor]:
    """What each parameter of a frozen copy was copied from, by the identity of the parameter.

    A module is a copy where it is frozen and all its parameters have the values of trained ones, to the last bit. Of
    a module with a single other value, as a net whose first half alone was copied to be trained, nothing is. What
    holds one number only, as a norm does, tells nothing, and needs nothing.

    Args:
        model: The model; parameters on the meta device or sharded are passed over, as nobody can read them.

    Example:
        >>> import copy
        >>> student = nn.Linear(4, 4)
        >>> both = nn.ModuleList([student, copy.deepcopy(student).requires_grad_(False)])
        >>> copies_in(both)[id(both[1].weight)] is student.weight
        True
    """
    trained: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and _tells(parameter):
            trained.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    found: dict[int, Tensor] = {}
    for module in _frozen(model):
        told = [parameter for parameter in module.parameters() if _tells(parameter)]
        sources = [_source(parameter, trained) for parameter in told]
        pairs = {id(copy): source for copy, source in zip(told, sources, strict=True) if source is not None}
        if len(pairs) == len(told):
            found.update(pairs)
    return found


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of which nothing is trained."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from _frozen(child)


def _tells(parameter: Tensor) -> bool:
    """Whether there are several numbers, here to be read."""
    if parameter.is_meta or is_sharded(parameter) or parameter.numel() < 2:
        return False
    values = parameter.detach()
    return bool((values != values.flatten()[0]).any())


def _source(copy: Tensor, trained: Mapping[tuple[torch.Size, torch.dtype], list[Tensor]]) -> Tensor | None:
    return next((one for one in trained.get((copy.shape, copy.dtype), ()) if _same(one, copy)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one.detach(), other.detach())
