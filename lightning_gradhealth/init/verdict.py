"""What the predicted flow gives reason to warn of, with a remedy that fits the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_gradhealth.init.flow import Flow
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.residual import find_branches
from lightning_gradhealth.ratios import fitted_gain
from lightning_gradhealth.records import DepthPoint
from lightning_gradhealth.tracing import Graph

LIMIT = 1e3  # factor in RMS from the first weight to the last: beyond it the first layers learn next to nothing
STEEP = 10.0  # the same where it comes from every layer: it then grows with depth
GAIN = 2.0  # per weight, up or down, from which on it counts as coming from every layer
FEW = 4  # weights, below which no gain per weight can be fitted
LOUD = 10.0  # RMS of outputs with which a softmax is one-hot and a squared loss in the hundreds
UNSTABLE = 10.0  # by which a small deviation of the scale may grow


@dataclass(frozen=True)
class Verdict:
    """Judges a predicted flow.

    Attributes:
        graph: The recorded forward pass.
        replayer: Its replayer.
        flow: The prediction.
    """

    graph: Graph
    replayer: Replayer
    flow: Flow

    def of_signal(self, points: Sequence[DepthPoint], signal: Sequence[float]) -> list[str]:
        """A note where the signal, in units of what is meant, changes too much from the first weight to the last."""
        found = _change([(point.name, size) for point, size in zip(reversed(points), reversed(signal), strict=True)])
        if found is None:
            return []
        last, first, change = found
        sizes = {point.name: point.forward or 0.0 for point in points}
        said = (
            f"the signal is predicted to change by a factor of {sizes[last] / sizes[first]:.2g} from {first} to {last}"
        )
        if not self._has_norms():
            return [f"{said}; put {self._missing()} between"]
        down = ', or scale the branches down by residual="depth"' if change > 1 and self._has_branches() else ""
        return [f"{said}: it has normalisation layers, but not on all of that way; put one where it changes{down}"]

    def of_gradients(self, points: Sequence[DepthPoint], balance: Sequence[float]) -> list[str]:
        """A note where gradients change too much from the last weight to the first."""
        found = _change([(point.name, size) for point, size in zip(points, balance, strict=True)])
        if found is None:
            return []
        first, last, change = found
        verb = "vanish" if change < 1 else "explode"
        said = f"gradients are predicted to {verb}: at {first} they are {change:.2g} of those at {last}"
        if not self._has_norms():
            return [f"{said}; use ReLU-like activations, or put {self._missing()} between"]
        if self._has_branches():
            return [f"{said}; put the norms at the beginning of the residual branches, with nothing but sums between"]
        return [f"{said}: its normalisation layers do not prevent it; put residual connections around them"]

    def _missing(self) -> str:
        """What a model without norms may need."""
        return "normalisation layers" + ("" if self._has_branches() else " or residual connections")

    def _has_branches(self) -> bool:
        return bool(find_branches(self.graph, self.replayer))

    def _has_norms(self) -> bool:
        return any(station.kind == "norm" for station in self.graph.stations.values())

    def of_loud_outputs(self, stds: Mapping[int, float], names: Mapping[int, str]) -> list[str]:
        """A note where a weight at the end of the model gives far more than 1."""
        ends = {s for sources in self.graph.final.values() for s in sources & self.graph.stations.keys()}
        ends = {s for s in ends if self.graph.stations[s].kind == "weight" and not self.graph.consumers[s]}
        loudest = max(sorted(ends), key=lambda s: self.flow.moments[s], default=None)
        if loudest is None or not LOUD**2 < self.flow.moments[loudest] < math.inf:
            return []
        known = [self.graph.trace.parameters[value] for value in self.graph.stations[loudest].parameters]
        drawn = next((parameter for parameter in known if id(parameter) in stds), None)
        if drawn is None:
            return []
        rms = math.sqrt(self.flow.moments[loudest])
        return [
            f"the outputs are predicted to have an RMS of {rms:.3g}: scale the last layer down by"
            f' overrides=[("{names.get(id(drawn), "")}", {{"std": {stds[id(drawn)] / rms:.2g}}})]'
        ]

    def of_sensitivity(self) -> list[str]:
        """A note where the activations make small deviations of the scale grow with depth."""
        largest = max(self.flow.sensitivity.values(), default=0.0)
        if not largest > UNSTABLE:
            return []
        chi_q, name = self.flow.steepest
        where = "there, too," if self._has_norms() else "between,"
        return [
            f"no gain holds the scale through this depth: a deviation of 1 % in the first variance becomes about"
            f" {largest:.0f} % ({name} has chi_q {chi_q:.3g}, and above 1 they grow with depth); put normalisation"
            f" layers {where} or calibrate"
        ]


def _change(sizes: Sequence[tuple[str, float]]) -> tuple[str, str, float] | None:
    """Where something begins and arrives, and by what factor it changes, if that is far from 1; None otherwise.

    Args:
        sizes: Root mean squares at the weights by name, where it arrives first; 0 (what a gate or a zero weight has
            shut off for now) does not count.
    """
    open_ = [(name, size) for name, size in sizes if 0 < size < math.inf]
    if len(open_) < 2:
        return None
    (end, arrived), (start, sent) = open_[0], open_[-1]
    gain = fitted_gain([size for _, size in open_])
    steady = len(open_) >= FEW and gain is not None and not 1 / GAIN <= gain <= GAIN
    limit = STEEP if steady else LIMIT
    return None if 1 / limit < arrived / sent < limit else (end, start, arrived / sent)
