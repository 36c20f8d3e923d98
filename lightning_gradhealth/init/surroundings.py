"""What the passages before and behind a weight say about it."""

from __future__ import annotations

import math

from lightning_gradhealth.init.gains import name_of, normal_nodes
from lightning_gradhealth.init.replay import Passage


def made_up_for(passage: Passage) -> float:
    """The variance that makes up for what a rectifier takes from it, as He's sqrt 2 does for ReLU.

    Only for what it takes: a constant or a gate, such as a LayerScale of 1e-6, is the model's own wish.
    """
    if passage.linear or passage.moment < 1e-24:
        return 1.0
    if passage.curve is None:
        return 1 / passage.moment
    z, _ = normal_nodes()
    steepest = float((passage.curve / z)[z != 0].abs().max())
    return steepest * steepest / passage.moment


def steepness_of(passage: Passage) -> float | None:
    """The constant a by which an odd, bounded activation like sin(a z) stretches its argument; None near 1."""
    if passage.curve is None or not passage.saturates or not passage.slope_at_zero:
        return None
    steepness = passage.slope_at_zero / float(passage.curve.abs().max())
    return steepness if not 2 / 3 < steepness < 3 / 2 else None


def output_gain(before: Passage) -> float:
    """1, the plain 1 / fan_in; where a constant scales what an output layer reads, as T5 does, what makes up for it."""
    scaled = before.linear and before.whole and before.operations and before.moment > 1e-12
    return 1 / math.sqrt(before.moment) if scaled else 1.0


def how_found(before: Passage, after: list[Passage]) -> str:
    """How a gain was found, by the least exact of the passages that it rests on."""
    passages = [before, *after[:1]]
    if not all(passage.replayed for passage in passages):
        return "assumed"
    if not all(passage.curve is not None or not passage.operations for passage in passages):
        return "replayed"
    exact = all(passage.homogeneous for passage in passages)
    return "closed form" if exact else "quadrature"


def what_follows(after: list[Passage]) -> str:
    """What follows a weight, with the gain of it."""
    for passage in after:
        if passage.operations and not (passage.linear and abs(passage.moment - 1) < 1e-6):
            name = (name_of(passage.curve) if passage.curve is not None else "") or _short(passage.operations)
            moment = passage.moment
            return f"{name} {moment**-0.5:.4g}" if 0 < moment < math.inf else name
    return ""


def _short(operations: tuple[str, ...]) -> str:
    names = [name.strip("_").removesuffix("_with_indices") for name in operations]
    return "+".join(names[:3]) + ("+…" if len(names) > 3 else "")


def scheme_for(before: Passage, after: list[Passage], gain: float) -> str:
    """The name that the field has for the choice; it decides which fan is taken."""
    if any(passage.saturates and len(passage.sources) == 1 for passage in after):
        return "xavier"
    bends = any(not passage.linear for passage in (before, *after))
    return "he" if bends and abs(gain - 1) > 1e-3 else "lecun"
