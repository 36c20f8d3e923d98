"""Every tensor that can be reached from a model, and whether anything happened to it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OPAQUE = (str, bytes, int, float, complex, type, torch.dtype, torch.device, types.ModuleType, types.FunctionType)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, gradients and tensors in any attribute, with where they are; each place once."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", model)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, Tensor):
            yield path, value
            if value.is_leaf and value.grad is not None:
                yield f"{path}.grad", value.grad
            continue
        if isinstance(value, _OPAQUE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += [(f"{path}[{number}]", item) for number, item in enumerate(iter(value))]
        elif hasattr(value, "__dict__"):
            stack += [(f"{path}.{key}" if path else key, item) for key, item in vars(value).items()]


@dataclass
class _Kept:
    tensor: Tensor
    storage: Any  # held, so that no other takes its address
    address: int
    version: int
    value: Tensor
    needs_gradient: bool


class Snapshot:
    """What every tensor that can be reached from a model was at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = {path: self._keep(tensor) for path, tensor in tensors(model)}

    @staticmethod
    def _keep(tensor: Tensor) -> _Kept:
        value = tensor.detach().clone()
        return _Kept(tensor, tensor.untyped_storage(), tensor.data_ptr(), tensor._version, value, tensor.requires_grad)

    def changes(self, drawn: frozenset[int] = frozenset()) -> list[str]:
        """What is no longer as it was, as "place: what"; of the tensors in `drawn` (by id) values may have changed."""
        now, said = dict(tensors(self._model)), []
        said += [f"{path}: gone" for path in self._kept if path not in now]
        said += [f"{path}: new" for path in now if path not in self._kept]
        for path, kept in self._kept.items():
            tensor = now.get(path)
            if tensor is None:
                continue
            if tensor is not kept.tensor:
                said.append(f"{path}: another object")
            if tensor.data_ptr() != kept.address:
                said.append(f"{path}: another storage")
            if tensor.requires_grad != kept.needs_gradient:
                said.append(f"{path}: requires_grad {tensor.requires_grad}")
            if id(tensor) in drawn:
                continue
            if tensor._version != kept.version:
                said.append(f"{path}: version {tensor._version}, was {kept.version}")
            if tensor.shape != kept.value.shape or not alike(tensor, kept.value):
                said.append(f"{path}: another value")
        return said


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal in value, NaN included."""
    one, other = one.detach().resolve_conj(), other.detach().resolve_conj()
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if one.is_floating_point():
        return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    return torch.equal(one, other)
