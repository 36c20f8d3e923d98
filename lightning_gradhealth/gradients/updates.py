"""Updates: what the optimizer's steps do to the weights at probed steps, by hooks on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.gradients.optimizers import bare, chain_of, takes_hooks
from lightning_gradhealth.gradients.rows import Pattern, Row
from lightning_gradhealth.gradients.weights import WeightProbe, WeightWatch
from lightning_gradhealth.layers import Layout
from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.norms import norms_or_zero
from lightning_gradhealth.sharding import Sharding, local

Places = Callable[[Pattern, torch.device], "Tensor | None"]


class _Open:
    """A probed step that is not over yet."""

    def __init__(self, optimizer: Any, row: Row, watch: WeightWatch, still_scaled: bool) -> None:
        self.groups = bare(optimizer).param_groups
        self.row, self.watch, self.still_scaled = row, watch, still_scaled

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now, at their places in the optimizer, which may have replaced them."""
        all_of_them = [parameter for group in self.groups for parameter in group["params"]]
        pattern = self.row.pattern
        if len(all_of_them) != len(pattern.owned):
            return self.watch.parameters
        place = {slot: number for number, slot in enumerate(pattern.owned)}
        return [all_of_them[place[slot]] for slot in pattern.slots]


class Updates:
    """Watches probed steps: weights before, and what the step did to them when it is over.

    Hooks are put on the optimizer and on what it wraps, and the last that is called counts. Of a wrapper that calls
    none, what it does after the step of the optimizer inside is measured at the next look.

    Args:
        layout: The slots.
        places: Places of the gradients among all owned parameters.

    Attributes:
        unmeasured: Why updates are not measured, by the name of the optimizer's class.

    Example:
        >>> Updates(Layout(torch.nn.Linear(1, 1)), lambda pattern, device: None).unmeasured
        {}
    """

    def __init__(self, layout: Layout, places: Places) -> None:
        self.unmeasured: dict[str, str] = {}
        self._layout = layout
        self._places = places
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._segments: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._open: dict[int, _Open] = {}
        self._late: dict[int, _Open] = {}  # the optimizer inside has stepped, its wrapper may go on
        self._depth: dict[int, int] = {}
        self._hooks: dict[int, list[Any]] = {}
        self._shardings: dict[int, Sharding | None] = {}

    def forget(self, number: int) -> None:
        """Before a step is observed: the step before it is over, if there was one."""
        self._settle(number)
        self._open.pop(number, None)

    def watch(self, optimizer: Any, row: Row, sharding: Sharding | None, *, still_scaled: bool) -> None:
        """Look at the weights now, and at what the step did to them when it is done."""
        number, slots = row.optimizer, [self._layout.slots[slot] for slot in row.pattern.slots]
        try:
            watch = WeightWatch(slots, self._indices, self._segments)
        except Exception as error:
            if sharding is not None:  # the other ranks would wait
                raise
            self._lose(optimizer, reason_of(error))
            return
        if sharding is None:
            row.probe = watch.probe
        self._shardings[number] = sharding
        self._open[number] = _Open(optimizer, row, watch, still_scaled)
        if number not in self._hooks:
            self._hook(number, optimizer)

    def _hook(self, number: int, optimizer: Any) -> None:
        chain = chain_of(optimizer)
        able = [each for each in chain if takes_hooks(each)]
        if not able:
            self._lose(chain[0], f"{type(chain[0]).__name__} takes no step hooks")
        late = bool(able) and not takes_hooks(chain[0])
        before, after = (functools.partial(hook, number) for hook in (self._before_step, self._after_step))
        self._hooks[number] = [
            handle
            for each in able
            for handle in (
                each.register_step_pre_hook(before),
                each.register_step_post_hook(functools.partial(after, late)),
            )
        ]

    def _lose(self, optimizer: Any, why: str) -> None:
        self.unmeasured.setdefault(type(optimizer).__name__, why)

    def _before_step(self, number: int, *_: Any) -> None:
        if not self._depth.get(number):
            self._settle(number)
        self._depth[number] = self._depth.get(number, 0) + 1

    @torch.no_grad()
    def _after_step(self, number: int, late: bool, optimizer: Any, *_: Any) -> None:
        """Close the probe of a step that has just been done; one more collective if it is sharded."""
        depth = self._depth[number] = max(0, self._depth.get(number, 0) - 1)
        done = self._open.get(number)
        if done is None:
            return
        try:
            self._close(done, optimizer, self._shardings[number])
        except Exception as error:  # a hook runs in the user's loop: nothing may come out of it
            done.row.applied = None
            self._lose(optimizer, reason_of(error))
        if depth:  # a step may call that of a base class, or of what it wraps: the outermost has the last word
            return
        del self._open[number]
        if late and self._shardings[number] is None:
            self._late[number] = done

    def _close(self, done: _Open, optimizer: Any, sharding: Sharding | None) -> None:
        row, watch = done.row, done.watch
        slots, flat = row.pattern.slots, self._layout.flat
        parameters = done.parameters()
        try:
            watch.close(parameters)
        except Exception as error:  # the monitor must never end a training
            watch.probe.updates = torch.full_like(watch.probe.sampled, torch.nan)
            self._lose(optimizer, f"{type(optimizer).__name__} changes parameters as it steps ({reason_of(error)})")
        there = all(p.grad is not None or slot in flat for p, slot in zip(watch.parameters, slots, strict=True))
        try:
            given = [None if p.grad is None else local(p.grad) for p in watch.parameters]
            applied = norms_or_zero(given, row.norms.device, exact=False)
        except Exception as error:
            applied, there = torch.full_like(row.norms, torch.nan), False
            self._lose(optimizer, reason_of(error))
        if sharding is not None:  # every rank sends as much, whatever it has
            *probe, applied = self._reduce(sharding, row, [*watch.probe.parts(), applied])
            row.probe = WeightProbe((1.0,) * len(parameters), *probe)
        row.applied = applied if there and not done.still_scaled else None

    @torch.no_grad()
    def _settle(self, number: int) -> None:
        """Measure once more what a wrapper without hooks has done, which is over by now."""
        done = self._late.pop(number, None)
        if done is None or done.watch.probe.updates is None:
            return
        known = done.watch.probe.updates
        try:
            done.watch.close(done.parameters())
        except Exception:
            done.watch.probe.updates = known  # told when the optimizer inside had stepped

    def settle(self) -> None:
        """Measure what is over by now, before it is read."""
        for number in list(self._late):
            self._settle(number)

    def let_go(self, alive: Collection[int]) -> None:
        """Forget the open probes of optimizers that are gone; these hold their parameters.

        Args:
            alive: The numbers of the others.
        """
        for number in self._open.keys() - set(alive):
            del self._open[number]

    def _reduce(self, sharding: Sharding, row: Row, parts: Sequence[Tensor]) -> list[Tensor]:
        """Norms of the whole from norms of this rank's parts of the parameters that have a gradient."""
        places = self._places(row.pattern, row.norms.device)
        if places is None:
            return list(sharding.reduce(*parts))
        blank = torch.zeros(len(row.pattern.owned), dtype=row.norms.dtype, device=row.norms.device)
        whole = sharding.reduce(*(blank.index_copy(0, places, part.to(blank.device)) for part in parts))
        return [vector.index_select(0, places) for vector in whole]

    def close(self) -> None:
        """Remove the hooks from the optimizers; calling it twice does no harm."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        for kept in (self._hooks, self._open, self._late):
            kept.clear()
