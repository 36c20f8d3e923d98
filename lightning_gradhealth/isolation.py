"""Run a model once more and leave no trace: the random state, and everything that a model remembers."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

from lightning_gradhealth.sharding import is_sharded
from lightning_gradhealth.trees import is_plain, of_the_user


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
    """Everything that modules remember: attributes, buffers, states of metrics, lists and dicts of these, and objects.

    The state of torchmetrics is a plain attribute, so that metrics need nothing of their own. Of parameters the values
    are kept only if `weights` is set: most forward passes do not write into them, and a copy takes as much memory.

    No method of what is kept is called but those of Python's own classes: a user's class may refuse len, iteration,
    comparison or attributes, or note down that it was asked.
    """

    def __init__(self, model: nn.Module, weights: bool) -> None:
        self._weights = weights
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
        kind = type(value)  # isinstance asks the object for its class, which a dead proxy refuses
        if issubclass(kind, torch.jit.ScriptModule):
            self._keep_scripted(cast(torch.jit.ScriptModule, value))
        elif issubclass(kind, nn.Module):
            self._open.append(object.__getattribute__(value, "__dict__"))
            self._keep_class(kind)
        elif issubclass(kind, Tensor):
            keep = self._keep_parameter if isinstance(value, nn.Parameter) else self._keep_tensor
            keep(cast(nn.Parameter, value))
        elif issubclass(kind, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self._keep_generator(cast(Any, value))
        elif issubclass(kind, (dict, list, deque, set, tuple, frozenset)):
            self._keep_collection(value)
            self._keep_attributes(value)
        elif issubclass(kind, (np.ndarray, bytearray)):
            self._keep_array(cast(Any, value))
        elif issubclass(kind, io.IOBase):
            self._keep_file(value)
        elif is_plain(value):
            self._keep_attributes(value)
            self._keep_class(kind)

    def _keep_generator(
        self, value: torch.Generator | random.Random | np.random.Generator | np.random.RandomState
    ) -> None:
        if isinstance(value, np.random.Generator):
            bits, place = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(bits, "state", place))
        elif isinstance(value, random.Random):
            drawn = value.getstate()
            self._undo.append(lambda: value.setstate(drawn))
        else:
            state: Any = value.get_state()
            self._undo.append(lambda: value.set_state(state))

    def _keep_collection(self, value: Any) -> None:
        if isinstance(value, dict):
            self._keep_dict(value)
        elif isinstance(value, (list, deque)):
            self._keep_sequence(value)
        elif isinstance(value, set):
            members = set(set.__iter__(value))
            self._undo.append(functools.partial(set.intersection_update, value, members))
            self._undo.append(functools.partial(set.update, value, members))
        else:
            self._open += (tuple if isinstance(value, tuple) else frozenset).__iter__(value)

    def _keep_array(self, value: np.ndarray[Any, Any] | bytearray) -> None:
        """The elements, where they can be written; objects among them are kept as well."""
        if isinstance(value, bytearray):
            content = bytes(value)
            self._undo.append(lambda: value.__setitem__(slice(None), content))
        elif value.flags.writeable:
            kept = value.copy()
            self._undo.append(lambda: np.copyto(value, kept))
            self._open += list(kept.flat) if value.dtype == object else []

    def _keep_attributes(self, value: object) -> None:
        """The attributes of an object of a class of the user's: a replay buffer, running statistics, a counter."""
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = None
        if type(attributes) is dict:
            self._open.append(attributes)
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                member = kind.__dict__.get(name)
                if isinstance(member, types.MemberDescriptorType):
                    with suppress(AttributeError):  # nothing is in it yet
                        self._keep_slot(value, member, member.__get__(value))

    def _keep_class(self, kind: type) -> None:
        """The attributes that the user's classes share among their objects: a counter, a list of all there are."""
        for each in kind.__mro__:
            if id(each) in self._seen or not of_the_user(each):
                continue
            self._seen[id(each)] = each
            kept = {name: value for name, value in vars(each).items() if not name.startswith("__")}
            self._open += [value for value in kept.values() if not isinstance(value, types.FunctionType)]
            self._undo.append(functools.partial(_put_back, each, kept))

    def _keep_file(self, file: Any) -> None:
        """A file in memory, and the place in one that is only read; what has been written to a disk stays there."""
        if isinstance(file, (io.StringIO, io.BytesIO)) and not file.closed:
            content: Any = file.getvalue()
            place = file.tell()
            self._undo += [
                functools.partial(file.seek, 0),
                functools.partial(file.write, content),
                functools.partial(file.truncate, len(content)) if isinstance(content, bytes) else file.truncate,
                functools.partial(file.seek, place),
            ]
        elif not file.closed and file.seekable() and not file.writable():
            with suppress(OSError):  # a text file that is read line by line does not tell
                self._undo.append(functools.partial(file.seek, file.tell()))

    def _keep_slot(self, value: object, member: Any, kept: object) -> None:
        self._open.append(kept)
        self._undo.append(lambda: member.__set__(value, kept))

    def _keep_parameter(self, parameter: nn.Parameter) -> None:
        if is_lazy(parameter):
            raise ValueError("the model has parameters without a shape yet (lazy modules); run one forward pass first")
        # shards are moved about by the strategy itself
        self._keep_tensor(parameter, values=self._weights and not is_sharded(parameter))

    def _keep_tensor(self, tensor: Tensor, values: bool = True) -> None:
        with torch.no_grad():
            alias = tensor.data  # its own version counter: a graph that has saved the tensor stays valid
            # elements that share memory cannot be written in place, by nobody
            shared = tensor.layout is not torch.strided or any(
                step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
            )
            copy = _cloned(alias) if values and not shared else None
        leaf, requires_grad = tensor.is_leaf, tensor.requires_grad
        gradient = tensor.grad if leaf else None
        if gradient is not None:
            tensor.grad = None
        attributes = dict(vars(tensor)) if type(tensor) in (Tensor, nn.Parameter) else None
        memory = alias.untyped_storage() if _has_memory(tensor) else None
        size = 0 if memory is None else memory.nbytes()
        version = None if tensor.is_inference() else _unsafe_preserve_version_counter(tensor)

        def undo() -> None:
            if memory is not None and memory.nbytes() != size:  # `resize_`, of the tensor or of its memory
                memory.resize_(size)
            # what validation leaves in a metric is an inference tensor: it can be written in its own mode only
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if copy is not None:
                    alias.copy_(copy)
                if _place(tensor) != _place(alias):  # `tensor.data = ...`
                    tensor.data = alias
            if leaf:
                _as_leaf(tensor, requires_grad, gradient)
            if attributes is not None and _identities(vars(tensor)) != _identities(attributes):
                vars(tensor).clear()
                vars(tensor).update(attributes)
            if copy is not None and version is not None:  # the values are the same: what has saved them may go on
                version.__exit__()

        self._undo.append(undo)

    def _keep_dict(self, value: dict[Any, Any]) -> None:
        raw: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # the order of the former is its own
        kept = list(raw.items(value))
        self._open += [item for _, item in kept]
        for key, item in kept:
            if (twin := _twin_of(item)) is not None:
                raw.__setitem__(value, key, twin)

        def undo() -> None:
            # something was taken out or added, and the order of buffers is that of checkpoints
            if [id(key) for key in raw.__iter__(value)] != [id(key) for key, _ in kept]:
                raw.clear(value)
            for key, item in kept:
                if dict.get(value, key, self) is not item:
                    raw.__setitem__(value, key, item)

        self._undo.append(undo)

    def _keep_sequence(self, value: list[Any] | deque[Any]) -> None:
        raw: Any = deque if isinstance(value, deque) else list
        kept = list(raw.__iter__(value))
        self._open += kept

        def undo() -> None:
            if list(map(id, raw.__iter__(value))) != list(map(id, kept)):
                raw.clear(value)
                raw.extend(value, kept)

        self._undo.append(undo)

    def _keep_scripted(self, module: torch.jit.ScriptModule) -> None:
        """Its attributes live in C++: buffers and parameters are reached by their names, flags one by one."""
        self._open += [*module.parameters(), *module.buffers()]
        for part in module.modules():
            flag = part.training
            self._undo.append(lambda part=part, flag=flag: setattr(part, "training", flag))  # type: ignore[misc]


