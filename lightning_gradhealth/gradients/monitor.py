"""GradientMonitor: one device vector a step, kept on the device until it is asked for; and the clipping."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.gradients.acting import Clippers
from lightning_gradhealth.gradients.between import Changed, Gone
from lightning_gradhealth.gradients.clipping import Clipper, Gradients, summed_up
from lightning_gradhealth.gradients.decision import Clip, Decision, check_clip
from lightning_gradhealth.gradients.flags import flags_of, without_effect
from lightning_gradhealth.gradients.grouping import make_record
from lightning_gradhealth.gradients.optimizers import (
    Numbers,
    bare,
    check_scaler,
    described,
    known_to,
    rate,
    scaler_of,
    still_scaled,
    unscaled,
)
from lightning_gradhealth.gradients.rows import HostRow, Pattern, Row, rows_from_state, rows_to_state
from lightning_gradhealth.gradients.unstepped import UnsteppedWatch, sizes_of
from lightning_gradhealth.gradients.updates import Updates
from lightning_gradhealth.layers import LayersSpec, Layout
from lightning_gradhealth.merging import merged
from lightning_gradhealth.norms import norms, read_once
from lightning_gradhealth.records import StepRecord
from lightning_gradhealth.saving import Saver
from lightning_gradhealth.sharding import Sharding, local, sum_over_ranks
from lightning_gradhealth.validation import check_int, check_keys, wrong

CAPACITY = 1_024
_STEPS = 2**63  # what loggers can write

_SAVED = ("observed", "had_grad", "without_grad", "used", "clippers")


def check_step(step: int | None) -> int | None:
    """Return the x value of a step, or None.

    Raises:
        TypeError: It is no int.
        ValueError: It is below 0.

    Example:
        >>> check_step(3), check_step(None)
        (3, None)
    """
    if step is None:
        return None
    remedy = "leave it out to have the steps counted"
    step = check_int("step", step, 0, remedy)
    if step >= _STEPS:
        raise ValueError(wrong("step", "an int below 2^63", step, remedy))
    return step


class GradientMonitor:
    """Tracks the gradient norm of every layer, one device vector a step, read once at `flush`; and clips, if asked.

    Observe after backward and before `optimizer.step()`, then apply. Several optimizers are told apart; of each
    only its own parameters are looked at, and each has a clipper with statistics of its own. Where parameters are
    sharded (DTensor, FSDP1), all ranks observe together: one collective a step.

    Args:
        model: The model whose parameters are watched; parameters it gains later are found. Under FSDP1 the one
            that the wrapper returned.
        clip: "adaptive" (`WhenExploding()`), a clipper, or None: gradients are measured, never changed.
        layers: How parameters are grouped: "module" (a layer is a module that directly owns parameters),
            "parameter", a depth, or regexes on parameter names (the first group names the layer).

    Raises:
        TypeError: `clip` or `layers` is none of these.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> monitor = GradientMonitor(net)
        >>> net(torch.ones(2, 4)).sum().backward()
        >>> monitor.apply(monitor.observe(optimizer))
        >>> record = monitor.flush()
        >>> record.step, [layer.name for layer in record.layers]
        (0, ['0', '2'])
    """

    def __init__(self, model: nn.Module, clip: Clip = None, layers: LayersSpec = "module") -> None:
        self._saver = Saver()
        self.clippers = Clippers(check_clip(clip), self._saver)
        self.layout = Layout(model, layers)
        self.rows: deque[Row] = deque(maxlen=CAPACITY)
        self._model = model
        self._numbers = Numbers()
        self._described: dict[int, Any] = {}
        self._had_grad: set[int] = set()
        self._without_grad: dict[int, tuple[int, int]] = {}  # slot -> x value since when, steps for which
        self.changed = Changed()
        self.changed_since: dict[int, int] = {}  # optimizer -> x value since when its gradients come changed
        self.gone = Gone()
        self._patterns: dict[int, Pattern] = {}
        self._shardings: dict[int, Sharding | None] = {}
        self._positions: dict[Pattern, Tensor] = {}
        self.updates = Updates(self.layout, self._places)
        self._unstepped = UnsteppedWatch(self.layout)
        self._saw_backward = False
        self._carried: dict[int, Tensor | float] = {}  # by optimizer: norm of what is left of the gradient before

    # --- every step ---

    def index_of(self, optimizer: Optimizer) -> int:
        """Number of an optimizer, in the order in which they were first met; wrappers are looked through."""
        return self._numbers.of(optimizer)

    def steps_of(self, optimizer: Optimizer) -> int:
        """Steps observed of this optimizer so far."""
        return self._numbers.counts[self.index_of(optimizer)]

    def expects(self, wanted: Callable[[int], bool]) -> bool:
        """Whether the next step of any optimizer is wanted, by the number of those before; True before the first.

        One that has never stepped is not waited for: it may never do so; nor one that has not for very long.
        """
        counts = self._numbers.waited_for()
        return not counts or any(map(wanted, counts))

    @property
    def stepped(self) -> bool:
        """Whether any optimizer was seen to step."""
        return any(self._numbers.counts)

    @property
    def unseen(self) -> list[int]:
        """Numbers of the optimizers that are known, and of which no step was observed."""
        return [number for number, count in enumerate(self._numbers.counts) if not count]

    @property
    def sharded(self) -> bool:
        """Whether a rank holds only a part of any optimizer's parameters."""
        return any(sharding is not None for sharding in self._shardings.values())

    @torch.no_grad()
    def observe(
        self,
        optimizer: Optimizer,
        *,
        step: int | None = None,
        grad_scaler: GradScaler | None = None,
        exact: bool = True,
        probe: bool = False,
    ) -> Decision:
        """Measure the gradients of `optimizer`'s parameters, without reading anything on the host.

        Args:
            optimizer: The optimizer that is about to step.
            step: The loggers' x value; None counts from 0, one more whenever an optimizer comes round again.
            grad_scaler: The scaler of the loss; gradients it has not unscaled yet are measured as if it had, or,
                where they are to be clipped, unscaled by it now.
            exact: False allows large tensors on a CPU to be summed in float32 blocks.
            probe: Measure weights, updates and what clipping leaves too, over the step that follows.

        Raises:
            TypeError: `optimizer` or `grad_scaler` is none, or `step` is no int.
            ValueError: `step` is below 0.
        """
        given, optimizer = optimizer, bare(optimizer)
        grad_scaler, step = scaler_of(given, check_scaler(grad_scaler)), check_step(step)
        number = self.index_of(optimizer)
        count = self._numbers.step(number)
        step = count if step is None else step
        self.updates.forget(number)
        if number not in self._described:  # it may be gone when the step is read
            self._described[number] = described(number, optimizer)
        scaled = grad_scaler is not None and grad_scaler.is_enabled()
        if self.changed.before_step(optimizer):
            self.changed_since.setdefault(number, step)
        pattern, tensors = self._scan(optimizer, number, step)
        pending = grad_scaler is not None and scaled and bool(tensors) and still_scaled(given, grad_scaler)
        if grad_scaler is not None and pending and self.clippers.clip is not None:
            grad_scaler.unscale_(known_to(grad_scaler, given))
            pending = False
        vector, sums = self._measure(number, pattern, tensors, self.clippers.asking(number), exact=exact)
        scale = None
        if grad_scaler is not None and scaled and grad_scaler._scale is not None:
            scale = grad_scaler._scale.clone()
        if grad_scaler is not None and pending:
            vector = unscaled(vector, grad_scaler)
        rates = tuple(rate(group) for group in optimizer.param_groups)
        row = Row(step, number, pattern, rates, vector, scaled)
        decision = Decision(optimizer, self._gradients(number, pattern, tensors, vector, sums), row)
        decision.cut = self.clippers.decide(decision)
        if decision.cut is not None:
            row.cut = flags_of(decision.cut)
            if scaled:  # the scaler skips the step if one is not finite
                row.cut = without_effect(row.cut, ~decision.total_norm.isfinite())
        carried = self._carried.pop(number, None)
        row.scale, row.pending = scale, pending
        row.carried = carried if self._saw_backward else None
        self._saw_backward = False
        self.rows.append(row)
        if probe and pattern.slots:
            inside = pending and getattr(optimizer, "_step_supports_amp_scaling", False)  # fused: unscaled in the step
            self.updates.watch(given, row, self._shardings[number], still_scaled=inside)
        return decision

    def _scan(self, optimizer: Optimizer, number: int, step: int) -> tuple[Pattern, list[Tensor | None]]:
        """What an optimizer steps and which of it has a gradient, and the gradients."""
        owned: list[int] = []
        groups: list[int] = []
        slots: list[int] = []
        missing: list[int] = []
        gradients: list[Tensor | None] = []
        slot_of, flat = self.layout.slot_of, self.layout.flat
        for group_number, group in enumerate(optimizer.param_groups):
            parameters = group["params"]
            groups += [group_number] * len(parameters)
            for parameter in parameters:
                slot = slot_of.get(id(parameter))
                if slot is None:
                    slot = self._find_slot(parameter, f"optimizer{number}.{len(owned)}")
                owned.append(slot)
                gradient = parameter.grad
                if gradient is not None or slot in flat:  # of a flat shard this rank may hold nothing at all
                    slots.append(slot)
                    gradients.append(gradient)
                elif parameter.requires_grad and slot not in self._had_grad:
                    missing.append(slot)
        if missing:
            self._miss(number, step, missing, slots)
        pattern = Pattern(tuple(owned), tuple(groups), tuple(slots))
        known = self._patterns.get(number)
        if known != pattern:
            if known is None or known.owned != pattern.owned:
                self._shard(optimizer, number, pattern)
            self._patterns[number] = known = pattern
            self._had_grad.update(slots)
            for slot in slots:
                self._without_grad.pop(slot, None)
        if self.clippers.clip is not None:
            gradients = [summed_up(self.layout.slots[slot].parameter) for slot in slots]
        return known, gradients

    def _miss(self, number: int, step: int, missing: Sequence[int], present: Sequence[int]) -> None:
        """Count a step without gradient for parameters that have never had one, unless theirs is used up by then."""
        slots = self.layout.slots
        self.gone.look(number, step, [(slot, slots[slot]) for slot in missing], [slots[slot] for slot in present])
        for slot in missing:
            if slot in self.gone.slots:
                self._without_grad.pop(slot, None)
                continue
            since, count = self._without_grad.get(slot, (step, 0))
            self._without_grad[slot] = since, count + 1

    def _find_slot(self, parameter: nn.Parameter, fallback: str) -> int:
        """The slot of a parameter that the model has gained, or that only the optimizer knows."""
        self.layout.refresh()
        slot = self.layout.slot_of.get(id(parameter))
        return self.layout.adopt(parameter, fallback) if slot is None else slot

    def let_go(self) -> None:
        """Between two windows, forget parameters that neither the model nor an optimizer has any more.

        Not where they are sharded: there the strategy takes them out of the model for a while.
        """
        if self.sharded or self.layout.flat:
            return
        alive = self._numbers.alive()
        stepped = {id(parameter) for _, each in alive for group in each.param_groups for parameter in group["params"]}
        for slot in self.layout.let_go(stepped):
            self._had_grad.discard(slot)
            self._without_grad.pop(slot, None)
            self.gone.slots.pop(slot, None)
        self.updates.let_go({number for number, _ in alive})

    # --- over ranks ---

    def _shard(self, optimizer: Optimizer, number: int, pattern: Pattern) -> None:
        """Learn how an optimizer's parameters are split."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sharding = Sharding.of(self._model, parameters)
        self._shardings[number] = sharding
        if sharding is not None:
            self.layout.set_sizes(pattern.owned, sharding.numel)

    def _measure(
        self,
        number: int,
        pattern: Pattern,
        tensors: Sequence[Tensor | None],
        asking: Sequence[Clipper] = (),
        *,
        exact: bool,
    ) -> tuple[Tensor, dict[Clipper, Tensor]]:
        """Norms of the whole of gradients, and where this rank may hold a part the sums asked for: one collective."""
        mine = [None if tensor is None else local(tensor) for tensor in tensors]
        parts = norms([part for part in mine if part is not None], exact=exact)
        sharding = self._shardings[number]
        if sharding is None:
            return parts, {}
        by_slot = dict(zip(pattern.slots, zip(tensors, mine, strict=True), strict=True))
        owned, here = zip(*(by_slot.get(slot, (None, None)) for slot in pattern.owned), strict=True)
        wanted = [functools.partial(clipper.sums, here) for clipper in asking]
        whole, _, *sums = sharding.reduce_gradients(parts, owned, wanted)
        places = self._places(pattern, whole.device)
        whole = whole if places is None else whole.index_select(0, places)
        return whole, dict(zip(asking, sums, strict=True))

    def _places(self, pattern: Pattern, device: torch.device) -> Tensor | None:
        """Places of the gradients among all owned parameters; None where all have one."""
        if len(pattern.slots) == len(pattern.owned):
            return None
        if pattern not in self._positions:
            places = [pattern.owned.index(slot) for slot in pattern.slots]
            self._positions[pattern] = torch.tensor(places, dtype=torch.int64).to(device)
        return self._positions[pattern]

    def _gradients(
        self,
        number: int,
        pattern: Pattern,
        tensors: Sequence[Tensor | None],
        vector: Tensor,
        sums: dict[Clipper, Tensor],
    ) -> Gradients:
        slots = [self.layout.slots[slot] for slot in pattern.slots]
        if self._shardings[number] is None:
            return Gradients(slots, tensors, vector)

        def measure(copies: Sequence[Tensor | None]) -> Tensor:
            return self._measure(number, pattern, copies, exact=False)[0]

        def anywhere(flag: Tensor) -> Tensor:
            return sum_over_ranks(flag.to(vector.dtype)) > 0

        return Gradients(slots, tensors, vector, measure, anywhere, sums)

    # --- probes ---

    def note_carried(self) -> None:
        """At the beginning of a backward pass, see what is left in the gradients; the least of a step's passes counts.

        Where they were cleared before any of them, what follows is accumulated on purpose.
        """
        self._saw_backward = True  # after one that was not seen nothing is known: it may have begun with none
        for number, optimizer in self._numbers.alive():
            known = self._carried.get(number)
            if isinstance(known, float) or not self._numbers.counts[number]:
                continue
            left = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if not left:
                self._carried[number] = 0.0
                continue
            norm = torch.linalg.vector_norm(norms([local(gradient) for gradient in left], exact=False))
            self._carried[number] = norm if known is None else torch.minimum(known, norm)

    def look_for_unstepped(self, row: Row, leaves: Sequence[Any]) -> None:
        """Note of a step which parameters get a gradient that no optimizer uses; not where parameters are sharded.

        Args:
            row: That of the step.
            leaves: Those of the loss's graph, see `signals.ending`.
        """
        if not self.sharded and not self.layout.flat:
            entries = self._unstepped.look(
                [optimizer for _, optimizer in self._numbers.alive()], leaves, self._had_grad
            )
            row.unstepped = tuple((entry.name, entry.layer, entry.kind, entry.fix) for entry in entries)
            row.unstepped_norms = sizes_of(entries)

    # --- what was decided ---

    @torch.no_grad()
    def apply(self, decision: Decision) -> None:
        """Carry out what the clipper decided: change the gradients in place, on the device, or leave them alone."""
        self.clippers.apply(decision)

    def close(self) -> None:
        """Remove the hooks from the optimizers; calling it twice does no harm."""
        self.updates.close()
        self.changed.forget()

    # --- at the logging cadence ---

    def pending(self) -> list[Tensor]:
        """Every device vector that has not been read yet."""
        self.updates.settle()
        return [vector for row in self.rows for vector in row.vectors()]

    def records(self, values: Sequence[Sequence[float]]) -> list[StepRecord]:
        """Turn what `pending` held, read on the host, into one record a probed step and one for the rest.

        Args:
            values: The contents of `pending()`'s vectors, in order.
        """
        read = iter(values)
        rows = [row.on_host(read) for row in self.rows]
        windows: list[list[HostRow]] = [[]]
        for row in rows:
            before = windows[-1]
            step = before[-1].step if before else row.step
            if row.step != step and any(
                (known.row.probe or known.row.unstepped) and known.step == step for known in before
            ):
                windows.append([])
            windows[-1].append(row)
        full = [window for window in windows if window]
        # what is missing is known as of now: it belongs to the latest record only
        self._described.update({number: described(number, optimizer) for number, optimizer in self._numbers.alive()})
        return [
            make_record(self.layout, window, self._without_grad if window is full[-1] else {}, self._described)
            for window in full
        ]

    def flush(self) -> StepRecord:
        """Read everything since the last flush in one transfer, and start a new window.

        Returns:
            One record of all steps since the last flush, 1,024 at most; `StepRecord(step=-1)` where there was none.
        """
        records = self.records(read_once(self.pending()))
        self.rows.clear()
        self.let_go()
        return merged(records) if records else StepRecord(step=-1)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives and tensors, slots by name, clippers by the number of the optimizer."""
        names = [slot.name for slot in self.layout.slots]
        return {
            "observed": self._numbers.state_dict(),
            "had_grad": sorted(names[slot] for slot in self._had_grad),
            "without_grad": {names[slot]: list(entry) for slot, entry in self._without_grad.items()},
            "changed_since": dict(self.changed_since),
            "used": self.layout.used,
            "clippers": self.clippers.state_dict(),
            **rows_to_state(self.rows, names),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; parameters that the model no longer has are forgotten.

        Raises:
            TypeError: It is no dict.
            ValueError: It is not what `state_dict` returned.
        """
        check_keys("state", state, _SAVED)
        slot_of = {slot.name: i for i, slot in enumerate(self.layout.slots)}
        self._numbers.load_state_dict(state["observed"])
        self._had_grad = {slot_of[name] for name in state["had_grad"] if name in slot_of}
        self._without_grad = {
            slot_of[name]: (since, count) for name, (since, count) in state["without_grad"].items() if name in slot_of
        }
        self.changed_since = dict(state.get("changed_since", {}))
        self.layout.record_use(state["used"])
        self.clippers.load_state_dict(state["clippers"])
        self.rows = deque(rows_from_state(state, slot_of), maxlen=CAPACITY)
