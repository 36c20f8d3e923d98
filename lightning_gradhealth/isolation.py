"""Run a model once more and leave no trace: the random state, and everything that a model remembers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True, eq=False)
class RandomState:
    """The random state of torch (CPU and initialised accelerators), of Python's `random` and of numpy's global one.

    Accelerators keep theirs on the host, so that taking it waits for no device.

    Example:
        >>> state = RandomState.now()
        >>> drawn = torch.rand(3), random.random(), np.random.rand()
        >>> state.restore()
        >>> torch.equal(drawn[0], torch.rand(3)), drawn[1:] == (random.random(), np.random.rand())
        (True, True)
    """

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device | str] | None = None) -> RandomState:
        """Take a snapshot.

        Args:
            devices: The accelerators to include, e.g. `["cuda:0"]`; None: all that are initialised.
        """
        wanted = _accelerators() if devices is None else [torch.device(device) for device in devices]
        states = [(device, _device_state(device)) for device in wanted if device.type != "cpu"]
        return cls(
            cpu=torch.get_rng_state(),
            accelerators=tuple(states),
            python=random.getstate(),
            numpy=np.random.get_state(),  # noqa: NPY002  (the global state is what users draw from)
        )

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            backend = torch.get_device_module(device)
            backend.set_rng_state(state) if device.type == "mps" else backend.set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def _accelerators() -> list[torch.device]:
    """The accelerators in use; asking one that is not would initialise it."""
    found = []
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            kind = backend.__name__.rpartition(".")[2]
            found += [torch.device(kind, index) for index in range(backend.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _device_state(device: torch.device) -> Tensor:
    backend = torch.get_device_module(device)
    state: Tensor = backend.get_rng_state() if device.type == "mps" else backend.get_rng_state(device)
    return state


class _Memory:
    """Everything that modules remember: attributes, buffers, states of metrics, and lists and dicts of these.

    The state of torchmetrics is a plain attribute, so that metrics need nothing of their own. Parameters are kept
    by identity: a forward and backward pass does not write into them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}  # the objects themselves, so that no id is given out twice
        self._open: list[object] = [model]
        try:
            while self._open:
                value = self._open.pop()
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self._keep(value)
        except Exception:
            self.restore()  # gradients that were set aside already
            raise

    def restore(self) -> None:
        """Put everything back; what fails does not keep the rest from being restored."""
        failure: Exception | None = None
        for undo in self._undo:
            try:
                undo()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _keep(self, value: object) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            self._keep_scripted(value)
        elif isinstance(value, nn.Module):
            self._open.append(value.__dict__)
        elif isinstance(value, nn.Parameter):
            self._keep_parameter(value)
        elif isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, (list, deque)):
            self._keep_sequence(value)
        elif isinstance(value, set):
            members = set(value)
            self._undo += [lambda: value.intersection_update(members), lambda: value.update(members)]
        elif isinstance(value, (tuple, frozenset)):
            self._open += value
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))

    def _keep_parameter(self, parameter: nn.Parameter) -> None:
        if is_lazy(parameter):
            raise ValueError("the model has parameters without a shape yet (lazy modules); run one forward pass first")
        gradient, requires_grad = parameter.grad, parameter.requires_grad
        parameter.grad = None

        def undo() -> None:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

        self._undo.append(undo)

    def _keep_tensor(self, tensor: Tensor) -> None:
        with torch.no_grad():
            alias = tensor.data  # its own version counter: a graph that has saved the tensor stays valid
            # elements that share memory cannot be written in place, by nobody
            shared = tensor.layout is not torch.strided or any(
                step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
            )
            copy = None if shared else alias.clone()

        def undo() -> None:
            # what validation leaves in a metric is an inference tensor: it can be written in its own mode only
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if copy is not None:
                    alias.copy_(copy)
                if (tensor.shape, tensor.dtype, tensor.device) != (alias.shape, alias.dtype, alias.device):
                    tensor.data = alias

        self._undo.append(undo)

    def _keep_dict(self, value: dict[Any, Any]) -> None:
        kept = dict(value)
        self._open += kept.values()

        def undo() -> None:
            for key in [key for key in value if key not in kept]:
                del value[key]
            if list(value) != list(kept):  # something was taken out, and the order of buffers is that of checkpoints
                value.clear()
            for key, item in kept.items():
                if key not in value or value[key] is not item:
                    value[key] = item

        self._undo.append(undo)

    def _keep_sequence(self, value: list[Any] | deque[Any]) -> None:
        kept = list(value)
        self._open += kept

        def undo() -> None:
            if len(value) != len(kept) or any(a is not b for a, b in zip(value, kept, strict=True)):
                value.clear()
                value.extend(kept)

        self._undo.append(undo)

    def _keep_scripted(self, module: torch.jit.ScriptModule) -> None:
        """Its attributes live in C++: buffers and parameters are reached by their names, flags one by one."""
        self._open += [*module.parameters(), *module.buffers()]
        for part in module.modules():
            flag = part.training
            self._undo.append(lambda part=part, flag=flag: setattr(part, "training", flag))  # type: ignore[misc]


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for `log` and `log_dict`."""


@contextmanager
def undisturbed(model: nn.Module, *, silent: bool = False) -> Iterator[None]:
    """Whatever runs inside, on exit the model and the random state are what they were, bit for bit.

    Restored: random state; buffers, tensors and other attributes of all modules (the same tensor objects), with
    the lists, dicts and sets among them, so the state of metrics too; training flags; `.grad` (None inside, and the
    same tensors afterwards) and `requires_grad` of every parameter; grad mode and autocast. Not restored: the values
    of parameters, and objects of other classes that a module holds (a trainer, an optimizer).

    Args:
        model: Any module.
        silent: `log` and `log_dict` of a LightningModule do nothing inside.

    Raises:
        ValueError: The model has lazy parameters.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    kinds = {"cpu", *(device.type for device in _accelerators())}
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    cache, grad_mode = torch.is_autocast_cache_enabled(), torch.is_grad_enabled()
    state = RandomState.now()
    memory = _Memory(model)
    try:
        if silent:
            for module in model.modules():
                if callable(getattr(module, "log", None)) and callable(getattr(module, "log_dict", None)):
                    vars(module).update(log=_nothing, log_dict=_nothing)  # among the attributes: they go on exit
        yield
    finally:
        torch.set_grad_enabled(grad_mode)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache)
        torch.clear_autocast_cache()  # casts of weights made inside belong to graphs that are gone
        state.restore()
        memory.restore()
