"""Residual branches: found where a recorded forward pass adds a branch to what it began from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.tracing import Graph, Station

RESIDUAL = ("auto", "none", "depth", "zero_last", "fixup")


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        merge: The station where it is added.
        weights: Its weights in order of use.
        last: Those of them whose outputs are added, with nothing but a norm or another addition between.
        norm: The norm at its end, if there is one.
        normed: A norm lies in the branch, or directly behind the addition.
        gated: A parameter scales the branch: LayerScale, ReZero, a gate.
        module: Path of the module that adds.
    """

    merge: int
    weights: tuple[int, ...]
    last: tuple[int, ...]
    norm: int | None
    normed: bool
    gated: bool
    module: str


def find_branches(graph: Graph, replayer: Replayer) -> list[Branch]:
    """All residual branches of a forward pass, in order.

    Additions of towers that nothing joins, and those inside a loop over time that uses one weight again and again,
    are none.
    """
    uses = Counter(value for station in graph.stations.values() for value in station.parameters)
    found: list[Branch] = []
    streams: dict[int, int] = {}  # for the merges of branches: the value that carries the stream in
    for index, station in graph.stations.items():
        if station.kind == "merge" and (longer := _longer(graph, index, station, streams)) is not None:
            branch = _branch(graph, replayer, index, station, longer, streams, uses)
            if branch is not None:
                found.append(branch)
                streams[index] = station.reads[1 - longer]
    return found


def _longer(graph: Graph, index: int, station: Station, streams: Mapping[int, int]) -> int | None:
    """Which side of a merge is the branch: 0 or 1; None where neither is the other's shortcut."""
    reach = _reach(graph, _sides(graph, index, station))
    if not reach[0] & reach[1]:
        return None
    sides = _carried(graph, index, station, reach, streams)
    carried = [side <= other for side, other in zip(sides, reversed(reach), strict=True)]
    if carried[0] != carried[1]:
        return carried.index(False)
    own = [len(_weights(graph, reach[i] - reach[1 - i])) for i in (0, 1)]
    return None if own[0] == own[1] else own.index(max(own))


def _sides(graph: Graph, index: int, station: Station) -> list[frozenset[int]]:
    return [graph.sources(value, index) for value in station.reads]


def _reach(graph: Graph, sides: list[frozenset[int]]) -> list[frozenset[int]]:
    return [side.union(*(graph.ancestors[source] for source in side)) for side in sides]


def _carried(
    graph: Graph, index: int, station: Station, reach: list[frozenset[int]], streams: Mapping[int, int]
) -> list[frozenset[int]]:
    """What each side carries in, without the branches that the same module has added to it before.

    So that of an attention and an MLP side by side, both added to what they read, neither is taken for the shortcut.
    """
    module = graph.trace.events[index].module

    def origin(source: int, other: Set[int]) -> frozenset[int]:
        if source in other or source not in streams or graph.trace.events[source].module != module:
            return frozenset((source,))
        return frozenset().union(*(origin(s, other) for s in graph.sources(streams[source], source)))

    sides = zip(_sides(graph, index, station), reversed(reach), strict=True)
    return [frozenset().union(*(origin(source, other) for source in side)) for side, other in sides]


def _branch(
    graph: Graph,
    replayer: Replayer,
    index: int,
    station: Station,
    longer: int,
    streams: Mapping[int, int],
    uses: Mapping[int, int],
) -> Branch | None:
    reach = _reach(graph, _sides(graph, index, station))
    shortcut = _reach(graph, _carried(graph, index, station, reach, streams))[1 - longer]
    inside = (reach[longer] - shortcut) & graph.stations.keys()
    own = _weights(graph, inside)
    ends = _Ends(streams.keys())
    ends.follow(graph, replayer, station.reads[longer], index, inside)
    if not ends.last or any(uses[value] > 1 for last in ends.last for value in graph.stations[last].parameters):
        return None
    normed = ends.normed or any(graph.stations[s].kind == "norm" for s in inside)
    normed = normed or any(_invariant(graph, replayer, s) for s in own) or _normed_after(graph, index)
    gated = _is_gated(graph, station.reads[longer], index)
    module = graph.trace.events[index].module
    return Branch(index, tuple(own), tuple(ends.last), ends.norm, normed, gated, module)


