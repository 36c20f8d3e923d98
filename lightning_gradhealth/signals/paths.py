"""The paths of the signal, read off the autograd graph that a forward pass has recorded anyway.

Nothing is traced or run twice: functional activations, merges and the order of the layers all stand in the graph.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradhealth.signals.kinds import shown_name
from lightning_gradhealth.signals.returns import LEAF

HOPS = 12  # operations between a merge and the module that reads it: activation, dropout, views, casts
# what leaves the size of a signal alone, but for a factor near 1: behind a merge it can stand for it
_PASSING = {
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Unsqueeze", "Squeeze", "Expand", "Clone"),
    *("ToCopy", "NativeDropout", "Alias", "Relu", "Gelu", "Silu", "LeakyRelu", "Elu", "Mish", "Hardswish"),
    "RegisterPostBackwardFunction",  # FSDP2 sends the inputs of its modules through this
}
NEAR = 1_000  # nodes between two calls of a cell that are looked through
_SUMS = {"Add", "Sub"}
PRODUCTS = {"Mul"}
MATRIX_PRODUCTS = {"Bmm", "Mm", "Baddbmm"}
_APPLYING = {*MATRIX_PRODUCTS, "Addmm", "Mv", "Addmv", "Linear", "Convolution"}  # a matrix to a signal
VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Expand", "Clone", "ToCopy", "NativeDropout"}
_SHAPES = {*VIEWS, "T", "Unsqueeze", "Squeeze", "Alias"}


class Paths:
    """The part of the graph that carries the signal, from the measured points on.

    A node carries the signal if it is a point or comes from one; the others compute weights. Through its *dominator*
    all paths to a node go: the points among the dominators of the deepest one are the main chain.

    Example:
        >>> import torch
        >>> paths = Paths()
        >>> x = torch.ones(2, requires_grad=True) * 1
        >>> _ = paths.mark(x.grad_fn, 0)
        >>> y = x + torch.relu(x)
        >>> _ = paths.mark(y.grad_fn, 1)
        >>> _ = list(paths.extend([y]))
        >>> paths.chain([0, 1])
        [0, 1]
    """

    def __init__(self) -> None:
        self.points: dict[Node, int] = {}
        self.consumers: dict[Node, list[Node]] = {}
        self._hidden: set[Node] = set()  # points that are not on any chain: further calls of a shared module
        self._carries: dict[Node, bool] = {}
        self._walked: set[Node] = set()  # on the way to the leaves
        self._signals: dict[Node, list[Node]] = {}
        self._dominator: dict[Node, Node | None] = {}
        self._depth: dict[Node, int] = {}
        self._sizes: dict[Node, int] = {}  # elements of the points
        # signals that come from different inputs meet in the larger one: what steers a net is smaller than what runs
        # through it, as the embedding of a time, or a bias of attention
        self._root: dict[Node, Node] = {}
        self._above: dict[Node, Node | None] = {}  # the nearest point among the dominators, the node itself included
        self._rank: dict[Node, int] = {}  # number of points among its dominators, itself included

    def mark(self, node: Node | None, point: int, *, size: int = 0, hidden: bool = False) -> bool:
        """Say that a node's result is a measured point; False where there is no node, or it is one already."""
        if node is None or node in self.points:
            return False
        self.points[node] = point
        self._sizes[node] = size
        self._carries[node] = True
        if hidden:
            self._hidden.add(node)
        return True

    def with_more(self, points: Mapping[Node, int], ends: Iterable[Tensor]) -> Paths:
        """The same points and some more, with all that leads to `ends`.

        Args:
            points: The numbers of the others.
            ends: What the paths lead to.
        """
        whole = Paths()
        for node, point in {**self.points, **points}.items():
            whole.mark(node, point, size=self._sizes.get(node) or size_of(node), hidden=node in self._hidden)
        list(whole.extend(ends))
        return whole

    def is_hidden(self, node: Node) -> bool:
        """Whether a point is a further call of a shared module."""
        return node in self._hidden

    def leaves(self, node: Node | None) -> Iterator[Node]:
        """The leaves of the graph behind a node that have not been given yet."""
        open_ = [node]
        while open_:
            current = open_.pop()
            if current is None or current in self._walked:
                continue
            self._walked.add(current)
            if current.name() == LEAF:
                yield current
            open_ += [before for before, _ in current.next_functions]

    # --- what a node is ---

    def carries(self, node: Node | None) -> bool:
        """Whether a node carries the signal: a point is among those that it comes from."""
        if node is None:
            return False
        known = self._carries
        open_ = [node]
        while open_:
            current = open_[-1]
            if current in known:
                open_.pop()
                continue
            before = [other for other, _ in current.next_functions if other is not None]
            unknown = [other for other in before if other not in known]
            if unknown:
                open_ += unknown
            else:
                known[current] = any(known[other] for other in before)
                open_.pop()
        return known[node]

    def sources(self, node: Node) -> list[Node]:
        """The nodes that carry the signal in, each once."""
        known = self._signals.get(node)
        if known is None:
            known = list(dict.fromkeys(other for other, _ in node.next_functions if other and self.carries(other)))
            self._signals[node] = known
        return known

    def behind_merge(self, node: Node | None) -> bool:
        """Whether a tensor is the sum of two signals, but for what hardly changes its size, and no point yet."""
        for _ in range(HOPS):
            if node is None or node in self.points:
                return False
            name = shown_name(node)
            sources = self.sources(node)
            if name in _SUMS and len(sources) > 1:
                return True
            if len(sources) != 1 or name not in (*_PASSING, *_SUMS, *PRODUCTS):
                return False
            node = sources[0]
        return False

    # --- new parts of the graph ---

    def extend(self, outputs: Iterable[Tensor]) -> Iterator[Node]:
        """Take in what leads to `outputs` and is not known yet; gives the nodes that carry the signal, in order."""
        new: list[Node] = []
        open_: list[tuple[Node, bool]] = [(output.grad_fn, False) for output in outputs if output.grad_fn is not None]
        while open_:
            node, done = open_.pop()
            if done:
                if node not in self._dominator:
                    self._place(node)
                    new.append(node)
            elif node not in self._dominator and self.carries(node):
                open_.append((node, True))
                open_ += [(source, False) for source in self.sources(node)]
        return iter(new)

    def _place(self, node: Node) -> None:
        sources = self.sources(node)
        for source in sources:
            self.consumers.setdefault(source, []).append(node)
        dominator = sources[0] if sources else None
        for source in sources[1:]:
            if dominator is not None and self._root[source] is not self._root[dominator]:
                dominator = max(dominator, source, key=lambda node: self._sizes.get(self._root[node], 0))
            else:
                dominator = self._common(dominator, source)
        self._root[node] = node if dominator is None else self._root[dominator]
        self._dominator[node] = dominator
        self._depth[node] = 0 if dominator is None else self._depth[dominator] + 1
        is_point = node in self.points and node not in self._hidden
        above = None if dominator is None else self._above[dominator]
        self._above[node] = node if is_point else above
        self._rank[node] = (0 if above is None else self._rank[above]) + is_point

    def _common(self, one: Node | None, other: Node | None) -> Node | None:
        while one is not other:
            if one is None or other is None:
                return None
            if self._depth[one] >= self._depth[other]:
                one = self._dominator[one]
            else:
                other = self._dominator[other]
        return one

    def feeding(self, nodes: Iterable[Node], *, but: Container[Node] = ()) -> set[Node]:
        """Those of `nodes` (in order, as `extend` gives them) from which a point follows that is not among `but`."""
        found: set[Node] = set()
        for node in reversed(list(nodes)):
            followers = self.consumers.get(node, ())
            if any(after in found or (after in self.points and after not in but) for after in followers):
                found.add(node)
        return found

    # --- what is asked ---

    def leads_back(self, node: Node | None, point: int) -> bool:
        """Whether what a node gives comes from a point not far before it."""
        open_, seen = deque([] if node is None else [node]), set[Node]()
        while open_ and len(seen) < NEAR:
            for before, _ in open_.popleft().next_functions:
                if before is None or before in seen:
                    continue
                if self.points.get(before) == point:
                    return True
                seen.add(before)
                open_.append(before)
        return False

    def point_before(self, node: Node) -> int | None:
        """The nearest point from which the first of the signals in a node comes; its own, if it is one."""
        current: Node | None = node
        while current is not None:
            if current in self.points:
                return self.points[current]
            current = next(iter(self.sources(current)), None)
        return None

    def point_after(self, node: Node) -> int | None:
        """The nearest point that follows a node."""
        current: Node | None = node
        while current is not None:
            current = next(iter(self.consumers.get(current, ())), None)
            if current in self.points:
                return self.points[current]
        return None

    def chain(self, wanted: Iterable[int]) -> list[int]:
        """The points on every path to the deepest end of the network among the `wanted` ones, from the input on."""
        # where further calls of modules on the chain are all that follows, that is the end
        allowed, inner = set(wanted), self.feeding(self._dominator, but=self._hidden)
        points = [n for n, point in self.points.items() if point in allowed and n in self._rank]
        ends = [node for node in points if node not in inner and node not in self._hidden]
        end: Node | None = max(ends, key=self._rank.__getitem__, default=None)
        found: list[int] = []
        while end is not None:
            found.append(self.points[end])
            dominator = self._dominator[end]
            end = None if dominator is None else self._above[dominator]
        return list(dict.fromkeys(reversed(found)))

    def predecessors(self) -> dict[int, int]:
        """For every point the nearest one that all of its signal comes through, where there is one."""
        found: dict[int, int] = {}
        for node, point in self.points.items():
            dominator = self._dominator.get(node)
            above = None if dominator is None else self._above[dominator]
            if above is not None and self.points[above] != point:
                found.setdefault(point, self.points[above])
        return found

    def follows(self, node: Node, names: set[str], through: set[str]) -> list[Node]:
        """The consumers of a node with one of `names`, seen through those with a name in `through`."""
        found: list[Node] = []
        open_ = list(self.consumers.get(node, ()))
        while open_:
            consumer = open_.pop()
            name = shown_name(consumer)
            if name in names:
                found.append(consumer)
            elif name in through:
                open_ += self.consumers.get(consumer, ())
            else:
                found.append(consumer)
        return found


