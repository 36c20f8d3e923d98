"""Layers: how the parameters of a model are grouped, named and ordered.

A layer is, by default, a module that directly owns parameters. Vectors over parameters ("slots") stay in
registration order on every rank; the order of first use in the forward pass is a permutation for display and
for verdicts over depth.
"""

from __future__ import annotations

import functools
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_gradhealth.makeup import applied_by_hand, kind_of
from lightning_gradhealth.messages import say
from lightning_gradhealth.naming import class_of, name_of
from lightning_gradhealth.sharding import is_flat
from lightning_gradhealth.validation import check_int, check_regexes, likely_meant, wrong

LayersSpec = str | int | Sequence[str]

_GROUPINGS = ("module", "parameter")

_WRAPPERS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_orig_mod|_forward_module|_checkpoint_wrapped_module)\.")
_COPIES = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_PARAMETRIZED = re.compile(r"\.?parametrizations\..*$")


def clean_name(name: str) -> str:
    """Strip the prefixes that FSDP, torch.compile, strategies and activation checkpointing add.

    Example:
        >>> clean_name("_forward_module.net._orig_mod.0.weight")
        'net.0.weight'
    """
    return _WRAPPERS.sub("", name)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or Fabric's wrapper, else the model itself.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    while True:
        if isinstance(model, _COPIES):
            model = model.module
        elif isinstance(inner := getattr(model, "_forward_module", None), nn.Module):
            model = inner
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was applied to this very module (by any of its three ways).

    Example:
        >>> is_compiled(nn.Linear(1, 1))
        False
    """
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


@functools.cache
def _gone(axes: int) -> nn.Parameter:
    """What stands for every parameter that was let go: no element, with as many axes."""
    return nn.Parameter(torch.empty((0,) * axes, device="meta"), requires_grad=False)


def check_layers(layers: LayersSpec) -> LayersSpec:
    """Return `layers` if it is a valid grouping.

    Args:
        layers: "module", "parameter", a depth >= 1, a regex, or a sequence of regexes.

    Raises:
        ValueError: It is none of these.
        TypeError: Its type is not one of these.

    Example:
        >>> check_layers(0)
        Traceback (most recent call last):
        ...
        ValueError: layers as a depth must be an int >= 1, got 0; 1 groups by the model's children
    """
    kinds = '"module", "parameter", a depth or regexes'
    if isinstance(layers, (bool, bytes)) or not isinstance(layers, (str, numbers.Integral, Sequence)):
        raise TypeError(wrong("layers", kinds, layers, 'leave it out for "module"'))
    if isinstance(layers, numbers.Integral):
        return check_int("layers as a depth", layers, 1, "1 groups by the model's children")
    if layers in _GROUPINGS:
        return layers
    remedy = f"give {kinds} that match parameter names"
    patterns = check_regexes("layers", layers, remedy)
    if not patterns:
        raise ValueError(wrong("layers", "at least one regex", layers, remedy))
    if isinstance(layers, str) and (meant := likely_meant(layers, _GROUPINGS)):
        hint = f"did you mean {meant!r}? As a regex on parameter names, write '({layers}).*'"
        raise ValueError(wrong("layers", kinds, layers, hint))
    return layers


def check_model(argument: str, model: Any) -> nn.Module:
    """Return a model.

    Raises:
        TypeError: It is no module.

    Example:
        >>> check_model("model", 5)
        Traceback (most recent call last):
        ...
        TypeError: model must be a torch.nn.Module, got 5; give the model that is trained
    """
    if isinstance(model, nn.Module):
        return model
    is_class = isinstance(model, type) and issubclass(model, nn.Module)
    remedy = f"build it first: {model.__name__}(...)" if is_class else "give the model that is trained"
    raise TypeError(wrong(argument, "a torch.nn.Module", model, remedy))


def _group_of(parameter_name: str, owner: str, root: str, layers: LayersSpec) -> str:
    """Name of the layer that a parameter belongs to."""
    if layers == "module":
        return owner or root
    if layers == "parameter":
        return parameter_name
    if isinstance(layers, int):
        return ".".join(owner.split(".")[:layers]) or root
    for pattern in [layers] if isinstance(layers, str) else layers:
        if match := re.match(pattern, parameter_name):
            return next((group for group in match.groups() if group), match.group(0)) or root
    return owner or root


@dataclass(frozen=True)
class Slot:
    """One parameter of the model and where it belongs.

    Attributes:
        name: Clean parameter name.
        parameter: The parameter itself.
        layer: Index of its layer, in registration order.
        owner: Clean path of the module that owns it.
        is_bias: Its gradient is a batch sum of dL/d(output), so that it can stand in for the backward signal.
        is_embedding: Its rows are looked up, so that only touched rows move.
        kind: Class of the module that owns it, as its author wrote it.
        units: Its axes along which the layer's outputs lie, features or channels.
        groups: So many blocks of axis 0 feed outputs of their own, in a transposed convolution.
    """

    name: str
    parameter: nn.Parameter
    layer: int
    owner: str
    is_bias: bool
    is_embedding: bool
    kind: type[nn.Module] = nn.Module
    units: tuple[int, ...] = (0,)
    groups: int = 1


class Layout:
    """The parameters of a model as slots, and the layers that they form.

    Args:
        model: Any module; DDP's wrapper is looked through.
        layers: How to group, see `check_layers`.

    Attributes:
        names: The layers, in registration order.
        slots: The parameters, in registration order.
        members: For each layer, its slots.
        slot_of: Slot of each parameter, by its identity.
        sizes: Number of elements of each slot, over all ranks.
        flat: Slots that are flat shards of FSDP1, of which a rank may hold nothing.
        by_hand: Slots of matrices that modules apply by hand, see `applied_by_hand`.
        kinds: The kinds of all modules, each once, see `kind_of`.

    Example:
        >>> layout = Layout(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        >>> layout.names, [slot.name for slot in layout.slots]
        (['0', '2'], ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(self, model: nn.Module, layers: LayersSpec = "module") -> None:
        self.model = unwrap(check_model("model", model))
        self.layers = check_layers(layers)
        self.names: list[str] = []
        self.slots: list[Slot] = []
        self.members: list[list[int]] = []
        self.slot_of: dict[int, int] = {}
        self.sizes: list[int] = []
        self.flat: set[int] = set()
        self.by_hand: set[int] = set()
        self._number: dict[str, int] = {}
        self._used: list[str] = []
        self._layers: list[tuple[str, str]] = []
        self._layer_of: dict[str, str] = {}
        self._cancelled: frozenset[int] | None = None
        self.kinds: tuple[str, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Append slots for parameters that the model has gained; slots once given keep their places."""
        root = name_of(self.model)
        modules = dict(self.model.named_modules())
        self.kinds = tuple(sorted({kind for module in modules.values() if (kind := kind_of(class_of(module)))}))
        for path, module in modules.items():
            owner = _PARAMETRIZED.sub("", self._clean(f"{path}.")).rstrip(".")
            whose = modules.get(_PARAMETRIZED.sub("", path), module)
            by_hand = applied_by_hand(module)
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in self.slot_of:
                    name = self._clean(f"{path}.{key}" if path else key)
                    layer = _group_of(name, owner, root, self.layers)
                    table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and key == "weight"
                    if key in by_hand:
                        self.by_hand.add(len(self.slots))
                    self._add(name, parameter, layer, owner, whose, embedding=table and parameter.ndim == 2)
        for pattern in self._unmatched():
            say(f"gradhealth: layers: {pattern!r} matches no parameter name; its layers are grouped by module")

    def _clean(self, name: str) -> str:
        """A name without what is put around the model, as by `torch.compile(DistributedDataParallel(...))`."""
        wrapped = isinstance(getattr(self.model, "_orig_mod", None), _COPIES)
        return clean_name(name.removeprefix("_orig_mod.module.") if wrapped else name)

    def _unmatched(self) -> list[str]:
        """The regexes of `layers` that match nothing."""
        if isinstance(self.layers, int) or self.layers in ("module", "parameter"):
            return []
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        return [pattern for pattern in patterns if not any(re.match(pattern, slot.name) for slot in self.slots)]

    def adopt(self, parameter: nn.Parameter, name: str) -> int:
        """Give a slot to a parameter that an optimizer holds but the model does not."""
        self._add(name, parameter, name, "", None, embedding=False)
        return self.slot_of[id(parameter)]

    def let_go(self, stepped: Collection[int]) -> list[int]:
        """Forget parameters that the model no longer has, so that they need not stay in memory; their slots remain.

        Args:
            stepped: Identities of the parameters that optimizers hold, which are kept.

        Returns:
            The slots of those that were let go.
        """
        kept = {id(parameter) for parameter in self.model.parameters()}.union(stepped)
        gone = [number for number, slot in enumerate(self.slots) if self.slot_of.get(id(slot.parameter)) == number]
        gone = [number for number in gone if id(self.slots[number].parameter) not in kept]
        for number in gone:
            slot = self.slots[number]
            del self.slot_of[id(slot.parameter)]
            self.slots[number] = replace(slot, parameter=_gone(slot.parameter.ndim))
            self.sizes[number] = 0
        return gone

    def _add(
        self, name: str, parameter: nn.Parameter, layer: str, owner: str, module: nn.Module | None, embedding: bool
    ) -> None:
        if layer not in self._number:
            self._number[layer] = len(self.names)
            self.names.append(layer)
            self.members.append([])
        self.members[self._number[layer]].append(len(self.slots))
        is_bias = parameter.ndim == 1 and name.rpartition(".")[2].startswith(("bias", "in_proj_bias"))
        self.slot_of[id(parameter)] = len(self.slots)
        if is_flat(parameter) and parameter.requires_grad:
            self.flat.add(len(self.slots))
        self.sizes.append(parameter.numel())
        kind = nn.Module if module is None else class_of(module)
        units, groups = _units(module, name.rpartition(".")[2], parameter.ndim)
        self.slots.append(Slot(name, parameter, self._number[layer], owner, is_bias, embedding, kind, units, groups))
        self._cancelled = None

    def kind(self, layer: int) -> str:
        """What a layer is: the first kind of its modules that is no norm, or else a norm; "" where none is known."""
        kinds = [kind for slot in self.members[layer] if (kind := kind_of(self.slots[slot].kind))]
        return next((kind for kind in kinds if kind != "norm"), next(iter(kinds), ""))

    def layer_of(self, module: str) -> str:
        """The layer that the parameters of a module belong to, by the module's clean path; "" if it owns none."""
        if len(self._layers) != len(self.slots):
            root = name_of(self.model)
            self._layers = [(slot.owner or root, self.names[slot.layer]) for slot in self.slots]
            self._layer_of = dict(reversed(self._layers))
        return self._layer_of.get(module, "")

    def set_sizes(self, slots: Sequence[int], sizes: Sequence[int]) -> None:
        """Learn how large whole parameters are of which this rank holds a part."""
        for slot, size in zip(slots, sizes, strict=True):
            self.sizes[slot] = size

    # --- order of first use ---

    def record_use(self, owners: Sequence[str]) -> None:
        """Remember the modules of the first training batch, in the order in which they were used."""
        self._used = list(owners)
        self._cancelled = None

    @property
    def used(self) -> list[str]:
        """The modules in order of first use, as recorded; empty where it was not."""
        return self._used

    def order(self) -> list[int]:
        """Layer indices in order of first use; a layer that was never seen follows its predecessor."""
        rank = {owner: position for position, owner in enumerate(self._used)}
        first: dict[int, int] = {}
        latest = -1
        for slot in self.slots:
            if slot.owner in rank:
                latest = rank[slot.owner]
            position = rank.get(slot.owner, latest)
            first[slot.layer] = min(first.get(slot.layer, position), position)
        return sorted(range(len(self.names)), key=lambda layer: (first.get(layer, latest), layer))

    def signal_slots(self) -> list[int]:
        """Slots of the biases whose gradients can stand in for the backward signal."""
        cancelled = self.cancelled_slots()
        return [i for i, slot in enumerate(self.slots) if slot.is_bias and i not in cancelled]

    def cancelled_slots(self) -> frozenset[int]:
        """Slots of the biases that batch or instance normalisation subtracts again.

        Their gradients are zero but for rounding: they say nothing about the signal, and need not move.
        """
        if self._cancelled is None:
            modules = {self._clean(f"{path}.").rstrip("."): m for path, m in self.model.named_modules()}
            chain = self._used or [
                path for path, m in modules.items() if isinstance(m, _NormBase) or has_own_parameters(m)
            ]
            owners = {
                before
                for before, after in zip(chain, chain[1:], strict=False)
                if isinstance(modules.get(after), _NormBase) and not isinstance(modules.get(before), _NormBase)
            }
            self._cancelled = frozenset(i for i, s in enumerate(self.slots) if s.is_bias and s.owner in owners)
        return self._cancelled


def _units(module: nn.Module | None, key: str, ndim: int) -> tuple[tuple[int, ...], int]:
    """Axes of a parameter along which the outputs of its module lie, and the number of groups of its inputs."""
    if isinstance(module, _ConvTransposeNd) and ndim > 2:
        return (1,), module.groups
    declared = getattr(module, "gradhealth_axes", None)  # see init.Axes
    axes: Any = declared.get(key) if isinstance(declared, Mapping) else None
    if ndim < 2 or not all(hasattr(axes, name) for name in ("in_axes", "out_axes", "split")):
        return (0,), 1
    outs, ins = ((a,) if isinstance(a, int) else tuple(a) for a in (axes.out_axes, axes.in_axes))
    apart = () if axes.split is None or axes.split[0] % ndim in {a % ndim for a in ins} else (axes.split[0],)
    return tuple({axis % ndim for axis in (*outs, *apart)}), 1


def has_own_parameters(module: nn.Module) -> bool:
    """Whether a module owns parameters directly, parametrized ones included.

    Example:
        >>> has_own_parameters(nn.Sequential(nn.Linear(1, 1)))
        False
    """
    return bool(module._parameters) or hasattr(module, "parametrizations")


class _Note:
    """A forward hook that writes a name down once; a class, so that a model that carries it can be pickled."""

    def __init__(self, name: str, used: list[str]) -> None:
        self._name = name
        self._used = used

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self._name not in self._used:
            self._used.append(self._name)


class UseRecorder:
    """Records the order of first use of modules during the next forward pass, until it is closed.

    Args:
        model: The model.

    Attributes:
        used: The modules that own parameters, or normalise, in the order in which they were first used.
        complete: False where compiled or scripted modules hide what happens inside.

    Example:
        >>> net = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
        >>> recorder = UseRecorder(net)
        >>> _ = net["a"](net["b"](torch.zeros(1, 2)))
        >>> recorder.close(), recorder.used
        (None, ['b', 'a'])
    """

    def __init__(self, model: nn.Module) -> None:
        self.used: list[str] = []
        self.complete = True
        self._handles: list[Any] = []
        hidden: tuple[str, ...] = ()
        for path, module in unwrap(model).named_modules():
            if is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
                self.complete = False
                hidden += (path,)
            if any(path == top or path.startswith(f"{top}.") or not top for top in hidden):
                continue
            if has_own_parameters(module) or isinstance(module, _NormBase):
                note = _Note(clean_name(f"{path}.").rstrip("."), self.used)
                self._handles.append(module.register_forward_pre_hook(note))

    def close(self) -> None:
        """Remove the hooks; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
