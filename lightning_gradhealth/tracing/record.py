"""Records the operations of one forward pass, below autograd, so that nothing a model does is hidden."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gradhealth.isolation import undisturbed
from lightning_gradhealth.layers import clean_name, is_compiled
from lightning_gradhealth.messages import where_and_why
from lightning_gradhealth.tracing.progress import tick

UNITS = (nn.RNNBase, nn.RNNCellBase)  # recorded as one event: what is inside is known better than read off


class Ref(NamedTuple):
    """Stands for a tensor among the arguments of an event."""

    value: int


@dataclass(frozen=True)
class Event:
    """One operation, or one recurrent module as a whole.

    Attributes:
        func: The operator; None for a recurrent module.
        args: Its arguments, with a `Ref` for every tensor.
        kwargs: The same by keyword.
        outputs: The values it returned, in order; an operation in place returns the value it has changed.
        writes: The values it changed in place.
        module: Path of the innermost module that ran it, "" for the model itself.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    writes: tuple[int, ...]
    module: str

    @cached_property
    def name(self) -> str:
        """The operator's name without overload and trailing underscore, as "add" for `aten.add_.Tensor`."""
        return "unit" if self.func is None else str(self.func.overloadpacket.__name__).rstrip("_")

    @cached_property
    def reads(self) -> list[int]:
        """The values among its arguments, in order."""
        return refs((self.args, self.kwargs))

    @cached_property
    def form(self) -> str:
        """Operator and arguments, equal for events that do the same to other values."""
        return repr((str(self.func), _formed(self.args), _formed(self.kwargs)))


@dataclass
class Trace:
    """What one forward pass did.

    Attributes:
        events: The operations in order.
        inputs: The values of the sample's tensors, with the tensors.
        outputs: The values that the model returned.
        parameters: The values that are parameters.
        constants: The values that were there before: buffers and tensors of the surroundings.
        shapes: Shape of every value.
        dtypes: What kind of numbers every value holds.
        base: For a view, the value whose memory it shares; otherwise the value itself.
        modules: The modules by path.
        by_class: For tensors on the meta device the values that their classes would give them, by identity.
        source: "fake", "real" or "meta": what tensors the pass ran on.
    """

    events: list[Event] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    by_class: dict[int, Tensor] = field(default_factory=dict)
    source: str = ""

    def holds_signal(self, value: int) -> bool:
        """Whether a value holds floating or complex numbers; others are indices and masks."""
        return self.dtypes[value].is_floating_point or self.dtypes[value].is_complex


def refs(tree: Any) -> list[int]:
    """The values in a tree of arguments, in order."""
    if isinstance(tree, Ref):
        return [tree.value]
    if type(tree) is dict:
        return refs(list(tree.values()))
    if isinstance(tree, (tuple, list)):
        return [value for part in tree for value in refs(part)]
    return []


def _formed(tree: Any) -> Any:
    """Arguments without the values that they refer to."""
    if isinstance(tree, Ref):
        return "tensor"
    if isinstance(tree, dict):
        return [(key, _formed(part)) for key, part in tree.items()]
    return [_formed(part) for part in tree] if isinstance(tree, (tuple, list)) else tree


_PRODUCTS = ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "convolution")

Observer = Callable[["Trace", list[Tensor], list[Tensor]], None]


class TraceError(ValueError):
    """The sample does not go through the model."""


def trace(model: nn.Module, example_inputs: Any, *, values: bool = True) -> Trace:
    """Run a model's forward once, in eval mode, and record every operation; it is left as it was, bit for bit.

    First on fake tensors, which have shapes but no values and take no time; where the forward needs values (an
    `if` on a number that it has computed), on the sample itself. A model on the meta device runs there.

    Args:
        model: The model.
        example_inputs: The sample: a tensor, a tuple of positional or a dict of keyword arguments of `forward`.
        values: Whether the sample itself may be run where fake tensors do not suffice.

    Returns:
        The recording.

    Raises:
        TraceError: The forward pass fails on the sample, too; the cause is attached.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> [event.name for event in trace(net, torch.zeros(2, 4)).events]
        ['t', 'addmm', 'relu']
    """
    args, kwargs = as_arguments(example_inputs)
    meta = any(parameter.is_meta for parameter in model.parameters())
    sources = ["meta"] if meta else ["fake", "real"] if values else ["fake"]
    attempts = [(source, grad) for source in sources for grad in (False, True)]  # True: autograd inside the forward
    for source, grad in attempts:
        # each by itself: what one has left of fake tensors (`weight.data = ...`) is none of the next one's business;
        # on fake tensors the few parameters that are written are copied when they are
        with undisturbed(model, silent=True, weights=source == "real"), _plainly(model), torch.set_grad_enabled(grad):
            model.eval()
            try:
                return _record(model, args, kwargs, source)
            except Exception as failure:  # whatever a forward may raise
                error = failure
    shown = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    hint = ""
    if isinstance(example_inputs, list):
        hint = "; it is a list, as a DataLoader gives: pass the inputs alone, such as batch[0]"
    elif meta and not all(parameter.is_meta for parameter in model.parameters()):
        hint = "; a part of the model is on the meta device, the rest is not: bring all of it to one place"
    elif meta:
        hint = "; on the meta device a forward cannot read values: make the plan with a model that holds its values"
    raise TraceError(
        f"example_inputs must go through model.forward, got tensors of the shapes {shown or 'none'}:"
        f" {where_and_why(error)}{hint}; pass a tensor, a tuple of positional or a dict of keyword arguments of forward"
    ) from error


