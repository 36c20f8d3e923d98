"""What has to be known of optimizers and loss scalers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.records import OptimizerStats
from lightning_gradhealth.validation import wrong

IDLE = 100  # rounds after which an optimizer that has not stepped is not waited for

_INSIDE = ("_optimizer", "optimizer", "base", "base_optimizer")  # Lightning and Fabric; Accelerate; Lookahead; SAM


def chain_of(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps, outermost first: each steps the same parameters as the one before.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> chain_of(optimizer) == [optimizer]
        True
    """
    chain = [optimizer]
    while (inner := _inside(chain[-1])) is not None and all(inner is not known for known in chain):
        chain.append(inner)
    return chain


def _inside(optimizer: Any) -> Any:
    """What a wrapper steps; None where it is none."""
    groups = _groups(optimizer)
    for name in _INSIDE:
        inner = _attribute(optimizer, name)
        own = None if inner is optimizer or isinstance(inner, type) else _groups(inner)
        if own is not None and (groups is None or own is groups or _ids(own) == _ids(groups)):
            return inner
    return None


def _attribute(owner: Any, name: str) -> Any:
    with contextlib.suppress(Exception):  # a property of somebody else's
        return getattr(owner, name)
    return None


def _groups(optimizer: Any) -> Sequence[Any] | None:
    groups = _attribute(optimizer, "param_groups")
    fits = isinstance(groups, Sequence) and all(isinstance(group, Mapping) and "params" in group for group in groups)
    return groups if fits else None


def _ids(groups: Sequence[Any]) -> set[int]:
    return {id(parameter) for group in groups for parameter in group["params"]}


def bare(optimizer: Any) -> Any:
    """The optimizer that a wrapper calls in the end: Lightning's, Fabric's, Accelerate's, Lookahead and the like.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> bare(optimizer) is optimizer
        True
    """
    return chain_of(optimizer)[-1]


def takes_hooks(optimizer: Any) -> bool:
    """Whether hooks on its step are called: one that has not called `Optimizer.__init__` has none, or calls none.

    Example:
        >>> import torch
        >>> takes_hooks(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)), takes_hooks(5)
        (True, False)
    """
    own = getattr(optimizer, "__dict__", {})  # a wrapper may hand out those of what it wraps
    called = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return "_optimizer_step_post_hooks" in own and bool(called)


def scaler_of(optimizer: Any, given: GradScaler | None) -> GradScaler | None:
    """The loss scaler: the one given, else the one that a wrapper (Accelerate's) keeps for itself."""
    if given is not None:
        return given
    own = (_attribute(each, "scaler") for each in chain_of(optimizer))
    return next((scaler for scaler in own if isinstance(scaler, GradScaler)), None)


def known_to(scaler: GradScaler, optimizer: Any) -> Any:
    """The optimizer of a chain that the scaler unscales: what is given, but for wrappers that call the scaler."""
    chain = chain_of(optimizer)
    while len(chain) > 1 and (
        _attribute(chain[0], "_optimizer") is chain[1] or _attribute(chain[0], "scaler") is scaler
    ):
        chain = chain[1:]
    return chain[0]


