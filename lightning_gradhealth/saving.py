"""What goes into a checkpoint: checked to be what `torch.load(weights_only=True)` takes, and copied where it is not."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradhealth.messages import printable, reason_of, say

_LEAVES = (type(None), bool, int, float, str, bytes, torch.Size, torch.device, torch.dtype)
_BASES: tuple[type, ...] = (bool, int, float, str, bytes)


def savable(value: Any) -> Any:
    """Return a value as a checkpoint may hold it; NumPy's numbers and arrays, enums and subclasses become plain.

    Raises:
        TypeError: It holds something that `torch.load(weights_only=True)` refuses.

    Example:
        >>> savable({"a": (np.float64(1.5), Enum("Kind", ["X"]).X)})
        {'a': (1.5, 1)}
        >>> savable({"f": print})
        Traceback (most recent call last):
        ...
        TypeError: a builtin_function_or_method cannot be saved; keep numbers, strings, lists, dicts and tensors
    """
    kind = type(value)
    if kind in _LEAVES or kind is Tensor:
        return value
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, Enum):
        return savable(value.value)
    if isinstance(value, np.generic):
        return savable(value.item())
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {savable(key): savable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [savable(item) for item in value]
        return parts if isinstance(value, list) else tuple(parts) if isinstance(value, tuple) else set(parts)
    for base in _BASES:
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"a {kind.__name__} cannot be saved; keep numbers, strings, lists, dicts and tensors")


class Saver:
    """Collects the parts of a state; a part that fails or cannot be saved is left out, and told once.

    Its copies are itself, so that what was told by one is not told again by another.

    Example:
        >>> saver, state = Saver(), {}
        >>> saver.put(state, "norm", "the norm", lambda: 1.5)
        >>> state
        {'norm': 1.5}
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def put(self, state: dict[Any, Any], key: Any, what: str, make: Callable[[], Any]) -> None:
        """Put a part into a state.

        Args:
            state: The state.
            key: The part's key.
            what: What it is, in words.
            make: Gives it.
        """
        try:
            state[key] = savable(make())
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                say(f"gradhealth: {printable(what)} is not saved in checkpoints ({reason_of(error)}); training goes on")

    def take(self, what: str, load: Callable[[], None]) -> bool:
        """Let a part take up its state; False where it fails, which is told once.

        Args:
            what: What it is, in words.
            load: Takes it up.
        """
        try:
            load()
        except Exception as error:
            if f"{what}, loading" not in self._told:
                self._told.add(f"{what}, loading")
                say(f"gradhealth: {printable(what)} cannot be taken up and starts afresh ({reason_of(error)})")
            return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return self