def follow(model: nn.Module, example_inputs: Any, observe: Observer) -> None:
    """Run a model's forward on real tensors, in the mode that it is in, and let a function see every operation.

    Args:
        model: The model; what running it changes stays changed, see `isolation.undisturbed`.
        example_inputs: As for `trace`.
        observe: Called after every operation with the recording so far, the tensors that the operation gave, which
            it may change in place, and those that it read, in the order of the event's `reads`.

    Example:
        >>> names = []
        >>> with torch.no_grad():
        ...     follow(nn.ReLU(), torch.ones(2), lambda trace, outputs, given: names.append(trace.events[-1].name))
        >>> names
        ['relu']
    """
    args, kwargs = as_arguments(example_inputs)
    with _plainly(model):
        _record(model, args, kwargs, "real", observe)


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `forward`.

    Example:
        >>> as_arguments({"ids": 1}), as_arguments((1, 2)), as_arguments(1)
        (((), {'ids': 1}), ((1, 2), {}), ((1,), {}))
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return example_inputs, {}
    return (example_inputs,), {}


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Without the fused paths, compilers and warnings that hide or disturb what is to be seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if any(is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # in plain operations, the same on every device
        log = logging.getLogger("torch._subclasses.fake_tensor")  # what fails there is tried again on real tensors
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str, observe: Observer | None = None
) -> Trace:
    with ExitStack() as stack:
        sample = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        recorder = _Recorder(model, source, observe)
        if source == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

            stack.callback(recorder.restore)  # behind the mode, which would compute nothing
            recorder._fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            args, kwargs = tree_map_only(Tensor, recorder._fake.from_tensor, (args, kwargs))
        elif source == "meta":
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            stack.enter_context(torch.device("meta"))
        else:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        recorder.trace.inputs = {recorder.value(t): real for t, real in zip(given, sample, strict=True)}
        for handle in recorder.watch():
            stack.callback(handle.remove)
        with recorder:
            output = model(*args, **kwargs)
        leaves = tree_leaves(_opened(output))
        recorder.trace.outputs = [recorder.value(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        return recorder.trace


def _opened(output: Any, depth: int = 0) -> Any:
    """Containers that torch does not know (dataclasses, caches) as dicts, so that the tensors in them are found."""
    if isinstance(output, (Tensor, str, bytes, int, float, bool, type(None))) or depth > 4:
        return output
    if isinstance(output, Mapping):
        return [_opened(part, depth + 1) for part in output.values()]
    if isinstance(output, Sequence):
        return [_opened(part, depth + 1) for part in output]
    return [_opened(part, depth + 1) for part in getattr(output, "__dict__", {}).values()]


def _given(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The arguments that an operator may change or give views of, with what it was given for them."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            yield argument, args[position] if position < len(args) else kwargs.get(argument.name)


def _keeper(parameter: nn.Parameter) -> Callable[[], None]:
    """Puts a parameter's values back, and says that nothing was written."""
    with _disable_current_modes():
        version, alias = _unsafe_preserve_version_counter(parameter), parameter.data
        values = alias.clone()

    def restore() -> None:
        alias.copy_(values)
        version.__exit__()

    return restore


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, source: str, observe: Observer | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observe = observe
        self.trace = Trace(source=source)
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), clean_name(f"{path}.").rstrip("."))
            self.trace.modules.setdefault(self._paths[id(module)], module)
        self._running: list[nn.Module] = []
        self._stored: dict[int, list[nn.Parameter]] = {}  # by the address of their memory
        self._saved: dict[int, Callable[[], None]] = {}
        self._fake: Any = None  # the mode of fake tensors
        self._fakes: dict[int, tuple[nn.Parameter, Any]] = {}
        self._unit: Any = None  # what the recurrent module that runs was given
        for parameter in model.parameters():
            self.trace.parameters[self.value(parameter)] = parameter
            if source == "fake" and torch._C._has_storage(parameter) and parameter.numel():
                self._stored.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)

    def restore(self) -> None:
        """Put the parameters back that the forward pass has written: where nothing is fake, such a mode computes."""
        for undo in self._saved.values():
            undo()

    # --- modules ---

    def watch(self) -> list[Any]:
        """Follow which module runs."""
        handles: list[Any] = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        for module in self.trace.modules.values():
            if isinstance(module, UNITS):
                handles.append(module.register_forward_pre_hook(self._enter_unit, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave_unit))
        return handles

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    def _enter_unit(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # as a flat list: a packed sequence cannot be built of anything but tensors
        self._unit = tuple(self._referred(tree_leaves((args, kwargs))))

    def _leave_unit(self, module: nn.Module, args: Any, output: Any) -> None:
        given, self._unit = self._unit or (), None
        outputs = tuple(self.value(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        self.trace.events.append(Event(None, given, {}, outputs, (), self._paths[id(module)]))

    def _path(self) -> str:
        return next((self._paths[id(m)] for m in reversed(self._running) if id(m) in self._paths), "")

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._unit is not None:
            return func(*args, **kwargs)
        tick("recording operations", len(self.trace.events))
        given, named = self._referred(args), self._referred(kwargs)
        self._check_kinds(func, given)
        self._save(func, args, kwargs)
        writes, viewed = self._effects(func, args, kwargs)
        output = func(*(args if writes else self._faked(args, viewed is not None)), **kwargs)
        # a value that is written keeps its number; what is new gets one, and shares memory with what it is a view of
        outputs = tuple(self.value(leaf, viewed) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        self.trace.events.append(Event(func, given, named, outputs, writes, self._path()))
        if self._observe is not None:
            made, read = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (output, (args, kwargs)))
            self._observe(self.trace, made, read)
        return output

    def _faked(self, args: Any, views: bool) -> Any:
        """Fake weights for real ones, each made once: the mode would make them anew in every operation of a loop.

        Only where what comes out is fake anyway, or shows a whole matrix: of other parameters forward may read values.
        """
        if self._fake is None or not any(isinstance(arg, nn.Parameter) for arg in args):
            return args
        mixed = any(getattr(arg, "fake_mode", None) is self._fake for arg in args)
        return tuple(
            self._fake_of(arg) if isinstance(arg, nn.Parameter) and (mixed or (views and arg.dim() > 1)) else arg
            for arg in args
        )

    def _fake_of(self, parameter: nn.Parameter) -> Any:
        if id(parameter) not in self._fakes:
            self._fakes[id(parameter)] = parameter, self._fake.from_tensor(parameter)
        kept, fake = self._fakes[id(parameter)]
        return fake if kept is parameter and kept.shape == fake.shape else parameter

    def _check_kinds(self, func: Any, given: Any) -> None:
        """Raise where integers meet floating numbers in a product: without values torch lets them."""
        if self.trace.source != "real" and func.overloadpacket.__name__ in _PRODUCTS:
            kinds = {self.trace.holds_signal(value) for value in refs(given)}
            if len(kinds) > 1:
                raise TypeError(f"{func.overloadpacket.__name__} of integers and floating numbers")

    def _referred(self, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: Ref(self._met(tensor)), tree)

    def _met(self, tensor: Tensor) -> int:
        """The number of an argument; one that no event has made was there before."""
        new = tensor not in self._values
        number = self.value(tensor)
        if new:
            self.trace.constants[number] = tensor.detach() if tensor.requires_grad else tensor
        return number

    def value(self, tensor: Tensor, viewed: int | None = None) -> int:
        """The number of a tensor: a new one for a tensor that has not been met."""
        known = self._values.get(tensor)  # type: ignore[no-untyped-call]
        if known is not None:
            return int(known)
        number = len(self.trace.shapes)
        self._values[tensor] = number
        self.trace.shapes.append(tuple(tensor.shape))
        self.trace.dtypes.append(tensor.dtype)
        self.trace.base.append(number if viewed is None else self.trace.base[viewed])
        return number

    def _save(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keep what a parameter holds before it is written for the first time."""
        if not self._stored:
            return
        for argument, given in _given(func, args, kwargs):
            if argument.alias_info.is_write:
                for leaf in tree_leaves(given):
                    if isinstance(leaf, Tensor) and torch._C._has_storage(leaf):
                        for parameter in self._stored.get(leaf.untyped_storage().data_ptr(), ()):
                            if id(parameter) not in self._saved:
                                self._saved[id(parameter)] = _keeper(parameter)

    def _effects(self, func: Any, args: Any, kwargs: Any) -> tuple[tuple[int, ...], int | None]:
        """The values that an operator changes, and the one that its results are views of."""
        writes: list[int] = []
        viewed: int | None = None
        for argument, given in _given(func, args, kwargs):
            values = [self.value(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            if argument.alias_info.is_write:
                writes += values
            elif values:
                viewed = values[0]
        return tuple(writes), viewed
