"""What a recorded forward pass means: which weights it meets in what order, and what lies between them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from functools import cached_property

import torch

from lightning_gradhealth.tracing.fans import contraction_fans
from lightning_gradhealth.tracing.operators import CONTRACTIONS, LOOKUPS, NORMS, ONE_SIDED, SUMS, VIEWS
from lightning_gradhealth.tracing.probe import Prober, Use
from lightning_gradhealth.tracing.record import Event, Trace
from lightning_gradhealth.tracing.stations import INPUT, NOTHING, State, Station, Stations, joined


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
        self.stations = Stations()
        self.elementwise: dict[int, str] = {}
        self.unknown: dict[int, str] = {}
        self.biases: dict[int, int] = {}
        self.kept: frozenset[int] = frozenset()
        self.visits = 0  # events that `between` has looked at
        self._made: dict[int, int] = {}  # value -> the event that made it
        self._written: dict[int, list[int]] = {}  # base value -> the events that wrote into its memory
        self._memory: dict[int, list[State]] = {}  # what all of these together have written, at each of them
        self._states: list[State] = []
        self._own: dict[str, set[int]] = {}
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
                self._write(self.trace.base[value], index)
        return self.stations.get(len(self._states) - 1)

    def _write(self, base: int, index: int) -> None:
        events, states = self._written.setdefault(base, []), self._memory.setdefault(base, [])
        if not events or events[-1] != index:
            events.append(index)
            states.append(joined([*states[-1:], self._states[index]]))

    # --- what a value is ---

    def makers(self, value: int, at: int) -> list[int]:
        """The events that gave a value what it holds just before event `at`."""
        written = self._written.get(self.trace.base[value], [])
        makers = written[: bisect_left(written, at)]
        made = self._made.get(value)
        return makers if made is None or made in makers else [made, *makers]

    def state(self, value: int, at: int) -> State:
        """What a value is just before event `at`."""
        leaf = NOTHING
        if value in self._parameters:
            leaf = State(parameters=frozenset((value,)))
        elif value in self._inputs:
            leaf = State(active=True, sources=1)
        states = [leaf]
        if (made := self._made.get(value)) is not None:
            states.append(self._states[made])
        base = self.trace.base[value]
        if base in self._written and (count := bisect_left(self._written[base], at)):
            states.append(self._memory[base][count - 1])
        return joined(states)

    def sources(self, value: int, at: int) -> frozenset[int]:
        """The stations (or INPUT) from which the signal in a value comes, without a station between."""
        return self.stations.named(self.state(value, at).sources)

    # --- what an event is ---

    def _classify(self, index: int, event: Event) -> State:
        reads = event.reads
        states = {value: self.state(value, index) for value in reads}
        station = self._station(index, event, reads, states)
        if station is not None:
            self.stations.add(station, joined(self.state(value, index) for value in station.reads).sources)
            return State(active=True, sources=self.stations.bits((index,)))
        merged = joined(states.values())
        if not merged.active:
            return merged
        if self._is_chosen(event, states):
            return State(parameters=merged.parameters)
        behind_weights = event.name in SUMS and self._only_weights(merged.sources)
        for value, state in states.items():
            itself = behind_weights and self._is_itself(value, index)
            for parameter in () if state.active else state.parameters:
                self.elementwise.setdefault(parameter, event.name)
                if itself and self._parameters[parameter].dim() < 2:
                    self.biases.setdefault(parameter, next(self.stations.decoded(merged.sources)))
        if not merged.sources & 1 and not any(self.trace.holds_signal(value) for value in event.outputs):
            return NOTHING  # an index or a mask that a signal has chosen carries none itself
        return State(active=True, sources=merged.sources)

    def _is_itself(self, value: int, at: int) -> bool:
        """Whether a value is a parameter but for its shape and type."""
        return all(self.trace.events[index].name in VIEWS for index in self.between(value, at)[0])

    def _only_weights(self, sources: int) -> bool:
        return not sources & ~self.stations.of_kind("weight")

    def _station(self, index: int, event: Event, reads: list[int], states: dict[int, State]) -> Station | None:
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

    def _unit(self, index: int, event: Event, reads: list[int], states: dict[int, State]) -> Station:
        module = self.trace.modules[event.module]
        own = {id(parameter) for parameter in module.parameters()}
        parameters = tuple(value for value, parameter in self._parameters.items() if id(parameter) in own)
        active = tuple(value for value in reads if states[value].active and self.trace.holds_signal(value))
        return Station(index, "unit", active[:1], parameters)

    def _norm(self, index: int, reads: list[int], states: dict[int, State]) -> Station | None:
        if not states[reads[0]].active:
            return None
        scales = [p for value in reads[1:] if not states[value].active for p in sorted(states[value].parameters)]
        for parameter in scales:
            self.elementwise.setdefault(parameter, "norm")
        return Station(index, "norm", tuple(reads[:1]), tuple(scales))

    def _weight(self, index: int, event: Event, states: dict[int, State]) -> Station | None:
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

    def _probed(self, index: int, event: Event, states: dict[int, State]) -> Station | None:
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

    def _reduced(self, index: int, event: Event, states: dict[int, State]) -> Station | None:
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
        self, index: int, data: int, weight: int, use: Use, states: dict[int, State], sums: Iterable[int] = ()
    ) -> Station:
        bias = tuple(p for value in sums for p in sorted(states[value].parameters))
        for parameter in bias:
            self.elementwise.setdefault(parameter, "add")
            self.biases.setdefault(parameter, index)
        parameters = tuple(sorted(states[weight].parameters))
        return Station(index, "weight", (data,), parameters, weight, use.fan_in, use.fan_out, use.scale, bias)

    def _is_chosen(self, event: Event, states: dict[int, State]) -> bool:
        """Whether an index that comes with the signal chooses among weights, as among those of experts."""
        tables = [v for v, state in states.items() if not state.active and state.parameters]
        active = [v for v, state in states.items() if state.active]
        matrices = any(len(self.trace.shapes[value]) > 2 for value in tables)
        gives = any(self.trace.holds_signal(value) for value in event.outputs)
        return matrices and gives and not any(self.trace.holds_signal(value) for value in active)

    def _is_data(self, value: int, other: int, states: dict[int, State], event: Event) -> bool:
        """Whether `value` carries the signal and `other` the weight."""
        if states[value].active != states[other].active:
            return states[value].active
        return self._owns(event, other, states) and not self._owns(event, value, states)

    def _is_weight(self, weight: int, data: int, states: dict[int, State], event: Event) -> bool:
        if states[weight].active or not states[weight].parameters:
            return False
        if states[data].active:
            return True
        # no signal in either: a product of weights or a norm of one, unless a module multiplies what it was given by
        # its own; a vector without parameters is the buffer of a power iteration
        given = bool(states[data].parameters) or len(self.trace.shapes[data]) > 1
        return given and self._owns(event, weight, states) and not self._owns(event, data, states)

    def _owns(self, event: Event, value: int, states: dict[int, State]) -> bool:
        """Whether a value is made of a parameter that belongs to the very module that runs."""
        if event.module not in self._own:
            module = self.trace.modules.get(event.module)
            self._own[event.module] = set() if module is None else {id(p) for p in module.parameters(recurse=False)}
        own = self._own[event.module]
        return any(id(self._parameters[p]) in own for p in states[value].parameters)

    def _merge(self, index: int, reads: list[int], states: dict[int, State]) -> Station | None:
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
    def ends(self) -> dict[int, list[int]]:
        """For every station (and INPUT) whose signal comes to the model's outputs with no station between: which."""
        found: dict[int, list[int]] = {}
        for value, sources in self.final.items():
            for source in sources:
                found.setdefault(source, []).append(value)
        return found

    def between(self, value: int, at: int, most: float = math.inf) -> tuple[list[int], frozenset[int]]:
        """The events that lead from stations to what `value` holds just before event `at`, and those stations.

        Args:
            value: The value.
            at: The event before which it is looked at.
            most: The greatest number of events.

        Raises:
            LongPathError: There are more.
        """
        events: set[int] = set()
        sources: set[int] = set()
        open_ = [(value, at)]
        seen: set[int] = set()
        until: dict[int, int] = {}  # base value -> how many of the events that wrote into it have been taken
        while open_:
            current, before = open_.pop()
            if current in self._inputs:
                sources.add(INPUT)
            makers = []
            if current not in seen:
                seen.add(current)
                makers = [self._made[current]] if current in self._made else []
            base = self.trace.base[current]
            if written := self._written.get(base):
                taken, count = until.get(base, 0), bisect_left(written, before)
                until[base] = max(taken, count)
                makers += written[taken:count]
            for maker in makers:
                self.visits += 1
                if maker in self.stations:
                    sources.add(maker)
                elif maker not in events:
                    events.add(maker)
                    if len(events) > most:
                        raise LongPathError(f"more than {most} operations")
                    open_ += [(read, maker) for read in self.trace.events[maker].reads]
        return sorted(events), frozenset(sources)


class LongPathError(ValueError):
    """More operations lie between two stations than are worth a look."""
