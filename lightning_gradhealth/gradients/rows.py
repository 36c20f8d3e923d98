"""Rows: what was measured of one optimizer step, on the device, on the host, and in a checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gradhealth.gradients.weights import WeightProbe

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pattern:
    """Which parameters an optimizer steps, and which of them have a gradient; the same for most steps.

    Attributes:
        owned: Slots of all its parameters.
        groups: Number of the parameter group of each of them.
        slots: Slots of the parameters that have a gradient.
    """

    owned: tuple[int, ...]
    groups: tuple[int, ...]
    slots: tuple[int, ...]

    @functools.cached_property
    def arrays(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """The same as index arrays."""
        owned, groups, slots = (np.array(part, dtype=np.intp) for part in (self.owned, self.groups, self.slots))
        return owned, groups, slots


@dataclass
class Row:
    """One observed optimizer step; what was measured is still on the device.

    Attributes:
        step: The loggers' x value.
        optimizer: Its number.
        pattern: Its parameters.
        rates: Learning rate of each parameter group (None where it lives on the device).
        norms: Gradient norms, one for each of the pattern's slots, before any clipping.
        scaled: A loss scaler is at work: it skips steps whose gradients overflow.
        loss: The training loss of the step.
        cut: What a clipper decided, shape (len(FLAGS),), see flags.py.
        skip: Whether the step was skipped, shape () or a bool; None where nothing skips.
        applied: The norms that the optimizer was given, after all clipping, at probed steps.
        probe: Weights and updates, at probed steps.
        origin: Where a NaN or Inf came from, in words, where that was looked into.
        origin_unknown: Why that was not found out.
        unstepped: Parameters that no optimizer steps: name, layer, kind and fix of each, see `Unstepped`.
        unstepped_norms: Their norms.
        squashed: See `SquashedLogits`, as a dict; empty: nothing is.
        carried: Norm of what was left in the gradients before the backward pass; None: not measured.
        scale: The loss scale, shape (), where a loss scaler is at work.
        pending: The gradients were still multiplied by it when they were observed.
    """

    step: int
    optimizer: int
    pattern: Pattern
    rates: tuple[float | None, ...]
    norms: Tensor
    scaled: bool
    loss: Tensor | float | None = None
    cut: Tensor | None = None
    skip: Tensor | bool | None = None
    applied: Tensor | None = None
    probe: WeightProbe | None = None
    origin: str = ""
    origin_unknown: str = ""
    unstepped: tuple[tuple[str, str, str, str], ...] = ()
    unstepped_norms: Tensor | None = None
    squashed: dict[str, Any] = field(default_factory=dict)
    carried: Tensor | float | None = None
    scale: Tensor | None = None
    pending: bool = False

    def vectors(self) -> list[Tensor]:
        """The device vectors to read, in the order in which `on_host` takes them back."""
        singles = (
            self.norms,
            self.loss,
            self.cut,
            self.skip,
            self.applied,
            self.unstepped_norms,
            self.carried,
            self.scale,
        )
        vectors = [v for v in singles if isinstance(v, Tensor)]
        return vectors + (self.probe.vectors() if self.probe else [])

    def on_host(self, values: Iterator[Sequence[float]]) -> HostRow:
        """Take this row's vectors from what was read."""

        def read(vector: Any) -> Floats | None:
            return np.asarray(next(values), dtype=np.float64) if isinstance(vector, Tensor) else None

        def number(value: Tensor | float | None) -> float | None:
            return next(values)[0] if isinstance(value, Tensor) else value

        norms = np.asarray(next(values), dtype=np.float64)
        loss, cut, skip, applied = number(self.loss), read(self.cut), number(self.skip), read(self.applied)
        unstepped, carried, scale = read(self.unstepped_norms), number(self.carried), number(self.scale)
        probe = [np.asarray(next(values)) for _ in self.probe.vectors()] if self.probe else []
        return HostRow(self, norms, loss, cut, bool(skip), applied, unstepped, carried, scale, *probe)


@dataclass
class HostRow:
    """A row after the read: the same, as host numbers."""

    row: Row
    norms: Floats
    loss: float | None
    cut: Floats | None = None
    skipped: bool = False
    applied: Floats | None = None
    unstepped: Floats | None = None
    carried: float | None = None
    scale: float | None = None
    weights: Floats | None = None
    sampled: Floats | None = None
    updates: Floats | None = None

    @property
    def step(self) -> int:
        """The loggers' x value."""
        return self.row.step

    @functools.cached_property
    def overflow(self) -> bool:
        """The loss scaler met an overflow while the loss was finite, so that it skips the step."""
        finite_loss = self.loss is None or math.isfinite(self.loss)
        return self.row.scaled and finite_loss and not bool(np.isfinite(self.norms).all())

    @functools.cached_property
    def total_norm(self) -> float | None:
        """L2 norm of all gradients; None where there is none, or the scaler skips the step."""
        return None if self.overflow or not len(self.norms) else float(np.sqrt(np.sum(self.norms**2)))

    @functools.cached_property
    def applied_norm(self) -> float | None:
        """L2 norm of all that the optimizer was given; None where it was not measured, or the step was skipped."""
        if self.applied is None or self.overflow or self.skipped or not len(self.applied):
            return None
        return float(np.sqrt(np.sum(self.applied**2)))


def rows_to_state(rows: Iterable[Row], names: Sequence[str]) -> dict[str, Any]:
    """Return rows as primitives and tensors, slots by name, each pattern once."""
    patterns: dict[Pattern, int] = {}
    states = []
    for row in rows:
        number = patterns.setdefault(row.pattern, len(patterns))
        probe = None if row.probe is None else dict(vars(row.probe))
        states.append({**vars(row), "pattern": number, "probe": probe})
    return {
        "rows": states,
        "patterns": [
            {"owned": [names[i] for i in p.owned], "groups": p.groups, "slots": [names[i] for i in p.slots]}
            for p in patterns
        ],
    }


def rows_from_state(state: Mapping[str, Any], slot_of: Mapping[str, int]) -> list[Row]:
    """Rebuild rows; those whose parameters the model no longer has are left out."""
    patterns: list[Pattern | None] = []
    for saved in state["patterns"]:
        known = all(name in slot_of for name in saved["owned"])
        owned, slots = (tuple(slot_of[name] for name in saved[part] if known) for part in ("owned", "slots"))
        patterns.append(Pattern(owned, tuple(saved["groups"]), slots) if known else None)
    rows = []
    for saved in state["rows"]:
        if (pattern := patterns[saved["pattern"]]) is not None:
            if saved["norms"].shape != (len(pattern.slots),):
                raise ValueError(f"{tuple(saved['norms'].shape)} norms for {len(pattern.slots)} gradients")
            probe = WeightProbe(**saved["probe"]) if saved["probe"] else None
            rows.append(Row(**{**saved, "pattern": pattern, "probe": probe}))
    return rows
