"""Weights that a forward pass makes of several parameters: which of them are drawn, and at what scale.

The weight is made again from random numbers: parameters that change it independently of each other add to it (parts
that are joined, a sum), the others multiply. No operation is known by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.init.advice import Advice
from lightning_gradhealth.init.deliberate import is_zero
from lightning_gradhealth.init.fans import Fans, fans
from lightning_gradhealth.init.handlers import WEIGHTED
from lightning_gradhealth.init.paths import UNREPLAYABLE, WeightPath
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.schemes import SCHEMES
from lightning_gradhealth.init.settings import joined
from lightning_gradhealth.tracing import Graph, Station, Trace

LARGEST = 1 << 26  # elements of the weights that are compared at once: 256 MiB
SAME = 1e-4  # of the largest element: what rounding may differ by


@dataclass(frozen=True)
class Term:
    """Parameters that are drawn together, since their product is one addend of a weight.

    Attributes:
        drawn: The parameters whose scale matters, by value.
        scale: Root mean square of the elements that they reach, for standard normal parameters.
        shared: By how many terms such an element is reached, on average.
        square: Mean square over the whole weight, for standard normal parameters.
    """

    drawn: tuple[int, ...]
    scale: float
    shared: float
    square: float


@dataclass(frozen=True)
class Composition:
    """What each of several parameters is to the weight that they make; those not named are drawn as the weight is.

    Attributes:
        terms: What is drawn to scale.
        kept: Parameters that keep their values, with the reason, by value.
        zeros: Those that are 0 on purpose, by value.
        rest: Mean square of what nothing drawn has to do with; None: some of it depends on what is drawn in a way
            that nobody can tell.
    """

    terms: tuple[Term, ...]
    kept: Mapping[int, str]
    zeros: frozenset[int]
    rest: float | None

    def std(self, stds: Mapping[int, float]) -> float | None:
        """The root mean square of the weight.

        Args:
            stds: Standard deviations of the parameters, by value.

        Returns:
            It; None where it cannot be told.
        """
        if self.rest is None or any(value not in stds for term in self.terms for value in term.drawn):
            return None
        squares = (term.square * math.prod(stds[value] ** 2 for value in term.drawn) for term in self.terms)
        return math.sqrt(math.fsum(squares) + self.rest)

    def advice(self, trace: Trace, station: Station, advice: Advice) -> dict[int, Advice]:
        """What follows for the parameters, where it differs from what holds for the weight.

        Args:
            trace: The recording.
            station: The weight.
            advice: What holds for the weight.
        """
        if advice.gain is not None:  # of the weight as a whole: its parameters share it
            advice = replace(
                advice, gain=advice.gain * advice.size, size=1.0, note=joined(advice.note, advice.why_size)
            )
        found = {value: Advice("state", note=why) for value, why in self.kept.items()}
        keep = "0 at the start: one part of a weight that is made of several parameters"
        found.update({value: replace(advice, keep=keep) for value in self.zeros})
        for term in self.terms:
            found.update(_of_term(term, trace, station, advice))
        return found


def compose(
    replayer: Replayer, graph: Graph, station: Station, known: MutableMapping[Any, Roles]
) -> Composition | None:
    """Find out what each of several parameters is to the weight that they make.

    Args:
        replayer: Of the recording.
        graph: The recording.
        station: A weight.
        known: What has been found out of weights of the same kind, which is added to.

    Returns:
        It; None where the weight cannot be made again, or is too large to try.

    Example:
        >>> from torch import nn
        >>> from lightning_gradhealth.tracing import Graph, trace
        >>> class Normed(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.g, self.v = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.randn(8, 4))
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True))
        >>> graph = Graph(trace(Normed(), torch.zeros(2, 4)))
        >>> composition = compose(Replayer(graph), graph, *graph.stations.values(), {})
        >>> list(composition.kept.values()), round(composition.std({}), 3)  # whatever the std of v
        (['a factor of the weight that v makes: kept'], 0.5)
    """
    numel = math.prod(graph.trace.shapes[station.operand]) if station.operand is not None else 0
    if not numel or numel * len(station.parameters) > LARGEST:
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():  # slopes are asked for, whatever the caller is about
            composer = _Composer(replayer, graph, station)
            key = composer.key()
            if key not in known:
                known[key] = composer.roles()
            return composer.measured(known[key])
    except UNREPLAYABLE:
        return None  # operations of other devices, or values that are not here


def _of_term(term: Term, trace: Trace, station: Station, advice: Advice) -> dict[int, Advice]:
    if not term.drawn or not term.scale or advice.gain is None:
        return dict.fromkeys(term.drawn, advice)
    scale = term.scale * math.sqrt(term.shared)
    if len(term.drawn) == 1:
        note = f"enters the product multiplied by {term.scale:.4g}" if abs(term.scale - 1) > 0.01 else ""
        if term.shared > 1.01:
            note = f"{note}{'; ' if note else ''}one of {term.shared:.3g} addends of the weight"
        return {term.drawn[0]: replace(advice, gain=advice.gain / scale, note=note) if note else advice}
    count = len(term.drawn)
    std = (_std(station, advice) / scale) ** (1 / count)
    found = {}
    for value in term.drawn:
        fan = _fan(trace.parameters[value], trace, station)
        found[value] = replace(
            advice,
            fan_in=fan,
            fan_out=fan,
            scheme="lecun",
            gain=std * math.sqrt(fan),
            factor=_root(advice.factor, count, last=value == term.drawn[-1]),
            note=f"a factor of the weight, one of {count}",
        )
    return found


def _root(factor: float, count: int, *, last: bool) -> float:
    """The share of a residual factor; of a silent branch one factor is 0: were all, nothing would learn."""
    return factor ** (1 / count) if factor else float(not last)


def _std(station: Station, advice: Advice) -> float:
    """The standard deviation that the weight should have, without the factor of its residual branch."""
    assert advice.gain is not None
    both = Fans(station.fan_in, station.fan_out)
    if "orthogonal" in advice.scheme:
        return advice.gain / math.sqrt(max(both))
    return advice.gain / math.sqrt(both.fan(SCHEMES[advice.scheme].mode))


def _fan(parameter: Tensor, trace: Trace, station: Station) -> float:
    """The fan_in that a parameter is drawn with: of a layer's weight, whatever it is used for, the layer's own."""
    layers = (module for module in trace.modules.values() if isinstance(module, WEIGHTED))
    return next((fans(layer).fan_in for layer in layers if layer.weight is parameter), station.fan_in)


@dataclass
class Roles:
    """What becomes of the parameters, by position among those of the weight.

    Attributes:
        drawn: For every addend those whose scale matters, and those that are drawn with them.
        kept: Those that keep their values, each with what it scales; None: it is added.
        known: What is drawn to no scale has no say in that of the weight.
    """

    drawn: list[tuple[list[int], list[int]]] = field(default_factory=list)
    kept: dict[int, list[int] | None] = field(default_factory=dict)
    known: bool = True


class _Kind(WeightPath):
    """The path of a weight, on which parameters count by their kind, not by their values."""

    def __init__(self, graph: Graph, station: Station, free: Sequence[int]) -> None:
        assert station.operand is not None
        super().__init__(graph, station, graph.between(station.operand, station.event)[0])
        kinds = enumerate((graph.trace.parameters[value], value in free) for value in station.parameters)
        self._kinds = {id(p): (at, tuple(p.shape), p.dtype, is_free) for at, (p, is_free) in kinds}

    def _fingerprint(self, tensor: Tensor) -> Any:
        return self._kinds.get(id(tensor)) or super()._fingerprint(tensor)


class _Numbers(dict[int, Tensor]):
    """Normal numbers by parameter; of an index, a mask or a packed code, what is valid for all.

    Args:
        parameters: The parameters, by value.
        rms: Their root mean square, an integer; for others give another: even a single number is different then.
    """

    def __init__(self, parameters: Mapping[int, Tensor], rms: int) -> None:
        super().__init__()
        self._parameters, self._rms = parameters, rms

    def __missing__(self, value: int) -> Tensor:
        parameter = self._parameters[value]
        seed = 2 * list(self._parameters).index(value) + self._rms
        generator = torch.Generator("cpu").manual_seed(seed)
        if parameter.is_floating_point() or parameter.is_complex():
            kind = torch.complex64 if parameter.is_complex() else torch.float32
            numbers = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=kind)
            self[value] = self._rms * numbers / math.sqrt(max(_mean_square(numbers), 1e-12))
        else:
            bits = torch.randint(0, 2, parameter.shape, generator=generator, device="cpu")
            self[value] = bits.to(parameter.dtype)
        return self[value]


class _Composer:
    """Makes a weight again and again, from other values of its parameters."""

    def __init__(self, replayer: Replayer, graph: Graph, station: Station) -> None:
        self._replayer, self._graph, self._station = replayer, graph, station
        self._parameters = {value: graph.trace.parameters[value] for value in station.parameters}
        self._noise = _Numbers(self._parameters, 1)
        numbers = [v for v, p in self._parameters.items() if p.is_floating_point() or p.is_complex()]
        trained = [v for v in numbers if self._parameters[v].requires_grad]
        zeros = [v for v in trained if self._parameters[v].dim() > 1 and is_zero(self._parameters[v])]
        # where all are 0, nobody has meant anything by it
        self._zeros = frozenset(zeros) if len(zeros) < len(self._parameters) else frozenset()
        self._free = [value for value in trained if value not in self._zeros]
        self._reach: dict[int, Tensor] = {}  # the elements of the weight that depend on each

    def key(self) -> Any:
        """Equal for weights that are made alike of parameters of the same kinds."""
        return _Kind(self._graph, self._station, self._free).key()

    def roles(self) -> Roles:
        """What is drawn, and what is kept."""
        at = {value: position for position, value in enumerate(self._parameters)}
        found = Roles()
        for group in self._groups():
            scaled, plain = self._drawn(group)
            drawn = scaled + plain
            makers = drawn or [value for value in group if value not in self._free]
            why = None if len(group) == 1 else [at[value] for value in makers]
            found.kept.update({at[v]: why for v in group if v in self._free and v not in drawn})
            manners = {self._manner(value, drawn) for value in plain}
            if scaled or "invariant" in manners:
                found.drawn.append(([at[value] for value in scaled], [at[value] for value in plain]))
            found.known = found.known and not (manners - {"none", "invariant"})
        return found

    def measured(self, roles: Roles) -> Composition:
        """The scales at which what is drawn enters the weight."""
        values = list(self._parameters)
        drawn = [([values[i] for i in scaled], [values[i] for i in plain]) for scaled, plain in roles.drawn]
        parts = [(scaled, self._part((scaled + plain)[0], scaled + plain)) for scaled, plain in drawn]
        reached = sum(((part != 0).float() for _, part in parts), torch.zeros(()))
        terms = tuple(_term(scaled, part, reached) for scaled, part in parts)
        rest = self._weight({value: self._noise[value] for pair in drawn for value in (*pair[0], *pair[1])})
        for _, part in parts:
            rest = rest - part
        kept = {
            values[i]: self._why(None if why is None else [values[j] for j in why]) for i, why in roles.kept.items()
        }
        return Composition(terms, kept, self._zeros, _mean_square(rest) if roles.known else None)

    def _why(self, makers: Sequence[int] | None) -> str:
        if makers is None:
            return "added to the weight: kept"
        wanted = [id(self._parameters[value]) for value in makers]
        names = {id(p): name for m in self._graph.trace.modules.values() for name, p in m._parameters.items()}
        made = f" that {', '.join(names[p] for p in wanted)} make{'s' * (len(wanted) == 1)}" if wanted else ""
        return f"a factor of the weight{made}: kept"

    # --- which parameters belong together ---

    def _groups(self) -> list[list[int]]:
        """The parameters, those together that do not simply add up."""
        noise, other = ({v: made[v] for v in self._parameters} for made in (self._noise, _Numbers(self._parameters, 2)))
        base = self._weight(noise)
        bound = SAME * float(base.abs().max())
        moved = {v: self._weight({**noise, v: other[v]}) for v in self._parameters}
        self._reach = {v: (weight - base).abs() > bound for v, weight in moved.items()}
        group = {value: {value} for value in self._parameters}
        for one, two in combinations(self._parameters, 2):
            if two not in group[one] and bool((self._reach[one] & self._reach[two]).any()):
                both = self._weight({**noise, one: other[one], two: other[two]})
                if bool(((both - moved[one] - moved[two] + base).abs() > bound).any()):
                    joined = group[one] | group[two]
                    group.update(dict.fromkeys(joined, joined))
        return [sorted(members) for value, members in group.items() if value == min(members)]

    def _drawn(self, group: list[int]) -> tuple[list[int], list[int]]:
        """The parameters of a group that are drawn: those whose scale matters, and others."""
        if len(group) == 1:
            return self._alone(group[0])
        drawable = [v for v in group if v in self._free and (self._parameters[v].dim() > 1 or self._is_whole(v))]
        manners = {value: self._manner(value, drawable) for value in drawable}
        silent = [value for value in drawable if manners[value] == "none"]  # its partner is 0
        factors = [value for value in drawable if manners[value] in ("homogeneous", "invariant")]
        found = [value for value in factors if self._mixes(value, drawable)]  # products of matrices
        if not found:
            found = self._first(group, factors) or self._outer(group, factors, manners)
        if not found and not silent:
            found = [v for v in drawable if self._is_whole(v) and not self._has_whole_partner(group)][:1]
        scaled = [value for value in found if manners[value] == "homogeneous"]
        return scaled, [value for value in (*found, *silent) if value not in scaled]

    def _alone(self, value: int) -> tuple[list[int], list[int]]:
        """Of a parameter that adds to the weight: a part of it, or a shift of many elements at once."""
        if value not in self._free or (self._parameters[value].dim() < 2 and not self._is_whole(value)):
            return [], []
        return ([value], []) if self._manner(value, [value]) == "homogeneous" else ([], [value])

    def _is_whole(self, value: int) -> bool:
        """Whether a parameter has an element for every one that it reaches."""
        return self._parameters[value].numel() >= int(self._reach[value].sum())

    def _has_whole_partner(self, group: list[int]) -> bool:
        """Whether a parameter that is given has the elements of the weight, so that all others only scale it."""
        fixed = [value for value in group if value not in self._free and value not in self._zeros]
        return any(self._is_whole(value) for value in fixed)

    def _first(self, group: list[int], factors: list[int]) -> list[int]:
        """Of factors that work element by element, the first that has all elements."""
        whole = [value for value in group if self._is_whole(value)]
        given = [value for value in whole if value not in self._free and value not in self._zeros]
        return [value for value in whole if value in factors and value < min(given, default=value + 1)][:1]

    def _outer(self, group: list[int], factors: list[int], manners: Mapping[int, str]) -> list[int]:
        """The factors of an outer product, none of which has all elements; not the scales of a quantised weight."""
        given = [value for value in group if value not in self._free and value not in self._zeros]
        if self._has_whole_partner(group) or not all(self._parameters[v].is_floating_point() for v in given):
            return []
        found = [value for value in factors if manners[value] == "homogeneous" and not self._is_whole(value)]
        return found if len(found) + len(given) > 1 else []

    # --- how the weight depends on one of them ---

    def _weight(self, values: Mapping[int, Tensor]) -> Tensor:
        """The weight for some values of parameters, others as they are."""
        weight = self._replayer.weight(self._station, {value: numbers.clone() for value, numbers in values.items()})
        return torch.where(weight.isfinite(), weight, torch.zeros(()))  # else as of the root of a negative number

    def _part(self, value: int, drawn: Sequence[int]) -> Tensor:
        """What a parameter contributes to the weight: the part that changes its sign with it.

        Args:
            value: The parameter.
            drawn: Those that are random, it among them; all others are as they are.
        """
        plus, minus = self._mirrored(value, drawn, 1.0)
        part = (plus - minus) / 2
        return torch.where(part.abs() > SAME**2 * plus.abs().max(), part, torch.zeros(()))

    def _mirrored(self, value: int, drawn: Sequence[int], factor: float) -> tuple[Tensor, Tensor]:
        at = {each: self._noise[each] for each in drawn}
        numbers = factor * self._noise[value]
        return self._weight({**at, value: numbers}), self._weight({**at, value: -numbers})

    def _manner(self, value: int, drawn: Sequence[int]) -> str:
        """What a factor 2 on a parameter does to what it contributes."""
        (plus, minus), (plus_twice, minus_twice) = (self._mirrored(value, drawn, factor) for factor in (1.0, 2.0))
        once, twice = (plus - minus) / 2, (plus_twice - minus_twice) / 2
        bound = 10 * SAME * float(once.abs().max())
        if bool(((plus + minus - plus_twice - minus_twice).abs() > max(bound, SAME**2)).any()):
            return "other"  # not odd: an absolute value, an exponential
        if not bound:
            return "none"
        if bool(((twice - 2 * once).abs() <= bound).all()):
            return "homogeneous"
        return "invariant" if bool(((twice - once).abs() <= bound).all()) else "other"

    def _mixes(self, value: int, drawn: Sequence[int]) -> bool:
        """Whether an element of the weight depends on several elements of a parameter, as in a product of matrices."""
        largest = int(self._part(value, drawn).abs().argmax())
        leaf = self._noise[value].clone().requires_grad_()
        with torch.enable_grad():
            weight = self._weight({**{each: self._noise[each] for each in drawn}, value: leaf})
            one = weight.flatten()[largest]
            (slope,) = torch.autograd.grad(one, leaf, torch.ones_like(one), allow_unused=True)
        return slope is not None and int((slope.abs() > SAME * slope.abs().max()).sum()) > 1


def _term(drawn: Sequence[int], part: Tensor, reached: Tensor) -> Term:
    mask = part != 0
    if not mask.any():
        return Term(tuple(drawn), 0.0, 1.0, 0.0)
    return Term(tuple(drawn), math.sqrt(_mean_square(part[mask])), float(reached[mask].mean()), _mean_square(part))


def _mean_square(values: Tensor) -> float:
    return float(values.abs().double().square().mean())
