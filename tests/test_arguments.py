"""Wrong arguments, over all that is public: a TypeError or ValueError at once, with argument, value and remedy.

A row holds a callable, the argument, and values of the wrong type and out of range. `RIGHT` holds what looks odd and
is taken on purpose, each with its reason.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from torch import nn

import lightning_gradhealth as gh
from lightning_gradhealth.validation import shown

NAN, INF = math.nan, math.inf
OBJECT = object()


@dataclass
class Row:
    """What must not be given to one argument of a callable."""

    label: str
    argument: str
    call: Callable[[Any], Any]
    types: Sequence[Any] = ()
    values: Sequence[Any] = ()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def stepped() -> tuple[gh.HealthSession, torch.optim.Optimizer]:
    model = net()
    model(torch.ones(8, 4)).sum().backward()
    return gh.HealthSession(model), torch.optim.SGD(model.parameters(), lr=0.1)


def keyword(call: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda value: call(**{name: value})


NO_FLAGS = [1, 0, "yes", "false", None, NAN, [True], torch.tensor(True), "on", 1.0]
NO_NUMBERS = ["1", None, True, [1.0], torch.tensor(1.0), 1j, {}, b"1"]
NOT_POSITIVE = [0, -1, NAN, INF, -INF, -0.0, np.float64(-2.0)]
NO_INTS = [1.5, "3", True, NAN, INF, [1], torch.tensor(3), 2.0, np.float64(3.0)]
NO_MODELS = [None, 5, "x", nn.Linear, [nn.Linear(1, 1)], torch.ones(2), lambda x: x, {"a": nn.Linear(1, 1)}]
NO_TEXTS = [None, 5, [], {}, True, b"x", NAN]


def shared(name: str, make: Callable[..., Any]) -> Iterator[Row]:
    """What GradHealth and HealthSession have in common."""

    def row(argument: str, types: Sequence[Any] = (), values: Sequence[Any] = ()) -> Row:
        return Row(name, argument, keyword(make, argument), types, values)

    no_clip = [1.0, True, 0, NAN, gh.NormClip, [gh.NormClip(1.0)], {}, torch.nn.utils.clip_grad_norm_]
    yield row("clip", no_clip, ["adaptiv", "norm", "", "Adaptive"])
    yield row("on_non_finite", [None, True, 0, ["skip"], {}, NAN], ["Skip", "ignore", "", "halt"])
    yield row("stop_on", [5, None, True, [5], b"x", NAN, [None]], ["exploding", ["x"], {"a": 1}, "", "Loss_Spike"])
    yield row("probe_every_n_steps", NO_INTS, [0, -1, np.int64(0)])
    yield row("probe_compiled", NO_FLAGS)
    yield row("temporal", NO_FLAGS)
    yield row(
        "layers",
        [True, 1.5, None, [1], {}, b"x", NAN, (None,), {"a"}, torch.tensor(1), ["a", 3]],
        [0, -1, "(", "[", ["("], "", [], (), "modules", "param", "Module", "paramter", [""], np.int64(0)],
    )
    yield row("rules", [None, 5, gh.Rule, [gh.Rule], [gh.Rule()], "abc", {"a": 1}, [None], ["stalled_loss"], {}])
    yield row(
        "ignore",
        [5, {"loss_spike": None}, {"loss_spike": 5}, [5], b"loss_spike", True, NAN, {1: "a"}],
        ["x", ["x"], {"loss_spike": "("}, {"x": ".*"}, "", {"loss_spike": ""}, {"loss_spikes": ".*"}],
    )
    yield row("thresholds", [None, {}, 5, "x", gh.Thresholds, {"depth_ratio": 1}, [gh.Thresholds()]])


def callback_and_session() -> Iterator[Row]:
    yield from shared("GradHealth", gh.GradHealth)
    yield from shared("HealthSession", lambda **options: gh.HealthSession(net(), **options))
    yield Row("GradHealth", "preflight", keyword(gh.GradHealth, "preflight"), NO_FLAGS)
    yield Row("GradHealth", "log_layers", keyword(gh.GradHealth, "log_layers"), [1.5, None, NAN, [1], {}], [-1, "all"])
    no_key = [5, True, [], b"x", {}, NAN, lambda: 0]
    yield Row("GradHealth", "loss_key", keyword(gh.GradHealth, "loss_key"), no_key, [""])
    yield Row("HealthSession", "model", gh.HealthSession, NO_MODELS)
    no_function = [5, "print", True, [], {}, NAN, 0, "", lambda: None, lambda line, level: None]
    yield Row("HealthSession", "announce", lambda v: gh.HealthSession(net(), announce=v), no_function)
    yield Row("HealthSession", "watch_calls", lambda v: gh.HealthSession(net(), watch_calls=v), NO_FLAGS)


def steps_of_a_session() -> Iterator[Row]:
    def observe(value: Any) -> Any:
        session, _ = stepped()
        return session.observe(value)

    def observe_with(name: str) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            session, optimizer = stepped()
            return session.observe(optimizer, **{name: value})

        return call

    no_optimizers = [None, 5, "x", [], nn.Linear(1, 1), torch.optim.SGD, {"params": []}]
    yield Row("HealthSession.observe", "optimizer", observe, no_optimizers)
    yield Row(
        "HealthSession.observe",
        "loss",
        observe_with("loss"),
        ["x", [1.0], torch.tensor(1j), {}, OBJECT, True, torch.tensor(True), 1j],
        [torch.ones(3), torch.ones(0), torch.ones(2, 2)],
    )
    no_scalers = [5, "x", True, OBJECT, [], torch.optim.SGD, torch.amp.GradScaler, 1024.0]
    yield Row("HealthSession.observe", "grad_scaler", observe_with("grad_scaler"), no_scalers)
    yield Row("HealthSession.observe", "step", observe_with("step"), ["x", *NO_INTS], [-1])
    yield Row("HealthSession.add_loss", "loss", stepped()[0].add_loss, ["x", None], [torch.ones(3)])
    no_decisions = [None, 5, "x", {}, [], OBJECT, gh.Decision]
    yield Row("HealthSession.apply", "decision", stepped()[0].apply, no_decisions)

    def load(value: Any) -> None:
        stepped()[0].load_state_dict(value)

    broken = {**stepped()[0].state_dict(), "monitor": 5}
    no_states = [{}, {"monitor": {}}, {**stepped()[0].state_dict(), "readings": 7}, broken]
    yield Row("HealthSession.load_state_dict", "state", load, [None, 5, "x", []], no_states)


def monitor() -> Iterator[Row]:
    yield Row("GradientMonitor", "model", gh.GradientMonitor, NO_MODELS)
    make = lambda **options: gh.GradientMonitor(net(), **options)  # noqa: E731
    yield Row("GradientMonitor", "clip", keyword(make, "clip"), [1.0, True, gh.NormClip, []], ["x"])
    yield Row("GradientMonitor", "layers", keyword(make, "layers"), [True, 1.5, None, {}], [0, "(", "modules"])
    yield Row("GradientMonitor.observe", "optimizer", lambda v: make().observe(v), [None, 5, torch.optim.SGD])

    def observe_with(name: str) -> Callable[[Any], Any]:
        optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
        return lambda v: make().observe(optimizer, **{name: v})

    yield Row("GradientMonitor.observe", "grad_scaler", observe_with("grad_scaler"), [5, "x", OBJECT])
    yield Row("GradientMonitor.observe", "step", observe_with("step"), ["x", 1.5, True], [-3])
    yield Row("GradientMonitor.load_state_dict", "state", lambda v: make().load_state_dict(v), [None, []], [{}])


def clippers() -> Iterator[Row]:
    numbers = {
        gh.NormClip: ("max_norm",),
        gh.ValueClip: ("limit",),
        gh.SignClip: ("scale",),
        gh.UnitwiseClip: ("clipping", "eps"),
        gh.PercentileClip: ("percentile",),
        gh.ZScoreClip: ("z_threshold", "clip_factor", "warmup_cap", "alpha"),
        gh.LayerwiseClip: ("relative", "warmup_norm", "beta"),
    }
    beyond = {"percentile": [101, 100.5], "alpha": [1, 2.0], "beta": [1.0, 7]}
    for kind, names in numbers.items():
        for name in names:
            values = [*NOT_POSITIVE, *beyond.get(name, [])]
            yield Row(kind.__name__, name, keyword(kind, name), NO_NUMBERS, values)
    for kind, name in ((gh.PercentileClip, "window"), (gh.ZScoreClip, "warmup"), (gh.LayerwiseClip, "warmup")):
        yield Row(kind.__name__, name, keyword(kind, name), [*NO_INTS, None], [0, -1])
    no_patterns = [5, [5], int, None, [None], NAN, b"x", ["a", nn.Linear(1, 1)]]
    yield Row("UnitwiseClip", "exclude", keyword(gh.UnitwiseClip, "exclude"), no_patterns, ["(", ["a", "("], "", [""]])
    no_clippers = [1.0, "x", gh.NormClip, [], True, NAN, {}, "adaptive"]
    yield Row("WhenExploding", "clipper", gh.WhenExploding, no_clippers)
    for name in ("latch", "dry_run"):
        yield Row("WhenExploding", name, keyword(gh.WhenExploding, name), NO_FLAGS)
    no_numbers = [value for value in NO_NUMBERS if value is not None]
    yield Row("WhenExploding", "warmup_norm", keyword(gh.WhenExploding, "warmup_norm"), no_numbers, NOT_POSITIVE)
    no_lists = [None, 5, "x", gh.NormClip(1.0), [1.0], [None], {}, (gh.NormClip,), iter([gh.NormClip(1.0)])]
    yield Row("Chain", "clippers", gh.Chain, no_lists, [[], ()])
    load = lambda v: gh.ZScoreClip().load_state_dict(v)  # noqa: E731
    yield Row("Clipper.load_state_dict", "state", load, [None, 5, []], [{}, {"kind": "ZScoreClip"}])
    yield Row("Gradients.of", "parameters", gh.Gradients.of, [5, None, nn.Linear(1, 1)], [nn.Parameter(torch.ones(1))])


def thresholds_and_records() -> Iterator[Row]:
    for field in dataclasses.fields(gh.Thresholds):
        whole = field.type == "int"
        types = [*NO_INTS, None] if whole else NO_NUMBERS
        values = [0, -1] if whole else NOT_POSITIVE
        yield Row("Thresholds", field.name, keyword(gh.Thresholds, field.name), types, values)
    for name in ("depth_ratio", "dead_units", "update_share", "stalled_fall"):
        yield Row("Thresholds", name, keyword(gh.Thresholds, name), values=[1.5, 100])

    def finding(**options: Any) -> gh.Finding:
        given = {"condition": "x", "severity": "info", "layers": (), "first_step": 1, "last_step": 1}
        return gh.Finding(**{**given, **options})

    def verdict(**options: Any) -> gh.Verdict:
        return gh.Verdict(**{"severity": "warning", "summary": "s", "remedy": "r", **options})

    no_layers = [None, "abc", 5, [1], {"a"}, True, {}, (1,), b"a"]
    for name, make in (("Finding", finding), ("Verdict", verdict)):
        yield Row(name, "severity", keyword(make, "severity"), [None, 5, True, ["info"]], ["fatal", "", "Warning"])
        yield Row(name, "layers", keyword(make, "layers"), no_layers)
        yield Row(name, "evidence", keyword(make, "evidence"), [None, 5, [1], "x"])
        for text in ("summary", "remedy", "code"):
            yield Row(name, text, keyword(make, text), [None, 5, ["a"]])
        yield Row(name, "first_step", keyword(make, "first_step"), ["x", 1.5, True, [1]])
    yield Row("Finding", "condition", keyword(finding, "condition"), [None, 5, [], {}, True], [""])
    yield Row("Finding", "last_step", keyword(finding, "last_step"), ["x", 1.5, None])
    yield Row("Rule", "thresholds", gh.Rule, [5, {}, gh.Thresholds])
    record = lambda **options: gh.StepRecord(**{"step": 0, **options})  # noqa: E731
    yield Row("StepRecord", "step", keyword(record, "step"), ["x", None, 1.5])
    yield Row("StepRecord", "layers", keyword(record, "layers"), [5, ("0",), "abc"])
    yield Row("StepStats", "total_norm", lambda v: gh.StepRecord(0, window=(gh.StepStats(1, 0, v),)), ["x", True])
    layer = lambda **options: gh.LayerStats(**{"name": "0", **options})  # noqa: E731
    yield Row("LayerStats", "grad_norm", keyword(layer, "grad_norm"), ["x", [1.0], torch.tensor(1.0)])
    yield Row("LayerStats", "name", keyword(layer, "name"), [None, 5])
    for kind in (gh.HealthReport, gh.FlowReport):
        yield Row(kind.__name__, "findings", keyword(kind, "findings"), [5, ("a",), "abc", [None]])
        yield Row(
            f"{kind.__name__}.save", "path", kind().save, [5, None, b"x.md", []], ["x.doc", "", "x", "s3://bucket/x.md"]
        )
    yield Row("InitReport", "seed", keyword(gh.InitReport, "seed"), ["x", None, 1.5])
    yield Row("DepthPoint", "name", gh.DepthPoint, [None, 3])
    yield Row("ChainPoint", "layer", lambda v: gh.ChainPoint("0", v), [None, 3])
    yield Row("SignalChain", "points", gh.SignalChain, [None, 3, "abc", (1,)])
    yield Row("TemporalFlow", "grad_norms", gh.TemporalFlow, [None, 3, "abc", ("a",)])
    yield Row("TemporalFlow.of", "by_layer", gh.TemporalFlow.of, [None, 3, "abc", [(1.0,)]])
    wrong = ["", "{", "[]", "5", '{"findings": 5}', '{"findings": [{"severity": "x"}]}', '{"steps": "many"}', "null"]
    for kind in (gh.HealthReport, gh.StepRecord, gh.InitReport, gh.Finding):
        texts = wrong if kind is gh.HealthReport else ["", "[]"]
        yield Row(f"{kind.__name__}.from_json", "text", kind.from_json, [None, 5, {}], texts)
        yield Row(f"{kind.__name__}.from_dict", "data", kind.from_dict, [None, 5, "{}"])


def initialisation() -> Iterator[Row]:
    x = torch.ones(8, 4)

    def init(name: str) -> Callable[[Any], Any]:
        return lambda value: gh.init_weights(net(), x, **{name: value})

    yield Row("init_weights", "model", lambda v: gh.init_weights(v, x), NO_MODELS)
    yield Row("plan_init", "model", lambda v: gh.plan_init(v, x), NO_MODELS)
    yield Row("init_weights", "scheme", init("scheme"), [None, 5, True, []], ["kaimng", ""])
    no_activations = [5, True, [], nn.ReLU, OBJECT]
    yield Row("init_weights", "nonlinearity", init("nonlinearity"), no_activations, ["Relu", "relux"])
    yield Row("gain", "nonlinearity", gh.gain, no_activations, ["reluu", nn.Softmax(0), torch.zeros_like])
    yield Row("init_weights", "mode", init("mode"), [5, True, []], ["fan", "in"])
    yield Row("init_weights", "distribution", init("distribution"), [None, 5, []], ["gauss", "Normal"])
    yield Row("init_weights", "residual", init("residual"), [None, 5, True, []], ["x", "Fixup"])
    yield Row("init_weights", "on_uncovered", init("on_uncovered"), [None, 5, True, []], ["x", "Raise"])
    yield Row("init_weights", "gamma", init("gamma"), NO_NUMBERS, NOT_POSITIVE)
    yield Row("init_weights", "seed", init("seed"), NO_INTS)
    yield Row("init_weights", "skip", init("skip"), [5, [5], True, NAN, nn.Conv2d, b"x", None], ["(", ["("], ""])
    yield Row("init_weights", "dry_run", init("dry_run"), NO_FLAGS)
    no_overrides = [5, "x", [5], [("a",)], [(5, "he")], None]
    wrong = [[("(", "he")], [("0.weight", "bogus")], [("0.weight", {"sdt": 1})], [("0.weight", {"std": NAN})]]
    yield Row("init_weights", "overrides", init("overrides"), no_overrides, [*wrong, [("nomatch", "he")]])
    yield Row("init_weights", "overrides", init("overrides"), [[("0.weight", {"value": True})]])
    for name in ("gain", "gamma"):
        fill = lambda v, name=name: gh.variance_scaling_(torch.ones(3, 3), **{name: v})  # noqa: E731
        yield Row("variance_scaling_", name, fill, [True, "x", 1j, torch.tensor(1.0)], NOT_POSITIVE)
    for name in ("fan_in", "generator", "in_axes"):
        options = {"in_axes": {"out_axes": [0]}}.get(name, {})
        fill = lambda v, n=name, o=options: gh.variance_scaling_(torch.ones(3, 3), **{**o, n: v})  # noqa: E731
        yield Row("variance_scaling_", name, fill, ["x", 1j, {}, True])
    no_tensors = [None, 5, "x", [1.0], nn.Linear(2, 2)]
    unfit = [torch.ones(3, dtype=torch.long), torch.ones(()), torch.ones(3)]
    for name in ("he_normal_", "he_uniform_", "xavier_normal_", "xavier_uniform_", "lecun_normal_", "lecun_uniform_"):
        yield Row(name, "tensor", getattr(gh, name), no_tensors, unfit)
    yield Row("delta_orthogonal_", "tensor", gh.delta_orthogonal_, no_tensors, [torch.ones(3), torch.ones(2, 4, 3)])
    yield Row("variance_scaling_", "tensor", gh.variance_scaling_, no_tensors, unfit)
    yield Row("register_initializer", "module_type", gh.register_initializer, [5, "x", None, int, nn.ReLU(), []])
    yield Row("fans", "module", gh.fans, [None, 5, "x", nn.Linear, torch.ones(3)])
    axes = lambda **options: gh.Axes(**{"in_axes": 0, "out_axes": 1, **options})  # noqa: E731
    yield Row("Axes", "in_axes", keyword(axes, "in_axes"), ["x", None, 1.5, [0.5], {}, True], [(0, 0), (), 1])
    yield Row("Axes", "out_axes", keyword(axes, "out_axes"), ["x", None, 1.5], [(1, 1), [], 0])
    yield Row("Axes", "split", keyword(axes, "split"), ["x", 5, (1,), (1, 1.5), {}, True], [(1, 0), (1, -1)])
    yield Row("Fans.fan", "mode", gh.Fans(1.0, 2.0).fan, [None, 5], ["fan"])


def metrics() -> Iterator[Row]:
    yield Row("GradientNorm", "reduction", gh.GradientNorm, [None, 5, True, []], ["sum", ""])
    yield Row("GradientNormRatio", "layers", gh.GradientNormRatio, [None, True, NAN], [0, [], "", "modules"])
    yield Row("GradientNormRatio", "reduction", keyword(gh.GradientNormRatio, "reduction"), [5, []], ["mean"])
    yield Row("DeadUnitFraction", "activation", gh.DeadUnitFraction, [None, 5, True, nn.ReLU], ["tanh", "reluu"])
    yield Row("DeadUnitFraction", "axis", keyword(gh.DeadUnitFraction, "axis"), ["x", None, 1.5, True, NAN])
    yield Row("SaturatedUnitFraction", "activation", gh.SaturatedUnitFraction, [None, 5, []], ["relu", "tanhh"])
    saturated = keyword(gh.SaturatedUnitFraction, "threshold")
    yield Row("SaturatedUnitFraction", "threshold", saturated, NO_NUMBERS, [*NOT_POSITIVE, 1, 2])


class Nameless:
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Unwilling:
    """Says that it can be iterated over, and cannot."""

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no iteration")


def odd() -> Iterator[Row]:
    """Values that break what looks at them: their text, their parts, their size."""
    no_parts = [torch.tensor(1.0), np.array(1.0), Unwilling()]
    for argument in ("stop_on", "ignore"):
        yield Row("GradHealth", argument, keyword(gh.GradHealth, argument), no_parts)
        yield Row("HealthSession", argument, keyword(functools.partial(gh.HealthSession, net()), argument), no_parts)
    yield Row("GradientNorm.update", "model", lambda v: gh.GradientNorm().update(v), [np.array(1.0), Unwilling()])
    yield Row(
        "diagnose", "budget", lambda v: gh.diagnose(net(), torch.ones(8, 4), budget=v), ["30", True], [0, math.nan]
    )
    yield Row("diagnose", "loss_fn", lambda v: gh.diagnose(net(), torch.ones(8, 4), v), [Nameless()])
    yield Row("init_weights", "overrides", lambda v: gh.init_weights(net(), overrides=v), [Nameless(), b"x"])
    no_batch = [5, "x", b"x", True, int, [], {}, NAN]
    yield Row("plan_init", "calibrate", lambda v: gh.plan_init(net(), torch.ones(8, 4), calibrate=v), [], no_batch)
    yield Row("Axes", "split", lambda v: gh.Axes(in_axes=0, out_axes=1, split=v), [b"ab", "ab"])
    meta = torch.empty(2, device="meta")
    yield Row("SignalGain.update", "input", lambda v: gh.SignalGain().update(v, torch.ones(2)), [], [meta])
    yield Row("HealthSession.observe", "loss", stepped()[0].add_loss, [], [10**400])
    for value in (2**63, 10**400):
        yield Row("HealthSession.observe", "step", lambda v: (s := stepped())[0].observe(s[1], step=v), [], [value])


ROWS = [
    *odd(),
    *callback_and_session(),
    *steps_of_a_session(),
    *monitor(),
    *clippers(),
    *thresholds_and_records(),
    *initialisation(),
    *metrics(),
]


def parts_of(value: Any) -> set[str]:
    """How a message may name a value: as it is, by a part of it, or a tensor by what is wrong with it."""
    parts = {shown(value)}
    if isinstance(value, torch.Tensor):
        parts |= {str(tuple(value.shape)), str(value.dtype), type(value).__name__}
    elif isinstance(value, dict):
        parts |= {part for pair in value.items() for part in parts_of(pair)}
        parts |= {"it has no", "cannot be read"}  # a state
    elif isinstance(value, (list, tuple)):
        parts |= {found for part in value for found in parts_of(part)}
    return parts


def error_of(call: Callable[[Any], Any], value: Any) -> Exception | None:
    try:
        call(value)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.label}-{row.argument}")
def test_wrong_arguments_are_named_with_their_value_and_a_remedy(row: Row) -> None:
    assert row.types or row.values
    for expected, values in ((TypeError, row.types), (ValueError, row.values)):
        for value in values:
            error, said = error_of(row.call, value), f"{row.label}({row.argument}={shown(value)})"
            assert error is not None, f"{said} passes in silence"
            message = str(error)
            assert type(error) is expected, f"{said}: {type(error).__name__}: {message}"
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            assert "lightning_gradhealth" in last, f"{said}: not said by the package: {message}"
            assert row.argument in message, f"{said}: the argument is not named: {message}"
            assert any(part in message for part in parts_of(value)), f"{said}: the value is not named: {message}"
            assert ";" in message, f"{said}: no remedy: {message}"
            assert "\n" not in message


# --- what is right on purpose ---


def right() -> Iterable[tuple[str, Callable[[], Any], str]]:
    """Label, call, and why a reader would call it right."""
    session = lambda **options: gh.HealthSession(net(), **options)  # noqa: E731
    yield "layers=2", lambda: session(layers=2), "a depth"
    yield "layers as numpy int", lambda: session(layers=np.int64(1)), "NumPy's numbers count as Python's"
    yield "layers='net'", lambda: session(layers="encoder"), "a regex; that it matches nothing is told at once"
    yield "layers=['0', '2']", lambda: session(layers=["0", "2"]), "regexes"
    yield "probe_every_n_steps", lambda: session(probe_every_n_steps=np.int32(3)), "NumPy's numbers"
    yield "stop_on=[]", lambda: gh.GradHealth(stop_on=[]), "no condition, as ()"
    yield "stop_on=Condition", lambda: gh.GradHealth(stop_on=[gh.Condition.DEAD_UNITS]), "a condition is its name"
    yield "ignore=[]", lambda: gh.GradHealth(ignore=[]), "nothing, as None"
    yield "log_layers=True", lambda: gh.GradHealth(log_layers=True), "all layers"
    yield "log_layers=numpy", lambda: gh.GradHealth(log_layers=np.int64(4)), "NumPy's numbers"
    yield "temporal=np.True_", lambda: gh.GradHealth(temporal=np.True_), "NumPy's booleans"
    yield "NormClip(numpy)", lambda: gh.NormClip(np.float32(0.5)), "NumPy's numbers"
    yield "NormClip(1)", lambda: gh.NormClip(1), "a whole number is a number"
    yield "percentile=100", lambda: gh.PercentileClip(100), "the greatest norm of the window"
    yield "window=numpy", lambda: gh.PercentileClip(window=np.int64(9)), "NumPy's numbers"
    yield "exclude=[]", lambda: gh.UnitwiseClip(exclude=[]), "none, as ()"
    init = lambda **options: gh.init_weights(net(), torch.ones(8, 4), **options)  # noqa: E731
    yield "scheme='HE'", lambda: init(scheme="HE"), "schemes are names of people, in any spelling of capitals"
    yield "nonlinearity=None", lambda: init(nonlinearity=None), "no activation: linear"
    yield "mode=None", lambda: init(mode=None), "the scheme's own"
    yield "seed=-1", lambda: init(seed=-1), "any whole number is a seed, as it is hashed with the names"
    yield "seed=2**70", lambda: init(seed=2**70), "as before"
    yield "seed=numpy", lambda: init(seed=np.int64(3)), "NumPy's numbers"
    yield "gain(None)", lambda: gh.gain(None), "linear"
    yield "gain=None", lambda: gh.variance_scaling_(torch.ones(3, 3), gain=None), "that of the nonlinearity"
    yield "Axes(-10)", lambda: gh.Axes(in_axes=-10, out_axes=1), "counted from the end; checked when the shape is known"
    yield "GradientNormRatio(5)", lambda: gh.GradientNormRatio(5), "a depth"
    yield "an empty batch", lambda: gh.SignalGain().update(torch.ones(0), torch.ones(3)), "the last batch of a rank"
    yield "Thresholds(numpy)", lambda: gh.Thresholds(time_window=np.int64(9), time_ratio=np.float64(9.0)), "NumPy's"
    yield "dead_units=1", lambda: gh.Thresholds(dead_units=1.0), "all units: a share"
    yield "layers=[...]", lambda: gh.Verdict("info", "s", "r", layers=["0"]), "any sequence of names"  # type: ignore[arg-type]
    yield "announce=print", lambda: session(announce=print), "any function that takes a line"
    yield "GradientNormRatio('x')", lambda: gh.GradientNormRatio("x"), "a regex; what it matches shows with the model"
    finding = lambda: gh.Finding("loss_spike", "warning", (), 0, 0, "s", {}, "r")  # type: ignore[arg-type]  # noqa: E731
    yield "Finding(severity='warning')", finding, "a severity is its name"
    yield (
        "Verdict(evidence=tensor)",
        lambda: gh.Verdict("info", "s", "r", evidence={"x": OBJECT}),
        "made plain when told",
    )
    yield "Chain(tuple)", lambda: gh.Chain((gh.NormClip(1.0),)), "any sequence"


@pytest.mark.parametrize(("call", "reason"), [pytest.param(c, r, id=i) for i, c, r in right()])
def test_what_looks_odd_and_is_right(call: Callable[[], Any], reason: str) -> None:
    assert reason
    call()


def test_observe_takes_what_behaves_as_optimizer_scaler_loss_and_step() -> None:
    """Wrappers, scalers and numbers of other kinds, as long as they can do what is asked of them."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self._optimizer = optimizer
            self.param_groups = optimizer.param_groups

    class Scaler:
        _scale = None

        def is_enabled(self) -> bool:
            return False

        def unscale_(self, optimizer: Any) -> None:
            raise AssertionError("it is not enabled")

    session, optimizer = stepped()
    wrapped: Any = Wrapper(optimizer)
    scaler: Any = Scaler()
    step: Any = np.int64(7)
    losses: list[Any] = [2.0, np.float32(2.0), torch.tensor([2.0]), torch.tensor(2, dtype=torch.int64), 2]
    for loss in losses:
        session.apply(session.observe(wrapped, loss, scaler, step=step))
        record = session.flush()
        assert (record.step, type(record.step)) == (7, int)
        assert record.window[0].loss == 2.0


