"""The tensors in whatever a module gives or takes, and a batch kept so that it can be run again."""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
from collections import deque
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


_DEPTH = 8  # containers within containers that are copied
_ATOMS = (str, bytes, int, float, complex, bool, type(None))


def with_own_containers(value: Any) -> Any:
    """The same tensors in other dicts, lists and objects, so that what is taken out of one stays in the other.

    Example:
        >>> batch = {"x": [1, 2], "labels": 3}
        >>> kept = with_own_containers(batch)
        >>> batch.pop("labels"), batch["x"].pop(), kept
        (3, 2, {'x': [1, 2], 'labels': 3})
    """
    return _owned(value, {}, 0)


def _owned(value: Any, known: dict[int, tuple[Any, Any]], depth: int) -> Any:
    """See `with_own_containers`; what is met twice is copied once."""
    if isinstance(value, (Tensor, *_ATOMS)) or depth > _DEPTH:
        return value
    if id(value) not in known:
        known[id(value)] = value, value
        try:
            _copied(value, known, depth + 1)
        except Exception:  # whatever its class does: it is shared, as it would be without a copy
            known[id(value)] = value, value
    return known[id(value)][1]


def _copied(value: Any, known: dict[int, tuple[Any, Any]], depth: int) -> None:
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))  # a named one
        if type(value) is tuple or make is not type(value):
            known[id(value)] = value, make([_owned(item, known, depth) for item in value])
        return
    own = copy.copy(value)  # a BatchEncoding, a graph, a dataclass: its attributes are its own then
    known[id(value)] = value, own
    if isinstance(own, MutableMapping):
        for key, item in list(value.items()):
            own[key] = _owned(item, known, depth)
    elif type(own) in (list, deque):
        items = [_owned(item, known, depth) for item in value]
        own.clear()
        own.extend(items)
    elif is_plain(own) and own is not value and (mine := getattr(own, "__dict__", None)):
        mine.update({name: _owned(item, known, depth) for name, item in mine.items()})


# what a model may hold but does not remember by: the loop around it, files, locks, code
_FOREIGN = frozenset(
    {
        *(sys.stdlib_module_names - {"collections", "types", "argparse"}),
        *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradhealth", "torchmetrics"),
        "builtins",
    }
)


def of_the_user(code: Any) -> bool:
    """Whether a class or function is none of Python's, torch's, Lightning's or ours.

    Example:
        >>> of_the_user(dict), of_the_user(Tensor)
        (False, False)
    """
    return str(code.__module__).partition(".")[0] not in _FOREIGN


def is_plain(value: object) -> bool:
    """Whether an object may be one that a model counts or collects in: of a class that no framework has made.

    What derives from a class of Lightning's or torch's (callbacks, optimizers, datasets, loggers) belongs to the loop.

    Example:
        >>> is_plain(5), is_plain(enum.Enum)
        (False, False)
    """
    kind = type(value)
    if kind.__module__ == "builtins" or issubclass(kind, (type, enum.Enum)):
        return False
    return all(of_the_user(base) for base in kind.__mro__[:-1] if base.__module__)


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
