"""The tensors in whatever a module gives or takes, and a batch kept so that it can be run again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
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


_ATOMS = (str, bytes, int, float, complex, bool, type(None))


def with_own_containers(value: Any) -> Any:
    """The same tensors in other dicts, lists and objects, so that what is taken out of one stays in the other.

    Example:
        >>> batch = {"x": [1, 2], "labels": 3}
        >>> kept = with_own_containers(batch)
        >>> batch.pop("labels"), batch["x"].pop(), kept
        (3, 2, {'x': [1, 2], 'labels': 3})
    """
    if isinstance(value, (Tensor, *_ATOMS)):
        return value
    if type(value) is dict:
        return {key: with_own_containers(item) for key, item in value.items()}
    if type(value) is list:
        return [with_own_containers(item) for item in value]
    if type(value) is tuple:
        return tuple(with_own_containers(item) for item in value)
    if isinstance(value, tuple):
        return value
    try:
        own = copy.copy(value)  # a BatchEncoding, a graph, a dataclass: its attributes are its own then
        if isinstance(own, MutableMapping):
            own.update({key: with_own_containers(item) for key, item in value.items()})
        return own
    except Exception:  # whatever its class does: it is shared, as it would be without a copy
        return value


class KeptBatch:
    """A batch as it was before it was trained on: containers of its own, and whether a tensor was changed since.

    Args:
        batch: What a forward pass is about to be given.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2)}
        >>> kept = KeptBatch(batch)
        >>> _ = batch.pop("x").add_(1.0)
        >>> sorted(kept.fresh()), kept.changed
        (['x'], True)
    """

    def __init__(self, batch: Any) -> None:
        self._batch = with_own_containers(batch)
        self._versions = [(t, t._version) for t in tensors(self._batch) if not t.is_inference()]

    def fresh(self) -> Any:
        """The batch, to be taken apart once more."""
        return with_own_containers(self._batch)

    @property
    def changed(self) -> bool:
        """Whether a tensor of it was written to."""
        return any(tensor._version != version for tensor, version in self._versions)
