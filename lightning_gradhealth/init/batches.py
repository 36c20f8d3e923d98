"""A batch as a DataLoader gives it, in place of what `forward` takes: the calls in which a training step uses it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from lightning_gradhealth.isolation import undisturbed
from lightning_gradhealth.steps import has_training_step, step_arguments

Call = tuple[nn.Module, Any]


def calls_in(model: nn.Module, batch: Any) -> list[Call]:
    """The outermost calls of modules with parameters that a LightningModule's step makes, each module once.

    Nothing is left changed. A module that optimizes by hand is not run: it would step its optimizers.

    Args:
        model: The model.
        batch: What its `training_step` takes.

    Example:
        >>> calls_in(nn.Linear(1, 1), torch.zeros(1, 1))
        []
    """
    if not has_training_step(model) or not getattr(model, "automatic_optimization", True):
        return []
    step: Callable[..., Any] = model.training_step  # type: ignore[assignment]
    outermost = _Outermost()
    with undisturbed(model, silent=True, weights=True), torch.no_grad():
        model.eval()
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # `undisturbed` takes the hooks off again
                module.register_forward_pre_hook(outermost.enter, with_kwargs=True)
                module.register_forward_hook(outermost.leave, always_call=True)
        args, kwargs = step_arguments(step, tree_map(lambda leaf: leaf, batch))  # it may take things out of a dict
        with contextlib.suppress(Exception):  # the calls before it failed tell as much
            step(*args, **kwargs)
    return [call for call in outermost.calls if next(call[0].parameters(), None) is not None]


class _Outermost:
    """Keeps the first call of every module that no other module has called."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._depth = 0

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or any(module is known for known, _ in self.calls):
            return
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        if args and kwargs:
            kwargs, args = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments), ()
        self.calls.append((module, kwargs or tuple(args)))

    def leave(self, *_: Any) -> None:
        self._depth -= 1


def parts_of(model: nn.Module, batch: Any) -> Iterator[Any]:
    """What of a batch `forward` may take: the entries that it names, or the first one.

    Args:
        model: The model.
        batch: A mapping or a sequence; of anything else there are no parts.

    Example:
        >>> list(parts_of(nn.Linear(1, 1), {"input": 1, "labels": 2})), list(parts_of(nn.Linear(1, 1), [1, 2]))
        ([{'input': 1}, 1], [1])
    """
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        if known := {name: value for name, value in batch.items() if name in names}:
            yield known
        yield from list(batch.values())[:1]
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        yield from batch[:1]
