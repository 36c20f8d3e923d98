"""A plan bound to a model: wherever it is materialised, `reset_parameters()` of its modules gives the plan's values.

Lightning, and torch's own recipe, turn a model on the meta device into a real one by `to_empty()` and then by
`reset_parameters()` of every module that owns parameters or buffers. Each such module gets one of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.stand_ins import among_stand_ins, own_reset, own_tensors, values_by_class
from lightning_gradhealth.layers import clean_name, unwrap
from lightning_gradhealth.sharding import fill, is_sharded, local

Filler = Callable[[Tensor], None]
Site = tuple[nn.Module, str]


def bind(model: nn.Module, fillers: Mapping[str, Filler], kept: Mapping[str, str]) -> None:
    """Let `reset_parameters()` of every module of `model` give the values of a plan, once there is memory for them.

    Nothing is written now. Call it before the strategy splits the model (afterwards is as good), and again to replace
    the plan. The weights come out as in one process: plain, split by FSDP2 or by tensor parallelism, tied.

    - What the plan leaves alone, and buffers, keep the value they have now, through `to_empty()` as well; on the meta
      device they have none, and get that of the class's own `reset_parameters` (or `_reset_parameters`), which is
      called on a copy that is not split, with random numbers that follow `torch.manual_seed` and the name.
    - What `load_state_dict` has loaded since is not overwritten. But only a checkpoint that was loaded by
      `assign=True` while parts of the model were still on the meta device outlives a `to_empty()`; do not call that
      on a model that holds its values. (`set_model_state_dict` hands over what the checkpoint lacks too, as it is now:
      call `reset_parameters()` before.)
    - Tied parameters, which `to_empty()` unties, are tied again, unless they are split.
    - A module whose class has a `reset_parameters` resets the modules below it too.

    A bound model can be copied, and pickled: the copy is bound as well, the pickle is to be bound again.

    Args:
        model: The model for which the plan was made.
        fillers: For each parameter that the plan sets, by its clean name (one of them, if it is tied): what fills a
            tensor, plain or a DTensor, of the parameter's shape.
        kept: For each other parameter: why the plan leaves it alone.

    Raises:
        ValueError: Parameters that the plan leaves alone, or buffers, are on the meta device, and the class of their
            module has no method that could give them a value; or a module is scripted. The model is then as it was.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(3, 2)
        >>> bind(model, {"weight": nn.init.ones_, "bias": nn.init.zeros_}, {})
        >>> model.to_empty(device="cpu").reset_parameters()
        >>> model.weight.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    model = unwrap(model)
    sites = _sites(model)
    pending = any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    _refuse_scripted(model)
    lost: list[str] = []
    plans = [
        _plan(path, module, sites, fillers, kept, pending, lost)
        for path, module in model.named_modules()
        if own_tensors(module) or hasattr(type(module), "reset_parameters")
    ]
    if lost:
        raise ValueError(
            f"model is on the meta device, where nothing has a value, and nobody can give one to {', '.join(lost)};"
            f" {_REMEDY}"
        )
    for plan in plans:
        reset = bound(plan["module"]) or Reset(plan["module"])
        vars(reset).update(plan)
    if _forget_loaded not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_forget_loaded)  # type: ignore[no-untyped-call]


def bound(module: nn.Module) -> Reset | None:
    """The `reset_parameters` that `bind` gave a module, if it did.

    Args:
        module: Any module.

    Example:
        >>> bound(nn.Linear(1, 1)) is None
        True
    """
    found = vars(module).get("reset_parameters")
    return found if isinstance(found, Reset) else None


