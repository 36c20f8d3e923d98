"""What a recorded forward pass means: which weights it meets in what order, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_gradhealth.tracing.fans import contraction_fans
from lightning_gradhealth.tracing.operators import CONTRACTIONS, LOOKUPS, NORMS, ONE_SIDED, SUMS, VIEWS
from lightning_gradhealth.tracing.probe import Prober, Use
from lightning_gradhealth.tracing.record import Event, Trace

INPUT = -1  # the source that stands for the model's inputs


@dataclass(frozen=True)
class Station:
    """Where a new signal begins: a weight, a lookup, a recurrent unit, a norm or a merge of two signals.

    Attributes:
        event: Index of the event.
        kind: "weight", "lookup", "unit", "norm" or "merge".
        reads: The values that carry the signal in: one, or for a merge the two that are added.
        parameters: The parameters behind the weight, by value; for a norm, its scale and shift.
        operand: The value that is the weight as the operator saw it; None for merges, norms and units.
        fan_in: Terms that an output sums (weights only).
        fan_out: Terms that the gradient of an input sums (weights only).
        scale: What the operator itself multiplies the products by, as a mean does (weights only).
        bias: The parameters added by the same operator.
    """

    event: int
    kind: str
    reads: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    operand: int | None = None
    fan_in: float = 1.0
    fan_out: float = 1.0
    scale: float = 1.0
    bias: tuple[int, ...] = ()


@dataclass(frozen=True)
class _State:
    """What is known of a value: whether it carries the signal, from which stations, and which parameters are in it."""

    active: bool = False
    sources: frozenset[int] = frozenset()
    parameters: frozenset[int] = frozenset()


_NOTHING = _State()


class Graph:
    """The stations of a forward pass and the paths between them.

    Args:
        trace: The recording.

    Attributes:
        stations: By the index of their event, in order.
        elementwise: Parameters that meet the signal other than as weights: what operator, by value.
        unknown: Parameters that meet it in an operator of which nobody can tell what it does: why, by value.
        biases: Those among them that are added to what a weight gives: the station of the weight, by value.
        kept: Biases that keep the values they have: no replay takes them for 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_gradhealth.tracing import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> [station.kind for station in Graph(trace(net, torch.zeros(2, 4))).stations.values()]
        ['weight', 'norm', 'weight']
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.stations: dict[int, Station] = {}
        self.elementwise: dict[int, str] = {}
        self.unknown: dict[int, str] = {}
        self.biases: dict[int, int] = {}
        self.kept: frozenset[int] = frozenset()
        self._made: dict[int, int] = {}  # value -> the event that made it
        self._written: dict[int, list[int]] = {}  # base value -> the events that wrote into its memory
        self._states: list[_State] = []
        self._prober = Prober(trace)
        self._inputs = trace.inputs
        self._parameters = trace.parameters
        self.extend()

    def extend(self) -> Station | None:
        """Take in what the trace has recorded since; the station at the last event, if it is one."""
        for index in range(len(self._states), len(self.trace.events)):
            event = self.trace.events[index]
            self._states.append(self._classify(index, event))
            for value in event.outputs:
                self._made.setdefault(value, index)
            for value in event.writes:
                self._written.setdefault(self.trace.base[value], []).append(index)
        return self.stations.get(len(self._states) - 1)

    # --- what a value is ---

    def makers(self, value: int, at: int) -> list[int]:
        """The events that gave a value what it holds just before event `at`."""
        makers = [event for event in self._written.get(self.trace.base[value], ()) if event < at]
        made = self._made.get(value)
        return makers if made is None or made in makers else [made, *makers]

    def state(self, value: int, at: int) -> _State:
        """What a value is just before event `at`."""
        leaf = _NOTHING
        if value in self._parameters:
            leaf = _State(parameters=frozenset((value,)))
        elif value in self._inputs:
            leaf = _State(active=True, sources=frozenset((INPUT,)))
        return _joined([leaf, *(self._states[event] for event in self.makers(value, at))])

    def sources(self, value: int, at: int) -> frozenset[int]:
        """The stations (or INPUT) from which the signal in a value comes, without a station between."""
        return self.state(value, at).sources

    # --- what an event is ---

    def _classify(self, index: int, event: Event) -> _State:
        reads = event.reads
        states = {value: self.state(value, index) for value in reads}
        station = self._station(index, event, reads, states)
        if station is not None:
            self.stations[index] = station
            return _State(active=True, sources=frozenset((index,)))
        merged = _joined(states.values())
        if not merged.active:
            return merged
        if self._is_chosen(event, states):
            return _State(parameters=merged.parameters)
        behind_weights = event.name in SUMS and self._only_weights(merged.sources)
        for value, state in states.items():
            itself = behind_weights and self._is_itself(value, index)
            for parameter in () if state.active else state.parameters:
                self.elementwise.setdefault(parameter, event.name)
                if itself and self._parameters[parameter].dim() < 2:
                    self.biases.setdefault(parameter, min(merged.sources))
        if INPUT not in merged.sources and not any(self.trace.holds_signal(value) for value in event.outputs):
            return _NOTHING  # an index or a mask that a signal has chosen carries none itself
        return _State(active=True, sources=merged.sources)

    def _is_itself(self, value: int, at: int) -> bool:
        """Whether a value is a parameter but for its shape and type."""
        return all(self.trace.events[index].name in VIEWS for index in self.between(value, at)[0])

    def _only_weights(self, sources: frozenset[int]) -> bool:
        return all(source in self.stations and self.stations[source].kind == "weight" for source in sources)

    def _station(self, index: int, event: Event, reads: list[int], states: dict[int, _State]) -> Station | None:
        if event.func is None:
            return self._unit(index, event, reads, states)
        name = event.name
        if name in LOOKUPS:
            table, *_ = reads
            return Station(index, "lookup", tuple(reads[1:2]), tuple(sorted(states[table].parameters)), table)
        if name in NORMS:
            return self._norm(index, reads, states)
        if name in CONTRACTIONS:
            return self._weight(index, event, states)
        if name in SUMS:
            return self._merge(index, reads, states)
        if name in VIEWS or torch.Tag.pointwise in event.func.tags:
            return None
        return self._probed(index, event, states) or self._reduced(index, event, states)

    def _unit(self, index: int, event: Event, reads: list[int], states: dict[int, _State]) -> Station:
        module = self.trace.modules[event.module]
        own = {id(parameter) for parameter in module.parameters()}
        parameters = tuple(value for value, parameter in self._parameters.items() if id(parameter) in own)
        active = tuple(value for value in reads if states[value].active and self.trace.holds_signal(value))
        return Station(index, "unit", active[:1], parameters)

    def _norm(self, index: int, reads: list[int], states: dict[int, _State]) -> Station | None:
        if not states[reads[0]].active:
            return None
        scales = [p for value in reads[1:] if not states[value].active for p in sorted(states[value].parameters)]
        for parameter in scales:
            self.elementwise.setdefault(parameter, "norm")
        return Station(index, "norm", tuple(reads[:1]), tuple(scales))

    def _weight(self, index: int, event: Event, states: dict[int, _State]) -> Station | None:
        data, weight = (event.args[position].value for position in CONTRACTIONS[event.name])
        if event.name not in ONE_SIDED and self._is_data(weight, data, states, event):
            data, weight = weight, data
        if not self._is_weight(weight, data, states, event):
            return None
        if not states[data].active:  # as learned queries are, or a table of positions that is projected
            for parameter in states[data].parameters:
                self.elementwise.setdefault(parameter, "signal")
        bias = [p for value in event.reads if value not in (data, weight) for p in states[value].parameters]
        for parameter in bias:
            self.elementwise.setdefault(parameter, "add")
            self.biases.setdefault(parameter, index)
        shapes = self.trace.shapes
        fan_in, fan_out = contraction_fans(event, shapes, data, weight)
        return Station(
            index,
            "weight",
            (data,),
            tuple(sorted(states[weight].parameters)),
            weight,
            fan_in,
            fan_out,
            1.0,
            tuple(bias),
        )

    def _probed(self, index: int, event: Event, states: dict[int, _State]) -> Station | None:
        """The weight of an operator that is known by what it does alone."""
        signals = [v for v, state in states.items() if state.active and self.trace.holds_signal(v)]
        operands = [v for v, state in states.items() if not state.active and state.parameters]
        if not any(self.trace.holds_signal(value) for value in event.outputs):
            return None
        uses = {(data, v): self._prober.use([event], data, v) for v in operands for data in signals}
        for (data, weight), use in uses.items():
            if use.kind == "product":
                sums = {v for v in operands if v != weight and uses[data, v].kind == "elementwise"}
                return self._product(index, data, weight, use, states, sums)
        for value in operands:
            known = [uses[data, value] for data in signals]
            if known and all(use.kind == "unknown" for use in known):
                for parameter in states[value].parameters:
                    self.unknown.setdefault(parameter, f"{event.name}: {known[0].why}")
        return None

    def _reduced(self, index: int, event: Event, states: dict[int, _State]) -> Station | None:
        """The weight of a product by elements that is summed afterwards, as a contraction by hand is."""
        signals = [v for v, state in states.items() if state.active and self.trace.holds_signal(v)]
        if len(signals) != 1 or not event.outputs or event.writes:
            return None
        chain, value = [event], signals[0]
        while True:
            makers = self.makers(value, index)
            if len(makers) != 1 or makers[0] in self.stations or self.trace.events[makers[0]].writes:
                return None
            chain.insert(0, self.trace.events[makers[0]])
            if chain[0].name not in VIEWS:
                break
            value = chain[0].reads[0]
        if chain[0].name != "mul" or len(chain[0].reads) != 2:
            return None
        by_role = sorted(chain[0].reads, key=lambda v: not self.state(v, index).active)
        data, weight = by_role
        of_data, of_weight = (self.state(v, index) for v in by_role)
        if not of_data.active or of_weight.active or not of_weight.parameters:
            return None
        if all(self._parameters[p].dim() < 2 for p in of_weight.parameters):
            return None
        use = self._prober.use(chain, data, weight)
        return self._product(index, data, weight, use, {weight: of_weight}) if use.kind == "product" else None

    def _product(
        self, index: int, data: int, weight: int, use: Use, states: dict[int, _State], sums: Iterable[int] = ()
    ) -> Station:
        bias = tuple(p for value in sums for p in sorted(states[value].parameters))
        for parameter in bias:
            self.elementwise.setdefault(parameter, "add")
            self.biases.setdefault(parameter, index)
        parameters = tuple(sorted(states[weight].parameters))
        return Station(index, "weight", (data,), parameters, weight, use.fan_in, use.fan_out, use.scale, bias)

    def _is_chosen(self, event: Event, states: dict[int, _State]) -> bool:
        """Whether an index that comes with the signal chooses among weights, as among those of experts."""
        tables = [v for v, state in states.items() if not state.active and state.parameters]
        active = [v for v, state in states.items() if state.active]
        matrices = any(len(self.trace.shapes[value]) > 2 for value in tables)
        gives = any(self.trace.holds_signal(value) for value in event.outputs)
        return matrices and gives and not any(self.trace.holds_signal(value) for value in active)

    def _is_data(self, value: int, other: int, states: dict[int, _State], event: Event) -> bool:
        """Whether `value` carries the signal and `other` the weight."""
        if states[value].active != states[other].active:
            return states[value].active
        return self._owns(event, other, states) and not self._owns(event, value, states)

    def _is_weight(self, weight: int, data: int, states: dict[int, _State], event: Event) -> bool:
        if states[weight].active or not states[weight].parameters:
            return False
        if states[data].active:
            return True
        # no signal in either: a product of weights or a norm of one, unless a module multiplies what it was given by
        # its own; a vector without parameters is the buffer of a power iteration
        given = bool(states[data].parameters) or len(self.trace.shapes[data]) > 1
        return given and self._owns(event, weight, states) and not self._owns(event, data, states)

    def _owns(self, event: Event, value: int, states: dict[int, _State]) -> bool:
        """Whether a value is made of a parameter that belongs to the very module that runs."""
        module = self.trace.modules.get(event.module)
        own = set() if module is None else {id(p) for p in module.parameters(recurse=False)}
        return any(id(self._parameters[p]) in own for p in states[value].parameters)

    def _merge(self, index: int, reads: list[int], states: dict[int, _State]) -> Station | None:
        active = [value for value in reads if states[value].active and self.trace.holds_signal(value)]
        if len(active) != 2 or states[active[0]].sources == states[active[1]].sources:
            return None
        return Station(index, "merge", tuple(active))

    # --- the order of things ---

    @cached_property
    def final(self) -> dict[int, frozenset[int]]:
        """The model's outputs that carry the signal, and their sources."""
        end = len(self.trace.events)
        outputs = {value: self.sources(value, end) for value in self.trace.outputs if self.trace.holds_signal(value)}
        return {value: sources for value, sources in outputs.items() if sources}

    @cached_property
    def consumers(self) -> dict[int, list[tuple[int, int]]]:
        """For every station (and INPUT): the stations that read its signal, each with the value that they read."""
        found: dict[int, list[tuple[int, int]]] = {INPUT: [], **{index: [] for index in self.stations}}
        for index, station in self.stations.items():
            for value in station.reads:
                for source in sorted(self.sources(value, index)):
                    found[source].append((index, value))
        return found

    @cached_property
    def ancestors(self) -> dict[int, frozenset[int]]:
        """For every station: all stations (and INPUT) from which its signal comes, near and far."""
        found: dict[int, frozenset[int]] = {INPUT: frozenset()}
        for index, station in self.stations.items():
            near = frozenset().union(*(self.sources(value, index) for value in station.reads))
            found[index] = near.union(*(found[source] for source in near))
        return found

    def between(self, value: int, at: int) -> tuple[list[int], frozenset[int]]:
        """The events that lead from stations to what `value` holds just before event `at`, and those stations."""
        events: set[int] = set()
        sources: set[int] = set()
        open_ = [(value, at)]
        seen: set[tuple[int, int]] = set()
        while open_:
            current, before = open_.pop()
            if current in self._inputs:
                sources.add(INPUT)
            for maker in self.makers(current, before):
                if maker in self.stations:
                    sources.add(maker)
                elif maker not in events:
                    events.add(maker)
                    for read in self.trace.events[maker].reads:
                        if (read, maker) not in seen:
                            seen.add((read, maker))
                            open_.append((read, maker))
        return sorted(events), frozenset(sources)


def _joined(states: Iterable[_State]) -> _State:
    states = [state for state in states if state is not _NOTHING]
    if len(states) == 1:
        return states[0]
    return _State(
        any(state.active for state in states),
        frozenset().union(*(state.sources for state in states)),
        frozenset().union(*(state.parameters for state in states)),
    )
