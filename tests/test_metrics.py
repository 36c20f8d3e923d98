"""The metrics equal slow twins over all data at once, however it comes in, and behave as torchmetrics do."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from conftest import Classifier, batches, mlp, trainer
from counting import host_reads
from hypothesis import given, settings
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_gradhealth import GradientMonitor
from lightning_gradhealth.metrics import (
    DeadUnitFraction,
    GradientNorm,
    GradientNormRatio,
    SaturatedUnitFraction,
    SignalGain,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardtanh": nn.functional.hardtanh,
    "hardsigmoid": nn.functional.hardsigmoid,
    "softsign": nn.functional.softsign,
}


def slopes(name: str, x: Tensor) -> Tensor:
    """The derivative by autograd, over the greatest that there is."""
    x = x.detach().double().requires_grad_()
    peak = torch.zeros((), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    (greatest,) = torch.autograd.grad(ACTIVATIONS[name](peak), peak)
    return slope / (greatest if greatest else 1.0)  # rectifiers have theirs right of zero


def twin_of_units(name: str, inputs: list[Tensor], axis: int) -> float:
    """The share of dead or saturated units, one unit and one sample at a time."""
    rows = torch.cat([slopes(name, x).movedim(axis, 0).reshape(x.shape[axis], -1) for x in inputs], dim=1)
    bad = 0
    for unit in rows.tolist():
        bad += not any(unit) if name.startswith("relu") else math.fsum(unit) / len(unit) < 0.05
    return bad / len(rows)


def unit_metric(name: str, axis: int = 1) -> Metric:
    return DeadUnitFraction(name, axis) if name.startswith("relu") else SaturatedUnitFraction(name, axis)


def with_gradients(model: nn.Module, scale: float = 1.0) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return model


# --- units ---


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((7, 20), 1), ((3, 20, 2, 5), 1), ((2, 6, 20), -1), ((20,), 0)])
def test_units_equal_the_twin(name: str, shape: tuple[int, ...], axis: int) -> None:
    offsets = torch.linspace(-12, 12, 20).view([20 if i == axis % len(shape) else 1 for i in range(len(shape))])
    inputs = [torch.randn(shape) + offsets for _ in range(3)]
    metric = unit_metric(name, axis)
    for x in inputs:
        metric.update(ACTIVATIONS[name](x))
    expected = twin_of_units(name, inputs, axis)
    assert 0.0 < expected < 1.0
    assert metric.compute().item() == expected


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    name=st.sampled_from([*ACTIVATIONS]),
)
def test_property_batches_do_not_matter(sizes: list[int], seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(sum(sizes), 6, generator=generator) + torch.linspace(-9, 9, 6)
    y = ACTIVATIONS[name](x)
    whole, parts, called = unit_metric(name), unit_metric(name), unit_metric(name)
    whole.update(y)
    for part in y.split(sizes):
        parts.update(part)
        called(part)
    results = [metric.compute() for metric in (whole, parts, called)]
    assert results[0].isnan() == (sum(sizes) == 0)
    assert results[0].isnan() or 0.0 <= results[0] <= 1.0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    y = torch.tensor([[0.0, 1.0]] * 400, dtype=dtype)  # bfloat16 cannot count to 400
    for metric in (DeadUnitFraction(), SaturatedUnitFraction()):
        metric.update(y)
        assert metric.compute().item() == 0.5
        assert metric.compute().dtype is torch.float64


@pytest.mark.parametrize("name", ["relu", "tanh"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_no_verdict(name: str, bad: float) -> None:
    metric = unit_metric(name)
    metric.update(torch.tensor([[0.5, 0.0], [bad, 0.0]]))
    metric.update(torch.tensor([[0.5, 0.0]]))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor([[0.5, 0.0]]))
    assert metric.compute().item() == (0.5 if name == "relu" else 0.0)


def test_a_unit_below_the_threshold() -> None:
    y = torch.tensor([[0.8]])  # slope .36
    metrics = MetricCollection({f"{limit}": SaturatedUnitFraction(threshold=limit / 10) for limit in (3, 4)})
    metrics.update(y)
    assert [value.item() for value in metrics.compute().values()] == [0.0, 1.0]


# --- signals ---


@settings(max_examples=30)
@given(gain=st.floats(1e-6, 1e6), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_property_gain_of_a_scaled_identity(gain: float, sizes: list[int]) -> None:
    metric = SignalGain()
    for size in sizes:
        x = torch.randn(size, 3, dtype=torch.float64)
        metric.update(x, gain * x)
    assert metric.compute().item() == pytest.approx(gain, rel=1e-12)


def test_gain_equals_the_twin() -> None:
    pairs = [(torch.randn(n, 5), 3 * torch.randn(n, 2, 4)) for n in (2, 7, 1)]
    metric = SignalGain()
    for pair in pairs:
        metric(*pair)
    squares = [math.fsum(reference.norm(pair[side]) ** 2 for pair in pairs) for side in (0, 1)]
    counts = [sum(pair[side].numel() for pair in pairs) for side in (0, 1)]
    assert metric.compute().item() == pytest.approx(math.sqrt(squares[1] / counts[1] / (squares[0] / counts[0])))


def test_gain_of_signals_that_float32_squares_cannot_hold() -> None:
    metric = SignalGain()
    metric.update(torch.full((9,), 1e-30), torch.full((9,), 1e30))
    assert metric.compute().item() == pytest.approx(1e60, rel=1e-6)


# --- gradients ---


def test_norms_equal_the_twin() -> None:
    model, mean, greatest = mlp(), GradientNorm(), GradientNorm("max")
    expected = []
    for scale in (1.0, 1e-25, 30.0):
        with_gradients(model, scale)
        model[0].bias.grad = None
        expected.append(math.hypot(*reference.layer_norms(model).values()))
        mean.update(model)
        greatest.update(model.parameters())
        assert GradientNorm()(model).item() == pytest.approx(expected[-1], rel=1e-6)
    assert mean.compute().item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert greatest.compute().item() == pytest.approx(max(expected), rel=1e-6)


def test_norm_equals_what_clipping_says() -> None:
    model = with_gradients(mlp())
    assert GradientNorm()(model[0].weight) == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-6)
    metric = GradientNorm()
    metric.update(model)
    assert metric.compute().item() == pytest.approx(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), rel=1e-5)
    assert GradientNorm()(model).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(reduction: Any, bad: float) -> None:
    model, metric = mlp(), GradientNorm(reduction)
    for element in (1.0, bad, 1.0):
        with_gradients(model)[0].bias.grad[0] = element
        metric(model)
    assert not metric.compute().isfinite()


def test_ratios_equal_the_twin_and_the_monitor() -> None:
    model, metric = with_gradients(mlp()), GradientNormRatio()
    model[2].weight.grad *= 1e-4
    model[4].bias.grad = None
    ratios = metric(model)
    expected = reference.norm_ratios(model)
    assert metric.layer_names == tuple(expected)
    assert ratios.tolist() == pytest.approx(list(expected.values()), rel=1e-6)
    monitor = GradientMonitor(model)
    monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1))
    assert ratios.tolist() == pytest.approx([layer.norm_ratio for layer in monitor.flush().layers], rel=1e-6)
    for reduction, choose in (("max", max), ("min", min)):
        assert GradientNormRatio(reduction=reduction)(model).item() == pytest.approx(choose(expected.values()))


def test_ratios_over_updates_are_those_of_the_mean_squares() -> None:
    model, metric = mlp(), GradientNormRatio("parameter")
    names = [name for name, _ in model.named_parameters()]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for step in range(4):
        with_gradients(model, 10.0**step)
        if step == 2:  # without a gradient it is left out of the mean, not a zero in it
            model[0].weight.grad = None
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[name].append(reference.norm(parameter.grad) ** 2 / parameter.numel())
        metric.update(model)
    rms = [math.sqrt(sum(squares) / len(squares)) for squares in seen.values()]
    scale = math.exp(sum(map(math.log, rms)) / len(rms))
    assert metric.layer_names == tuple(names)
    assert metric.compute().tolist() == pytest.approx([value / scale for value in rms], rel=1e-6)


def test_ratios_of_zero_missing_and_broken_gradients() -> None:
    model = with_gradients(nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(5))))
    for layer, value in zip(model, (1.0, 4.0, 0.0, math.inf, None), strict=True):
        layer.weight.grad = None if value is None else torch.full((2, 2), value)
    ratios = GradientNormRatio()(model).tolist()
    assert ratios[:4] == [0.5, 2.0, 0.0, math.inf]
    assert math.isnan(ratios[4])
    assert GradientNormRatio(reduction="min")(model).item() == 0.0
    model[1].weight.grad[0] = math.nan
    assert GradientNormRatio(reduction="max")(model).isnan()
    for layer in model:
        layer.weight.grad = torch.zeros(2, 2)
    assert GradientNormRatio()(model).isnan().all()
    assert GradientNormRatio(reduction="max")(model).isnan()


@settings(max_examples=20)
@given(exponent=st.integers(-60, 60), depth=st.integers(2, 6))
def test_property_ratios_do_not_depend_on_the_scale_and_multiply_to_one(exponent: int, depth: int) -> None:
    model = with_gradients(mlp(depth, 5).double())
    before = GradientNormRatio()(model)
    for parameter in model.parameters():
        parameter.grad *= 2.0**exponent
    torch.testing.assert_close(GradientNormRatio()(model), before, rtol=1e-12, atol=0)
    assert before.log().sum().item() == pytest.approx(0.0, abs=1e-9)


# --- as torchmetrics do ---


def examples() -> list[tuple[Metric, tuple[Any, ...], tuple[Any, ...]]]:
    """Every metric with two different updates."""
    small, large = with_gradients(mlp()), with_gradients(mlp(), 5.0)
    y = torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])
    return [
        (GradientNorm(), (small,), (large,)),
        (GradientNorm("max"), (large,), (small,)),
        (GradientNormRatio(), (small,), (large,)),
        (GradientNormRatio(reduction="max"), (small,), (large,)),
        (DeadUnitFraction(), (y,), (y.flip(1),)),
        (SaturatedUnitFraction(), (y,), (y.flip(1),)),
        (SignalGain(), (y, 2 * y), (y, 7 * y)),
    ]


each = pytest.mark.parametrize("index", range(7), ids=[type(metric).__name__ for metric, _, _ in examples()])


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


@each
def test_call_gives_the_batch_and_adds_it(index: int) -> None:
    metric, one, two = examples()[index]
    alone, updated = metric.clone(), metric.clone()
    alone.update(*two)
    updated.update(*one)
    updated.update(*two)
    metric(*one)
    same(metric(*two), alone.compute())
    same(metric.compute(), updated.compute())
    with pytest.raises(AssertionError):  # the two updates differ, so that neither can stand in for both
        same(alone.compute(), updated.compute())


@each
def test_copies_carry_on(index: int) -> None:
    metric, one, two = examples()[index]
    metric.update(*one)
    copies = [pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)]
    loaded = examples()[index][0]
    metric.persistent(True)
    loaded.load_state_dict(pickle.loads(pickle.dumps(metric.state_dict())))
    metric.update(*two)
    for other in [*copies, loaded]:
        other.update(*two)
        same(other.compute(), metric.compute())


@each
def test_reset_and_merge(index: int) -> None:
    metric, one, two = examples()[index]
    other = metric.clone()
    metric.update(*two)
    metric.reset()
    metric.update(*one)
    other.update(*two)
    both = metric.clone()
    both.update(*two)
    metric.merge_state(other)
    same(metric.compute(), both.compute())


@each
def test_without_data_it_is_nan_and_says_so(index: int) -> None:
    metric, _, _ = examples()[index]
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()


@each
def test_sums_keep_their_precision_when_the_model_is_cast(index: int) -> None:
    metric, one, two = examples()[index]
    expected = metric.clone()
    model = nn.ModuleDict({"metric": metric, "net": nn.Linear(1, 1)})
    for values in (one, two):
        expected.update(*values)
        metric.update(*values)
        model.to(torch.bfloat16).half()
    assert model["net"].weight.dtype is torch.float16
    assert torch.equal(metric.compute(), expected.compute())
    metric.reset()
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64}


@each
def test_to_another_device(index: int) -> None:
    metric, _, _ = examples()[index]
    moved = metric.to("meta")
    assert moved.device.type == "meta"
    assert {state.device.type for state in moved.metric_state.values()} == {"meta"}


@each
def test_no_update_reads_on_the_host(index: int) -> None:
    metric, one, two = examples()[index]
    with host_reads() as updating:
        metric.update(*one)
        metric.update(*two)
    with host_reads() as computing:
        metric.compute()
    assert updating.count == 0
    assert computing.count == isinstance(metric, GradientNormRatio)


@each
def test_it_leaves_the_inputs_alone(index: int) -> None:
    metric, one, _ = examples()[index]
    one = tuple(value.requires_grad_() if isinstance(value, Tensor) else value for value in one)
    before = [value.detach().clone() for value in one if isinstance(value, Tensor)]
    assert not metric(*one).requires_grad
    assert not any(state.requires_grad for state in metric.metric_state.values())
    assert all(map(torch.equal, [value for value in one if isinstance(value, Tensor)], before))


def test_one_collection_for_all() -> None:
    model = with_gradients(mlp())
    x = torch.randn(40, 6) + torch.linspace(-8, 8, 6)
    metrics = {
        "norm": GradientNorm(),
        "greatest_norm": GradientNorm("max"),
        "ratio": GradientNormRatio(),
        "unevenness": GradientNormRatio(reduction="max"),
        "dead": DeadUnitFraction(),
        "gain": SignalGain(),
    }
    collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()}, prefix="health/")
    for scale in (1.0, 2.0, 0.5):
        with_gradients(model, scale)
        given: dict[str, Any] = {"model": model, "input": scale * x, "output": x.relu()}
        collection.update(**given)
        for metric in metrics.values():
            metric.update(**metric._filter_kwargs(**given))
    results = collection.compute()
    assert results.keys() == {f"health/{name}" for name in metrics}
    for name, metric in metrics.items():
        same(results[f"health/{name}"], metric.compute())


def test_a_collection_does_not_take_one_for_another() -> None:
    """Their sums are the same after the first batch, but not after the second."""
    collection = MetricCollection(
        {name: unit_metric(name) for name in ("relu", "relu6", "tanh", "sigmoid", "softsign")}
    )
    collection.update(torch.tensor([[0.0, 1.0]]))
    collection.update(torch.tensor([[7.0, 0.5]]))
    alone = {name: unit_metric(name) for name in collection}
    for name, metric in alone.items():
        metric.update(torch.tensor([[0.0, 1.0]]))
        metric.update(torch.tensor([[7.0, 0.5]]))
        assert collection.compute()[name] == metric.compute()
    assert collection.compute()["relu"] != collection.compute()["relu6"]


class Logged(Classifier):
    """Logs the metrics as a user would."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = GradientNorm()
        self.unevenness = GradientNormRatio(reduction="max")
        self.dead = DeadUnitFraction()
        self.gain = SignalGain()
        self.norms: list[float] = []
        self.hidden: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[:2](batch[0])
        self.hidden.append(hidden.detach())
        self.dead.update(hidden)
        self.log("dead", self.dead, on_step=False, on_epoch=True)
        self.gain(batch[0], hidden)
        self.log("gain", self.gain, on_step=True, on_epoch=True)
        return nn.functional.cross_entropy(self.net[2:](hidden), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(math.hypot(*reference.layer_norms(self).values()))
        self.norm(self)
        self.log("norm", self.norm, on_step=True, on_epoch=True)
        self.unevenness.update(self.net)
        self.log("unevenness", self.unevenness, on_step=False, on_epoch=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_logged_in_a_fit(precision: Any) -> None:
    model = Logged()
    fit = trainer(max_epochs=1, precision=precision, log_every_n_steps=1)
    fit.fit(model, batches())
    logged = fit.logged_metrics
    assert len(model.norms) == 8
    tight = {"rel": 1e-5}  # Lightning keeps what is logged as float32
    assert logged["norm_step"].item() == pytest.approx(model.norms[-1], **tight)
    assert logged["norm_epoch"].item() == pytest.approx(sum(model.norms) / 8, **tight)
    hidden = torch.cat(model.hidden)
    assert logged["dead"].item() == pytest.approx((hidden <= 0).all(0).double().mean().item(), **tight)
    assert logged["unevenness"].item() >= 1.0
    assert logged["gain_epoch"].item() > 0.0
    assert model.norm.total.tolist() == [0.0, 0.0]  # Lightning has reset it for the next epoch


@each
def test_plot(index: int) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    metric, one, two = examples()[index]
    values = [metric(*one), metric(*two)]
    from matplotlib import pyplot

    for shown in (None, values[0], values):
        figure, axes = metric.plot(shown)
        assert axes.get_ylabel() == type(metric).__name__
        assert len(axes.lines) == max(1, values[0].numel())
        assert figure.axes == [axes]
        pyplot.close(figure)
    if values[0].numel() > 1:
        _, axes = metric.plot()
        assert [line.get_label() for line in axes.lines] == ["0", "2", "4", "6"]
        pyplot.close()


# --- what cannot be done is said ---


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GradientNorm("median"),
            ValueError,
            "reduction must be one of 'mean', 'max', got 'median'; did you mean",
        ),
        (lambda: GradientNormRatio(reduction="mean"), ValueError, "reduction must be one of None, 'max', 'min', got"),
        (lambda: GradientNormRatio(0), ValueError, "layers as a depth must be an int >= 1, got 0"),
        (lambda: DeadUnitFraction("tanh"), ValueError, "one of 'relu', 'relu6', got 'tanh'; .*SaturatedUnitFraction"),
        (lambda: SaturatedUnitFraction("relu"), ValueError, "'softsign', got 'relu'; DeadUnitFraction is for"),
        (lambda: DeadUnitFraction(axis=1.0), TypeError, r"axis must be an int, got 1.0; 1 for"),
        (
            lambda: SaturatedUnitFraction(threshold=5),
            ValueError,
            "threshold must be a finite number > 0 and < 1, got 5; leave",
        ),
        (lambda: GradientNorm().update(mlp()), ValueError, r"none of its parameters has a gradient; .*backward\(\)"),
        (lambda: GradientNormRatio().update(mlp()), ValueError, "none of its parameters has a gradient; update"),
        (lambda: GradientNorm().update(nn.ReLU()), ValueError, "model has no parameters; give"),
        (lambda: GradientNormRatio().update(nn.ReLU()), ValueError, "model has no parameters; give"),
        (lambda: GradientNorm().update(mlp().named_parameters()), TypeError, "got tuple; give .*not named_parameters"),
        (lambda: GradientNorm().update(3.0), TypeError, "must be a module or parameters, got float; give"),
        (lambda: GradientNorm().update("net"), TypeError, "must be a module or parameters, got str; give"),
        (lambda: GradientNormRatio().update([torch.ones(1)]), TypeError, r"must be a torch.nn.Module, got list; its"),
        (lambda: DeadUnitFraction().update(torch.ones(3)), ValueError, r"shape \(3,\) and no axis 1; set axis="),
        (lambda: DeadUnitFraction().update(torch.ones(3, 2).int()), TypeError, "output must be .* got torch.int32; of"),
        (lambda: DeadUnitFraction().update((1, 2)), TypeError, "output must be a tensor, got tuple; of several"),
        (lambda: SignalGain().update(torch.ones(2).long(), torch.ones(2)), TypeError, "input must be .* torch.int64"),
        (lambda: SignalGain().update(torch.ones(2), None), TypeError, "output must be a tensor, got NoneType"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("call", [True, False])
def test_a_metric_is_for_one_layer_or_model(call: bool) -> None:
    def give(metric: Metric, value: Any) -> None:
        metric(value) if call else metric.update(value)

    dead, ratio = DeadUnitFraction(), GradientNormRatio()
    give(dead, torch.ones(2, 3))
    with pytest.raises(ValueError, match="output has 1 units on axis 1, at earlier updates 3; use one metric for each"):
        give(dead, torch.ones(2, 1))
    give(ratio, with_gradients(mlp()))
    with pytest.raises(ValueError, match=r"other layers .*: 0, 2, 4 and 2 more, not 0, 2, 4 and 1 more; use one"):
        give(ratio, with_gradients(mlp(depth=5)))


@pytest.mark.parametrize("call", [True, False])
@pytest.mark.parametrize("make", [DeadUnitFraction, lambda: SaturatedUnitFraction("tanh"), GradientNormRatio])
def test_after_a_reset_another_width_may_come(make: Callable[[], Metric], call: bool) -> None:
    def values(metric: Metric, sizes: tuple[int, ...]) -> Tensor:
        for size in sizes:
            ratio = isinstance(metric, GradientNormRatio)
            torch.manual_seed(size)
            given = with_gradients(mlp(depth=size)) if ratio else torch.randn(8, size).clamp(-1, 1)
            metric(given) if call else metric.update(given)
        return metric.compute()

    metric = make()
    values(metric, (4, 4))
    metric.reset()
    again = values(metric, (6, 6))
    same(again, values(make(), (6, 6)))
    metric.reset()
    same(values(metric, (4,)), values(make(), (4,)))
    with pytest.raises(ValueError, match="at earlier updates"):  # and within a run it still has to be the same one
        values(metric, (5,))


def test_a_state_of_other_units_is_refused() -> None:
    old, new = DeadUnitFraction(), DeadUnitFraction()
    old.update(torch.ones(2, 3))
    old.persistent(True)
    new.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="output has 4 units on axis 1, at earlier updates 3"):
        new.update(torch.ones(2, 4))
