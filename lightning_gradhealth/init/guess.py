"""A sample for a model that was given none: shapes that its first layer takes, tried on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor, nn

from lightning_gradhealth.tracing import Graph, TraceError, trace

ROWS, STEPS = 4, 16
SIDES = (32, 64, 224, 28)


def guessed(model: nn.Module) -> tuple[Graph, str] | None:
    """A recorded forward pass on a guess, with what was guessed; None where no guess meets all weights.

    Args:
        model: The model.

    Example:
        >>> guessed(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))[1]
        '4×784'
    """
    if _required(model) > 1:
        return None
    for sample in _samples(model):
        try:
            graph = Graph(trace(model, sample, values=False))
        except TraceError:
            continue
        if _is_complete(model, graph):
            return graph, "×".join(map(str, sample.shape))
    return None


def _required(model: nn.Module) -> int:
    """How many arguments `forward` cannot do without."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # scripted, or no Python function
        return 1
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is inspect.Parameter.empty and p.kind not in free for p in parameters)


def _samples(model: nn.Module) -> Iterator[Tensor]:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    for module in model.modules():
        if shapes := list(_shapes(module)):
            kind = torch.long if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else dtype
            yield from (torch.zeros(shape, dtype=kind, device=parameter.device) for shape in shapes)
            return


def _is_complete(model: nn.Module, graph: Graph) -> bool:
    """Whether the pass has met every weight of torch's own layers."""
    met = {id(graph.trace.parameters[v]) for station in graph.stations.values() for v in station.parameters}
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))]
    return bool(met) and all(id(weight) in met for weight in weights)


@singledispatch
def _shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that a module takes; none for what has no say in it."""
    return iter(())


@_shapes.register
def _(module: nn.Linear) -> Iterator[tuple[int, ...]]:
    return iter([(ROWS, module.in_features), (ROWS, STEPS, module.in_features)])


@_shapes.register(nn.Embedding)
@_shapes.register(nn.EmbeddingBag)
def _(module: nn.Module) -> Iterator[tuple[int, ...]]:
    return iter([(ROWS, STEPS), (ROWS,)])


@_shapes.register(nn.RNNBase)
def _(module: nn.RNNBase) -> Iterator[tuple[int, ...]]:
    return iter([(ROWS, STEPS, module.input_size)])


@_shapes.register(nn.modules.conv._ConvNd)
def _(module: nn.modules.conv._ConvNd) -> Iterator[tuple[int, ...]]:
    return ((ROWS, module.in_channels, *[side] * len(module.kernel_size)) for side in SIDES)
