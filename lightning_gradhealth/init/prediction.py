"""What becomes of signal and gradient over depth, given the standard deviations of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_gradhealth.init.curves import correlated, scale, sensitivity, shifted
from lightning_gradhealth.init.flow import Flow
from lightning_gradhealth.init.gains import name_of, normal_nodes
from lightning_gradhealth.init.recurrence import input_layer
from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.init.verdict import Verdict
from lightning_gradhealth.records import DepthPoint
from lightning_gradhealth.tracing import INPUT, Graph, Station
from lightning_gradhealth.tracing.progress import tick

NOTHING = 1e-9  # mean in units of the RMS: what quadrature leaves of the mean of an odd activation
_SIGNS = {"sub": (1, -1), "rsub": (-1, 1)}


class Prediction:
    """Propagates variances through a recorded forward pass, forward and back.

    Args:
        graph: The recording.
        replayer: Its replayer.
        given: Mean squares of what lookups give, and each layer of recurrent modules.
        scales: What the forward pass multiplies a weight by on its way, by station; 1 for those that are missing.
        factors: What the scale of a norm is multiplied by, by station; 1 for those that are missing.
        composed: Of a weight that is made of several parameters, by station: its root mean square for given ones of
            these, by value.
        meant: The standard deviation that a weight's output is meant to have, by station; 1 for those that are missing.

    Paper: Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232).
    """

    def __init__(
        self,
        graph: Graph,
        replayer: Replayer,
        given: Mapping[int, tuple[float, ...]],
        scales: Mapping[int, float] | None = None,
        factors: Mapping[int, float] | None = None,
        composed: Mapping[int, Callable[[Mapping[int, float]], float | None]] | None = None,
        meant: Mapping[int, float] | None = None,
    ) -> None:
        self._graph, self._replayer, self._given = graph, replayer, dict(given)
        self._scales, self._factors = dict(scales or {}), dict(factors or {})
        self._composed, self._meant = dict(composed or {}), dict(meant or {})
        self._shifted: dict[tuple[int, float, float], tuple[Passage, Passage]] = {}

    def __call__(
        self, stds: Mapping[int, float], names: Mapping[int, str]
    ) -> tuple[tuple[DepthPoint, ...], tuple[str, ...]]:
        """Predict what every weight gives, and say what is wrong with it.

        Args:
            stds: Standard deviation of every weight, by the identity of the parameter.
            names: Names of the parameters, by identity.
        """
        self._replayer.allow(0.25)  # no weight depends on it
        left = self._replayer.left
        flow = self.flow(stds)
        if self._replayer.left > left:
            return (), (
                "the signal over depth is not predicted: the forward pass is too long; a shorter sample may help",
            )
        found: dict[str, tuple[int, float]] = {}
        for index, station in self._graph.stations.items():
            for value, moment in self._given_by(index, station, stds, flow):
                found.setdefault(names.get(id(self._graph.trace.parameters[value]), ""), (index, math.sqrt(moment)))
        at = [index for index, _ in found.values()]
        gradients, balance = _relative(flow.gradients, at), _relative(flow.balance, at)
        points = [
            DepthPoint(name=name, forward=forward, backward=gradient, target=forward)
            for (name, (_, forward)), gradient in zip(found.items(), gradients, strict=True)
        ]
        signal = [forward / (self._meant.get(index) or 1.0) for index, forward in found.values()]
        verdict = Verdict(self._graph, self._replayer, flow)
        warned = [
            *verdict.of_signal(points, signal),
            *verdict.of_gradients(points, balance),
            *verdict.of_loud_outputs(stds, names),
            *verdict.of_sensitivity(),
        ]
        return tuple(points), tuple(warned)

    def _given_by(self, index: int, station: Station, stds: Mapping[int, float], flow: Flow) -> list[tuple[int, float]]:
        """The weights of a station, by value, with the mean squares of their products."""
        if station.kind == "weight":
            return [(station.parameters[-1], flow.moments[index])]
        if station.kind != "unit":
            return []
        below = self._passages(station, index, flow)
        read = (below[0].moment if below else 1.0, *self._given[index])
        found = []
        for value in station.parameters:
            parameter = self._graph.trace.parameters[value]
            std, layer = stds.get(id(parameter)), input_layer(self._graph, index, value)
            if std is not None and layer is not None:
                found.append((value, std * std * parameter.shape[1] * read[layer]))
        return found

    def flow(self, stds: Mapping[int, float]) -> Flow:
        """Mean squares of signal and gradient at every station.

        Args:
            stds: Standard deviation of every weight, by the identity of the parameter.
        """
        flow = Flow()
        for done, (index, station) in enumerate(self._graph.stations.items()):
            tick("predicting the signal", done, len(self._graph.stations))
            self._forward(index, station, stds, flow)
        flow.gradients = self._backward(stds, flow, balanced=False)
        flow.balance = self._backward(stds, flow, balanced=True)
        return flow

    # --- forward ---

    def _passages(self, station: Station, at: int, flow: Flow) -> list[Passage]:
        return [self._passage(value, at, flow) for value in station.reads]

    def _passage(self, value: int, at: int, flow: Flow, scale: float = 1.0) -> Passage:
        """What becomes of the signal, or of `scale` times the signal, on its way to a value."""
        sources = self._graph.sources(value, at)
        stds = {s: math.sqrt(flow.moments[s] * scale**2) for s in sources if s != INPUT}
        passage = self._replayer.passage(value, at, stds)
        if passage.curve is None or not any(flow.means.get(source) for source in sources):
            return passage
        (source,) = passage.sources
        key = id(passage), flow.means[source] * scale, stds[source]
        if key not in self._shifted:  # a loop asks the same at every step; the passage is kept, so that its id is
            self._shifted[key] = passage, shifted(passage, passage.curve, flow.means[source] * scale, stds[source])
        return self._shifted[key][1]

    def _forward(self, index: int, station: Station, stds: Mapping[int, float], flow: Flow) -> None:
        read = [_arriving(passage, flow) for passage in self._passages(station, index, flow)]
        flow.moments[index] = self._given.get(index, (1.0,))[-1]
        flow.means[index] = 0.0
        flow.alike[index] = read[0].alike if read and station.kind != "lookup" else 0.0
        flow.sensitivity[index] = 0.0
        if station.kind == "weight":
            std = self._std(station, stds)
            if std is not None:
                flow.moments[index] = std * std * station.fan_in * read[0].moment
            flow.sensitivity[index] = self._sensitivity(station.reads[0], index, flow)
        elif station.kind == "norm":
            flow.moments[index] = self._factors.get(index, 1.0) ** 2
        elif station.kind == "merge":
            self._merge(index, station, read, flow)

    def _merge(self, index: int, station: Station, read: Sequence[_Arriving], flow: Flow) -> None:
        signs = _SIGNS.get(self._graph.trace.events[index].name, (1, 1))
        means = [sign * part.mean for sign, part in zip(signs, read, strict=True)]
        both = 2 * math.prod(means)  # E[2ab] of independent a and b, at one position as between two
        total = math.fsum(part.moment for part in read) + both
        common = math.fsum(part.moment * part.alike for part in read) + both
        flow.moments[index], flow.means[index] = total, math.fsum(means)
        flow.alike[index] = common / total if total > 0 else 0.0
        deviations = [self._sensitivity(value, index, flow) for value in station.reads]
        parts = [(part.moment + both / 2) * by for part, by in zip(read, deviations, strict=True)]
        flow.sensitivity[index] = math.fsum(parts) / total if total > 0 else 0.0

    def _std(self, station: Station, stds: Mapping[int, float]) -> float | None:
        found = {value: stds.get(id(self._graph.trace.parameters[value])) for value in station.parameters}
        known = {value: std for value, std in found.items() if std is not None}
        if station.event in self._composed:
            made = self._composed[station.event](known)
        else:
            made = next(iter(known.values()), None)
        return None if made is None else made * self._scales.get(station.event, 1.0)

    def _sensitivity(self, value: int, at: int, flow: Flow) -> float:
        """How much a relative deviation of the first variance has become: the product of chi_q on the way."""
        passage = self._passage(value, at, flow)
        inherited = max((flow.sensitivity.get(source, 1.0) for source in passage.sources), default=1.0)
        if passage.invariant or passage.curve is None or passage.homogeneous:
            return 0.0 if passage.invariant else inherited
        if any(flow.means.get(source) for source in passage.sources):
            up, down = (self._passage(value, at, flow, factor**0.5).moment for factor in (1.1, 1 / 1.1))
            if not (up > 0 and down > 0):
                return inherited
            chi_q = math.log(up / down) / math.log(1.21)
        else:
            chi_q = sensitivity(passage.curve)
        if chi_q > flow.steepest[0]:
            flow.steepest = chi_q, name_of(passage.curve) or "+".join(passage.operations[:3])
        return inherited * chi_q

    # --- back ---

    def _backward(self, stds: Mapping[int, float], flow: Flow, *, balanced: bool) -> dict[int, float]:
        """Mean square of the gradient at every station.

        Args:
            stds: Standard deviation of every weight, by the identity of the parameter.
            flow: The signal.
            balanced: Where a path scales with its signal, gradients change as the signal does, whatever is pooled: the
                product of the two is kept from end to end.
        """
        gradients: dict[int, float] = dict.fromkeys(self._graph.stations, 0.0)

        def send(value: int, at: int, sent: float, receivers: Iterable[int]) -> None:
            passage = self._passage(value, at, flow)
            for source in receivers:
                slope = passage.slopes.get(source, 1.0)
                if balanced and passage.homogeneous and passage.curve is None and len(passage.sources) == 1:
                    before = flow.moments[source]
                    slope = passage.moment / before if before > 0 else 1.0
                gradients[source] += sent * slope

        end = len(self._graph.trace.events)
        for value, sources in self._graph.final.items():
            send(value, end, 1.0, [s for s in sources & gradients.keys() if not self._graph.consumers[s]])
        for index in sorted(self._graph.stations, reverse=True):
            station = self._graph.stations[index]
            sent = gradients[index] * self._back(index, station, stds, flow)
            for value in station.reads:
                send(value, index, sent, self._graph.sources(value, index) & gradients.keys())
        return gradients

    def _back(self, index: int, station: Station, stds: Mapping[int, float], flow: Flow) -> float:
        """What the mean square of a gradient is multiplied by from a station's output to what it reads."""
        if station.kind == "weight":
            std = self._std(station, stds)
            return 1.0 if std is None else std * std * station.fan_out
        if station.kind == "norm":
            read = self._normed(index, station, flow)
            return self._factors.get(index, 1.0) ** 2 / read if read > 0 else 0.0
        return 0.0 if station.kind == "lookup" else 1.0

    def _normed(self, index: int, station: Station, flow: Flow) -> float:
        """The mean square that a norm divides by."""
        passage = self._passage(station.reads[0], index, flow)
        if "rms" in self._graph.trace.events[index].name or not any(flow.means.get(s) for s in passage.sources):
            return passage.moment
        return passage.moment - _arriving(passage, flow).mean ** 2


