"""Replays what lies between one weight and the next on random numbers, to see what becomes of a signal there.

No operation is known by name: whatever a model does, functional or by hand, has the gain that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.init.gains import normal_nodes
from lightning_gradhealth.init.paths import UNREPLAYABLE, Path, Run, WeightPath, channel_axis, noise
from lightning_gradhealth.tracing import VIEWS, Graph, LongPathError, Station
from lightning_gradhealth.tracing.progress import tick

ENOUGH = 1 << 18  # random numbers that a moment is taken from: their error is below 0.5 %
TOO_MANY = 1 << 25  # elements of one value above which nothing is replayed
BUDGET = 1 << 21  # elements of all values on the way, over all draws; one draw may cost more
DRAWS = 1 << 10
MANY_PATHS = 64  # that are measured as exactly as can be; of the next as many each gets half of the numbers, and so on
TINY = 1e-3  # a signal that an odd activation passes as a straight line
ONE_BY_ONE = 1 << 13  # operations of all draws, where they cannot be run at once: some tenths of a second
# operations that are executed for one recording: no clock, so that weights are the same on all machines and ranks
ALLOWED, ALLOWED_EACH = 1 << 16, 2  # and so many for each that was recorded


@dataclass(frozen=True)
class Passage:
    """What becomes of standard normal numbers on their way from the stations behind a value to that value.

    Attributes:
        sources: The stations that the signal comes from.
        moment: Mean square of the value; 1.0 where it could not be replayed.
        slopes: For every source the mean square of an element of `J^T u` for standard normal u: what a gradient's
            mean square is multiplied by on its way back; empty where it could not be replayed.
        homogeneous: Twice the signal gives twice the value.
        invariant: Twice the signal gives the same value: a norm lies between.
        linear: But for a norm it is linear: the negative signal gives the negative value.
        whole: The value has as many elements as what its one source gives: nothing is pooled or chosen.
        averages: Signals are multiplied with one another and summed over this many positions, as attention does;
            0 where they are not.
        saturates: It is bounded on both sides, near where the signal lies.
        oscillates: It is bounded, and far out it still changes: it is periodic. Told only where there is no curve.
        slope_at_zero: Of an odd path, what it multiplies a small signal by; None for others.
        curve: Its values at `normal_nodes()`, where it works element by element on one signal; otherwise None.
        operations: Names of the operations that are no mere views, in order.
        replayed: Whether it was replayed; otherwise the moment is assumed.
    """

    sources: frozenset[int]
    moment: float = 1.0
    slopes: Mapping[int, float] = field(default_factory=dict)
    homogeneous: bool = True
    invariant: bool = False
    linear: bool = True
    saturates: bool = False
    oscillates: bool = False
    slope_at_zero: float | None = None
    whole: bool = False
    averages: int = 0
    curve: Tensor | None = None
    operations: tuple[str, ...] = ()
    replayed: bool = True


class Replayer:
    """Replays paths of one recorded forward pass, on the CPU wherever the model lives; equal paths are replayed once.

    Args:
        graph: The stations and the paths between them.

    Example:
        >>> from torch import nn
        >>> from lightning_gradhealth.tracing import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = Graph(trace(net, torch.zeros(2, 4)))
        >>> last = max(graph.stations)
        >>> round(Replayer(graph).passage(graph.stations[last].reads[0], last).moment, 6)
        0.5
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._trace = graph.trace
        self._asked: dict[Any, Passage] = {}
        self._known: dict[Any, Passage] = {}  # by what the path does
        self._keep: list[Any] = []  # what the keys name by identity must not be freed meanwhile
        self.executed = self._measured = 0
        self.left = 0  # paths that were not replayed: too long, or too many before
        self._allowed = 0
        self.allow()

    def allow(self, share: float = 1.0) -> None:
        """Begin another part of the work, which may execute this share of the operations that are allowed."""
        self._allowed = self.executed + int(share * (ALLOWED + ALLOWED_EACH * len(self._trace.events)))

    def passage(self, value: int, at: int, stds: Mapping[int, float] | None = None) -> Passage:
        """What becomes of the signal on its way to `value`, as event `at` reads it.

        Args:
            value: A value of the recording.
            at: The event before which it is looked at.
            stds: Standard deviations of the sources; 1 for those that are missing.
        """
        unit = self._passage(value, at, {})
        if not stds or not unit.replayed:
            return unit
        scales = {source: stds.get(source, 1.0) for source in self._graph.sources(value, at)}
        if set(scales.values()) <= {1.0}:
            return unit
        if len(set(scales.values())) == 1:
            square = next(iter(scales.values())) ** 2
            if unit.homogeneous:
                return replace(unit, moment=unit.moment * square)
            if unit.invariant and square > 0:
                return replace(unit, slopes={source: slope / square for source, slope in unit.slopes.items()})
        if unit.curve is None:  # to two digits, so that equal blocks at nearly equal scales are replayed once
            scales = {source: float(f"{std:.2g}") for source, std in scales.items()}
        return self._passage(value, at, scales)

    def _passage(self, value: int, at: int, stds: dict[int, float]) -> Passage:
        asked = (value, at, tuple(sorted(stds.items())))
        if asked in self._asked:
            return self._asked[asked]
        self._asked[asked] = self._found(value, at, stds)
        return self._asked[asked]

    def _found(self, value: int, at: int, stds: dict[int, float]) -> Passage:
        tick()
        path, visited = None, self._graph.visits
        if self.executed < self._allowed:
            with suppress(LongPathError):
                path = Path(self._graph, value, at, stds)
        self.executed += (self._graph.visits - visited) // 4
        if path is None:
            self.left += 1
            return Passage(self._graph.sources(value, at), replayed=False)
        self.executed += len(path.events) + len(path.sources)  # to tell what it does takes time, too
        key = path.key()
        if key not in self._known:
            self._keep.append(path)
            with torch.inference_mode(False):  # slopes are derivatives, whatever the caller is about
                self._known[key] = self._replayed(path)
            self.executed += path.runs * (len(path.events) + len(path.sources))
        return _renamed(self._known[key], path)

    def sums_features(self, value: int, at: int, source: int) -> bool:
        """Whether an element of `value` is made of several features of one position of a source, and of no other.

        As in a dot product, or where the source makes the weights of another layer; attention and graphs mix positions.

        Args:
            value: A value of the recording.
            at: The event before which it is looked at.
            source: One of the weights behind it.
        """
        try:
            path = Path(self._graph, value, at, {})
            generator = torch.Generator("cpu").manual_seed(0)
            with torch.inference_mode(False), torch.enable_grad(), _own_random_numbers():
                leaves = {
                    first: noise(path, each, first, 1, generator).requires_grad_(each == source)
                    for each in sorted(path.sources)
                    for first in path.begins(each)
                }
                elements = self._run_all(path, leaves).flatten()
                chosen = elements[int(elements.detach().abs().argmax())]
                leaf = leaves[path.begins(source)[0]]
                (slope,) = torch.autograd.grad(chosen, leaf, allow_unused=True)
        except (LongPathError, *UNREPLAYABLE):
            return False
        if slope is None or not slope[0].dim():
            return False
        read = (slope[0] != 0).movedim(channel_axis(self._graph, source) or -1, -1)
        read = read.reshape(-1, read.shape[-1])
        return int(read.any(1).sum()) == 1 < int(read.any(0).sum())

    def weight(self, station: Station, values: Mapping[int, Tensor]) -> Tensor:
        """The weight that the forward pass makes of given values of its parameters.

        Args:
            station: The weight, which has an operand.
            values: Of some parameters, by value; the others are as they are.

        Raises:
            RuntimeError: Or another error: an operation does not run here, or needs what is not recorded.
        """
        assert station.operand is not None
        events = self._graph.between(station.operand, station.event)[0]
        none = next(iter(values.values()), torch.zeros(()))
        with _own_random_numbers():
            return Run(WeightPath(self._graph, station, events), torch.float32, lambda _: none).result(values)

    def weight_scale(self, station: Station, parameter: int, alike: float = 0.0) -> float | None:
        """What the elements of a parameter are multiplied by on their way to being a weight.

        Args:
            station: The weight.
            parameter: One of its parameters, by value.
            alike: The correlation of the numbers that the weight reads: where all its elements have one sign, as
                absolute values have, what they share adds up in amplitude, not in variance.

        Returns:
            The root mean square of the weight for a standard normal parameter, or of what has the same effect; None
            where the weight is the parameter but for its shape, or does not depend on the parameter's scale.
        """
        if station.operand is None or station.operand == parameter:
            return None
        events = self._graph.between(station.operand, station.event)[0]
        if all(self._trace.events[index].name in VIEWS for index in events):
            return None
        shape = self._trace.shapes[parameter]
        generator = torch.Generator("cpu").manual_seed(0)
        kind = torch.complex64 if self._trace.parameters[parameter].is_complex() else torch.float32
        numbers = torch.randn(shape, generator=generator, device="cpu", dtype=kind)
        # of numbers of one size every part has the mean square of the whole, so that a linear scale is exact
        signs = torch.randint(0, 2, shape, generator=generator, device="cpu").mul(2).sub(1).to(kind)
        try:
            with torch.no_grad():
                given = (numbers, 2 * numbers, signs, signs + numbers)
                once, twice, plain, both = (self.weight(station, {parameter: values}) for values in given)
                linear = torch.allclose(twice, 2 * once, rtol=1e-3, atol=1e-6)
                sums = torch.allclose(both, once + plain, rtol=1e-3, atol=1e-6)
        except UNREPLAYABLE:
            return None  # operations of other devices, values that are not here, or sparse ones
        if not linear:
            return None
        if sums:
            return math.sqrt(_mean_square(plain))
        common = alike * (station.fan_in - 1) * float(once.real.double().mean()) ** 2
        return math.sqrt((_mean_square(once) + common) / _mean_square(numbers))

    def has_one_sign(self, station: Station) -> bool:
        """Whether all elements of a weight have one sign, whatever those of its one parameter have."""
        (parameter, *more) = station.parameters
        if more or station.operand is None or station.operand == parameter:
            return False
        events = self._graph.between(station.operand, station.event)[0]
        if all(self._trace.events[index].name in VIEWS for index in events):
            return False
        shape = self._trace.shapes[parameter]
        numbers = torch.linspace(-1, 1, math.prod(shape), device="cpu").view(shape)
        try:
            with torch.no_grad():
                weight = self.weight(station, {parameter: numbers})
                return not weight.is_complex() and bool((weight >= 0).all() | (weight <= 0).all())
        except UNREPLAYABLE:
            return False  # as for its scale: nothing is known

    def _replayed(self, path: Path) -> Passage:
        for attempt in (self._by_curve, self._by_noise):
            try:
                with _own_random_numbers():
                    found = attempt(path)
            except UNREPLAYABLE:
                continue  # the other way, and then none: operations of other devices, or values that are not here
            if found is not None:
                return found
        return Passage(path.sources, averages=path.averages(), operations=path.operations(), replayed=False)

    # --- element by element: exact ---

    def _by_curve(self, path: Path) -> Passage | None:
        """Evaluate the path as a function of one number, by quadrature; None where it is none."""
        if len(path.sources) != 1 or not path.is_elementwise():
            return None
        (source,) = path.sources
        std, offset = path.stds.get(source, 1.0), path.offset(source, flat=True)
        z, weight = normal_nodes()
        with torch.enable_grad():
            leaf = (std * z).requires_grad_()
            curve = Run(path, torch.float64, lambda _: leaf + offset, flat=True).result()
            if curve.shape != z.shape:
                return None
            (slope,) = torch.autograd.grad(curve.sum(), leaf, allow_unused=True)
        with torch.no_grad():
            curve = curve.detach()
            slope = torch.zeros_like(z) if slope is None else slope
            moment = float((curve.square() * weight).sum())
            back = float((slope.square() * weight).sum())
            if not (math.isfinite(moment) and math.isfinite(back)):
                return None
            doubled = Run(path, torch.float64, lambda _: 2 * std * z + offset, flat=True).result()
            scale = curve.abs().max().clamp_min(1e-300)
            bulk = z.abs() < 3  # a cut far out, as at 6, does not tell
            homogeneous = bool(((doubled - 2 * curve).abs() <= 1e-6 * scale)[bulk].all())
            invariant = bool(((doubled - curve).abs() <= 1e-6 * scale).all() & curve.any())  # 0 has no scale to lose
            odd = bool(((curve + curve.flip(0)).abs() <= 1e-6 * scale)[bulk].all())
            near, far = (curve[(z.abs() - edge).abs() < 0.5].abs().max() for edge in (3.5, 11.5))
        return Passage(
            path.sources,
            moment,
            {source: back},
            homogeneous=homogeneous,
            invariant=invariant,
            linear=(homogeneous or invariant) and odd,
            saturates=bool(far < 1.2 * near) and not invariant,
            slope_at_zero=float((curve / z)[z.abs() < TINY].abs().max()) / std
            if odd and not invariant and std
            else None,
            whole=True,
            curve=curve,
            operations=path.operations(),
        )

    # --- anything else: measured ---

    def _by_noise(self, path: Path) -> Passage | None:
        """Run the path on random numbers of the recorded shapes, many draws at once."""
        largest = path.largest()
        if largest > TOO_MANY:
            return None
        self._measured += 1
        share = 1 + self._measured // MANY_PATHS  # of what one path may cost, where there are many
        draws = max(1, min(ENOUGH // share // max(path.numel(), 1), BUDGET // share // max(path.total(), 1), DRAWS))
        generator = torch.Generator("cpu").manual_seed(0)
        leaves = {
            value: noise(path, source, value, draws, generator).requires_grad_()
            for source in sorted(path.sources)
            for value in path.begins(source)
        }
        with torch.enable_grad():
            values = self._run_all(path, leaves)
            cotangent = torch.randn(values.shape, generator=generator, device="cpu", dtype=values.dtype)
            found = torch.autograd.grad(values, list(leaves.values()), cotangent, allow_unused=True)
        by_value = dict(zip(leaves, found, strict=True))
        slopes = dict.fromkeys(path.sources, 0.0)
        for source in slopes:
            mine = [gradient for value in path.begins(source) if (gradient := by_value.get(value)) is not None]
            slopes[source] = _mean_square(torch.cat([gradient.flatten() for gradient in mine])) if mine else 0.0
        moment = _mean_square(values.detach())
        if not math.isfinite(moment):
            return None
        return Passage(
            path.sources,
            moment,
            slopes,
            whole=path.is_whole(),
            averages=path.averages(),
            operations=path.operations(),
            **self._manners(path, leaves),
        )

    def _run_all(self, path: Path, leaves: Mapping[int, Tensor]) -> Tensor:
        """The value at the end of the path for every draw of the values it begins with, shape (draws, ...)."""
        names = list(leaves)
        owners = {value: source for source in path.sources for value in path.begins(source)}

        def once(*drawn: Tensor) -> Tensor:
            given = dict(zip(names, drawn, strict=True))
            zero = 0.0 * drawn[0].detach().flatten()[0]
            return Run(path, torch.float32, lambda value: given[value] + path.offset(owners[value]), zero=zero).result()

        draws = len(leaves[names[0]])
        if draws > 1:
            try:
                with _quiet_fallbacks():
                    return torch.vmap(once, randomness="different")(*leaves.values())
            except RuntimeError:  # operations that vmap refuses
                draws = min(draws, max(32, ONE_BY_ONE // max(len(path.events), 1)))
        return torch.stack([once(*(leaf[i] for leaf in leaves.values())) for i in range(draws)])

    def _manners(self, path: Path, leaves: Mapping[int, Tensor]) -> dict[str, Any]:
        """What scaling the signal does to the value."""
        with torch.no_grad():

            def run(factor: float) -> Tensor:
                return self._run_all(path, {value: factor * leaf.detach()[:4] for value, leaf in leaves.items()})

            values, doubled, negative = map(run, (1.0, 2.0, -1.0))
            bound = 1e-3 * values.abs().max().clamp_min(1e-30)
            homogeneous = bool(((doubled - 2 * values).abs() <= bound).all())
            invariant = bool(((doubled - values).abs() <= bound).all() & values.any())
            odd = bool(((negative + values).abs() <= bound).all())
            found = {"homogeneous": homogeneous, "invariant": invariant, "linear": (homogeneous or invariant) and odd}
            if len(path.sources) > 1 or homogeneous or invariant:
                return found
            small, large, larger = map(run, (TINY, 4.0, 12.0))
            slope = math.sqrt(_mean_square(small)) / TINY if odd else None
            bounded = _mean_square(larger) < 1.25**2 * _mean_square(large)
            far = (large * larger.conj()).real.double().mean()
            waves = bounded and _mean_square(larger) > 0.8**2 * _mean_square(large) > 2 * 0.8**2 * abs(float(far))
            return {**found, "saturates": bounded, "oscillates": waves, "slope_at_zero": slope}


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """What a model draws on its way (noise, samples) is the same for every replay, and not from the user's state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def _quiet_fallbacks() -> Iterator[None]:
    """That an operation has no batched form, so that vmap runs it draw by draw, is no news to the user."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _mean_square(values: Tensor) -> float:
    return float(values.abs().double().square().mean())


def _renamed(passage: Passage, path: Path) -> Passage:
    """The passage of an equal path, with the sources of this one."""
    if passage.sources == path.sources:
        return passage
    names = dict(zip(sorted(passage.sources), path.order, strict=True))
    slopes = {names[source]: slope for source, slope in passage.slopes.items()}
    return replace(passage, sources=path.sources, slopes=slopes)
