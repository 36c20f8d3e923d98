"""Residual branches: found where a recorded forward pass adds a branch to what it began from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from lightning_gradhealth.init.paths import LONGEST
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.tracing import Graph, LongPathError, Station
from lightning_gradhealth.tracing.progress import tick

MOST_SIDE_BY_SIDE = 64  # branches that one module adds to what all of them read
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
    are none; for loops that add to their state there is `loop_factors`.
    """
    uses = Counter(value for station in graph.stations.values() for value in station.parameters)
    once = graph.stations.bits(
        index
        for index, station in graph.stations.items()
        if station.kind == "weight" and all(uses[value] == 1 for value in station.parameters)
    )
    found: list[Branch] = []
    streams: dict[int, int] = {}  # for the merges of branches: the value that carries the stream in
    for done, (index, station) in enumerate(graph.stations.items()):
        tick("finding branches", done, len(graph.stations))
        if station.kind == "merge" and (longer := _longer(graph, index, station, streams)) is not None:
            branch = _branch(graph, replayer, index, station, longer, streams, once)
            if branch is not None:
                found.append(branch)
                streams[index] = station.reads[1 - longer]
    return found


def loop_factors(graph: Graph, replayer: Replayer) -> dict[int, float]:
    """What the weights at the end of `y = y + f(y)` are multiplied by where it is done N times with the same weights.

    Equal steps add up in amplitude, not in variance: each is 1 / N, as the step of an Euler scheme, unless a step that
    small is there already or a norm or a gate holds the branch.

    Args:
        graph: The recorded forward pass.
        replayer: Its replayer.

    Returns:
        The factors by station, for all uses of these weights.

    Paper: Chen et al. 2018, Neural ordinary differential equations (arXiv:1806.07366): residual blocks as Euler steps.
    """
    uses: dict[tuple[int, ...], list[int]] = {}
    for index, station in graph.stations.items():
        if station.kind == "weight":
            uses.setdefault(station.parameters, []).append(index)
    again = graph.stations.bits(index for each in uses.values() if len(each) > 1 for index in each)
    # all steps until now, by the weights that end the branch and the merge
    so_far: dict[tuple[tuple[int, ...], int], float] = {}
    whole: dict[tuple[int, ...], float] = {}
    for done, (index, station) in enumerate(graph.stations.items()):
        tick("finding loops", done, len(graph.stations))
        if station.kind == "merge" and (step := _step(graph, replayer, index, station, again)) is not None:
            parameters, state, scale = step
            # a state that was a constant at first: its first step is the first that is known of it
            first = scale if state in uses[parameters] else 0.0
            steps = so_far.get((parameters, state), first) + scale
            so_far[parameters, index] = steps
            whole[parameters] = max(whole.get(parameters, 0.0), steps if steps > scale else 0.0)
    return {index: 1 / total for parameters, total in whole.items() if total > 1 for index in uses[parameters]}


def _step(
    graph: Graph, replayer: Replayer, index: int, station: Station, again: int
) -> tuple[tuple[int, ...], int, float] | None:
    """Of a state that something made of it is added to: the weight that ends this, the state, and a factor between."""
    for side in (0, 1):
        state, ends = (graph.sources(station.reads[each], index) for each in (1 - side, side))
        if len(state) != 1 or len(ends) != 1:
            continue
        (before,), (last,) = state, ends
        reaches = graph.stations.bits((last,)) & again and graph.stations.upstream(graph.stations.bits((last,)))
        if not reaches or not reaches & graph.stations.bits((before,)):
            continue
        kept, added = (replayer.passage(station.reads[each], index) for each in (1 - side, side))
        inside = reaches & ~graph.stations.upstream(graph.stations.bits((before,))) & ~1
        held = inside & graph.stations.of_kind("norm") or _is_gated(graph, station.reads[side], index)
        if held or not (kept.linear and added.linear and 0.9 < kept.moment < 1.1):
            continue
        alpha = graph.trace.events[index].kwargs.get("alpha", 1)
        scale = math.sqrt(added.moment) * (abs(alpha) if isinstance(alpha, (int, float)) else 1.0)
        return graph.stations[last].parameters, before, scale
    return None


def _longer(graph: Graph, index: int, station: Station, streams: Mapping[int, int]) -> int | None:
    """Which side of a merge is the branch: 0 or 1; None where neither is the other's shortcut."""
    reach = [graph.stations.upstream(side) for side in _sides(graph, index, station)]
    if not reach[0] & reach[1]:
        return None
    sides = _carried(graph, index, station, reach, streams)
    carried = [not side & ~other for side, other in zip(sides, reversed(reach), strict=True)]
    if carried[0] != carried[1]:
        return carried.index(False)
    weights = graph.stations.of_kind("weight")
    own = [(reach[i] & ~reach[1 - i] & weights).bit_count() for i in (0, 1)]
    return None if own[0] == own[1] else own.index(max(own))


