"""What the passages before and behind a weight say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

from lightning_gradhealth.init.gains import name_of, normal_nodes
from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.tracing import Graph, Station

FREE = 1 / math.sqrt(3)  # what torch's own layers begin with in units of 1 / sqrt(fan_in)
BEFORE_NORM = "a norm takes its scale, only its size beside the learning rate counts"
SUMMED = 1.5  # a mean square from which on several products were summed
DEVIATION = math.sqrt(0.1)  # of a factor from 1: so it adds a tenth to the variance of what it multiplies


def free_size(graph: Graph, replayer: Replayer, index: int, normed: Set[int]) -> tuple[float, str]:
    """A factor on the std of a weight whose scale the forward pass leaves open, and why; 1 where it does not.

    Behind a norm the size of a weight changes nothing but what a step of the optimizer does to it: the learning rate
    that counts is the rate over the size, or its square. Usual rates were found for layers as torch makes them, of
    variance 1 / (3 fan_in), and so the weight gets a third of the variance, too. What makes a factor near 1 for another
    signal, as adaptive norms and FiLM do, begins with small deviations from it, so that the signal is kept.

    Paper: van Laarhoven 2017 (arXiv:1706.05350) for the rate; Peebles and Xie 2023 (arXiv:2212.09748) for adaptive
    norms, which begin at 1 exactly.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.
        index: The weight's station.
        normed: What `normed` has found.
    """
    if _makes_factor(graph, replayer, index):
        return DEVIATION, "it makes a factor near 1"
    if index in normed:
        return FREE, BEFORE_NORM
    return 1.0, ""


def size_in_product(graph: Graph, replayer: Replayer, index: int, stds: Mapping[int, float]) -> tuple[float, str]:
    """A factor on the std of a weight whose outputs are multiplied with other signals and summed; 1 where they are not.

    Where a net makes the weights of another, or two of them meet in a dot product, what comes out grows with the number
    of products. The weights that make the factors share what keeps it at variance 1: made weights then have the
    variance that the formula of their own fan gives them.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.
        index: The weight's station.
        stds: Of other stations, as far as they are known.
    """
    readers = [(value, reader) for reader, value in graph.consumers[index]]
    readers += [(value, len(graph.trace.events)) for value in graph.ends.get(index, ())]
    if len(readers) != 1:
        return 1.0, ""
    value, at = readers[0]
    passage = replayer.passage(value, at)
    sources = passage.sources
    makers = [each for each in sources if each in graph.stations and _is_read_once(graph, each)]

    def moment(std: float) -> float:
        others = {each: stds.get(each, 1.0) for each in sources if each not in makers}
        return replayer.passage(value, at, {**others, **dict.fromkeys(makers, std)}).moment

    once = moment(1.0)
    if index not in makers or not passage.replayed or not SUMMED < once < math.inf:
        return 1.0, ""
    up, down = math.log(moment(2.0) / once, 4), math.log(once / max(moment(0.5), 1e-30), 4)  # of a power: its exponent
    if abs(up - down) > 0.05 or up < 0.95:
        return 1.0, ""
    product = up > 1.9 or not passage.homogeneous  # else it is a plain sum
    if not product or not all(replayer.sums_features(value, at, each) for each in makers):
        return 1.0, ""
    return once ** (-0.5 / up), "its outputs are factors of products that are summed, or weights of others"


def _is_read_once(graph: Graph, index: int) -> bool:
    return graph.stations[index].kind == "weight" and len(graph.consumers[index]) + len(graph.ends.get(index, ())) == 1


def normed(graph: Graph, replayer: Replayer) -> frozenset[int]:
    """The weights and sums that norms read, and beside them nothing but the model's end, before anything that bends.

    Where the end alone reads them, all that is put out has to be behind a norm of some kind, as cosines are.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.
    """
    end, found = len(graph.trace.events), set[int]()
    finals: dict[int, list[int]] = {}
    for value, sources in graph.final.items():
        for source in sources:
            finals.setdefault(source, []).append(value)
    for index in sorted((s for s, at in graph.stations.items() if at.kind in ("weight", "merge")), reverse=True):
        readers = [(value, reader) for reader, value in graph.consumers[index]]
        ends = [(value, end) for value in finals.get(index, ())]
        if not readers and not all(replayer.passage(*each).invariant for each in ends):
            continue  # an answer, of the size that outputs have
        if readers + ends and all(_is_normed(graph, replayer, index, *each, found) for each in readers + ends):
            found.add(index)
    return frozenset(found)


def _is_normed(graph: Graph, replayer: Replayer, index: int, value: int, reader: int, found: Set[int]) -> bool:
    """Whether a reader gets a signal whose scale is gone, or hands it on to such."""
    passage = replayer.passage(value, reader)
    if passage.invariant:
        return True
    if passage.sources != {index} or not passage.homogeneous:
        return False
    kind = graph.stations[reader].kind if reader in graph.stations else "end"
    return kind in ("norm", "end") or (kind == "merge" and reader in found)


def _makes_factor(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether what a weight gives multiplies another signal that passes without it, too: as 1 + what it gives."""
    end = [(len(graph.trace.events), value) for value in graph.ends.get(index, ())]
    for reader, value in graph.consumers[index] + end:
        passage = replayer.passage(value, reader)
        others = passage.sources - {index}
        if not others or not passage.replayed:
            continue
        alone = replayer.passage(value, reader, dict.fromkeys(others, 1e-4))
        without = replayer.passage(value, reader, {index: 1e-4})
        slope = max(without.slopes.get(other, 0.0) for other in others)
        # attention passes each position in small shares then; pooling behind a factor makes its slope small, and heavy
        # tails of the factor make the moment without it small
        kept = slope > 0.5 if passage.averages else slope > 0.1 or without.moment > 0.1 * passage.moment
        # a tie that does nothing is none, nor is a derivative of a curve
        larger = without.moment < 0.9 * passage.moment
        if kept and larger and alone.moment < 1e-4 * passage.moment:
            return True
    return False


class OneSign:
    """What weights give whose elements all have one sign, as absolute values have in monotonic networks.

    Their outputs are all alike, and a second such weight sums them in amplitude, not in variance.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.
    """

    def __init__(self, graph: Graph, replayer: Replayer) -> None:
        self._graph, self._replayer = graph, replayer
        self._alike: set[int] = set()  # the stations that give signals that are all alike

    def see(self, index: int, station: Station) -> None:
        """Take in the next station: a weight of one sign, or an addition to what one gives."""
        if station.kind == "merge":
            alike = any(self._alike & self._graph.sources(value, index) for value in station.reads)
        else:
            alike = station.kind == "weight" and self._replayer.has_one_sign(station)
        if alike:
            self._alike.add(index)

    def correlation(self, station: Station) -> float:
        """Of any two numbers that a weight reads: 1 where they are alike, otherwise what an activation's mean makes."""
        if self._alike & self._graph.sources(station.reads[0], station.event):
            return 1.0
        before = self._replayer.passage(station.reads[0], station.event)
        if before.curve is None or not before.moment:
            return 0.0
        _, weight = normal_nodes()
        return float((before.curve * weight).sum()) ** 2 / before.moment


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