def test_a_wrong_argument_of_observe_leaves_the_session_as_it_was() -> None:
    session, optimizer = stepped()
    wrong: Any = torch.ones(3)
    with pytest.raises(ValueError, match=r"loss must be one number, got a tensor of shape \(3,\); .*mean"):
        session.observe(optimizer, wrong)
    assert session.flush().step == -1
    session.apply(session.observe(optimizer, 1.0))
    assert session.flush().step == 0


def test_a_state_that_cannot_be_read_leaves_the_session_as_it_was() -> None:
    session, optimizer = stepped()
    session.apply(session.observe(optimizer, 1.0))
    session.flush()
    state = session.state_dict()
    for key, wrong in (("monitor", {}), ("judgement", 5), ("response", None), ("readings", 3), ("signals", [])):
        with pytest.raises(ValueError, match=r"state must be what state_dict\(\) returned"):
            session.load_state_dict({**state, key: wrong})
        assert session.report().steps == 1
        assert session.monitor.steps_of(optimizer) == 1


def test_layers_that_match_nothing_and_mutes_that_match_nothing_are_told() -> None:
    said: list[str] = []
    session = gh.HealthSession(net(), ignore={"dead_units": "head.*", "loss_spike": ".*"}, announce=said.append)
    assert len(said) == 1
    assert "'head.*'" in said[0]
    assert "dead_units" in said[0]
    assert "0, 2" in said[0]
    session.close()
    said.clear()
    gh.HealthSession(net(), ignore={"dead_units": "0", "stalled_layers": "0|head"}, announce=said.append)
    assert not said