def size_of(node: Any) -> int:
    """The number of elements that a node has given.

    Example:
        >>> import torch
        >>> size_of(torch.ones(2, 3, requires_grad=True).exp().grad_fn)
        6
    """
    return math.prod(node._input_metadata[0].shape)


class Applied(NamedTuple):
    """A matrix that a module applies by hand.

    Attributes:
        name: The parameter, by its clean path.
        owner: The module that holds it.
        module: That module itself.
    """

    name: str
    owner: str
    module: nn.Module


class Matrices:
    """Where the graph of a step applies matrices that no module of their own applies.

    What such a matrix reads becomes a point, of which the gradient alone is measured: autograd keeps no more. What two
    of them read, and one that is applied again and again, tells of none of them.

    Attributes:
        points: The number of the site of what a matrix reads.
        readers: The matrix that reads it; None where there are several.
        ends: What the forward passes have given, and the loss.

    Example:
        >>> import torch
        >>> held, x = nn.ParameterList(torch.eye(2) for _ in range(3)), torch.ones(1, 2)
        >>> known = {id(p): Applied(f"{place}", "", held) for place, p in enumerate(held)}
        >>> [applied.name for _, applied in Matrices().look([x @ held[0] @ held[1] @ held[2]], known)]
        ['2', '1']
    """

    def __init__(self) -> None:
        self.points: dict[Node, int] = {}
        self.readers: dict[Node, Applied | None] = {}
        self.ends: list[Tensor] = []
        self._walked: set[Node] = set()
        self._counts: dict[str, int] = {}

    def look(self, ends: Iterable[Tensor], known: Mapping[int, Applied]) -> Iterator[tuple[Node, Applied]]:
        """What the matrices read in the part of the graph that has not been walked yet.

        Args:
            ends: What the graph leads to.
            known: The matrices, by identity.
        """
        if not known:
            return
        new = [end for end in ends if end.grad_fn is not None]
        self.ends += new
        open_ = [end.grad_fn for end in new]
        while open_:
            node = open_.pop()
            if node is None or node in self._walked:
                continue
            self._walked.add(node)
            open_ += [before for before, _ in node.next_functions]
            found = _applied(node, known) if shown_name(node) in _APPLYING else None
            if found is None:
                continue
            read, applied = found
            count = self._counts[applied.name] = self._counts.get(applied.name, 0) + 1
            is_new = read not in self.readers
            self.readers[read] = applied if is_new else None
            if is_new and count == 1:
                yield read, applied

    def crossed(self, paths: Paths, returned: Iterable[int]) -> tuple[tuple[int, ...], dict[int, Applied]]:
        """The chain of all points, and those of them that are what one matrix reads.

        Args:
            paths: With the points that modules give.
            returned: The points that a gradient has come back to.
        """
        if not self.readers:
            return (), {}
        chain = paths.with_more(self.points, self.ends).chain(returned)
        points = {**self.points, **{node: point for node, point in paths.points.items() if node in self.readers}}
        once = {node: one for node, one in self.readers.items() if one is not None and self._counts[one.name] == 1}
        return tuple(chain), {points[node]: applied for node, applied in once.items() if points[node] in chain}


def _applied(node: Any, known: Mapping[int, Applied]) -> tuple[Node, Applied] | None:
    """What a product reads, and the matrix that it applies; None where it is not one matrix and one signal."""
    ways = [_through(before, place) for before, place in node.next_functions if before is not None]
    leaves = [before.variable for before, _ in ways if before.name() == LEAF]
    signals = [(before, place) for before, place in ways if before.name() != LEAF]
    mine = [known[id(leaf)] for leaf in leaves if id(leaf) in known]
    if len(mine) != 1 or len(signals) != 1 or signals[0][1] != 0:
        return None
    return signals[0][0], mine[0]


def _through(node: Any, place: int) -> tuple[Any, int]:
    """A node and which of its results, seen through what only reshapes it."""
    while shown_name(node) in _SHAPES:
        before = [(other, number) for other, number in node.next_functions if other is not None]
        if len(before) != 1:
            break
        node, place = before[0]
    return node, place
