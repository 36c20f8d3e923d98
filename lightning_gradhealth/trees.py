"""The tensors in whatever a module gives or takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output of any shape: a tensor, a mapping, a sequence, a dataclass, nested at will.

    Example:
        >>> import torch
        >>> [tensor.item() for tensor in tensors({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in tensors(item))
    elif isinstance(value, (list, tuple, set)):
        yield from (tensor for item in value for tensor in tensors(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (tensor for field in dataclasses.fields(value) for tensor in tensors(getattr(value, field.name)))
