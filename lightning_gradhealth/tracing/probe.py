"""What an operator does with a parameter, found out by calling it: no operator is known by name.

The recorded operations are run again on random numbers of their recorded shapes. An output that depends on several
elements of the parameter, in a product with the signal, is a contraction: the parameter is a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_gradhealth.tracing.record import Event, Ref, Trace

MANY = 1 << 11  # elements of one operand above which the operator is tried at smaller sizes
TOO_MANY = 1 << 24  # and above which it is not tried at all
SAMPLES = 24  # elements whose reach is looked at
STEPS = 1 << 12  # elements of a weight that are all changed, one after the other, where there are no derivatives
SMALL = 8  # sizes up to it stay as they are
SAME = 1e-4  # of the largest element: what rounding may differ by in single precision
_CPU = torch.device("cpu")
# what an operator may raise that is given what it was not made for
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """What operations do with a parameter and a signal.

    Attributes:
        kind: "product" (linear in both, and several elements of the parameter are summed), "elementwise" (an output
            reads one element of it), "sum" (it is added to what the signal gives), "unknown".
        fan_in: Elements of the parameter that an output reads, on average.
        fan_out: Outputs that an element of the signal reaches, on average.
        scale: What the products are multiplied by.
        why: Of an unknown use: what is known.
    """

    kind: str
    fan_in: float = 1.0
    fan_out: float = 1.0
    scale: float = 1.0
    why: str = ""


def use_of(function: Function, data: Tensor, weight: Tensor) -> Use:
    """What a function does with a weight.

    Args:
        function: Of the signal and the weight.
        data: A signal: of its shape and kind random numbers are taken.
        weight: The same for the weight.

    Raises:
        RuntimeError: Or what else the function raises.

    Example:
        >>> use_of(lambda x, w: torch.einsum("bi,eoi->beo", x, w), torch.empty(2, 3), torch.empty(4, 5, 3))
        Use(kind='product', fan_in=3.0, fan_out=20.0, scale=1.0, why='')
        >>> use_of(torch.mul, torch.empty(2, 3), torch.empty(3)).kind
        'elementwise'
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def signs(like: Tensor) -> Tensor:
        """Numbers of size 1, so that the size of a product is that of its factor."""
        return torch.randint(0, 2, like.shape, generator=generator, device=_CPU).mul(2).sub(1).to(like.dtype)

    def numbers(like: Tensor) -> Tensor:
        """Numbers of which none is near 0 and no sum of a few is 0."""
        return signs(like) * (1 + torch.rand(like.shape, generator=generator, device=_CPU)).to(like.dtype)

    x, w = numbers(data), numbers(weight)
    slopes = _slopes(function, x, w)
    if not slopes.number:  # as coordinates beyond the edge read nothing
        slopes = _slopes(function, x / 4, w)
        x = x / 4
    if not slopes.number:
        return Use("unknown", why="what it gives does not depend on it")
    if slopes.number <= slopes.outputs:
        return Use("elementwise")

    def mixed(x: Tensor, w: Tensor) -> Tensor:
        """The part of the function that depends on both."""
        none, nothing = torch.zeros_like(x), torch.zeros_like(w)
        return function(x, w) - function(none, w) - function(x, nothing) + function(none, nothing)

    with torch.no_grad():
        first = mixed(x, w)
        bound = SAME * float(function(x, w).abs().max()) + 1e-12
        if float(first.abs().max()) <= bound:
            return Use("sum")
        other_x, other_w = numbers(data), numbers(weight)
        in_x = mixed(x + 2 * other_x, w) - first - 2 * mixed(other_x, w)
        in_w = mixed(x, w + 2 * other_w) - first - 2 * mixed(x, other_w)
        bound = 10 * SAME * float(first.abs().max())
        if not (float(in_x.abs().max()) <= bound and float(in_w.abs().max()) <= bound):
            return Use("unknown", why="neither linear in it nor element by element")
        reached = _reached(mixed, x, w)
    size = math.sqrt(_slopes(function, signs(data), w).square / slopes.number)
    if weight.is_complex() and not first.is_complex():
        size /= math.sqrt(2)  # one part of a number has half of its variance
    return Use("product", slopes.number / slopes.outputs, reached, size)


class _Slopes(NamedTuple):
    """How many elements of the weight some outputs read, how many outputs that are, and the squares of the slopes."""

    number: float
    outputs: int
    square: float


