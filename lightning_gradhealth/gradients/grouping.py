"""From slots to layers: the record that a window of rows makes.

Sums first, ratios last: squares are added over the slots of a layer, whichever optimizer steps them, and the
pure functions of `records` turn the sums into ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.flows import Matrix
from lightning_gradhealth.gradients.flags import FLAGS
from lightning_gradhealth.gradients.rows import Floats, HostRow
from lightning_gradhealth.layers import Layout
from lightning_gradhealth.merging import last_norm
from lightning_gradhealth.ratios import fitted_gain, norm_ratios
from lightning_gradhealth.records import LayerStats, OptimizerStats, SquashedLogits, StepRecord, StepStats, Unstepped

Missing = Mapping[int, tuple[int, int]]


Groups = Mapping[int, tuple[OptimizerStats, tuple[float | None, ...]]]


def make_record(layout: Layout, rows: Sequence[HostRow], missing: Missing, groups: Groups) -> StepRecord:
    """Make the record of a window.

    Args:
        layout: The slots and layers.
        rows: The steps of the window, at least one.
        missing: Slots that have never had a gradient: the x value since when, and the steps for which.
        groups: By optimizer, what it is, and the weight decay of each parameter group.
    """
    table = _Table(layout)
    for row in rows:
        table.add(row)
        table.decay_of(row, groups.get(row.row.optimizer, (None, ()))[1])
    layers = _layers(layout, table, missing)
    window = tuple(_step(row) for row in rows)
    finite = [s.total_norm for s in window if s.total_norm is not None and math.isfinite(s.total_norm)]
    chains: dict[int, list[float]] = {}
    for layer in layers:
        if layer.optimizer is not None and layer.bias_grad_rms is not None:
            chains.setdefault(layer.optimizer, []).append(layer.bias_grad_rms)
    gains = [gain for chain in chains.values() if (gain := fitted_gain(chain)) is not None]
    return StepRecord(
        step=rows[-1].step,
        total_norm=last_norm(window, "total_norm"),
        total_norm_max=max(finite, default=None),
        applied_norm=last_norm(window, "applied_norm"),
        clip_coefficient=min((s.clip_coefficient for s in window if s.clip_coefficient is not None), default=None),
        layers=layers,
        window=window,
        probed=any(row.row.probe is not None for row in rows),
        backward_gain=max(gains, key=_distance_from_one, default=None),
        unstepped=_unstepped(rows),
        squashed=next((SquashedLogits(**row.row.squashed) for row in rows if row.row.squashed), None),
        carried=max((step.carried for step in window if step.carried is not None), default=None),
        optimizers=tuple(stats for _, (stats, _) in sorted(groups.items())),
        kinds=layout.kinds,
    )


def _unstepped(rows: Sequence[HostRow]) -> tuple[Unstepped, ...]:
    """The parameters that no optimizer steps, each as it was seen last."""
    found = {}
    for row in rows:
        for entry, norm in zip(row.row.unstepped, [] if row.unstepped is None else row.unstepped, strict=False):
            name, layer, kind, fix = entry
            found[name, kind] = Unstepped(name, layer, kind, float(norm), fix)
    return tuple(found.values())


def _carried(row: HostRow) -> float | None:
    """The share of what was left of the gradient before in that of a step; None where it was not measured."""
    if row.carried is None or not row.total_norm or not math.isfinite(row.total_norm):
        return None
    return row.carried / row.total_norm


def _distance_from_one(gain: float) -> float:
    return abs(math.log(gain)) if 0.0 < gain < math.inf else math.inf


def _flag(value: float | None) -> bool | None:
    return None if value is None else bool(value)


def _step(row: HostRow) -> StepStats:
    values = [math.nan] * len(FLAGS) if row.cut is None else [float(value) for value in row.cut]
    flags = {name: None if math.isnan(value) else value for name, value in zip(FLAGS, values, strict=True)}
    return StepStats(
        step=row.step,
        optimizer=row.row.optimizer,
        total_norm=row.total_norm,
        loss=row.loss,
        non_finite=not row.overflow and not bool(np.isfinite(row.norms).all()),
        overflow=row.overflow,
        scaled=row.row.scaled,
        learning_rate=max((rate for rate in row.row.rates if rate is not None), default=None),
        skipped=None if row.row.skip is None else row.skipped,
        origin=row.row.origin,
        origin_unknown=row.row.origin_unknown,
        clip_coefficient=flags["coefficient"],
        clipped=_flag(flags["clipped"]),
        armed=_flag(flags["armed"]),
        acted=_flag(flags["acted"]),
        outbreak=_flag(flags["outbreak"]),
        would_clip=flags["would"],
        refused=bool(flags["refused"]),
        applied_norm=row.applied_norm,
        loss_scale=row.scale,
        carried=_carried(row),
        unscaled=None if row.scale is None else not row.row.pending,
    )


class _Table:
    """What is known of every slot at the end of a window, and of every layer over it."""

    def __init__(self, layout: Layout) -> None:
        slots, layers = len(layout.slots), len(layout.names)
        self.layer_of = np.array([slot.layer for slot in layout.slots], dtype=np.intp)
        self.numel = np.array(layout.sizes, dtype=np.float64)
        self.value: Floats = np.zeros(slots)  # norm of the latest gradient
        self.present = np.zeros(slots, dtype=bool)  # it had one at its optimizer's last step
        self.owner = np.full(slots, -1)
        self.rate: Floats = np.full(slots, np.nan)
        self.decay: Floats = np.full(slots, np.nan)
        self.squares: Floats = np.zeros((4, slots))  # of weights, samples, updates and gradients, at probes
        self.applied: Floats = np.full(slots, np.nan)  # norm of what the optimizer was given, at probes
        self.peak: Floats = np.zeros(layers)
        self.seen = np.zeros(layers, dtype=bool)
        self.bad = np.zeros(layers, dtype=np.intp)
        self.probed = np.zeros(slots, dtype=bool)

    def by_layer(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> Floats:
        """Sum over the slots of each layer."""
        return np.asarray(np.bincount(self.layer_of, values, len(self.peak)), dtype=np.float64)

    def norms(self) -> Floats:
        """Latest gradient norm of each layer."""
        with np.errstate(over="ignore", invalid="ignore"):
            norms: Floats = np.sqrt(self.by_layer(np.where(self.present, self.value, 0.0) ** 2))
        return norms

    def decay_of(self, row: HostRow, decays: Sequence[float | None]) -> None:
        """Take in the weight decay of each parameter group of a step's optimizer, unless it has other groups by now."""
        owned, groups, _ = row.row.pattern.arrays
        if len(groups) and int(groups.max()) < len(decays):
            values = np.array([np.nan if decay is None else decay for decay in decays])
            self.decay[owned] = values[groups]

    def add(self, row: HostRow) -> None:
        """Take in one step."""
        owned, groups, slots = row.row.pattern.arrays
        self.owner[owned] = row.row.optimizer
        rates = np.array([np.nan if rate is None else rate for rate in row.row.rates])
        self.rate[owned] = rates[groups]
        if row.overflow:
            return
        self.present[owned] = False
        self.present[slots] = True
        self.value[slots] = row.norms
        hit = self.layer_of[slots]
        self.seen[hit] = True
        norms = self.norms()
        self.peak = np.fmax(self.peak, np.where(np.isfinite(norms), norms, 0.0))
        self.bad += np.bincount(hit, ~np.isfinite(row.norms), len(self.peak)) > 0
        if row.applied is not None and not row.skipped:
            self.applied[slots] = row.applied
        probe = row.row.probe
        if probe is not None and row.weights is not None and row.sampled is not None:
            updates = np.full(len(slots), np.nan) if row.updates is None else row.updates
            scale = np.asarray(probe.scale)
            squares = (row.weights**2, scale * row.sampled**2, scale * updates**2, row.norms**2)
            self.squares[:, slots] = np.stack(squares)
            self.probed[slots] = True


