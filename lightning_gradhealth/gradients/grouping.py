"""From slots to layers: rows of device vectors, and the record that a window of them makes.

Sums first, ratios last: squares are added over the slots of a layer, and the pure functions of `records` turn
them into ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_gradhealth.gradients.weights import WeightProbe
from lightning_gradhealth.layers import Layout, trainable
from lightning_gradhealth.records import (
    LayerStats,
    StepRecord,
    StepStats,
    fitted_gain,
    norm_ratios,
    root_mean_square,
)

Floats = NDArray[np.float64]


@dataclass
class Row:
    """One observed optimizer step; what was measured is still on the device.

    Attributes:
        step: The loggers' x value.
        optimizer: Its number.
        owned: Slots of all its parameters.
        groups: Number of the parameter group of each of them.
        rates: Learning rate of each group (None where it lives on the device).
        slots: Slots of the parameters that had a gradient.
        norms: Their gradient norms, shape (len(slots),).
        exact: The norms were accumulated in float64 throughout.
        scaled: A loss scaler is at work: it skips steps whose gradients overflow.
        loss: The training loss of the step.
        probe: Weights and updates, at probed steps.
    """

    step: int
    optimizer: int
    owned: tuple[int, ...]
    groups: tuple[int, ...]
    rates: tuple[float | None, ...]
    slots: tuple[int, ...]
    norms: Tensor
    exact: bool
    scaled: bool
    loss: Tensor | float | None = None
    probe: WeightProbe | None = None

    def vectors(self) -> list[Tensor]:
        """The device vectors to read, in the order in which `on_host` takes them back."""
        vectors = [self.norms]
        if isinstance(self.loss, Tensor):
            vectors.append(self.loss)
        return vectors + (self.probe.vectors() if self.probe else [])

    def on_host(self, values: Iterator[Sequence[float]]) -> HostRow:
        """Take this row's vectors from what was read."""
        norms = np.asarray(next(values), dtype=np.float64)
        loss = next(values)[0] if isinstance(self.loss, Tensor) else self.loss
        probe = [np.asarray(next(values)) for _ in self.probe.vectors()] if self.probe else []
        return HostRow(self, norms, loss, *probe)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the row as primitives and tensors, slots by name."""
        state = {**vars(self)}
        state["owned"] = [names[slot] for slot in self.owned]
        state["slots"] = [names[slot] for slot in self.slots]
        if self.probe is not None:
            state["probe"] = {**vars(self.probe), "slots": [names[slot] for slot in self.probe.slots]}
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any], slot_of: Mapping[str, int]) -> Row | None:
        """Rebuild a row; None where the model no longer has all of its parameters."""

        def slots(names: Sequence[str]) -> tuple[int, ...]:
            return tuple(slot_of[name] for name in names)

        try:
            probe = state["probe"]
            return cls(
                **{
                    **state,
                    "owned": slots(state["owned"]),
                    "slots": slots(state["slots"]),
                    "probe": WeightProbe(**{**probe, "slots": slots(probe["slots"])}) if probe else None,
                }
            )
        except KeyError:
            return None


@dataclass
class HostRow:
    """A row after the read: the same, as host numbers."""

    row: Row
    norms: Floats
    loss: float | None
    weights: Floats | None = None
    sampled: Floats | None = None
    updates: Floats | None = None

    @property
    def step(self) -> int:
        """The loggers' x value."""
        return self.row.step

    @property
    def probe(self) -> WeightProbe | None:
        """The probe of this step, if it was probed."""
        return self.row.probe

    def non_finite(self, following: HostRow | None) -> NDArray[np.bool_]:
        """Which of the norms stand for a NaN or Inf in the gradient.

        Overflow under a loss scaler is its everyday business, and the step is skipped: none is reported while
        the loss is finite. A norm in float32 blocks is Inf also where only the squares overflow: then the
        gradients of the next step are finite again.
        """
        bad = ~np.isfinite(self.norms)
        if self.row.scaled and (self.loss is None or math.isfinite(self.loss)):
            return np.zeros_like(bad)
        if not self.row.exact and following is not None and np.isfinite(following.norms).all():
            return np.isnan(self.norms)
        return bad

    @property
    def skipped_by_scaler(self) -> bool:
        """The loss scaler met an overflow."""
        return self.row.scaled and not bool(np.isfinite(self.norms).all())


