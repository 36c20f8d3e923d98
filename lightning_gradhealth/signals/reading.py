"""What a probe has measured at one step: one device vector, and the names of what is in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradhealth.flows import ChainPoint, SignalChain, TemporalFlow
from lightning_gradhealth.records import LayerStats, StepRecord
from lightning_gradhealth.serial import Record

BINS = 32
INPUT = "the network's input"  # stands before the outputs of all modules
UNITS = 3
COLUMNS = 5  # of a site: squares, sum and number of the output's elements, squares and number of the gradient's


@dataclass(frozen=True)
class Site(Record):
    """One place where signals are measured.

    Attributes:
        name: The module whose output it is, or `name (input)` for what that module reads.
        owner: That module.
        size: Elements of the tensor, of one pass.
        before: The nearest site through which all of its signal comes; -1 where there is none.
        same: For a module that gives the very tensor of another: that one's site; -1 elsewhere.
    """

    name: str
    owner: str
    size: int = 1
    before: int = -1
    same: int = -1


@dataclass(frozen=True)
class Activation(Record):
    """An activation that can die or saturate.

    Attributes:
        name: Its key: the site before it, its kind, and the number among those of that kind there.
        owner: The module that the site belongs to.
        kind: As "relu", "tanh" or "attention".
        dies: It can die; otherwise it can saturate.
        units: Number of its units.
    """

    name: str
    owner: str
    kind: str
    dies: bool
    units: int = 0


@dataclass(frozen=True)
class Spec(Record):
    """What the vector of a reading holds.

    Attributes:
        sites: `COLUMNS` numbers each.
        activations: `UNITS` numbers each: the shares of bad and of always active units, and 1 where they were measured.
        chain: The sites of the main chain, in order.
        modules: One number each, in the order in which they ended: 1 where the output was not finite.
        histogram: Whether `BINS` numbers a site follow.
        crossed: The sites of the main chain, and those between them that matrices read which modules apply by hand.
        matrices: For each of these the one matrix that reads it; "" where there is none, or several.
    """

    sites: tuple[Site, ...] = ()
    activations: tuple[Activation, ...] = ()
    chain: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    histogram: bool = False
    crossed: tuple[int, ...] = ()
    matrices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The signals of one probed step, still on the device.

    Attributes:
        step: The loggers' x value.
        optimizer: Index of the optimizer that stepped.
        vector: The numbers: those of the sites, of the network's input (squares, number), of the activations, of the
            modules, and the histograms.
        spec: What they are.
        flows: The gradient through time of recurrent modules, by module, and by layer and direction: shape (steps,).
    """

    step: int
    optimizer: int
    vector: Tensor
    spec: Spec
    flows: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def vectors(self) -> list[Tensor]:
        """The device vectors to read, in the order in which `read` takes them."""
        return [self.vector, *(norms for flow in self.flows.values() for norms in flow.values())]

    def state_dict(self) -> dict[str, Any]:
        """Return primitives and a tensor."""
        return {**vars(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Reading:
        """Rebuild a reading."""
        return cls(**{**state, "spec": Spec.from_dict(state["spec"])})

    def read(self, values: Sequence[float], *others: Sequence[float]) -> Signals:
        """Turn the contents of `vectors()`, read on the host, into signals."""
        numbers = iter(others)
        flows = {
            name: TemporalFlow.of({key: next(numbers) for key in flow}) for name, flow in self.flows.items() if flow
        }
        signals = self._signals(values)
        signals.temporal = flows
        return signals

    def _signals(self, values: Sequence[float]) -> Signals:
        spec, signals = self.spec, Signals(self.step, self.optimizer, self.spec)
        rows = [values[i * COLUMNS : (i + 1) * COLUMNS] for i in range(len(spec.sites))]
        start = len(rows) * COLUMNS
        for site, row in zip(spec.sites, rows, strict=True):
            squares, total, count, back, gradients = rows[site.same] if site.same >= 0 else row
            signals.forward_rms.append(math.sqrt(squares / count) if count else None)
            signals.forward_mean.append(total / count if count else None)
            signals.backward_rms.append(math.sqrt(back / gradients) if gradients else None)
        squares, count = values[start : start + 2]
        signals.input_rms = math.sqrt(squares / count) if count else None
        start += 2
        for _ in spec.activations:
            bad, full, measured = values[start : start + UNITS]
            signals.bad_units.append(bad / measured if measured else None)
            signals.full_units.append(full / measured if measured else None)
            start += UNITS
        flagged = [name for name, flag in zip(spec.modules, values[start:], strict=False) if flag]
        signals.first_non_finite = flagged[0] if flagged else ""
        start += len(spec.modules)
        if spec.histogram:
            for site in spec.sites:
                first = start + BINS * (site.same if site.same >= 0 else len(signals.histograms))
                signals.histograms.append(tuple(map(int, values[first : first + BINS])))
        return signals


@dataclass
class Signals:
    """A reading on the host: one entry a site, or an activation."""

    step: int
    optimizer: int
    spec: Spec
    forward_rms: list[float | None] = field(default_factory=list)
    forward_mean: list[float | None] = field(default_factory=list)
    backward_rms: list[float | None] = field(default_factory=list)
    bad_units: list[float | None] = field(default_factory=list)
    full_units: list[float | None] = field(default_factory=list)
    histograms: list[tuple[int, ...]] = field(default_factory=list)
    input_rms: float | None = None
    first_non_finite: str = ""
    temporal: dict[str, TemporalFlow] = field(default_factory=dict)

    def chain(self, layer_of: Callable[[str], str]) -> SignalChain:
        """The main chain, its points by the names of layers."""
        points = tuple(
            ChainPoint(site.name, layer_of(site.owner), self.forward_rms[number], self.backward_rms[number], site.size)
            for number in self.spec.chain
            for site in [self.spec.sites[number]]
        )
        return SignalChain(points, self.optimizer, self.input_rms)

    def of_layers(self, layer_of: Callable[[str], str]) -> dict[str, dict[str, Any]]:
        """The fields of `LayerStats` that signals give, by layer; of several modules in one layer the last counts."""
        found: dict[str, dict[str, Any]] = {}
        for number, site in enumerate(self.spec.sites):
            if site.name == site.owner:  # what a module reads behind a merge is no output of it
                found.setdefault(layer_of(site.owner), {}).update(self._of_site(number))
        for activation, share, full in zip(self.spec.activations, self.bad_units, self.full_units, strict=True):
            fields = found.setdefault(layer_of(activation.owner), {})
            fields.setdefault("activation", activation.kind)
            name = "dead_fraction" if activation.dies else "saturated_fraction"
            if share is not None and math.isfinite(fields.get("forward_rms") or 0.0):  # NaN is active nowhere
                if share >= (fields.get(name) or 0.0):
                    fields.update({name: share, "units": activation.units, "full_fraction": full})
                fields["activation"] = activation.kind
        return found

    def of_matrices(self) -> dict[str, float]:
        """What is left of the gradient before each matrix of the smallest one behind it, by parameter."""
        back = [self.backward_rms[number] for number in self.spec.crossed]
        found = {}
        for place, name in enumerate(self.spec.matrices):
            before, behind = back[place], [rms for rms in back[place + 1 :] if rms is not None]
            if name and before is not None and min(behind, default=0.0) > 0.0:
                found[name] = before / min(behind)
        return found

    def _of_site(self, number: int) -> dict[str, Any]:
        before = self.spec.sites[number].before
        forward, backward = self.forward_rms, self.backward_rms
        return {
            "forward_rms": forward[number],
            "forward_mean": self.forward_mean[number],
            "backward_rms": backward[number],
            "forward_gain": _ratio(forward[number], forward[before]) if before >= 0 else None,
            "backward_gain": _ratio(backward[before], backward[number]) if before >= 0 else None,
            "forward_histogram": self.histograms[number] if self.histograms else (),
        }


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def with_signals(record: StepRecord, signals: Sequence[Signals], layer_of: Callable[[str], str]) -> StepRecord:
    """A record with the signals of its window; of several readings of a layer that of its own optimizer counts.

    Args:
        record: What the gradients gave.
        signals: The readings of its window, in order.
        layer_of: The layer that a module belongs to; "" where it belongs to none.

    Example:
        >>> with_signals(StepRecord(step=3), [], str).step
        3
    """
    if not signals:
        return record
    by_reading = [(reading.optimizer, reading.of_layers(layer_of)) for reading in signals]

    def fields_of(layer: LayerStats) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for _, found in sorted(by_reading, key=lambda reading: reading[0] == layer.optimizer):
            merged.update({k: v for k, v in found.get(layer.name, {}).items() if v is not None})
        return merged

    # a step without a backward pass has no chain, and takes none away
    latest = {reading.optimizer: chain for reading in signals if (chain := reading.chain(layer_of)).points}
    chains = tuple(latest.values())
    crossed = {name: gain for reading in signals for name, gain in reading.of_matrices().items()}

    def with_gains(layer: LayerStats) -> LayerStats:
        if not layer.matrices:
            return layer
        return layer.changed(matrices=tuple(m.changed(backward_gain=crossed.get(m.name)) for m in layer.matrices))

    layers = tuple(with_gains(layer.changed(**fields_of(layer))) for layer in record.layers)
    origin = next((name for reading in signals if (name := reading.first_non_finite)), "")
    gains = {
        f"{way}_gain": _farthest([getattr(chain, f"{way}_gain") for chain in chains]) for way in ("forward", "backward")
    }
    measured = {name: value for name, value in gains.items() if value is not None}
    temporal = {layer_of(name): flow for reading in signals for name, flow in reading.temporal.items()}
    seen = {"layers": layers, "chains": chains, "first_non_finite": origin, "temporal": temporal}
    return StepRecord(**{**vars(record), **measured, **seen})


def _farthest(gains: Sequence[float | None]) -> float | None:
    """The gain that is farthest from 1."""
    known = [gain for gain in gains if gain is not None]
    return max(known, key=lambda gain: abs(math.log(gain)) if 0.0 < gain < math.inf else math.inf, default=None)
