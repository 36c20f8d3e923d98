"""What a recorded forward pass does between stations, and how to do it again with other numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lightning_gradhealth.tracing import INPUT, VIEWS, Event, Graph, Ref, Station

MANY = 1 << 17  # numbers that need no better order than a random one
LONGEST = 1 << 12  # operations of a path that is replayed
CORRELATION = 0.5  # of neighbouring positions: within a factor of 2 of both extremes, whatever is pooled
_CPU = torch.device("cpu")  # one place, so that the gains are the same to the last bit
PRODUCTS = {"mm", "bmm", "baddbmm"}
# what a replay may raise: operations of other devices or that vmap refuses, values that are not here
UNREPLAYABLE = (RuntimeError, ValueError, TypeError, IndexError, KeyError)
_ELEMENTWISE = {"copy", "_prelu_kernel"}  # without torch's tag


class Path:
    """The events from the stations behind a value to that value."""

    def __init__(self, graph: Graph, value: int, at: int, stds: dict[int, float]) -> None:
        self.graph, self.trace = graph, graph.trace
        self.value = value
        self.events, self.sources = graph.between(value, at, LONGEST)
        self.stds = {source: std for source, std in stds.items() if source in self.sources and std != 1.0}
        self.order = sorted(self.sources)
        self.runs = 0
        self._averages: int | None = None
        self.filled: set[int] = set()  # memory that the signal is written into
        self._live = {self.trace.base[value] for source in self.sources for value in self.begins(source)}
        for index in self.events:
            if self.is_live(self.trace.events[index]):
                self.filled.update(self.trace.base[value] for value in self.trace.events[index].writes)
                self._live.update(self.trace.base[value] for value in self.trace.events[index].outputs)

    def is_live(self, event: Event) -> bool:
        """Whether an event reads what depends on the signal."""
        return any(self.trace.base[value] in self._live for value in event.reads)

    def operations(self) -> tuple[str, ...]:
        """Names of what is done to the signal, without views."""
        events = [self.trace.events[index] for index in self.events]
        return tuple(event.name for event in events if self.is_live(event) and event.name not in VIEWS)

    def is_elementwise(self) -> bool:
        """Whether nothing on the way mixes elements of the signal or selects among them."""
        for index in self.events:
            event = self.trace.events[index]
            if self.is_live(event):
                like = event.name.endswith("_like")
                if not (
                    like or event.name in VIEWS or torch.Tag.pointwise in event.func.tags or event.name in _ELEMENTWISE
                ):
                    return False
        return True

    def offset(self, source: int, *, flat: bool = False) -> Tensor | float:
        """What a bias that is kept adds to the signal of a weight; `flat`: as one number, or a ValueError."""
        station = self.graph.stations.get(source)
        kept = [value for value in (station.bias if station is not None else ()) if value in self.graph.kept]
        if not kept:
            return 0.0
        bias = self.trace.parameters[kept[0]].detach().to("cpu", torch.float32)
        if flat:
            if not bool((bias == bias.flatten()[0]).all()):
                raise ValueError("not the same for all elements")
            return float(bias.flatten()[0])
        shape = self.trace.shapes[self.begins(source)[0]]
        if bias.dim() == 1 and "conv" in self.trace.events[source].name:
            return bias.view(-1, *[1] * (len(shape) - 2))
        return bias

    def averages(self) -> int:
        """Over how many positions the last product of two signals sums; 0 without one."""
        if self._averages is None:
            self._averages = self._averaged()
        return self._averages

    def _averaged(self) -> int:
        found = 0
        for index in self.events:
            event = self.trace.events[index]
            if event.name not in PRODUCTS:
                continue
            active = [value for value in event.reads if self.graph.state(value, index).sources]
            if len(active) > 1:
                found = self.trace.shapes[active[-2]][-1]
        return found

    def begins(self, source: int) -> list[int]:
        """The values that a source gives."""
        values = self.trace.inputs if source == INPUT else self.trace.events[source].outputs
        return [value for value in values if self.trace.holds_signal(value)]

    def numel(self) -> int:
        """Number of elements of the value at the end."""
        return math.prod(self.trace.shapes[self.value])

    def is_whole(self) -> bool:
        """Whether the value has as many elements as what its one source gives."""
        if len(self.order) != 1:
            return False
        (first, *_) = self.begins(self.order[0])
        return math.prod(self.trace.shapes[first]) == self.numel()

    def total(self) -> int:
        """Number of elements of all values on the way."""
        return sum(
            math.prod(self.trace.shapes[value]) for index in self.events for value in self.trace.events[index].outputs
        )

    def largest(self) -> int:
        """Number of elements of the largest value on the way."""
        values = [value for index in self.events for value in self.trace.events[index].outputs]
        return max((math.prod(self.trace.shapes[value]) for value in [*values, self.value]), default=0)

    def key(self) -> Any:
        """Equal for paths that do the same to signals of the same shapes."""
        numbers: dict[int, int] = {}

        def local(value: int) -> Any:
            if value in self.trace.parameters:
                return self._fingerprint(self.trace.parameters[value])
            if value in self.trace.constants:
                return self._fingerprint(self.trace.constants[value])
            return numbers.setdefault(value, len(numbers)), self.trace.shapes[value]

        parts: list[Any] = []
        for index in sorted({*self.events, *self.order}):
            if index == INPUT:
                parts += [("input", local(value)) for value in self.trace.inputs]
                parts.append(("scale", self.stds.get(INPUT, 1.0)))
                continue
            event = self.trace.events[index]
            outputs = tuple(map(local, event.outputs))
            if index in self.sources:
                station = self.graph.stations[index]
                biases = tuple(local(value) for value in station.bias if value in self.graph.kept)
                parts.append(("source", outputs, self.stds.get(index, 1.0), channel_axis(self.graph, index), biases))
                continue
            parts.append((event.form, tuple(map(local, event.reads)), outputs))
        return (*parts, local(self.value))

    def _fingerprint(self, tensor: Tensor) -> Any:
        """Tells tensors of different values apart, as far as that is cheap."""
        tensor = self.trace.by_class.get(id(tensor), tensor)
        if tensor.numel() <= 8 and not tensor.is_meta and type(tensor).__name__ != "FakeTensor":
            return "values", tuple(tensor.shape), tuple(tensor.detach().flatten().tolist())
        return "tensor", id(tensor)


class WeightPath(Path):
    """The events from parameters to the weight that they make."""

    def __init__(self, graph: Graph, station: Station, events: list[int]) -> None:
        self.graph, self.trace = graph, graph.trace
        self.value = -1 if station.operand is None else station.operand
        self.events, self.sources, self.stds, self.order, self._live = events, frozenset(), {}, [], set()
        self.runs, self.filled, self._averages = 0, set(), None


class Run:
    """One execution of a path.

    Args:
        path: The path.
        dtype: The precision.
        given: The signals that it begins with, by value.
        flat: Everything is a function of one number, whatever its shape.
        zero: A 0 that depends on the signals, for all draws at once: memory that they are written into must, too.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        given: Callable[[int], Tensor],
        *,
        flat: bool = False,
        zero: Tensor | None = None,
    ) -> None:
        self._zero = zero
        self._path, self._trace, self._graph = path, path.trace, path.graph
        self._dtype, self._given, self._flat = dtype, given, flat
        self._values: dict[int, Any] = {}

    def result(self, known: Mapping[int, Tensor] | None = None) -> Tensor:
        """The value at the end of the path, where some values are given."""
        self._path.runs += 1
        self._values.update(known or {})
        for index in sorted({*self._path.events, *self._path.sources}):
            if index in self._path.sources:
                self._values.update((value, self._given(value)) for value in self._path.begins(index))
            else:
                self._execute(self._trace.events[index])
        result = self._look_up(self._path.value)
        if not isinstance(result, Tensor):
            raise TypeError("the path ends in no tensor")
        return result

    def _execute(self, event: Event) -> None:
        reads = event.reads
        if self._flat and reads and event.name in VIEWS:
            self._values.update(dict.fromkeys(event.outputs, self._look_up(reads[0])))
            return
        if event.name == "constant_pad_nd" and not self._flat and self._path.is_live(event):
            output = _padded(*self._given_to(event.args))
        else:
            output = event.func(*self._given_to(event.args), **self._given_to(event.kwargs))
        results = [output] if isinstance(output, Tensor) else [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if self._flat and not self._path.is_live(event):
            results = [self._collapsed(result) for result in results]
        if self._path.filled:
            results = [self._fillable(v, result) for v, result in zip(event.outputs, results, strict=True)]
        self._values.update(zip(event.outputs, results, strict=True))

    def _given_to(self, part: Any) -> Any:
        """Arguments, with the values that their references stand for, in the replay's precision and place."""
        if isinstance(part, Ref):
            return self._look_up(part.value)
        if type(part) in (tuple, list):
            return type(part)(map(self._given_to, part))
        if type(part) is dict:
            return {key: self._given_to(item) for key, item in part.items()}
        if isinstance(part, torch.dtype):
            return self._dtype if part.is_floating_point else part
        return _CPU if isinstance(part, torch.device) else part

    def _look_up(self, value: int) -> Any:
        if value not in self._values:
            known: Tensor | None = self._trace.parameters.get(value)
            known = self._trace.constants.get(value, known)
            known = self._trace.inputs.get(value, known)
            if known is None:
                raise KeyError(f"value {value} is not on the path")
            real = self._real(known)
            if value in self._graph.biases and value not in self._graph.kept:  # they begin at 0, whatever they hold now
                real.zero_()
            self._values[value] = self._collapsed(real) if self._flat else self._fillable(value, real)
        return self._values[value]

    def _fillable(self, value: int, tensor: Tensor) -> Tensor:
        """Memory with room for all draws, where the signal is going to be written into it."""
        own = value in self._path.filled and value not in self._values and self._trace.base[value] == value
        return tensor + self._zero.to(tensor.dtype) if own and self._zero is not None else tensor

    def _real(self, tensor: Tensor) -> Tensor:
        """A copy to work on, in the replay's precision and place."""
        tensor = self._trace.by_class.get(id(tensor), tensor)
        if tensor.is_meta:  # no values: a scale that does nothing
            return torch.ones(tensor.shape, dtype=self._dtype, device=_CPU)
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(_CPU, dtype, copy=True)

    def _collapsed(self, tensor: Tensor) -> Tensor:
        """A tensor of equal elements as a scalar, which goes with any shape."""
        if tensor.dim() and tensor.numel():
            first = tensor.flatten()[0]
            if not bool((tensor == first).all()):
                raise ValueError("not the same for all elements")
            return first.clone()
        return tensor


def _padded(signal: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    """A signal with zeros around it: of its own scale there too, since the positions that count have no other.

    Zeros beside features (two axes) are zeros that the next weight sums, and stay.
    """
    if value != 0 or signal.dim() < 3 or signal.is_complex() or not signal.numel():
        return functional.pad(signal, list(pad), value=value)
    places = functional.pad(torch.arange(signal.numel(), device=_CPU).view(signal.shape), list(pad), value=-1)
    around = torch.arange(places.numel(), device=_CPU).view(places.shape) % signal.numel()
    return signal.flatten()[torch.where(places < 0, around, places)]


def noise(path: Path, source: int, value: int, draws: int, generator: torch.Generator) -> Tensor:
    """Normal numbers, shape (draws, *shape of the value); those of one channel at several positions are correlated."""
    shape, std = path.trace.shapes[value], path.stds.get(source, 1.0)
    if path.trace.dtypes[value].is_complex:
        return std * torch.randn((draws, *shape), generator=generator, device=_CPU, dtype=torch.complex64)
    numbers = _normal((draws, *shape), generator)
    channel = channel_axis(path.graph, source)
    if channel is None or len(shape) < 3 or path.averages():  # what attention averages is followed apart
        return std * numbers
    common_shape = [size if axis in (0, channel % len(shape)) else 1 for axis, size in enumerate(shape)]
    common = _normal((draws, *common_shape), generator)
    return std * (math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * numbers)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal quantiles in random order: as random as normal numbers, their moments far less so."""
    numel = math.prod(shape)
    if numel > MANY:  # so many that the order of quantiles would cost more than it gains
        return torch.randn(shape, generator=generator, device=_CPU)
    order = torch.randperm(numel, generator=generator, device=_CPU)
    return _quantiles(numel)[order].view(shape)


@functools.lru_cache(4)
def _quantiles(number: int) -> Tensor:
    quantiles: Tensor = torch.special.ndtri((torch.arange(number, dtype=torch.float64) + 0.5) / max(number, 1))
    return quantiles.float()


def channel_axis(graph: Graph, source: int) -> int | None:
    """The axis of the features in what a station gives; all others but the first are positions."""
    if source == INPUT:
        return None
    name = graph.trace.events[source].name
    return 1 if "conv" in name or "batch_norm" in name or "group_norm" in name else -1