class Numbers:
    """Numbers optimizers in the order in which they were first met, and keeps none of them alive.

    Attributes:
        counts: Steps observed of each.

    Example:
        >>> import torch
        >>> numbers, weight = Numbers(), torch.nn.Parameter(torch.zeros(1))
        >>> first = torch.optim.SGD([weight], lr=0.1)
        >>> numbers.of(first), numbers.of(torch.optim.SGD([weight], lr=0.1)), numbers.of(first)
        (0, 1, 0)
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._known: list[Callable[[], Any]] = []
        self._round: set[int] = set()
        self._clock = -1
        self._last_seen: dict[int, int] = {}

    def of(self, optimizer: Any) -> int:
        """Number of an optimizer; a new one gets the next.

        Raises:
            TypeError: It is none.
        """
        inner = bare(optimizer)
        for number, known in enumerate(self._known):
            if known() is inner:
                return number
        check_optimizer(inner)
        self._known.append(_reference(inner))
        self.counts.extend([0] * (len(self._known) - len(self.counts)))
        return len(self._known) - 1

    def step(self, number: int) -> int:
        """Count a step of an optimizer, and return the x value: one more whenever an optimizer comes round again."""
        self.counts[number] += 1
        if self._clock < 0 or number in self._round:
            self._clock += 1
            self._round.clear()
        self._round.add(number)
        self._last_seen[number] = self._clock
        return self._clock

    def waited_for(self) -> list[int]:
        """Counts of the optimizers that have stepped and still may: others have not come round for very long."""
        return [
            count
            for number, count in enumerate(self.counts)
            if count and self._clock - self._last_seen.get(number, self._clock) <= IDLE
        ]

    def alive(self) -> list[tuple[int, Any]]:
        """The optimizers that still exist, with their numbers."""
        return [(number, each) for number, known in enumerate(self._known) if (each := known()) is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, as primitives."""
        return {"counts": list(self.counts), "clock": self._clock, "round": sorted(self._round)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.counts = list(state["counts"])
        self.counts.extend([0] * (len(self._known) - len(self.counts)))
        self._clock, self._round = state["clock"], set(state["round"])
        self._last_seen = dict.fromkeys(range(len(self.counts)), self._clock)


def _reference(optimizer: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(optimizer)
    except TypeError:  # some class of its own, with slots
        return lambda: optimizer


def check_optimizer(optimizer: Any) -> Optimizer:
    """Return an optimizer, or what has parameter groups as one has.

    Raises:
        TypeError: It has none.

    Example:
        >>> check_optimizer(5)
        Traceback (most recent call last):
        ...
        TypeError: optimizer must be a torch.optim.Optimizer, got 5; give the one that is about to step
    """
    if isinstance(optimizer, type) or _groups(optimizer) is None:
        raise TypeError(wrong("optimizer", "a torch.optim.Optimizer", optimizer, "give the one that is about to step"))
    return cast(Optimizer, optimizer)


def check_scaler(grad_scaler: Any) -> GradScaler | None:
    """Return a loss scaler, what behaves as one, or None.

    Raises:
        TypeError: It is none.

    Example:
        >>> check_scaler(True)
        Traceback (most recent call last):
        ...
        TypeError: grad_scaler must be a torch.amp.GradScaler or None, got True; leave it out where no loss is scaled
    """
    methods = ("is_enabled", "unscale_")
    has_all = all(callable(getattr(grad_scaler, name, None)) for name in methods)
    if grad_scaler is not None and (isinstance(grad_scaler, type) or not has_all):
        remedy = "leave it out where no loss is scaled"
        raise TypeError(wrong("grad_scaler", "a torch.amp.GradScaler or None", grad_scaler, remedy))
    return cast("GradScaler | None", grad_scaler)


def rate(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group, where it can be had without a host read."""
    return _plain(group.get("lr"))


def described(number: int, optimizer: Optimizer) -> tuple[OptimizerStats, tuple[float | None, ...]]:
    """What an optimizer is, and the weight decay of each of its groups, where they are plain numbers.

    Args:
        number: Its index.
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> described(0, torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01))
        (OptimizerStats(optimizer=0, name='SGD', momentum=0.9, scheduled=False), (0.01,))
    """
    groups = optimizer.param_groups
    momenta = [value for group in groups if (value := _plain(group.get("momentum"))) is not None]
    scheduled = any("initial_lr" in group for group in groups)  # what every schedule of torch leaves there
    stats = OptimizerStats(number, type(optimizer).__name__, max(momenta, default=None), scheduled)
    return stats, tuple(_plain(group.get("weight_decay")) for group in groups)


def _plain(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def still_scaled(optimizer: Any, scaler: GradScaler) -> bool:
    """Whether the scaler has not unscaled this optimizer's gradients yet, by whichever wrapper it knows it."""
    states = [scaler._per_optimizer_states[id(each)] for each in chain_of(optimizer)]
    return scaler._scale is not None and all(state["stage"].name == "READY" for state in states)


def unscaled(vector: Tensor, scaler: GradScaler) -> Tensor:
    """Divide by the loss scale, on the device."""
    assert scaler._scale is not None
    return vector / scaler._scale.to(vector.device, vector.dtype)
