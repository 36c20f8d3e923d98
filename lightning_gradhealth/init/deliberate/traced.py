"""What was set on purpose, by the place that it has in the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from lightning_gradhealth.init.deliberate.values import is_zero, meant
from lightning_gradhealth.init.fans import Fans
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.tracing import Graph


def meant_in(
    model: nn.Module, graph: Graph | None = None, ends: Mapping[int, int | None] = MappingProxyType({})
) -> dict[int, str]:
    """What was set on purpose in a model, with the reason, by the identity of the parameter; see `values`.

    Args:
        model: The model.
        graph: Its recorded forward pass, which knows weights that no module of torch owns.
        ends: What `at_the_end` says of it.
    """
    if graph is None:
        return meant(model)
    known: dict[int, Fans | None] = {}
    parameters = graph.trace.parameters
    for station in graph.stations.values():
        if station.kind == "weight":
            alone = len(station.parameters) == 1
            own = Fans(station.fan_in, station.fan_out) if alone else None
            known.update({id(parameters[value]): own for value in station.parameters})
    biases = {id(parameters[value]): graph.stations[station].fan_in for value, station in graph.biases.items()}
    return meant(model, known, biases, ends)


def at_the_end(graph: Graph) -> dict[int, int | None]:
    """The weights behind none of whose uses anything with parameters follows: what they give is the model's answer.

    Args:
        graph: The recorded forward pass.

    Returns:
        By the identity of the weight that of the one bias that is added to it; None without one.
    """
    inner: set[int] = set()
    for index in sorted(graph.stations, reverse=True):
        if any(reader in inner or graph.stations[reader].parameters for reader, _ in graph.consumers[index]):
            inner.add(index)
    parameters = graph.trace.parameters
    biases = {station: id(parameters[value]) for value, station in graph.biases.items()}
    found: dict[int, int | None] = {}
    again = {id(parameters[value]) for index in inner for value in graph.stations[index].parameters}
    for index, station in graph.stations.items():
        if station.kind == "weight" and index not in inner and len(station.parameters) == 1:
            if id(parameters[station.parameters[0]]) in again:
                continue
            weight = id(parameters[station.parameters[0]])
            found[weight] = found.get(weight) or biases.get(index)  # a bias is known at the first use of its weight
    return found


def second_of_pair(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether a weight is zero, reads nothing but another weight, and is added to what reads the same as that."""
    station = graph.stations[index]
    if not all(is_zero(graph.trace.parameters[value]) for value in station.parameters):
        return False
    before = replayer.passage(station.reads[0], index)
    pair = [source for source in before.sources if source in graph.stations]
    if len(pair) != 1 or not before.linear or graph.stations[pair[0]].kind != "weight":
        return False
    down = graph.stations[pair[0]]
    origin = graph.sources(down.reads[0], pair[0])
    for reader, _ in graph.consumers[index]:
        merge = graph.stations[reader]
        others = {s for value in merge.reads for s in graph.sources(value, reader)} - {index}
        for other in others & set(graph.stations):
            weight = graph.stations[other]
            if weight.kind == "weight" and graph.sources(weight.reads[0], other) == origin:
                return True
    return False