class Reset:
    """The `reset_parameters` of one module of a bound model; `bind` makes it.

    Attributes:
        module: The module.
        names: The clean name of each of its own parameters and buffers, by its attribute.
        planned: What fills the parameters that the plan sets; None after unpickling.
        valueless: The parameters and buffers to which only the class can give a value.
        remembered: Values of the others that `to_empty()` would lose: the very memory, not a copy.
        ties: All places of the parameters that have several.
        loaded: What has come from a checkpoint.
        seed: Where the class's own random numbers come from.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> bind(layer, {"weight": nn.init.ones_, "bias": nn.init.zeros_}, {})
        >>> layer.reset_parameters is bound(layer)
        True
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names: dict[str, str] = {}
        self.planned: dict[str, Filler] | None = None
        self.valueless: set[str] = set()
        self.remembered: dict[str, Tensor] = {}
        self.ties: dict[str, tuple[Site, ...]] = {}
        self.loaded: set[str] = set()
        self.seed = 0
        self._arriving: dict[str, bool] = {}
        vars(module)["reset_parameters"] = self
        module.register_load_state_dict_pre_hook(self._before_load)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(self._after_load)  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        """Give the module, and those below it if its class has such a method, the values of the plan.

        Raises:
            RuntimeError: The model comes from a pickle, which does not hold the plan.
            ValueError: A parameter has been added since, or the class's own method leaves one without a value.
        """
        if among_stand_ins():
            return
        self._reset()
        if hasattr(type(self.module), "reset_parameters"):
            for module in self.module.modules():
                if module is not self.module and (reset := bound(module)) is not None:
                    reset._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reset:
        """A copy for the copied module; the plan is shared."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(
            {key: value if key == "planned" else deepcopy(value, memo) for key, value in vars(self).items()}
        )
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but the plan, which consists of functions, and what only serves until the model is materialised."""
        return {**vars(self), "planned": None, "remembered": {}}

    def _reset(self) -> None:
        """The module's own part."""
        if self.planned is None:
            raise RuntimeError(
                f"the plan of {type(self.module).__name__}.reset_parameters() was not pickled with the model; call"
                " plan_init(model, ...).bind() again, or load a checkpoint"
            )
        for sites in self.ties.values():
            _tie(sites)
        asked = []
        for attribute, tensor in own_tensors(self.module).items():
            if attribute not in self.names:
                raise ValueError(
                    f"{attribute!r} has come to a {type(self.module).__name__} after its plan was bound;"
                    " call plan_init(model, ...).bind() again"
                )
            if tensor.is_meta:
                continue  # to be called again, once there is memory
            if (value := self.remembered.pop(attribute, None)) is not None:
                _restore(tensor, value)
            elif not self._has_loaded(attribute, tensor):
                if attribute in self.planned:
                    self.planned[attribute](tensor)
                elif attribute in self.valueless:
                    asked.append(attribute)
        if asked:
            self._ask_class(asked)

    def _ask_class(self, attributes: Sequence[str]) -> None:
        """Give what the plan leaves alone the values of the class's own method, and nothing else."""
        targets = own_tensors(self.module)
        values = values_by_class(self.module, attributes, f"{self.seed}:{min(self.names.values())}")
        if empty := [self.names[attribute] for attribute in attributes if attribute not in values]:
            raise ValueError(
                f"{type(self.module).__name__}'s own reset_parameters() gives no value to"
                f" {', '.join(map(repr, empty))}; {_REMEDY}"
            )
        for attribute, value in values.items():
            fill(targets[attribute], value)

    def _has_loaded(self, attribute: str, tensor: Tensor) -> bool:
        """Whether the tensor came from a checkpoint, by this name or by another."""
        sites = self.ties.get(attribute, ((self.module, attribute),))
        return any(_was_loaded(site) and own_tensors(site[0]).get(site[1]) is tensor for site in sites)

    def _before_load(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        own = own_tensors(module).items()
        self._arriving = {attribute: tensor.is_meta for attribute, tensor in own if prefix + attribute in state_dict}

    def _after_load(self, module: nn.Module, _: object) -> None:
        own = own_tensors(module)
        for attribute, was_meta in self._arriving.items():
            tensor = own.get(attribute)
            if tensor is not None and not tensor.is_meta:  # else copying did nothing
                self.loaded.add(attribute)
                if was_meta:
                    self.remembered[attribute] = tensor.detach()
        self._arriving = {}


_REMEDY = (
    "let the class define reset_parameters(), make it on a real device (with torch.device('cpu'): ...) or, for a"
    " parameter, say what to do by overrides= or @register_initializer"
)


def _refuse_scripted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and own_tensors(module):
            raise ValueError(
                f"model contains the scripted module {path!r}, to which nothing can be bound; script it once it is"
                " materialised, or call init_weights then"
            )


def _sites(model: nn.Module) -> dict[int, list[tuple[str, Site]]]:
    """All places of each parameter, by its identity, with their clean names."""
    found: dict[int, list[tuple[str, Site]]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = path.rpartition(".")
        site = (model.get_submodule(owner), attribute)
        found.setdefault(id(parameter), []).append((clean_name(path), site))
    return found


def _plan(
    path: str,
    module: nn.Module,
    sites: Mapping[int, list[tuple[str, Site]]],
    fillers: Mapping[str, Filler],
    kept: Mapping[str, str],
    pending: bool,
    lost: list[str],
) -> dict[str, Any]:
    """What becomes the attributes of a module's `Reset`; what nobody can give a value is added to `lost`."""
    plan: dict[str, Any] = {"module": module, "seed": torch.initial_seed(), "names": {}, "planned": {}, "ties": {}}
    remembered = plan["remembered"] = {}
    valueless = plan["valueless"] = set()
    for attribute, tensor in own_tensors(module).items():
        name = plan["names"][attribute] = clean_name(f"{path}.{attribute}" if path else attribute)
        places = sites.get(id(tensor), [])
        names = [each for each, _ in places]
        filler = next((fillers[each] for each in names if each in fillers), None)
        if len({(id(owner), key) for _, (owner, key) in places}) > 1:
            plan["ties"][attribute] = tuple(site for _, site in places)
        if filler is not None:
            plan["planned"][attribute] = filler
        if not tensor.is_meta:
            if pending and (filler is None or _was_loaded((module, attribute))):
                remembered[attribute] = tensor.detach()
        elif filler is not None:
            continue
        elif own_reset(module) is not None:
            valueless.add(attribute)
        else:
            why = next(
                (kept[each] for each in names if kept.get(each)), "the plan leaves it alone" if names else "a buffer"
            )
            lost.append(f"{name!r} of {type(module).__name__} ({why})")
    return plan


def _was_loaded(site: Site) -> bool:
    module, attribute = site
    reset = bound(module)
    return reset is not None and attribute in reset.loaded


def _tie(sites: Sequence[Site]) -> None:
    """Let all places of a parameter hold the same one again, where each rank holds all of it."""
    now = [(site, parameter) for site in sites if (parameter := site[0]._parameters.get(site[1])) is not None]
    whole = [(site, parameter) for site, parameter in now if not is_sharded(parameter)]
    there = [(site, parameter) for site, parameter in whole if not parameter.is_meta]
    if not there:
        return
    _, first = next((each for each in there if _was_loaded(each[0])), there[0])
    for (module, attribute), parameter in whole:
        if parameter is not first:
            setattr(module, attribute, first)


def _restore(target: Tensor, value: Tensor) -> None:
    if is_sharded(value):  # remembered as this rank's part
        with torch.no_grad():
            local(target.detach()).copy_(local(value))
    else:
        fill(target, value)


def _forget_loaded(model: nn.Module, _: object) -> None:
    """After a checkpoint without which nothing waits for a `to_empty()`: hold on to no memory that may be replaced."""
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        return
    for module in model.modules():
        if (reset := bound(module)) is not None:
            reset.remembered.clear()