def make_record(layout: Layout, rows: Sequence[HostRow], without_grad: Mapping[int, int]) -> StepRecord:
    """Make the record of a window.

    Args:
        layout: The slots and layers.
        rows: The steps of the window, at least one.
        without_grad: Slots that have never had a gradient, and the steps for which that is so.
    """
    layer_of = np.array([slot.layer for slot in layout.slots])
    count = len(layout.names)
    peak: Floats = np.zeros(count)
    bad = np.zeros(count, dtype=int)
    window: list[StepStats] = []
    for index, row in enumerate(rows):
        following = next((r for r in rows[index + 1 :] if r.row.optimizer == row.row.optimizer), None)
        slots, mask = np.array(row.row.slots, dtype=int), row.non_finite(following)
        hit = layer_of[slots]
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.bincount(hit, row.norms**2, count))
        peak = np.fmax(peak, np.where(np.isfinite(norms), norms, 0.0))
        bad += np.bincount(hit, mask, count) > 0
        rates = [rate for rate in row.row.rates if rate is not None]
        window.append(
            StepStats(
                step=row.step,
                optimizer=row.row.optimizer,
                total_norm=_total(row) if len(slots) and not row.skipped_by_scaler else None,
                loss=row.loss,
                non_finite=bool(mask.any()),
                learning_rate=max(rates, default=None),
            )
        )
    last = {row.row.optimizer: row for row in sorted(rows, key=lambda row: not row.skipped_by_scaler)}
    probes = {row.row.optimizer: row for row in rows if row.probe is not None}
    layers: dict[int, LayerStats] = {}
    gains: list[float | None] = []
    for number, row in last.items():
        own = _layers_of(layout, row, probes.get(number), without_grad, peak, bad)
        layers |= own
        gains.append(fitted_gain([s.bias_grad_rms for s in own.values() if s.bias_grad_rms is not None]))
    totals = [_total(row) for row in last.values() if len(row.norms) and not row.skipped_by_scaler]
    finite = [s.total_norm for s in window if s.total_norm is not None and math.isfinite(s.total_norm)]
    return StepRecord(
        step=rows[-1].step,
        total_norm=math.hypot(*totals) if totals else None,
        total_norm_max=max(finite, default=None),
        layers=tuple(layers.get(layer) or _idle(layout, layer) for layer in layout.order()),
        window=tuple(window),
        probed=bool(probes),
        backward_gain=max((g for g in gains if g is not None), key=_distance_from_one, default=None),
    )


def _total(row: HostRow) -> float:
    return float(np.sqrt(np.sum(row.norms**2)))


def _distance_from_one(gain: float) -> float:
    return abs(math.log(gain)) if 0.0 < gain < math.inf else math.inf