def _weights(graph: Graph, stations: Set[int]) -> list[int]:
    return sorted(s for s in stations if s in graph.stations and graph.stations[s].kind == "weight")


@dataclass
class _Ends:
    """The weights at the end of a branch, the norm behind them, and whether a norm by hand is on the way."""

    joined: Set[int]  # the merges of branches inside: what they end with is theirs
    last: list[int] = field(default_factory=list)
    norm: int | None = None
    normed: bool = False
    seen: set[int] = field(default_factory=set)

    def follow(self, graph: Graph, replayer: Replayer, value: int, at: int, inside: Set[int]) -> None:
        """Go back from a value to the weights that nothing but norms and additions separates from it."""
        passage = replayer.passage(value, at)
        self.normed = self.normed or passage.invariant
        if len(passage.sources) > 1 and not (passage.homogeneous or passage.invariant):
            return  # a product of several signals, of which no single weight is the end
        for source in sorted((graph.sources(value, at) & inside) - self.seen - self.joined):
            self.seen.add(source)
            station = graph.stations[source]
            if station.kind == "weight":
                self.last.append(source)
            elif station.kind in ("norm", "merge"):
                self.norm = source if station.kind == "norm" and self.norm is None else self.norm
                for read in station.reads:
                    self.follow(graph, replayer, read, source, inside)


def _invariant(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether a weight reads its signal through a norm that is written by hand."""
    return any(replayer.passage(value, index).invariant for value in graph.stations[index].reads)


def _normed_after(graph: Graph, merge: int) -> bool:
    consumers = graph.consumers[merge]
    return bool(consumers) and all(graph.stations[target].kind == "norm" for target, _ in consumers)


def _is_gated(graph: Graph, value: int, at: int) -> bool:
    """Whether a parameter multiplies the branch on its way to the addition."""
    events, _ = graph.between(value, at)
    for index in events:
        event = graph.trace.events[index]
        states = [graph.state(read, index) for read in event.reads]
        if event.name == "mul" and any(state.parameters and not state.active for state in states):
            return True
    return False


def resolve(residual: str, branches: list[Branch]) -> str:
    """What `residual="auto"` comes to: nothing where norms or gates hold the branches, else "depth"."""
    if residual != "auto":
        return residual
    return "depth" if any(not (branch.normed or branch.gated) for branch in branches) else "none"


def blocks(branches: list[Branch]) -> int:
    """The number of residual blocks: a module that adds twice, as a transformer layer does, is one."""
    adds = Counter(branch.module for branch in branches)
    return sum(1 if count == 2 else count for count in adds.values())


def factors(residual: str, branches: list[Branch], *, auto: bool) -> dict[int, float]:
    """What the std of a weight, or the scale of a norm, is multiplied by, by station.

    "depth": `1 / sqrt(2 N)` for N blocks, so that N branches together add 1/2 to the variance. "zero_last": 0.
    "fixup": `N ** (-1 / (2 m - 2))` for all weights but the last of a branch of m, 0 for the last. A branch that ends
    in a norm is scaled by the norm's weight, since the norm would undo any other scale.

    Args:
        residual: "none", "depth", "zero_last" or "fixup".
        branches: The branches.
        auto: Only those without norm and gate.

    Paper: Radford et al. 2019 (GPT-2) for the depth; Goyal et al. 2017 (arXiv:1706.02677) for the zero;
    Zhang et al. 2019 (arXiv:1901.09321) for Fixup.
    """
    if residual == "none":
        return {}
    chosen = [branch for branch in branches if not (auto and (branch.normed or branch.gated))]
    number = blocks(chosen)
    found: dict[int, float] = {}
    for branch in chosen:
        ends = branch.last if branch.norm is None else (branch.norm,)
        found.update(dict.fromkeys(ends, 1 / math.sqrt(2 * number) if residual == "depth" else 0.0))
        if residual == "fixup":
            inner = [weight for weight in branch.weights if weight not in branch.last]
            exponent = -1 / (2 * max(len(branch.weights), 2) - 2)
            found.update(dict.fromkeys(inner, number**exponent))
    return found
