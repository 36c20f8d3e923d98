"""Values that somebody has set on purpose, as no constructor of torch would: they stay as they are."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.tracing import Graph


def biases_on_purpose(graph: Graph) -> frozenset[int]:
    """Biases of which every element lies beyond torch's default range, 1 / sqrt(fan_in), all on one side of 0.

    As those of a gate that begins closed, of an output at its prior, of a state-space model's step.

    Args:
        graph: The recorded forward pass.

    Returns:
        The parameters, by value.
    """
    found = set()
    for value, station in graph.biases.items():
        bias = graph.trace.parameters[value].detach()
        if (
            _is_readable(bias)
            and not bias.is_complex()
            and bool((bias.square() * graph.stations[station].fan_in > 1.01).all())
        ):
            one_side = bool((bias > 0).all()) or bool((bias < 0).all())
            found.update([value] if one_side else [])
    return frozenset(found)


def zeros_on_purpose(graph: Graph) -> frozenset[int]:
    """Weights of torch's own layers that are 0 throughout, which their constructors never leave.

    As the last one of a branch that begins as nothing (ControlNet, DiT), or of a head. Where half of them are 0, that
    is fresh memory rather than a purpose.

    Args:
        graph: The recorded forward pass.

    Returns:
        The parameters, by value.
    """
    own = [m for m in graph.trace.modules.values() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear))]
    weights = {id(m._parameters["weight"]) for m in own if m._parameters.get("weight") is not None}
    mine = {value: p.detach() for value, p in graph.trace.parameters.items() if id(p) in weights and _is_readable(p)}
    zeros = frozenset(value for value, weight in mine.items() if is_zero(weight))
    return zeros if 2 * len(zeros) < len(mine) else frozenset()


def is_zero(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and all of them are 0.

    Example:
        >>> import torch
        >>> is_zero(torch.zeros(2)), is_zero(torch.zeros(0))
        (True, False)
    """
    return _is_readable(tensor) and not bool(tensor.detach().any())


def _is_readable(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta and tensor.numel() > 0


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