@dataclass(frozen=True)
class _Arriving:
    """Mean square of what a station reads, its correlation between positions (about 0, as it is a part), its mean."""

    moment: float
    alike: float
    mean: float = 0.0


def _arriving(passage: Passage, flow: Flow) -> _Arriving:
    """What arrives behind a passage, averages over correlated positions included."""
    alike = max((flow.alike.get(source, 0.0) for source in passage.sources), default=0.0)
    mean = _mean(passage, flow)
    if passage.curve is not None:
        (source,) = passage.sources
        return _Arriving(passage.moment, correlated(passage.curve, _about_mean(source, alike, flow)), mean)
    if not passage.averages or not passage.replayed:
        return _Arriving(passage.moment, alike, mean)
    # Of n independent positions the average has a share of the variance, at least 1/n; what all have in common stays.
    share = min(max(passage.moment, 1 / passage.averages), 1.0)
    kept = alike + (1 - alike) * share
    return _Arriving(passage.moment * kept / share, (alike + (1 - alike) / passage.averages) / kept)


def _mean(passage: Passage, flow: Flow) -> float:
    """The mean of what arrives: exact behind an activation, a guess behind what mixes elements as a pool does."""
    if len(passage.sources) != 1:
        return 0.0
    (source,) = passage.sources
    before, square = flow.means.get(source, 0.0), flow.moments.get(source, 1.0)
    if passage.curve is None:
        keeps = passage.homogeneous and passage.replayed and not passage.averages
        return before * math.sqrt(passage.moment / square) if keeps and square > 0 else 0.0
    _, weight = normal_nodes()
    mean = float((passage.curve * weight).sum()) * math.sqrt(scale(passage, passage.curve))
    return mean if abs(mean) > NOTHING * math.sqrt(passage.moment) else 0.0


def _about_mean(source: int, alike: float, flow: Flow) -> float:
    """The correlation of a source's deviations from its mean, given that of the whole."""
    mean, moment = flow.means.get(source, 0.0), flow.moments.get(source, 1.0)
    variance = moment - mean * mean
    if not mean or variance <= 0:
        return alike
    return min(max((alike * moment - mean * mean) / variance, 0.0), 1.0)


def _relative(squares: Mapping[int, float], at: Sequence[int]) -> list[float]:
    """Roots of mean squares at some stations, relative to the last of them that is not 0."""
    roots = [math.sqrt(squares[index]) for index in at]
    last = next((root for root in reversed(roots) if root > 0), 1.0)
    return [root / last for root in roots]