def _largest(values: Floats) -> float | None:
    return max((float(value) for value in values if not math.isnan(value)), default=None)


def _components(table: _Table) -> dict[int, int]:
    """The optimizers that share a layer count as one: each by the smallest number among them."""
    root = {int(number): int(number) for number in np.unique(table.owner) if number >= 0}
    first: dict[int, int] = {}
    for layer, number in set(zip(table.layer_of.tolist(), table.owner.tolist(), strict=True)):
        other = first.setdefault(layer, number) if number >= 0 else number
        if other != number:
            both = {root[number], root[other]}
            root = {n: min(both) if found in both else found for n, found in root.items()}
    return root


def _layers(layout: Layout, table: _Table, missing: Missing) -> tuple[LayerStats, ...]:
    """The statistics of every layer, in order of first use."""
    order = layout.order()
    norms = table.norms()
    present = table.by_layer(table.present)
    numel = np.where(present > 0, table.by_layer(table.numel * table.present), table.by_layer(table.numel))
    signal = np.zeros(len(layout.slots), dtype=bool)
    signal[layout.signal_slots()] = True
    signal &= table.present
    bias_numel = table.by_layer(table.numel * signal)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rms = norms / np.sqrt(numel)
        bias_rms = np.sqrt(table.by_layer(np.where(signal, table.value, 0.0) ** 2) / bias_numel)
        applied = np.sqrt(table.by_layer(np.where(table.present, table.applied, 0.0) ** 2))
        weights, samples, updates, gradients = (np.sqrt(table.by_layer(row)) for row in table.squares)
    matrices = np.array([slot.parameter.ndim > 1 for slot in layout.slots], dtype=bool) & table.probed
    matrix_numel = table.by_layer(table.numel * matrices)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        matrix_rms = np.sqrt(table.by_layer(table.squares[0] * matrices) / matrix_numel)
    root = _components(table)
    owners = {layer: root[int(table.owner[s])] for s, layer in enumerate(table.layer_of) if table.owner[s] >= 0}
    ratios: dict[int, float | None] = {}
    for number in set(owners.values()):
        mine = [layer for layer in order if owners.get(layer) == number]
        values = norm_ratios([float(rms[layer]) if present[layer] else None for layer in mine])
        ratios.update(zip(mine, values, strict=True))

    def one(layer: int) -> LayerStats:
        slots = layout.members[layer]
        lacking = [slot for slot in slots if slot in missing]
        weight, sample, update = float(weights[layer]), float(samples[layer]), float(updates[layer])
        return LayerStats(
            name=layout.names[layer],
            numel=int(numel[layer]),
            grad_norm=float(norms[layer]) if present[layer] else None,
            grad_norm_max=float(table.peak[layer]) if table.seen[layer] else None,
            applied_norm=float(applied[layer]) if present[layer] and not math.isnan(applied[layer]) else None,
            norm_ratio=ratios.get(layer),
            non_finite=int(table.bad[layer]),
            bias_grad_rms=float(bias_rms[layer]) if bias_numel[layer] else None,
            weight_norm=weight if table.probed[slots].any() else None,
            matrix_rms=float(matrix_rms[layer]) if matrix_numel[layer] else None,
            matrices=tuple(
                Matrix(layout.slots[slot].name, math.sqrt(table.squares[0, slot] / table.numel[slot]))
                for slot in slots
                if slot in layout.by_hand and matrices[slot] and table.numel[slot]
            ),
            grad_to_weight=float(gradients[layer]) / weight if weight else None,
            update_to_weight=update / sample if sample and not math.isnan(update) else None,
            learning_rate=_largest(table.rate[slots]),
            weight_decay=_largest(table.decay[slots]),
            frozen=not any(layout.slots[slot].parameter.requires_grad for slot in slots),
            vectors=all(layout.slots[slot].parameter.ndim < 2 and slot not in layout.flat for slot in slots),
            cancelled=all(slot in layout.cancelled_slots() for slot in slots),
            without_grad=tuple(layout.slots[slot].name for slot in lacking),
            no_gradient_since=min((missing[slot][0] for slot in lacking), default=None),
            steps_without_grad=max((missing[slot][1] for slot in lacking), default=0),
            optimizer=owners.get(layer),
            kind=layout.kind(layer),
        )

    return tuple(one(layer) for layer in order)
