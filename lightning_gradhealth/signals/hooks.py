"""What hangs on modules and tensors while signals are measured, and the tensors that are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from lightning_gradhealth import sharding
from lightning_gradhealth.signals.sums import norm_of
from lightning_gradhealth.trees import tensors


class Hook:
    """A hook of a module, without effect in a copy: a model that carries it can be pickled, and trained elsewhere.

    Args:
        call: What it does.
        failed: Is given what that raises: a failure must not reach the forward pass.
    """

    _call: Callable[..., None] | None = None

    def __init__(self, call: Callable[..., None], failed: Callable[[Exception], None]) -> None:
        self._call = call
        self._failed = failed

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, *args: Any) -> None:
        """Call what it is for."""
        if torch.compiler.is_compiling():
            return  # a compiled function calls the module: it is to be compiled as if there were no hook
        if self._call is None:
            return
        try:
            self._call(*args)
        except Exception as error:
            self._failed(error)


class Beside:
    """The hook of a tensor that a module gives beside its first: keeps the norm of its gradient under the call.

    Args:
        norms: Where to keep it.
        call: The number of the call.
    """

    def __init__(self, norms: dict[int, Tensor], call: int) -> None:
        self._norms = norms
        self._call = call

    def __call__(self, gradient: Tensor) -> None:
        """Add it."""
        if not torch.is_grad_enabled():
            norm = norm_of(plain(gradient))
            known = self._norms.get(self._call)
            self._norms[self._call] = norm if known is None else torch.hypot(known, norm)


def first_floating(value: Any) -> Tensor | None:
    """The first tensor of floating numbers."""
    if type(value) is Tensor and value.is_floating_point() and _is_dense(value):
        return value
    return next((t for t in tensors(value) if t.is_floating_point() and _is_dense(t)), None)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def written_to(tensor: Tensor) -> Tensor:
    """What an operation after this one would write to if it works in place: of a mere view, what it is a view of.

    Written to, a view gets another history, and hooks on the one that it had are never called.
    """
    base = tensor._base
    whole = base is not None and base.grad_fn is not None and base.numel() == tensor.numel()
    return base if base is not None and whole else tensor


def detached(value: Any) -> Any:
    """The same without graphs."""
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach())
    return tree_map_only(Tensor, lambda tensor: tensor.detach(), value)


def plain(tensor: Tensor) -> Tensor:
    """This rank's part, without its graph."""
    return sharding.local(tensor.detach())


def callable_roots(model: nn.Module, path: str = "") -> Iterator[nn.Module]:
    """The modules that a loop calls: the model, or the children of a mere container.

    Example:
        >>> pair = nn.ModuleDict({"generator": nn.Linear(1, 1), "discriminator": nn.Linear(1, 1)})
        >>> len(list(callable_roots(pair)))
        2
    """
    if type(model).forward is nn.Module.forward:
        for child in model.children():
            yield from callable_roots(child)
    else:
        yield model