def test_a_mute_that_matches_no_layer_is_told_in_a_fit(caplog: pytest.LogCaptureFixture) -> None:
    health = gh.GradHealth(ignore={"stalled_layers": "nomatch.*"})
    trainer(health, max_steps=2).fit(Classifier(mlp()), batches())
    assert [record.getMessage() for record in caplog.records if "nomatch" in record.getMessage()]
    assert health.report().aside == ""


class ByHand(Classifier):
    """Manual optimization, which returns no loss but logs one."""

    def __init__(self, name: str) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.name = name

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.log(self.name, loss)


def test_a_loss_key_that_was_never_logged_is_said_with_what_was() -> None:
    health = gh.GradHealth(loss_key="los")
    trainer(health, max_steps=4).fit(ByHand("train_loss"), batches())
    (note,) = [note for note in health.report().notes if "los" in note]
    assert "loss_key='los'" in note
    assert "train_loss" in note
    assert health.report().notes.count(note) == 1
    right_key = gh.GradHealth(loss_key="train_loss")
    trainer(right_key, max_steps=4).fit(ByHand("train_loss"), batches())
    assert not [note for note in right_key.report().notes if "loss" in note]


def test_one_loss_a_sample_is_judged_by_its_mean() -> None:
    class PerSample(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()
            self.automatic_optimization = False
            self.means: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            self.manual_backward(losses.mean())
            optimizer.step()
            self.means.append(losses.mean().item())
            return {"loss": losses}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    health, module = gh.GradHealth(), PerSample()
    trainer(health, max_steps=3).fit(module, batches())
    report = health.report()
    assert report.aside == ""
    assert "loss: unavailable" not in report.notes


# --- records ---


def test_a_word_becomes_a_severity_and_a_list_a_tuple() -> None:
    layers: Any = ["net.0"]
    severity: Any = "critical"
    finding = gh.Finding("loss_spike", severity, layers, 3, 4)
    assert finding.severity is gh.Severity.CRITICAL
    assert finding.condition is gh.Condition.LOSS_SPIKE
    assert finding.layers == ("net.0",)
    assert gh.Finding.from_json(finding.to_json()) == finding


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"findings": 5}, "findings must be"),
        ({"findings": [{"condition": "x"}]}, r"findings\[0\] has no 'severity'"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"layers": [{"name": "0"}, {"name": "2", "grad_norm": "big"}]}, r"layers\[1\].*grad_norm must be a number"),
        ({"trend": [[1.0, 2.0], ["a"]]}, "trend must be"),
        ({"notes": "abc"}, "notes must be a tuple of a text"),
    ],
)
def test_a_report_that_cannot_be_read_says_where(change: dict[str, Any], where: str) -> None:
    """From JSON and from a dict."""
    data = {**gh.HealthReport(steps=3).to_dict(), **change}
    with pytest.raises(ValueError, match=rf"^data must be what HealthReport.to_dict\(\) returned, got .*; .*{where}"):
        gh.HealthReport.from_dict(data)
    with pytest.raises(ValueError, match=rf"^text must be what HealthReport.to_json\(\) returned, got .*; .*{where}"):
        gh.HealthReport.from_json(json.dumps(data))


