"""GradientMonitor: one device vector a step, kept on the device until it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.gradients.grouping import make_record
from lightning_gradhealth.gradients.norms import norms, read_once
from lightning_gradhealth.gradients.rows import HostRow, Pattern, Row, rows_from_state, rows_to_state
from lightning_gradhealth.layers import LayersSpec, Layout
from lightning_gradhealth.records import StepRecord
from lightning_gradhealth.sharding import is_sharded

CAPACITY = 1_024


@dataclass
class Decision:
    """What is to be done with the gradients of one step; everything in it stays on the device.

    Attributes:
        optimizer: The optimizer that is about to step.
        norms: L2 norms of its gradients, one a parameter that has one, shape (n,), float64.
        coefficient: The factor that `apply` scales the gradients by, shape (); None: leave them alone.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer(torch.tensor([[3.0, 4.0]])).backward()
        >>> decision = GradientMonitor(layer).observe(torch.optim.SGD(layer.parameters(), lr=0.1))
        >>> decision.total_norm.item(), decision.action
        (5.0, 'ok')
    """

    optimizer: Optimizer
    norms: Tensor
    coefficient: Tensor | None = None

    @property
    def total_norm(self) -> Tensor:
        """L2 norm of all gradients together, shape (), float64, on the device."""
        norm: Tensor = torch.linalg.vector_norm(self.norms)
        return norm

    @property
    def action(self) -> str:
        """Either "ok" or "clip"; reading it waits for the device."""
        return "clip" if self.coefficient is not None and bool(self.coefficient < 1) else "ok"


class GradientMonitor:
    """Tracks the gradient norm of every layer, one device vector a step, read once at `flush`.

    Observe after backward and before `optimizer.step()`. Gradients are measured, never changed. Several
    optimizers are told apart; of each only its own parameters are looked at.

    Args:
        model: The model whose parameters are watched; parameters it gains later are found.
        layers: How parameters are grouped: "module" (a layer is a module that directly owns parameters),
            "parameter", a depth, or regexes on parameter names (the first group names the layer).

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

    def __init__(self, model: nn.Module, layers: LayersSpec = "module") -> None:
        self.layout = Layout(model, layers)
        self.rows: deque[Row] = deque(maxlen=CAPACITY)
        self._optimizers: list[Optimizer] = []
        self._observed: list[int] = []
        self._had_grad: set[int] = set()
        self._without_grad: dict[int, tuple[int, int]] = {}  # slot -> x value since when, steps for which
        self._patterns: dict[int, Pattern] = {}

    # --- every step ---

    def index_of(self, optimizer: Optimizer) -> int:
        """Number of an optimizer, in the order in which they were first met."""
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return index
        self._optimizers.append(optimizer)
        self._observed.extend([0] * (len(self._optimizers) - len(self._observed)))
        return len(self._optimizers) - 1

    def steps_of(self, optimizer: Optimizer) -> int:
        """Steps observed of this optimizer so far."""
        return self._observed[self.index_of(optimizer)]

    @torch.no_grad()
    def observe(
        self,
        optimizer: Optimizer,
        *,
        step: int | None = None,
        grad_scaler: GradScaler | None = None,
        exact: bool = True,
    ) -> Decision:
        """Measure the gradients of `optimizer`'s parameters, without reading anything on the host.

        Args:
            optimizer: The optimizer that is about to step.
            step: The loggers' x value; None counts from 0 the steps of the optimizer that stepped most.
            grad_scaler: The scaler of the loss; gradients it has not unscaled yet are measured as if it had.
            exact: False allows large tensors on a CPU to be summed in float32 blocks.

        Raises:
            RuntimeError: A parameter is only this rank's shard.
        """
        number = self.index_of(optimizer)
        self._observed[number] += 1
        if step is None:
            step = max(self._observed) - 1
        pattern, gradients = self._scan(optimizer, number, step)
        vector = norms(gradients, exact=exact)
        scaled = grad_scaler is not None and grad_scaler.is_enabled()
        if grad_scaler is not None and scaled and gradients:
            vector = _unscaled(vector, optimizer, grad_scaler)
        rates = tuple(_rate(group) for group in optimizer.param_groups)
        self.rows.append(Row(step, number, pattern, rates, vector, scaled))
        return Decision(optimizer, vector)

    def _scan(self, optimizer: Optimizer, number: int, step: int) -> tuple[Pattern, list[Tensor]]:
        """What an optimizer steps and which of it has a gradient, and the gradients."""
        owned: list[int] = []
        groups: list[int] = []
        slots: list[int] = []
        gradients: list[Tensor] = []
        slot_of = self.layout.slot_of
        for group_number, group in enumerate(optimizer.param_groups):
            parameters = group["params"]
            groups += [group_number] * len(parameters)
            for parameter in parameters:
                slot = slot_of.get(id(parameter))
                if slot is None:
                    slot = self._find_slot(parameter, f"optimizer{number}.{len(owned)}")
                owned.append(slot)
                gradient = parameter.grad
                if gradient is not None:
                    slots.append(slot)
                    gradients.append(gradient)
                elif parameter.requires_grad and slot not in self._had_grad:
                    since, count = self._without_grad.get(slot, (step, 0))
                    self._without_grad[slot] = since, count + 1
        pattern = Pattern(tuple(owned), tuple(groups), tuple(slots))
        known = self._patterns.get(number)
        if known == pattern:
            return known, gradients
        for watched in (self.layout.slots[slot] for slot in owned):
            if is_sharded(watched.parameter):
                raise RuntimeError(
                    f"{watched.name!r} is a shard of the whole; gradient norms under FSDP and tensor"
                    " parallelism are not supported yet: use DDP or a single device"
                )
        self._patterns[number] = pattern
        self._had_grad.update(slots)
        for slot in slots:
            self._without_grad.pop(slot, None)
        return pattern, gradients

    def _find_slot(self, parameter: nn.Parameter, fallback: str) -> int:
        """The slot of a parameter that the model has gained, or that only the optimizer knows."""
        self.layout.refresh()
        slot = self.layout.slot_of.get(id(parameter))
        return self.layout.adopt(parameter, fallback) if slot is None else slot

    @torch.no_grad()
    def apply(self, decision: Decision) -> None:
        """Carry out a decision: scale the gradients on the device, or leave them alone.

        Args:
            decision: What `observe` returned, possibly with a coefficient of your own.
        """
        if decision.coefficient is None:
            return
        for group in decision.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(decision.coefficient.to(parameter.grad.device))

    # --- at the logging cadence ---

    def pending(self) -> list[Tensor]:
        """Every device vector that has not been read yet."""
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
            if row.step != step and any(known.row.probe and known.step == step for known in before):
                windows.append([])
            windows[-1].append(row)
        full = [window for window in windows if window]
        # what is missing is known as of now: it belongs to the latest record only
        return [make_record(self.layout, window, self._without_grad if window is full[-1] else {}) for window in full]

    def flush(self) -> StepRecord:
        """Read everything since the last flush in one transfer, and start a new window.

        Returns:
            The record of the last step observed; `StepRecord(step=-1)` where there was none.
        """
        records = self.records(read_once(self.pending()))
        self.rows.clear()
        return records[-1] if records else StepRecord(step=-1)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives and tensors, slots by name."""
        names = [slot.name for slot in self.layout.slots]
        return {
            "observed": list(self._observed),
            "had_grad": sorted(names[slot] for slot in self._had_grad),
            "without_grad": {names[slot]: list(entry) for slot, entry in self._without_grad.items()},
            "used": self.layout.used,
            **rows_to_state(self.rows, names),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; parameters that the model no longer has are forgotten."""
        slot_of = {slot.name: i for i, slot in enumerate(self.layout.slots)}
        self._observed = list(state["observed"])
        self._observed.extend([0] * (len(self._optimizers) - len(self._observed)))
        self._had_grad = {slot_of[name] for name in state["had_grad"] if name in slot_of}
        self._without_grad = {
            slot_of[name]: (since, count) for name, (since, count) in state["without_grad"].items() if name in slot_of
        }
        self.layout.record_use(state["used"])
        self.rows = deque(rows_from_state(state, slot_of), maxlen=CAPACITY)


def _rate(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group, where it can be had without a host read."""
    rate = group.get("lr")
    return float(rate) if isinstance(rate, (int, float)) else None


def _unscaled(vector: Tensor, optimizer: Optimizer, scaler: GradScaler) -> Tensor:
    """Divide by the loss scale, on the device, unless the scaler has unscaled this optimizer's gradients."""
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    if stage.name != "READY" or scaler._scale is None:
        return vector
    return vector / scaler._scale.to(vector.device, vector.dtype)
