"""Layers before a periodic activation, as sin(30 (W x + b)): there a scale is a frequency, not a gain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_gradhealth.init.gains import normal_nodes
from lightning_gradhealth.init.replay import Passage
from lightning_gradhealth.tracing import INPUT, Graph

LIKE = 0.25  # by which a scale may differ from the rule's and still be it
SLOW = 2.0  # below, a unit signal sees little of the waves, and the usual gain serves


@dataclass(frozen=True)
class Waves:
    """What holds for one layer that a periodic activation follows or precedes.

    Attributes:
        std: That of its weights by the rule; None: the usual gain serves.
        phase: Bound of its biases, which are uniform; None: the usual 0.
        keep: Why weights and biases that stand there now stay; "": they do not.
    """

    std: float | None = None
    phase: float | None = None
    keep: str = ""


def waves(
    graph: Graph, index: int, before: Passage, after: list[Passage], *, ends: bool, rms: float | None
) -> Waves | None:
    """The rule of Sitzmann et al. for a weight, where it applies.

    The first layer's scale is the range of frequencies that the model can show: no fan knows it, so what stands there
    stays. By the rule it is uniform within 1 / n; all others have sqrt(2 / n) / omega, for omega in sin(omega z).

    Args:
        graph: The recorded forward pass.
        index: The station of the weight.
        before: What it reads.
        after: What reads it.
        ends: Nothing that has parameters follows.
        rms: That of the weight as it is; None: nobody can read it, or nothing is kept.

    Paper: Sitzmann et al. 2020, Implicit neural representations with periodic activation functions (arXiv:2006.09661).
    """
    station = graph.stations[index]
    reads = (before.curve is not None and len(before.sources) == 1 and frequency(before.curve)) or 0.0
    mine = [passage for passage in after if passage.sources == {index} and _oscillates(passage)]
    first = not graph.sources(station.reads[0], index) - {INPUT}
    curve = next((passage.curve for passage in mine if passage.curve is not None), None)
    omega = (curve is not None and frequency(curve)) or 0.0
    phase = station.fan_in**-0.5
    if mine and first:
        keep = "" if rms is None else "frequencies of the first layer, before a periodic activation: no fan knows them"
        return Waves(1 / (math.sqrt(3) * station.fan_in) if omega > SLOW else None, phase, keep)
    factor = omega or (reads if ends else 0.0)
    if not reads or factor <= SLOW:
        return None
    std = math.sqrt(2 / station.fan_in) / factor
    like = rms is not None and (rms <= (1 + LIKE) * std if ends and not omega else abs(rms - std) <= LIKE * std)
    keep = f"as the rule for periodic activations has it: sqrt(2 / fan_in) / {factor:.3g}"
    return Waves(std, phase if omega else None, keep if like else "")


def frequency(curve: Tensor) -> float | None:
    """What a periodic function multiplies its argument by, as 30 in sin(30 z); None for a function that is none.

    It is told by its curve, which comes near both of its bounds in every quarter of [-12, 12].

    Args:
        curve: Its values at `normal_nodes()`.

    Example:
        >>> z, _ = normal_nodes()
        >>> round(frequency((30 * z).sin())), frequency(z.tanh()), frequency(z + z.sin() ** 2)
        (30, None, None)
    """
    z, _ = normal_nodes()
    middle, amplitude = float(curve.max() + curve.min()) / 2, float(curve.max() - curve.min()) / 2
    if not 0 < amplitude < math.inf:
        return None
    sides = (curve - middle) / amplitude
    for start in (-12, -6, 0, 6):
        quarter = sides[(z > start) & (z < start + 6)]
        if not (float(quarter.max()) > 0.7 and float(quarter.min()) < -0.7):
            return None
    return float((curve.diff() / z.diff()).abs().max()) / amplitude


def _oscillates(passage: Passage) -> bool:
    return passage.oscillates if passage.curve is None else frequency(passage.curve) is not None