def test_whole_thresholds_stay_whole_and_rules_with_them_do_not_fail_later() -> None:
    for field in dataclasses.fields(gh.Thresholds):
        given: Any = {field.name: np.int64(3) if field.type == "int" else np.float64(0.5)}
        value = getattr(gh.Thresholds(**given), field.name)
        assert type(value) is (int if field.type == "int" else float)


# --- initialisation: all or nothing ---


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.t


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fails_when_it_fills(module: Any, context: Any) -> None:
    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.fill_(torch.rand(()).item())
        raise RuntimeError("mine")

    context.fill_(module.t, fill)


def fails_at_once(module: Any, context: Any) -> None:
    torch.rand(3)
    raise RuntimeError("mine")


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("initializer", [fails_when_it_fills, fails_at_once])
@pytest.mark.parametrize("norm", [None, torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.weight_norm])
def test_an_initializer_that_fails_half_way_leaves_the_model_as_it_was(initializer: Any, norm: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Scale(), nn.Linear(8, 8))
    if norm is not None:
        norm(model[0])
    gh.register_initializer(Scale)(initializer)
    x = torch.randn(4, 8)
    before, output = {k: v.clone() for k, v in model.state_dict().items()}, model.eval()(x)
    state = torch.get_rng_state()
    warnings.simplefilter("ignore")
    with pytest.raises(RuntimeError, match="mine"):
        gh.init_weights(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert unchanged(model, before)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("batch", [torch.randn(4, 5), "x", torch.full((8, 4), NAN), torch.full((8, 4), INF), []])
def test_a_batch_that_cannot_calibrate_changes_nothing(batch: Any) -> None:
    model = net()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match="calibrate must be a batch"):
        gh.init_weights(model, torch.ones(8, 4), calibrate=batch)
    assert unchanged(model, before)
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_of_zeros_is_told_and_makes_no_nan() -> None:
    model = net()
    report = gh.init_weights(model, torch.ones(8, 4), calibrate=torch.zeros(8, 4))
    assert [note for note in report.notes if "does not vary" in note and "2 weights" in note]
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_integers_for_a_layer_of_numbers_are_no_sample() -> None:
    with pytest.raises(ValueError, match=r"example_inputs must go through model\.forward"):
        gh.init_weights(net(), torch.ones(8, 4, dtype=torch.long))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("views", ["three", "keys and values", "one"])