def _sides(graph: Graph, index: int, station: Station) -> list[int]:
    return [graph.state(value, index).sources for value in station.reads]


def _carried(graph: Graph, index: int, station: Station, reach: list[int], streams: Mapping[int, int]) -> list[int]:
    """What each side carries in, without the branches that the same module has added to it before.

    So that of an attention and an MLP side by side, both added to what they read, neither is taken for the shortcut.
    """
    module = graph.trace.events[index].module
    sides = zip(_sides(graph, index, station), reversed(reach), strict=True)
    return [_origins(graph, side, other, module, streams) for side, other in sides]


def _origins(graph: Graph, side: int, other: int, module: str, streams: Mapping[int, int]) -> int:
    """The stations of a side, those that are merges of the module's own replaced by what their streams carry in."""
    found, open_, steps = 0, list(graph.stations.decoded(side)), 0
    while open_:
        source = open_.pop()
        bit = graph.stations.bits((source,))
        steps += 1
        own = source in streams and graph.trace.events[source].module == module and not bit & (other | found)
        if own and steps <= MOST_SIDE_BY_SIDE:
            open_ += graph.sources(streams[source], source)
        else:
            found |= bit
    return found


def _branch(
    graph: Graph,
    replayer: Replayer,
    index: int,
    station: Station,
    longer: int,
    streams: Mapping[int, int],
    once: int,
) -> Branch | None:
    stations = graph.stations
    reach = [stations.upstream(side) for side in _sides(graph, index, station)]
    carried = _carried(graph, index, station, reach, streams)
    inside = reach[longer] & ~stations.upstream(carried[1 - longer]) & ~1  # 1: what comes from the inputs
    if not inside & once:  # as in most loops, whose paths grow with every step: no need to follow them
        return None
    ends = _Ends(streams.keys())
    ends.follow(graph, replayer, station.reads[longer], index, inside)
    if not ends.last or stations.bits(ends.last) & ~once:
        return None
    own = list(stations.decoded(inside & stations.of_kind("weight")))
    normed = ends.normed or bool(inside & stations.of_kind("norm"))
    normed = normed or any(_invariant(graph, replayer, s) for s in own) or _normed_after(graph, index)
    gated = _is_gated(graph, station.reads[longer], index)
    module = graph.trace.events[index].module
    return Branch(index, tuple(own), tuple(ends.last), ends.norm, normed, gated, module)


@dataclass
class _Ends:
    """The weights at the end of a branch, the norm behind them, and whether a norm by hand is on the way."""

    joined: Set[int]  # the merges of branches inside: what they end with is theirs
    last: list[int] = field(default_factory=list)
    norm: int | None = None
    normed: bool = False
    seen: set[int] = field(default_factory=set)

    def follow(self, graph: Graph, replayer: Replayer, value: int, at: int, inside: int) -> None:
        """Go back from a value to the weights that nothing but norms and additions separates from it."""
        open_ = [(value, at)]
        while open_:
            value, at = open_.pop()
            passage = replayer.passage(value, at)
            self.normed = self.normed or passage.invariant
            if len(passage.sources) > 1 and not (passage.homogeneous or passage.invariant):
                continue  # a product of several signals, of which no single weight is the end
            near = graph.state(value, at).sources & inside
            for source in sorted(set(graph.stations.decoded(near)) - self.seen - self.joined):
                self.seen.add(source)
                station = graph.stations[source]
                if station.kind == "weight":
                    self.last.append(source)
                elif station.kind in ("norm", "merge"):
                    self.norm = source if station.kind == "norm" and self.norm is None else self.norm
                    open_ += [(read, source) for read in reversed(station.reads)]


def _invariant(graph: Graph, replayer: Replayer, index: int) -> bool:
    """Whether a weight reads its signal through a norm that is written by hand."""
    return any(replayer.passage(value, index).invariant for value in graph.stations[index].reads)


def _normed_after(graph: Graph, merge: int) -> bool:
    consumers = graph.consumers[merge]
    return bool(consumers) and all(graph.stations[target].kind == "norm" for target, _ in consumers)


def _is_gated(graph: Graph, value: int, at: int) -> bool:
    """Whether a parameter multiplies the branch on its way to the addition."""
    try:
        events, _ = graph.between(value, at, LONGEST)
    except LongPathError:
        return False
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