def _layers_of(
    layout: Layout,
    row: HostRow,
    probed: HostRow | None,
    without_grad: Mapping[int, int],
    peak: Floats,
    bad: NDArray[np.int_],
) -> dict[int, LayerStats]:
    """The layers of one optimizer at its last step, in order of first use."""
    own = _Grouped(layout, row)
    weights = own.weight_ratios(probed) if probed else {}
    mine = [layer for layer in layout.order() if own.owned[layer]]
    ratios = norm_ratios([own.rms(layer) for layer in mine])
    layers = {}
    for layer, ratio in zip(mine, ratios, strict=True):
        missing = [slot for slot in own.owned[layer] if slot in without_grad]
        layers[layer] = LayerStats(
            name=layout.names[layer],
            numel=own.numel(layer),
            grad_norm=own.norm(layer),
            grad_norm_max=float(peak[layer]) if own.present[layer] else None,
            norm_ratio=ratio,
            non_finite=int(bad[layer]),
            bias_grad_rms=own.bias_rms(layer),
            learning_rate=max((rate for rate in own.rates[layer] if rate is not None), default=None),
            frozen=not trainable(layout.slots[slot].parameter for slot in own.owned[layer]),
            without_grad=tuple(layout.slots[slot].name for slot in missing),
            steps_without_grad=max((without_grad[slot] for slot in missing), default=0),
            optimizer=row.row.optimizer,
            **weights.get(layer, {}),
        )
    return layers


def _idle(layout: Layout, layer: int) -> LayerStats:
    """A layer that no optimizer stepped in the window."""
    parameters = [layout.slots[slot].parameter for slot in layout.members[layer]]
    return LayerStats(layout.names[layer], numel=sum(p.numel() for p in parameters), frozen=not trainable(parameters))


class _Grouped:
    """The slots of one optimizer's last step, by layer."""

    def __init__(self, layout: Layout, row: HostRow) -> None:
        self._layout = layout
        self._value = dict(zip(row.row.slots, row.norms.tolist(), strict=True))
        self._signal = set(layout.signal_slots())
        self.owned: list[list[int]] = [[] for _ in layout.names]
        self.rates: list[list[float | None]] = [[] for _ in layout.names]
        for slot, group in zip(row.row.owned, row.row.groups, strict=True):
            self.owned[layout.slots[slot].layer].append(slot)
            self.rates[layout.slots[slot].layer].append(row.row.rates[group])
        self.present = [[slot for slot in slots if slot in self._value] for slots in self.owned]

    def numel(self, layer: int) -> int:
        slots = self.present[layer] or self.owned[layer]
        return sum(self._layout.slots[slot].parameter.numel() for slot in slots)

    def norm(self, layer: int) -> float | None:
        slots = self.present[layer]
        return math.hypot(*(self._value[slot] for slot in slots)) if slots else None

    def rms(self, layer: int) -> float | None:
        norm = self.norm(layer)
        return None if norm is None else root_mean_square(norm, self.numel(layer))

    def bias_rms(self, layer: int) -> float | None:
        slots = [slot for slot in self.present[layer] if slot in self._signal]
        numel = sum(self._layout.slots[slot].parameter.numel() for slot in slots)
        return root_mean_square(math.hypot(*(self._value[s] for s in slots)), numel) if slots else None

    def weight_ratios(self, probed: HostRow) -> dict[int, dict[str, float | None]]:
        """weight_norm, grad_to_weight and update_to_weight of every layer that was probed."""
        probe, result = probed.probe, {}
        if probe is None or probed.weights is None or probed.sampled is None:
            return {}
        scale = np.asarray(probe.scale)
        change = np.full(len(scale), np.nan) if probed.updates is None else probed.updates
        squares = (probed.weights**2, scale * probed.sampled**2, scale * change**2)
        layer_of = np.array([self._layout.slots[slot].layer for slot in probe.slots], dtype=int)
        weights, samples, updates = (
            np.sqrt(np.bincount(layer_of, column, len(self.owned))).tolist() for column in squares
        )
        gradients = dict(zip(probed.row.slots, probed.norms.tolist(), strict=True))
        for layer in set(layer_of.tolist()):
            gradient = math.hypot(*(gradients[slot] for slot in self.owned[layer] if slot in gradients))
            weight, sample, update = weights[layer], samples[layer], updates[layer]
            result[layer] = {
                "weight_norm": weight,
                "grad_to_weight": gradient / weight if weight else None,
                "update_to_weight": update / sample if sample and not math.isnan(update) else None,
            }
        return result


__all__ = ["HostRow", "Row", "make_record"]