# iterators that are nothing but a place in something; others draw from further iterators
_PLACES = (
    *map(type, (iter([]), iter(()), iter(""), iter(range(1)), iter(range(2**80)))),
    *(itertools.count, itertools.repeat),
)


def _twin_of(value: object) -> object:
    """A copy of an iterator, to be used up in its place; None for all else, and where it cannot be copied."""
    if type(value) not in _PLACES:
        return None
    with warnings.catch_warnings(), suppress(TypeError):
        warnings.simplefilter("ignore", DeprecationWarning)  # those of itertools cannot be copied from Python 3.14 on
        return copy.copy(value)
    return None


def _put_back(kind: type, kept: dict[str, Any]) -> None:
    """Give a class the attributes that it had."""
    now = vars(kind)
    for name in [name for name in now if not name.startswith("__") and name not in kept]:
        delattr(kind, name)
    for name, value in kept.items():
        if now.get(name) is not value:
            setattr(kind, name, value)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor is and where it lies in memory, where that can be said."""
    kind = (tensor.shape, tensor.dtype, tensor.device)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return kind
    return (*kind, tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride())


def _identities(values: dict[str, Any]) -> dict[str, int]:
    return {name: id(value) for name, value in values.items()}


def _as_leaf(tensor: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    """Free a tensor that had no history of one, as it has where a result with a gradient was written into it."""
    if tensor.grad_fn is not None:
        with suppress(RuntimeError):  # a view cannot be freed
            tensor.detach_()
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.is_leaf and tensor.grad is not gradient:
        tensor.grad = gradient


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one over memory of its own or of others."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type != "meta" and torch._C._has_storage(tensor)


def _cloned(tensor: Tensor) -> Tensor:
    """A copy, on the host where the device has no room for it."""
    try:
        return tensor.clone()
    except torch.OutOfMemoryError:
        return tensor.to("cpu", copy=True)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for `log` and `log_dict`."""


@contextmanager
def undisturbed(model: nn.Module, *, silent: bool = False, weights: bool = False) -> Iterator[None]:
    """Whatever runs inside, on exit the model and the random state are what they were, bit for bit.

    Restored: random state; buffers, tensors and other attributes of all modules (the same tensor objects in the same
    memory), with the lists, dicts, sets, arrays and objects among them, so the state of metrics too; training flags;
    `.grad` (None inside, and the same tensors afterwards) and `requires_grad` of every parameter; grad mode and
    autocast. Iterators over sequences are run on a copy, classes and files in memory are put back.
    Not restored: what belongs to the loop around the model (a trainer, an optimizer, a dataset), and what cannot be
    (a generator, other iterators, as that of a DataLoader, what was written to a file). Functions are left alone, too:
    what a hook of the user's notes down in a variable around it is often what it is there for.

    Args:
        model: Any module.
        silent: `log` and `log_dict` of a LightningModule do nothing inside.
        weights: Restore the values of parameters, too, which a forward pass may write: a teacher that follows its
            student, data-dependent initialisation, an embedding with max_norm. It takes a copy of them; shards of
            parameters are left out. Without it parameters are only in the same memory as before.

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
    memory = _Memory(model, weights)
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
