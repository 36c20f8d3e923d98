"""Tables that are looked up: what becomes of their rows decides their scale."""

from __future__ import annotations

import math

from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.surroundings import output_gain
from lightning_gradhealth.tracing import Graph, Station


def biases_scores(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether what is looked up goes nowhere but onto products of two signals."""
    readers = [reader for reader, _ in graph.consumers[index]]
    return bool(readers) and all(_is_added_to_scores(graph, replayer, index, reader) for reader in readers)


def _is_added_to_scores(graph: Graph, replayer: Replayer, index: int, reader: int) -> bool:
    station = graph.stations[reader]
    others = [value for value in station.reads if index not in graph.sources(value, reader)]
    return station.kind == "merge" and any(_are_scores(graph, replayer, value, reader) for value in others)


def _are_scores(graph: Graph, replayer: Replayer, value: int, at: int, before: int = 2) -> bool:
    """Whether a value is a product of two signals, to which some tables may have been added before."""
    if replayer.passage(value, at).averages:
        return True
    merges = (
        [graph.stations[source] for source in graph.sources(value, at) if source in graph.stations] if before else []
    )
    reads = [(read, merge.event) for merge in merges if merge.kind == "merge" for read in merge.reads]
    return any(_are_scores(graph, replayer, read, event, before - 1) for read, event in reads)


def is_read_by_index(graph: Graph, station: Station) -> bool:
    """Whether the rows of a weight are chosen by index before it is one, as those of relative positions."""
    if station.operand is None or len(station.parameters) > 1:
        return False
    events, _ = graph.between(station.operand, station.event)
    return any(graph.trace.events[index].name in ("index", "index_select", "embedding", "gather") for index in events)


def reaches_norm(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether what is looked up comes to a norm with nothing but additions between."""
    open_, seen = [index], {index}
    while open_:
        for reader, value in graph.consumers[open_.pop()]:
            kind = graph.stations[reader].kind
            if kind == "norm" or replayer.passage(value, reader).invariant:
                return True
            if kind == "merge" and reader not in seen:
                seen.add(reader)
                open_.append(reader)
    return False


def tied_tables(graph: Graph, replayer: Replayer) -> dict[int, float]:
    """Tables that are looked up and are weights elsewhere, too, with the std they get as these."""
    weights = {value: s for s in graph.stations.values() if s.kind == "weight" for value in s.parameters}
    tables = {value for s in graph.stations.values() if s.kind == "lookup" for value in s.parameters}
    return {value: _as_weight(replayer, weights[value]) for value in tables & weights.keys()}


def _as_weight(replayer: Replayer, station: Station) -> float:
    """The std that the table of an output layer is about to get."""
    return output_gain(replayer.passage(station.reads[0], station.event)) / math.sqrt(station.fan_in)