def _slopes(function: Function, x: Tensor, w: Tensor) -> _Slopes:
    try:
        with torch.enable_grad():
            leaf = w.clone().requires_grad_()
            values = function(x, leaf).flatten()
            rows = [
                torch.autograd.grad(values[at], leaf, torch.ones_like(values[at]), retain_graph=True)[0].abs().double()
                for at in _some(values.numel())
            ]
    except _REFUSALS:  # an operator without a derivative
        return _steps(function, x, w)
    bound = SAME * max((float(row.max()) for row in rows if row.numel()), default=0.0)
    read = [row[row > bound] for row in rows if bool((row > bound).any())]
    return _Slopes(sum(map(len, read)), len(read), sum(float(row.square().sum()) for row in read))


def _steps(function: Function, x: Tensor, w: Tensor) -> _Slopes:
    """The same for all outputs, from what a step of one element changes."""
    with torch.no_grad():
        base, flat = function(x, w), w.flatten()
        bound = SAME * float(base.abs().max()) + 1e-12
        places = _some(len(flat), STEPS if len(flat) <= STEPS else 8 * SAMPLES)
        hit = torch.zeros(base.shape, dtype=torch.bool) if len(places) == len(flat) else base.abs() > bound
        number, square = 0, 0.0
        for at in places:
            step = flat.clone()
            step[at] += 1
            change = (function(x, step.view_as(w)) - base).abs().double()
            hit = hit | (change > bound)
            number, square = number + int((change > bound).sum()), square + float(change[change > bound].square().sum())
    share = len(places) / max(len(flat), 1)
    return _Slopes(number / share, int(hit.sum()), square / share) if number else _Slopes(0.0, 0, 0.0)


def _reached(mixed: Function, x: Tensor, w: Tensor) -> float:
    """How many outputs an element of the signal reaches, on average."""
    found = []
    for at in _some(x.numel()):
        one = torch.zeros_like(x).flatten()
        one[at] = 1
        value = mixed(one.view_as(x), w).abs()
        if (reached := int((value > SAME * float(value.max())).sum())) and float(value.max()) > 0:
            found.append(reached)
    return sum(found) / len(found) if found else 1.0


def _some(number: int, most: int = SAMPLES) -> list[int]:
    """Places among many, all over them; all of few."""
    if number <= most:
        return list(range(number))
    generator = torch.Generator("cpu").manual_seed(1)
    return sorted(set(torch.randint(0, number, (most,), generator=generator, device=_CPU).tolist()))


