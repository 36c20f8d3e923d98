"""The stations of a recording, and sets of them: loops make so many that each is a bit of one integer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

INPUT = -1  # the source that stands for the model's inputs


@dataclass(frozen=True)
class Station:
    """Where a new signal begins: a weight, a lookup, a recurrent unit, a norm or a merge of two signals.

    Attributes:
        event: Index of the event.
        kind: "weight", "lookup", "unit", "norm" or "merge".
        reads: The values that carry the signal in: one, or for a merge the two that are added.
        parameters: The parameters behind the weight, by value; for a norm, its scale and shift.
        operand: The value that is the weight as the operator saw it; None for merges, norms and units.
        fan_in: Terms that an output sums (weights only).
        fan_out: Terms that the gradient of an input sums (weights only).
        scale: What the operator itself multiplies the products by, as a mean does (weights only).
        bias: The parameters added by the same operator.
    """

    event: int
    kind: str
    reads: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    operand: int | None = None
    fan_in: float = 1.0
    fan_out: float = 1.0
    scale: float = 1.0
    bias: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    """What is known of a value: whether it carries the signal, from which stations, and which parameters are in it.

    The stations are bits, see `Stations`.
    """

    active: bool = False
    sources: int = 0
    parameters: frozenset[int] = frozenset()


NOTHING = State()


def joined(states: Iterable[State]) -> State:
    """What is known of a value that is made of others."""
    first: State = NOTHING
    for state in states:
        if first is NOTHING or first is state:
            first = state
        elif state is not NOTHING:
            first = State(
                first.active or state.active,
                first.sources | state.sources,
                first.parameters
                if not state.parameters or first.parameters is state.parameters
                else first.parameters | state.parameters,
            )
    return first


class Stations(dict[int, Station]):
    """Stations by the index of their event, in order; sets of them (and of INPUT) are bits of one number.

    Example:
        >>> stations = Stations()
        >>> stations.add(Station(3, "norm", ()), near=1)
        >>> stations.add(Station(7, "weight", ()), near=stations.bits([3]))
        >>> list(stations.decoded(stations.upstream(stations.bits([7]))))
        [-1, 3, 7]
    """

    def __init__(self) -> None:
        super().__init__()
        self._order: list[int] = [INPUT]  # by their bit
        self._bit: dict[int, int] = {INPUT: 1}
        self._above: dict[int, int] = {INPUT: 0}
        self._kinds: dict[str, int] = {}
        self._sets: dict[int, frozenset[int]] = {}

    def add(self, station: Station, near: int) -> None:
        """Take in the next station.

        Args:
            station: The station.
            near: Those that it reads, with no other between.
        """
        bit = 1 << len(self._order)
        self[station.event] = station
        self._order.append(station.event)
        self._bit[station.event] = bit
        self._kinds[station.kind] = self.of_kind(station.kind) | bit
        self._above[station.event] = self.upstream(near)

    def bits(self, stations: Iterable[int]) -> int:
        """Stations as a set."""
        found = 0
        for station in stations:
            found |= self._bit[station]
        return found

    def decoded(self, bits: int) -> Iterator[int]:
        """The stations of a set, in order."""
        while bits:
            lowest = bits & -bits
            yield self._order[lowest.bit_length() - 1]
            bits ^= lowest

    def named(self, bits: int) -> frozenset[int]:
        """The stations of a set, as one of their indices."""
        if bits not in self._sets:
            self._sets[bits] = frozenset(self.decoded(bits))
        return self._sets[bits]

    def of_kind(self, kind: str) -> int:
        """The set of all stations of one kind."""
        return self._kinds.get(kind, 0)

    def upstream(self, bits: int) -> int:
        """A set, and all stations from which its signals come, near and far."""
        found = bits
        for station in self.decoded(bits):
            found |= self._above[station]
        return found
