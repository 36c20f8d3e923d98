"""Deep chains of saturating activations without norms: there no gain that keeps the signal lets gradients through."""

from __future__ import annotations

from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.tracing import INPUT, Graph

DEEP = 20  # activations in a row: tanh's gradients then differ by 1.178 ** 20 = 26 in variance from end to end
EDGE = (
    1.0306**0.5
)  # times 1 / f'(0): just above the edge of chaos for tanh (Xiao et al. 2018), whose signal stays alive


def critical_gains(graph: Graph, replayer: Replayer) -> dict[int, float]:
    """Gains of the weights in deep chains of odd, saturating activations, by station.

    At variance 1 such a chain is chaotic: chi_1 is above 1 (1.178 for tanh), gradients explode and inputs that are
    alike come out unlike. At the edge of chaos, with orthogonal weights, thousands of layers train.

    Args:
        graph: The recording.
        replayer: Its replayer.

    Paper: Xiao et al. 2018, Dynamical isometry and a mean field theory of CNNs (arXiv:1806.05393); Pennington et al.
    2017 (arXiv:1711.04735).
    """
    slopes: dict[int, float] = {}  # of what follows a weight
    above: dict[int, int] = {}  # the weight before, through a saturating activation
    for index, station in graph.stations.items():
        if station.kind != "weight":
            continue
        passage = replayer.passage(station.reads[0], index)
        slope = _slope(passage)
        if slope is not None:
            (above[index],) = passage.sources
            slopes[above[index]] = slope
    depth: dict[int, int] = {}
    for index in sorted({*above, *slopes}):
        depth[index] = depth.get(above.get(index, INPUT), 0) + 1
    for index in sorted(above, reverse=True):  # all of a chain learn how long it is
        depth[above[index]] = max(depth[above[index]], depth[index])
    return {index: EDGE / slope for index, slope in slopes.items() if depth[index] > DEEP}


def _slope(passage: Passage) -> float | None:
    """The slope at 0 of an odd, saturating activation that one weight alone goes through; None for anything else."""
    if not passage.saturates or len(passage.sources) != 1 or INPUT in passage.sources:
        return None
    return passage.slope_at_zero or None