class Prober:
    """Finds out what the operations of a recording do with parameters; each kind of operation is tried once.

    Args:
        trace: The recording.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: dict[Any, Use] = {}

    def use(self, events: Sequence[Event], data: int, weight: int) -> Use:
        """What a chain of operations does with a weight.

        Args:
            events: The operations: the first reads data and weight, each other what the one before gives.
            data: The value that carries the signal.
            weight: The value that is the weight.
        """
        key = (data == weight, tuple(self._key(event, data, weight) for event in events))
        if key not in self._known:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                self._known[key] = self._tried(events, data, weight)
        return self._known[key]

    def _key(self, event: Event, data: int, weight: int) -> Any:
        def local(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return repr(leaf)
            held = self._held(leaf.value)
            values = tuple(held.flatten().tolist()) if held is not None and held.numel() <= SMALL else id(held)
            role = "data" if leaf.value == data else "weight" if leaf.value == weight else values
            return role, self._trace.shapes[leaf.value], self._trace.dtypes[leaf.value]

        return str(event.func), repr(tree_map(local, (event.args, event.kwargs), is_leaf=_is_ref))

    def _held(self, value: int) -> Tensor | None:
        """The numbers that a value that no event has made holds, where there are any here."""
        tensor = self._trace.constants.get(value, self._trace.inputs.get(value))
        if tensor is None or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            return None
        return tensor.detach()

    def _tried(self, events: Sequence[Event], data: int, weight: int) -> Use:
        values = {value for event in events for value in (*event.reads, *event.outputs)}
        largest = max(math.prod(self._trace.shapes[value]) for value in values)
        shapes = [self._trace.shapes[value] for value in values]
        sizes = [*(_Sizes(shapes, step) for step in (1, 8) if largest > MANY), _Sizes([])]
        why = ""
        for size in sizes:
            if largest > TOO_MANY and not size.primes:
                return Use("unknown", why=why or "too large to try")
            for dtypes in _PRECISIONS:
                for indices in _INDICES:
                    try:
                        found = use_of(*self._function(events, data, weight, size, dtypes, indices))
                    except _REFUSALS as error:
                        why = why or f"it does not run here: {str(error).splitlines()[0] if str(error) else error!r}"
                        continue
                    if found.kind == "unknown":
                        why = found.why
                        continue
                    fans = size.read(found.fan_in), size.read(found.fan_out)
                    told = not size.primes or math.isclose(found.scale, 1.0, rel_tol=1e-3)  # a mean's scale is a size
                    if told and None not in fans:
                        return Use(found.kind, *fans, found.scale)  # type: ignore[arg-type]
        return Use("unknown", why=why)

    def _function(
        self, events: Sequence[Event], data: int, weight: int, size: _Sizes, dtypes: Any, indices: Any
    ) -> tuple[Function, Tensor, Tensor]:
        """The operations as a function of signal and weight, and tensors of their shapes."""
        trace = self._trace
        generator = torch.Generator("cpu").manual_seed(2)
        made = {value for event in events for value in event.outputs} - {data, weight}
        others: dict[int, Tensor] = {}
        small = min((s for event in events for v in event.reads for s in size.shape(trace.shapes[v])), default=1)
        rows = size.shape(trace.shapes[data])
        for value in chain.from_iterable(event.reads for event in events):
            if value in made or value in (data, weight) or value in others:
                continue
            held, shape, dtype = self._held(value), size.shape(trace.shapes[value]), trace.dtypes[value]
            if trace.holds_signal(value):
                numbers = torch.randn(shape, generator=generator, device=_CPU)
                fits = held is not None and tuple(held.shape) == shape and value not in trace.inputs
                others[value] = (held if fits and held is not None else numbers).to(_CPU, dtypes(dtype))
            elif held is not None and tuple(held.shape) == shape and not size.primes:
                others[value] = held.to(_CPU)
            else:
                others[value] = indices(shape, rows, small).to(dtype)

        def argument(leaf: Any, values: dict[int, Tensor]) -> Any:
            if isinstance(leaf, Ref):
                tensor = values[leaf.value]
                return tensor.clone() if tensor.requires_grad else tensor.detach().clone()
            if isinstance(leaf, torch.dtype):
                return dtypes(leaf) if leaf.is_floating_point or leaf.is_complex else leaf
            if isinstance(leaf, torch.device):
                return _CPU
            return size.number(leaf) if isinstance(leaf, int) and not isinstance(leaf, bool) else leaf

        def function(x: Tensor, w: Tensor) -> Tensor:
            values = {**others, data: x, weight: w}
            for event in events:
                args, kwargs = tree_map(
                    lambda leaf: argument(leaf, values), (event.args, event.kwargs), is_leaf=_is_ref
                )
                results = [leaf for leaf in tree_leaves(event.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                values.update(zip(event.outputs, results, strict=True))
            last = next(v for v in events[-1].outputs if trace.holds_signal(v))
            return values[last]

        like = [torch.empty(size.shape(trace.shapes[v]), dtype=dtypes(trace.dtypes[v])) for v in (data, weight)]
        return function, like[0], like[1]


class _Sizes:
    """Sizes of axes at which an operator is tried: large ones as different primes, so that fans can be read back.

    Args:
        shapes: The shapes as they are; none: nothing is changed.
        step: What the smaller sizes are multiples of, as some operators want it.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], step: int = 1) -> None:
        large = sorted({size for shape in shapes for size in shape if size > SMALL})
        self.primes = dict(zip(large, (step * prime for prime in _primes()), strict=False))

    def number(self, size: int) -> int:
        return self.primes.get(size, size)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.number(size) for size in shape)

    def read(self, found: float) -> float | None:
        """The fan at the sizes as they are; None where it is no product of them."""
        if not self.primes:
            return float(found)
        if found != int(found):
            return None
        rest, fan = int(found), 1
        for size, prime in self.primes.items():
            while rest % prime == 0:
                rest, fan = rest // prime, fan * size
        return float(rest * fan)


def _primes() -> Iterator[int]:
    return (n for n in count(11) if all(n % k for k in range(2, math.isqrt(n) + 1)))


def _is_ref(part: Any) -> bool:
    return isinstance(part, Ref)


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.complex64 if dtype.is_complex else torch.float32


_PRECISIONS = (_double, _single, lambda dtype: dtype)


def _parts(shape: tuple[int, ...], rows: Sequence[int], smallest: int) -> Tensor:
    """Where equal parts of the rows end, as offsets of groups are given."""
    number, total = shape[-1] if shape else 1, rows[0] if rows else 1
    ends = torch.tensor([(total * (part + 1)) // max(number, 1) for part in range(number)])
    return ends.expand(shape).contiguous() if shape else ends[0]


def _indices(shape: tuple[int, ...], rows: Sequence[int], smallest: int) -> Tensor:
    """Indices that fit every axis."""
    return torch.arange(math.prod(shape)).remainder(max(smallest, 1)).view(shape)


def _zeros(shape: tuple[int, ...], rows: Sequence[int], smallest: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


_INDICES = (_parts, _indices, _zeros)
