"""Weights between a transform and its inverse, as those of Fourier layers: what the one scales the other undoes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.tracing import VIEWS, Graph, Station

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
    if not trace.dtypes[read].is_complex:
        return None
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
