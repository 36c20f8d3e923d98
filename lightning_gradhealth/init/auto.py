"""`scheme="auto"`: the gain, fan and scheme of every weight, as a recorded forward pass shows its surroundings."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_gradhealth.init.advice import Advice, Advised
from lightning_gradhealth.init.batches import calls_in, parts_of
from lightning_gradhealth.init.composed import Composition, Roles, compose
from lightning_gradhealth.init.critical import critical_gains
from lightning_gradhealth.init.deliberate import Waves, at_the_end, is_zero, meant_in, scale_of, second_of_pair, waves
from lightning_gradhealth.init.gains import Nonlinearity, gain as gain_of
from lightning_gradhealth.init.guess import guessed
from lightning_gradhealth.init.module_order import by_module_order
from lightning_gradhealth.init.parametrized import originals
from lightning_gradhealth.init.prediction import Prediction
from lightning_gradhealth.init.recurrence import input_layer, simulate
from lightning_gradhealth.init.replay import Passage, Replayer
from lightning_gradhealth.init.residual import factors, find_branches, loop_factors, resolve
from lightning_gradhealth.init.settings import joined
from lightning_gradhealth.init.stand_ins import small_by_class
from lightning_gradhealth.init.surroundings import (
    OneSign,
    free_size,
    how_found,
    made_up_for,
    normed,
    output_gain,
    scheme_for,
    size_in_product,
    steepness_of,
    what_follows,
)
from lightning_gradhealth.init.tables import biases_scores, is_read_by_index, reaches_norm, tied_tables
from lightning_gradhealth.init.transforms import moment_before_transform, normalised_behind
from lightning_gradhealth.sharding import is_sharded
from lightning_gradhealth.tracing import Graph, Station, Trace, TraceError, trace
from lightning_gradhealth.tracing.progress import tick

ROWS = 4  # of a batch of images
_SHARES = {"_softmax", "_log_softmax", "_safe_softmax"}  # what a classifier may end with


def advise(
    model: nn.Module,
    example_inputs: Any,
    *,
    residual: str,
    nonlinearity: Nonlinearity,
    keep: str = "deliberate",
    guess: bool = True,
) -> Advised:
    """Say what is known of every parameter before anything is drawn.

    Args:
        model: The model, unwrapped.
        example_inputs: A sample; None: the model's `example_input_array`, and without one the order of its modules.
        residual: "auto", "none", "depth", "zero_last" or "fixup".
        nonlinearity: "auto": what follows each weight is found; otherwise the one activation of the whole model.
        keep: "deliberate": what was set on purpose is told; "nothing": nothing is.
        guess: Where there is no sample, whether what the first layer takes may serve as one.

    Raises:
        ValueError: The sample does not go through the model, or `residual` needs one and there is none.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> advised = advise(net, torch.zeros(1, 4), residual="auto", nonlinearity="auto")
        >>> [round(advised.advice[id(net[i].weight)].gain, 4) for i in (0, 2)]
        [1.4142, 1.0]
    """
    sample = _example_of(model) if example_inputs is None else example_inputs
    fixed = None if nonlinearity == "auto" else gain_of(nonlinearity)
    asked = _Asked(residual, fixed, keep == "deliberate")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        if example_inputs is not None:
            raise ValueError(
                "example_inputs cannot go through a model that is sharded, since its forward has to run on all ranks;"
                " make the plan before: plan = plan_init(model, example_inputs), shard the model, then plan.apply(), or"
                " plan.bind() before sharding where the model is on the meta device"
            )
        sample, guess = None, False
    if sample is None:
        if residual not in ("auto", "none"):
            raise ValueError(
                f"residual={residual!r} needs example_inputs, since branches are found in a forward pass; give a"
                ' sample, or residual="none"'
            )
        if (found := guessed(model) if guess else None) is not None:
            graph, shape = found
            advised = _Adviser(model, graph, asked).advised()
            note = f"no sample was given: forward was followed on a guess, {shape}; give example_inputs= to be sure"
            return replace(advised, source=f"trace (guessed {shape})", notes=(note, *advised.notes))
        return replace(by_module_order(model, fixed), meant=meant_in(model) if asked.keeps else {})
    try:
        return _Adviser(model, Graph(_trace(model, sample)), asked).advised()
    except TraceError:
        advised_by_batch = _of_batch(model, sample, asked)
        if advised_by_batch is None:
            raise
        return advised_by_batch


def _example_of(model: nn.Module) -> Any:
    """The sample that a LightningModule knows of; None where it has none, or a property that fails."""
    try:
        return getattr(model, "example_input_array", None)
    except Exception:  # of the user's code; there may be a guess all the same
        return None


@dataclass(frozen=True)
class _Asked:
    """What the call asks for: residual factors, one gain for all (None: found), and whether purposes count."""

    residual: str
    fixed: float | None
    keeps: bool


def _of_batch(model: nn.Module, batch: Any, asked: _Asked) -> Advised | None:
    """What the calls of a training step tell, or a part of the batch; None where nothing goes through the model."""
    found: list[tuple[nn.Module, Advised]] = []
    for part, sample in calls_in(model, batch):
        with suppress(TraceError):
            found.append((part, _Adviser(part, Graph(_trace(part, sample)), asked).advised()))
    if found:
        names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        calls = ", ".join(names.get(id(part), type(part).__name__) for part, _ in found)
        note = f"forward does not take the batch: what training_step calls was followed ({calls})"
        advice = {key: one for _, advised in reversed(found) for key, one in advised.advice.items()}
        first = found[0][1]
        notes = tuple(dict.fromkeys((note, *(line for _, advised in found for line in advised.notes))))
        purposes = {key: why for _, advised in reversed(found) for key, why in advised.meant.items()}
        return replace(
            first, advice=advice, meant=purposes, notes=notes, forecast=first.forecast if len(found) == 1 else None
        )
    for sample in parts_of(model, batch):
        with suppress(TraceError):
            advised = _Adviser(model, Graph(_trace(model, sample)), asked).advised()
            what = ", ".join(sample) if isinstance(sample, dict) else "its first entry"
            return replace(advised, notes=(f"forward was given a part of the batch: {what}", *advised.notes))
    return None


def _trace(model: nn.Module, sample: Any) -> Trace:
    """Record the forward pass; of a batch of images some rows tell as much, and replay faster."""
    rows = {leaf.shape[:1] for leaf in tree_leaves(sample) if isinstance(leaf, Tensor)}
    images = any(isinstance(leaf, Tensor) and leaf.dim() >= 4 for leaf in tree_leaves(sample))
    if images and len(rows) == 1 and max(rows) > (ROWS,):
        try:
            return trace(model, tree_map_only(Tensor, lambda leaf: leaf[:ROWS], sample))
        except TraceError:  # it wants just as many: all of it, then
            pass
    return trace(model, sample)


class _Adviser:
    """Goes through the stations of one forward pass, from the first to the last."""

    def __init__(self, model: nn.Module, graph: Graph, asked: _Asked) -> None:
        self._graph, self._trace, self._fixed, self._keeps = graph, graph.trace, asked.fixed, asked.keeps
        self._ends = at_the_end(graph)
        self._meant = meant_in(model, graph, self._ends) if asked.keeps else {}
        graph.kept = frozenset(value for value in graph.biases if id(graph.trace.parameters[value]) in self._meant)
        graph.trace.by_class.update(small_by_class(model))
        self._replayer = Replayer(graph)
        branches = [
            branch
            for branch in find_branches(graph, self._replayer)
            if not any(second_of_pair(graph, self._replayer, index) for index in branch.last)
        ]
        self._residual = resolve(asked.residual, branches)
        self._factors = factors(self._residual, branches, auto=asked.residual == "auto")
        if asked.residual in ("auto", "depth"):
            self._factors.update(loop_factors(graph, self._replayer))
        if asked.residual != "auto":  # what is asked for rules over what stands there
            for value in (value for index in self._factors for value in graph.stations[index].parameters):
                self._meant.pop(id(self._trace.parameters[value]), None)
        self._critical = critical_gains(graph, self._replayer)
        self._normed = normed(graph, self._replayer)
        self._stds: dict[int, float] = {}  # what each station's output is meant to have
        self._one_sign = OneSign(graph, self._replayer)
        self._scales: dict[int, float] = {}  # what the forward pass multiplies a weight by, where it does
        self._sequences: dict[int, list[Tensor]] = {}
        self._simulated: dict[tuple[int, int, int], list[Tensor]] = {}
        self._calls: Counter[str] = Counter()
        self._parametrized = {id(original) for original in originals(model)}
        self._compositions: dict[int, Composition] = {}  # of the weights that are made of several parameters
        self._roles: dict[Any, Roles] = {}  # of these parameters, by how the weight is made
        self._advice: dict[int, Advice] = {}
        self._tied = tied_tables(graph, self._replayer)

    def advised(self) -> Advised:
        """All that the forward pass tells."""
        for done, (index, station) in enumerate(self._graph.stations.items()):
            tick("finding gains", done, len(self._graph.stations))
            self._visit(index, station)
            self._one_sign.see(index, station)
        for value, parameter in self._trace.parameters.items():
            if id(parameter) not in self._advice:
                self._advice[id(parameter)] = self._unweighted(value, parameter)
        given = {s: self._layers(s) for s, at in self._graph.stations.items() if at.kind in ("lookup", "unit")}
        source = {"fake": "trace (fake tensors)", "real": "trace (real batch)", "meta": "trace (meta)"}
        return Advised(
            advice=self._advice,
            meant=self._meant,
            source=source[self._trace.source],
            residual=self._residual,
            notes=self._notes(),
            forecast=Prediction(
                self._graph,
                self._replayer,
                given,
                self._scales,
                factors=self._norms(),
                composed={index: composition.std for index, composition in self._compositions.items()},
                meant=self._stds,
            ),
        )

    def _norms(self) -> dict[int, float]:
        """What the scale of a norm is, by station, where it is not 1: as asked for, or as it was meant."""
        found = {}
        for index, station in self._graph.stations.items():
            if station.kind == "norm" and index in self._factors:
                found[index] = self._factors[index]
            elif station.kind == "norm" and station.parameters:
                scale = self._trace.parameters[station.parameters[0]]
                found[index] = (scale_of(scale) or 0.0) if id(scale) in self._meant else 1.0
        return found

    def _notes(self) -> tuple[str, ...]:
        """What the user should know of how the model was read."""
        notes = []
        if self._trace.source == "meta":
            notes.append(
                "on the meta device nobody knows what constructors have set by hand (zeros, gates, biases): name such"
                " parameters in overrides="
            )
        if any(advice.found == "assumed" for advice in self._advice.values()):
            why = f" ({self._replayer.left} paths are too long)" if self._replayer.left else ""
            notes.append(
                f"some gains are assumed, as what they rest on could not be replayed{why}: a smaller sample may help"
            )
        if self._residual != "none" and not self._factors:
            notes.append(f"residual={self._residual!r}: no residual branch was found")
        return tuple(notes)

    # --- stations ---

    def _visit(self, index: int, station: Station) -> None:
        if station.kind == "weight":
            self._weight(index, station)
        elif station.kind == "lookup":
            self._lookup(index, station)
        elif station.kind == "unit":
            self._unit(index, station)
        elif station.kind == "norm" and index in self._factors:
            for value in station.parameters[:1]:
                self._advise(value, Advice("state", factor=self._factors[index], note="ends a residual branch"))

    def _weight(self, index: int, station: Station) -> None:
        before = self._passage(station.reads[0], index)
        after = self._following(index)
        label = what_follows(after)
        target = self._target(index, after)
        shares = before.averages or _SHARES & set(before.operations)  # averages and shares are meant to be small
        moment = max(before.moment, 1.0) if shares else before.moment
        transformed = moment_before_transform(self._graph, self._replayer, station, self._passage)
        known = math.isfinite(moment) and moment > 1e-12
        gain = math.sqrt(target / moment) if known else 1.0
        found = how_found(before, after)
        if not known:
            found = "assumed"
        if self._fixed is not None:
            gain, found = self._fixed, "given"
        elif transformed is not None:
            gain = max(transformed, 1e-12) ** -0.5
        if self._is_output(index, after):
            gain, found = output_gain(self._replayer.passage(station.reads[0], index)), "output"
        as_meant = normalised_behind(self._trace, station, after)
        if as_meant:
            gain, found = math.sqrt(station.fan_in), "closed form"
        scheme = scheme_for(before, after, gain)
        if index in self._critical and self._fixed is None and found != "output":
            gain, found = self._critical[index], "edge of chaos"
            scheme = "delta_orthogonal" if "conv" in self._trace.events[index].name else "orthogonal"
        bound = found in ("given", "output", "edge of chaos") or transformed is not None or as_meant
        if bound:
            target = gain * gain * moment
        size, why_size = (1.0, "") if self._fixed is not None or as_meant else self._size(index, bound)
        distribution = ""
        if (periodic := self._waves(index, station, after)) is not None and periodic.std is not None:
            gain, found, scheme = periodic.std * math.sqrt(station.fan_in), "closed form", "lecun"
            target, distribution, size, why_size = gain * gain * moment, "uniform", 1.0, ""
        self._stds[index] = math.sqrt(target) * size
        advice = Advice(
            "weight",
            fan_in=station.fan_in,
            fan_out=station.fan_out,
            scheme=scheme,
            gain=gain,
            size=size,
            why_size=why_size,
            factor=self._factors.get(index, 1.0),
            found=found,
            follows=label,
            distribution=distribution,
            meant=as_meant,
            note="its products are divided by the root of their number: of variance 1, as it was" if as_meant else "",
        )
        composed = self._composed(index, station, advice)
        for value, one in composed.items():
            if one.role != "weight":  # it stays, and it is known why
                self._meant.pop(id(self._trace.parameters[value]), None)
        for value in station.parameters:
            self._advise(value, composed.get(value) or self._of_parameter(index, station, value, advice))

    def _size(self, index: int, bound: bool) -> tuple[float, str]:
        """What the std is multiplied by, and why; `bound`: what follows leaves the weight's own scale no freedom."""
        free = (1.0, "") if bound else free_size(self._graph, self._replayer, index, self._normed)
        return size_in_product(self._graph, self._replayer, index, self._stds) if free[0] == 1.0 else free

    def _waves(self, index: int, station: Station, after: list[Passage]) -> Waves | None:
        """The rule of periodic activations, where it holds for a weight; its biases are seen to."""
        value = station.parameters[0]
        parameter = self._trace.parameters[value]
        if len(station.parameters) > 1 or self._fixed is not None or id(parameter) in self._parametrized:
            return None
        rms = scale_of(parameter) if self._keeps else None
        before = self._replayer.passage(station.reads[0], index)
        rule = waves(self._graph, index, before, after, ends=id(parameter) in self._ends, rms=rms)
        biases = [bias for bias, owner in self._graph.biases.items() if owner == index] if rule is not None else []
        if rule is not None and rule.keep:
            self._meant.update({id(self._trace.parameters[each]): rule.keep for each in (value, *biases)})
        elif rule is not None and rule.phase is not None:
            note = "uniform: phases before a periodic activation"
            for bias in biases:
                self._advise(bias, Advice("phase", gain=rule.phase, note=note))
        return rule

    def _composed(self, index: int, station: Station, advice: Advice) -> dict[int, Advice]:
        """What holds for the parameters of a weight that the forward pass makes of several."""
        owned = any(id(self._trace.parameters[value]) in self._parametrized for value in station.parameters)
        if len(station.parameters) < 2 or owned or second_of_pair(self._graph, self._replayer, index):
            return {}
        composition = compose(self._replayer, self._graph, station, self._roles)
        if composition is None:
            return {}
        self._compositions[index] = composition
        if station.scale != 1.0 and advice.gain is not None:
            self._scales[index] = station.scale
            advice = replace(advice, gain=advice.gain / station.scale)
        return composition.advice(self._trace, station, advice)

    def _of_parameter(self, index: int, station: Station, value: int, advice: Advice) -> Advice:
        parameter = self._trace.parameters[value]
        if self._keeps and len(station.parameters) > 1 and parameter.dim() > 1 and is_zero(parameter):
            return replace(advice, keep="0 at the start: one part of a weight that is made of several parameters")
        if self._keeps and second_of_pair(self._graph, self._replayer, index):
            return replace(advice, keep="0 at the start: the second of a low-rank pair")
        if self._keeps and is_read_by_index(self._graph, station) and biases_scores(self._graph, self._replayer, index):
            return replace(advice, keep="a table by position, added to attention scores")
        # a parametrized weight is written through its parametrization, so that no scale is left to make up for
        alone = len(station.parameters) == 1 and id(parameter) not in self._parametrized
        scale = self._scale(station, value) if alone else 1.0
        if abs(scale - 1) > 0.01 and advice.gain is not None:
            self._scales[index] = scale
            return replace(
                advice,
                gain=advice.gain / scale,
                note=joined(advice.note, f"enters the product multiplied by {scale:.4g}"),
            )
        return advice

    def _scale(self, station: Station, value: int) -> float:
        """What the products of a parameter are multiplied by, before and by the operator."""
        # used again, as in a derivative: what its first use makes of a signal is settled
        alike = 0.0 if id(self._trace.parameters[value]) in self._advice else self._one_sign.correlation(station)
        made = self._replayer.weight_scale(station, value, alike)
        return station.scale * (1.0 if made is None else made)

    def _lookup(self, index: int, station: Station) -> None:
        for value in station.parameters:
            if value in self._tied:
                self._stds[index] = self._tied[value]
            elif self._keeps and biases_scores(self._graph, self._replayer, index):
                self._advise(value, Advice("lookup", keep="added to attention scores: a bias by position"))
            elif reaches_norm(self._graph, self._replayer, index):
                gain = self._trace.parameters[value].shape[-1] ** -0.5
                self._stds[index] = gain
                note = "1 / sqrt(width): a norm takes its scale, and so it learns as fast as what is added to it"
                self._advise(value, Advice("lookup", 1.0, 1.0, "lecun", gain, found="closed form", note=note))
            else:
                self._advise(value, Advice("lookup", 1.0, 1.0, "lecun", 1.0, found="closed form"))

    def _unit(self, index: int, station: Station) -> None:
        module = self._trace.modules[self._trace.events[index].module]
        moment = self._passage(station.reads[0], index).moment if station.reads else 1.0
        steps, drive = self._steps(index, module), self._drive(index, station)
        key = id(module), steps, id(drive)  # a cell is called at every step
        if key not in self._simulated:
            self._simulated[key] = simulate(module, steps, drive)
        self._sequences[index] = self._simulated[key]
        layers = self._layers(index)
        self._stds[index] = layers[-1] ** 0.5
        for value in station.parameters:
            layer, gain = input_layer(self._graph, index, value), None
            if layer is not None:
                reads = layers[layer - 1] if layer else moment
                gain = reads**-0.5 if math.isfinite(reads) and reads > 1e-12 else 1.0
            self._advise(value, Advice("weight", scheme="lecun", gain=gain, found="replayed", follows="gates"))

    def _layers(self, index: int) -> tuple[float, ...]:
        """The mean square of what each layer of a recurrent station gives; of a lookup, that of its rows."""
        if index not in self._sequences:
            return (self._stds.get(index, 1.0) ** 2,)
        return tuple(float(outputs.square().mean()) for outputs in self._sequences[index])

    def _drive(self, index: int, station: Station) -> Tensor | None:
        """The sequences that a recurrent layer reads, where another one gives them as they are."""
        if not station.reads:
            return None
        passage = self._replayer.passage(station.reads[0], index)
        source = min(passage.sources, default=None)
        return self._sequences[source][-1] if len(passage.sources) == 1 and source in self._sequences else None

    def _steps(self, index: int, module: nn.Module) -> int:
        """Length of the sequences that a recurrent layer reads; of a cell, how often it is called."""
        if isinstance(module, nn.RNNCellBase):
            path = self._trace.events[index].module
            if not self._calls:
                self._calls.update(self._trace.events[other].module for other in self._graph.stations)
            return self._calls[path]
        reads = self._graph.stations[index].reads
        shape = self._trace.shapes[reads[0]] if reads else (1,)
        return shape[1 if getattr(module, "batch_first", False) and len(shape) == 3 else 0]

    def _unweighted(self, value: int, parameter: nn.Parameter) -> Advice:
        if value in self._graph.unknown:
            return Advice("unknown", note=self._graph.unknown[value])
        use = self._graph.elementwise.get(value)
        if use is None:
            return Advice("unused")
        if value in self._graph.biases:
            if value in self._graph.kept:
                return Advice("state", note=self._meant[id(parameter)])
            return Advice("bias", note="added to the output of a weight")
        if use == "signal":
            return Advice("state", note="a signal that the model begins with: a weight multiplies it")
        words = {"mul": "multiplied", "add": "added", "norm": "the scale or shift of a norm"}
        return Advice("state", note=f"{words.get(use, use)} element by element: no weight")

    def _advise(self, value: int, advice: Advice) -> None:
        parameter = self._trace.parameters[value]
        known = self._advice.setdefault(id(parameter), advice)
        if known is advice or known.gain is None or advice.gain is None or _weakest(known) == _weakest(advice):
            return
        # of several uses the smallest gain holds: it is what a loop comes to, whose state is 0 at first
        chosen, other = sorted((known, advice), key=_weakest)
        note = chosen.note or known.note
        if "used again" not in known.note:
            note = joined(note, f"used again, where its gain would be {other.gain:.4g}")
        self._advice[id(parameter)] = replace(chosen, note=note)

    # --- what surrounds a weight ---

    def _passage(self, value: int, at: int) -> Passage:
        return self._replayer.passage(value, at, self._stds)

    def _following(self, index: int) -> list[Passage]:
        """What the signal passes on its way to each of its readers, at unit variance; the model's outputs last."""
        near = [self._replayer.passage(value, reader) for reader, value in self._graph.consumers[index]]
        end = len(self._trace.events)
        far = [self._replayer.passage(value, end) for value in self._graph.ends.get(index, ())]
        return near + far

    def _target(self, index: int, after: list[Passage]) -> float:
        """The variance that a weight should give: 1, unless what follows keeps any scale and all see it alike."""
        if not after:
            return 1.0
        first = after[0]
        if len(after) == 1 and first.sources == {index} and (steep := steepness_of(first)) is not None:
            return steep**-2
        for passage in after:
            alone = passage.sources == {index} and passage.homogeneous and not passage.invariant and passage.replayed
            if not alone or abs(passage.moment - first.moment) > 0.01 * first.moment:
                return 1.0
        return made_up_for(first)

    def _is_output(self, index: int, after: list[Passage]) -> bool:
        """Whether nothing but the model's output follows, and no activation but a softmax."""
        if self._graph.consumers[index]:
            return False
        return all((passage.linear or _SHARES & set(passage.operations)) and not passage.invariant for passage in after)


def _weakest(advice: Advice) -> tuple[bool, float]:
    """The order in which the advice of several uses holds."""
    return not advice.meant, (advice.gain or 0.0) * advice.size / math.sqrt(advice.fan_in or 1.0)
