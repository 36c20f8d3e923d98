"""The values that a module's own class gives its parameters and buffers, without touching these.

The class's own `reset_parameters` runs on stand-ins: so it overwrites nothing that a plan or a checkpoint has given,
and all ranks get the same values, however these are split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.isolation import RandomState

_AMONG_STAND_INS: ContextVar[bool] = ContextVar("_AMONG_STAND_INS", default=False)


def among_stand_ins() -> bool:
    """Whether a class's own method runs on stand-ins now: what it asks of other modules is not wanted then.

    Example:
        >>> among_stand_ins()
        False
    """
    return _AMONG_STAND_INS.get()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, by attribute.

    Args:
        module: Any module.

    Example:
        >>> list(own_tensors(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    own = chain(module._parameters.items(), module._buffers.items())
    return {attribute: tensor for attribute, tensor in own if tensor is not None}


def own_reset(module: nn.Module) -> Callable[[nn.Module], object] | None:
    """The method by which a module's class gives its parameters and buffers their first values, if it has one.

    Args:
        module: Any module, whatever its instance says.

    Example:
        >>> own_reset(nn.Linear(2, 2)) is nn.Linear.reset_parameters
        True
    """
    kind = type(module)
    method: Callable[[nn.Module], object] | None = getattr(kind, "reset_parameters", None)
    return method or getattr(kind, "_reset_parameters", None)  # nn.MultiheadAttention


def values_by_class(module: nn.Module, attributes: Sequence[str], seed: str) -> dict[str, Tensor]:
    """What the class's own method would write into some of a module's parameters and buffers.

    Args:
        module: A module whose class has such a method, see `own_reset`; it may be split over ranks.
        attributes: Of its own parameters and buffers.
        seed: What torch's random numbers on the CPU follow meanwhile; the random state is restored.

    Returns:
        Whole tensors on the CPU, without those that the method does not write into.

    Raises:
        ValueError: The class has no such method.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> _ = norm.running_mean.fill_(5.0)
        >>> values_by_class(norm, ["running_mean"], "any"), norm.running_mean
        ({'running_mean': tensor([0., 0.])}, tensor([5., 5.]))
    """
    method = own_reset(module)
    if method is None:
        raise ValueError(
            f"module must have a reset_parameters() of its class, {type(module).__name__} has none; add one"
        )
    with _stand_ins(module) as untouched, _seeded(seed):
        method(module)
        now = own_tensors(module)
        return {key: now[key].detach() for key in attributes if not untouched[key](now[key])}


def small_by_class(model: nn.Module) -> dict[int, Tensor]:
    """What the classes of small modules on the meta device (norms, PReLU) will write into them, by identity.

    Args:
        model: The model.

    Example:
        >>> [value.item() for value in small_by_class(nn.PReLU(device="meta")).values()]
        [0.25]
    """
    found: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        own = own_tensors(module)
        small = all(tensor.dim() < 2 for tensor in own.values())
        if small and any(tensor.is_meta for tensor in own.values()) and own_reset(module) is not None:
            found.update((id(own[key]), value) for key, value in values_by_class(module, list(own), path).items())
    return found


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[dict[str, Callable[[Tensor], bool]]]:
    """Inside, the module's own parameters and buffers are whole, empty and on the CPU; those below it on meta.

    So its class's own method overwrites nothing, needs no more memory than the module does, and gives all ranks the
    same values, however these are split.

    Yields:
        For each of the module's own: whether a tensor is one that nobody has written into.
    """
    groups: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (group, dict(group), "cpu" if each is module else "meta")
        for each in module.modules()
        for group in (each._parameters, each._buffers)
    ]
    token = _AMONG_STAND_INS.set(True)
    try:
        for group, real, device in groups:
            group.update({key: _stand_in(tensor, device) for key, tensor in real.items() if tensor is not None})
        with torch.device("cpu"), torch.no_grad():
            yield {attribute: _untouched(tensor) for attribute, tensor in own_tensors(module).items()}
    finally:
        _AMONG_STAND_INS.reset(token)
        for group, real, _ in groups:
            group.clear()
            group.update(real)


def _stand_in(tensor: Tensor, device: str) -> Any:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).fill_(_mark(tensor.dtype))
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _mark(dtype: torch.dtype) -> float:
    """What no initializer is likely to fill a whole tensor with; for bool there is no such thing."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _untouched(stand_in: Tensor) -> Callable[[Tensor], bool]:
    """A test for a stand-in: old code writes into `.data`, which counts no versions, but the mark goes."""
    version, mark = stand_in._version, _mark(stand_in.dtype)

    def test(now: Tensor) -> bool:
        if now is not stand_in or now._version != version or not now.numel():
            return False
        return bool((now.isnan() if math.isnan(mark) else now == mark).all())

    return test


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Inside, torch's random numbers on the CPU depend on `text` alone; on exit all random state is what it was."""
    state = RandomState.now()
    try:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        # `torch.manual_seed` would also decide how an accelerator that is not initialised yet begins
        torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield
    finally:
        state.restore()
