"""Weights of which a part of the scale lies elsewhere: in a transform around them, or in a constant behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.tracing import VIEWS, Graph, Station, Trace

FEW = 8  # terms of which the root is more than what an activation takes
_LINEAR = {"mul", "div", "neg", "copy"}  # among the operations that work by elements


def moment_before_transform(
    graph: Graph, replayer: Replayer, station: Station, passage: Callable[[int, int], Passage]
) -> float | None:
    """The mean square that a weight on complex numbers makes up for: that of the real signal that was transformed.

    What passes of the signal is the model's own matter: white noise, of which only a few modes are kept, is not what
    such models see, and the transform's scale is undone behind the weight.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.
        station: A weight.
        passage: What becomes of a signal, at its scale, on its way to a value as an event reads it.

    Returns:
        It; None where the weight reads real numbers, or what is not linear in what was transformed.
    """
    trace = graph.trace
    (read, *_) = station.reads
    (given, *_) = trace.events[station.event].outputs
    if not (trace.dtypes[read].is_complex and trace.dtypes[given].is_complex):
        return None  # where real numbers come out, the inverse is a part of the operation
    events, _ = graph.between(read, station.event)
    steps = [index for index in events if graph.sources(trace.events[index].outputs[0], index + 1)]
    complex_ = [index for index in steps if trace.dtypes[trace.events[index].outputs[0]].is_complex]
    for index in complex_:
        event = trace.events[index]
        if torch.Tag.pointwise in event.func.tags and event.name not in (VIEWS | _LINEAR):
            return None
    entered = {
        (value, index)
        for index in complex_
        for value in trace.events[index].reads
        if not trace.dtypes[value].is_complex and trace.holds_signal(value) and graph.sources(value, index)
    }
    if not entered:
        return replayer.passage(read, station.event).moment
    return sum(passage(value, index).moment for value, index in entered) / len(entered)


def normalised_behind(trace: Trace, station: Station, after: Sequence[Passage]) -> bool:
    """Whether the model itself divides the products of a weight by about the root of their number, and means it.

    Then a weight of variance 1 is meant, as in networks in the parametrisation of the neural tangent kernel. A constant
    alone may be there by chance: the weight has to have that variance, which torch gives to none of its layers.

    Args:
        trace: The recorded forward pass.
        station: A weight.
        after: What becomes of its output on the way to each reader.
    """
    (value, *more) = station.parameters
    weight = trace.parameters[value].detach()
    if more or weight.is_meta or station.fan_in < FEW or weight.numel() < FEW:
        return False
    if not _near(math.sqrt(float(weight.abs().double().square().mean())), 0.8):
        return False
    scales = [math.sqrt(passage.moment * station.fan_in) for passage in after if _keeps_scale(passage)]
    return bool(scales) and len(scales) == len(after) and all(0.2 < scale < 1.5 for scale in scales)


def _keeps_scale(passage: Passage) -> bool:
    """Whether it tells how large a signal is: neither a norm nor shares lie between."""
    shares = any("softmax" in name for name in passage.operations)
    return passage.replayed and not (passage.invariant or passage.averages or shares)


def _near(value: float, share: float) -> bool:
    return share < value < 1 / share