def test_attention_over_views_is_calibrated(views: str, bias: bool) -> None:
    """The packed projection reads parts of its weight and bias, and one of them may be what is measured."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True, bias=bias)
            self.head = nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key = x.unsqueeze(1), x.unsqueeze(1)
            value = key if views == "keys and values" else x.unsqueeze(1)
            given = (query, query, query) if views == "one" else (query, key, value)
            return self.head(self.attention(*given, need_weights=False)[0].squeeze(1))

    model = Attends()
    report = gh.init_weights(model, seed=1, calibrate=3.0 * torch.randn(256, 16))
    after = {point.name: point.after for point in report.depth}
    assert after["attention.in_proj_weight"] == pytest.approx(1.0, abs=0.02)
    assert after["head.weight"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["auto", "he", "orthogonal"])
def test_an_orthogonal_parametrization_in_half_precision(dtype: torch.dtype, scheme: str) -> None:
    """QR is not to be had there, or too coarse: float32 is used, and what is remembered keeps its dtype."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    torch.nn.utils.parametrizations.orthogonal(model[0])
    model.to(dtype)
    before = model[0].weight.detach().clone()
    gh.init_weights(model, torch.randn(4, 32, dtype=dtype), seed=0, scheme=scheme)
    weight = model[0].weight.detach()
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert not torch.equal(weight, before)
    assert (weight.float() @ weight.float().T - torch.eye(32)).abs().max() < 0.02
