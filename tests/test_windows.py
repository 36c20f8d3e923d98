"""What several records of one flush become, and that a measured 0 is not the same as nothing measured."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from lightning_gradhealth import (
    GradHealth,
    GradientMonitor,
    HealthReport,
    HealthSession,
    LayerStats,
    NormClip,
    StepRecord,
)
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.loggers.scalars import scalars
from lightning_gradhealth.merging import KEPT, latest, merged
from lightning_gradhealth.records import StepStats
from lightning_gradhealth.reports.health import layer_state
from lightning_gradhealth.rules import Thresholds, default_rules


class Memory(Logger):
    """A logger that keeps what it is given."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {name.removeprefix("gradhealth/"): v for name, v in metrics.items() if name.startswith("gradhealth/")}
        assert step is not None
        self.rows[step].update(ours)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def summed(self, name: str) -> float:
        return sum(row.get(name, 0.0) for row in self.rows.values())


class Norms(pl.Callback):
    """The norm of each optimizer step's gradients, taken by hand: x value, optimizer, norm."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []

    def on_before_optimizer_step(self, run: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        numbers = {id(getattr(o, "optimizer", o)): i for i, o in enumerate(run.optimizers)}
        step = run.fit_loop.epoch_loop._batches_that_stepped
        self.steps.append(
            (step, numbers[id(optimizer)], math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        )


class Spiking(Classifier):
    """Its loss is 1,000 times as large in one batch, NaN in another."""

    def __init__(self, *args: Any, spike: int = -1, nan: int = -1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.spike, self.nan, self.batch = spike, nan, -1

    def factor(self) -> float:
        self.batch += 1
        return {self.spike: 1e3, self.nan: math.nan}.get(self.batch, 1.0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor()


class Pair(Spiking):
    """Steps its two halves one after the other, in each batch the first of them `often` times."""

    often = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        factor = self.factor()
        first, second = self.optimizers()
        for optimizer in (*[first] * self.often, second):
            optimizer.zero_grad()
            self.manual_backward(Classifier.training_step(self, batch, batch_idx) * factor)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=1e-4) for part in (self.net[:3], self.net[3:])]


class PairTwice(Pair):
    """The first half steps twice a batch."""

    often = 2


class Heals(pl.Callback):
    """Puts the weights back after each batch, so that the run goes on after a NaN."""

    def __init__(self, model: nn.Module) -> None:
        self.before = [parameter.detach().clone() for parameter in model.parameters()]

    def on_train_batch_end(self, run: pl.Trainer, module: pl.LightningModule, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for parameter, old in zip(module.parameters(), self.before, strict=True):
                parameter.copy_(old)


def by_hand(norms: Norms, rows: dict[int, dict[str, float]]) -> dict[int, float]:
    """The largest finite norm of the steps that each logged row stands for."""
    borders = [-1, *sorted(rows)]
    return {
        right: max(norm for step, _, norm in norms.steps if left < step <= right and math.isfinite(norm))
        for left, right in zip(borders, borders[1:], strict=False)
    }


@pytest.mark.parametrize(
    ("kind", "options", "cadence"),
    [
        (Pair, {}, 10),  # two optimizers
        (PairTwice, {}, 10),
        (Spiking, {"optimizer": torch.optim.LBFGS, "lr": 1e-4}, 10),
        (Spiking, {"lr": 1e-4}, 3),  # weights are probed more often than the Trainer logs
        (Spiking, {"lr": 1e-4}, 1),
        (Spiking, {"lr": 1e-4}, 1_000),
    ],
)
def test_a_spike_and_a_nan_anywhere_in_a_window_are_logged(kind: Any, options: Any, cadence: int) -> None:
    for spike, nan in ((1, 12), (14, 25), (23, 8)):
        logger, norms, health = Memory(), Norms(), GradHealth(probe_every_n_steps=cadence)
        model = kind(spike=spike, nan=-1 if "optimizer" in options else nan, **options)  # LBFGS would keep the NaN
        trainer(health, norms, Heals(model), logger=logger, log_every_n_steps=10, max_epochs=4).fit(model, batches())
        rows = {step: row for step, row in logger.rows.items() if "log10_total_norm" in row}
        assert rows
        truth = by_hand(norms, rows)
        assert {step: 10 ** row["log10_total_norm"] for step, row in rows.items()} == pytest.approx(truth, rel=1e-6)
        report = health.report()
        assert logger.summed("non_finite_steps") == report.non_finite_steps
        assert report.non_finite_steps == sum(not math.isfinite(norm) for _, _, norm in norms.steps)


@pytest.mark.parametrize("cadence", [1, 2, 7])
@pytest.mark.parametrize(("kind", "per_batch"), [(Spiking, 1), (Pair, 2)])
def test_what_was_clipped_and_skipped_adds_up(kind: Any, per_batch: int, cadence: int) -> None:
    logger = Memory()
    health = GradHealth(clip=NormClip(0.1), on_non_finite="skip", probe_every_n_steps=cadence)
    options = {} if kind is Pair else {"lr": 1e-3}
    run = trainer(health, logger=logger, log_every_n_steps=10, max_epochs=4)
    run.fit(kind(nan=13, **options), batches())
    report = health.report()
    assert report.skipped_steps == logger.summed("skipped_steps") == per_batch
    borders = [-1, *sorted(logger.rows)]
    clipped = [
        logger.rows[right]["clipped_fraction"] * (right - left) * per_batch
        for left, right in zip(borders, borders[1:], strict=False)
    ]
    assert round(sum(clipped)) == report.clipped_steps > 10 * per_batch


def test_a_window_longer_than_what_is_kept_loses_no_count_and_no_peak() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = HealthSession(model, probe_every_n_steps=500)
    spikes = {3: 1e3, 700: 1e4, 1_500: math.nan, 2_200: 7.0}
    for step in range(2_500):
        model.weight.grad = torch.full((1, 2), spikes.get(step, 1.0))
        session.apply(session.observe(optimizer))
        optimizer.step()
        if step == 1_200:  # what was read in between survives a checkpoint
            state = session.state_dict()
            session.close()
            session = HealthSession(model, probe_every_n_steps=500)
            session.load_state_dict(state)
    record = session.flush()
    assert (record.step, record.steps, record.non_finite_steps) == (2_499, 2_500, 1)
    assert record.total_norm_max == pytest.approx(1e4 * math.sqrt(2))
    assert record.layers[0].grad_norm_max == pytest.approx(1e4 * math.sqrt(2))
    assert record.layers[0].non_finite == 1
    assert len(record.window) == KEPT
    assert session.report().steps == 2_500
    assert session.flush() is record  # nothing new


def test_the_monitor_alone_gives_one_record_of_all_that_it_saw() -> None:
    model = mlp()
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.0), GradientMonitor(model)
    norms = []
    for scale in (1.0, 50.0, 2.0, 1.0):
        optimizer.zero_grad()
        (model(torch.ones(4, 8)).square().sum() * scale).backward()
        norms.append(float(monitor.observe(optimizer, probe=True).total_norm))
        optimizer.step()
    record = monitor.flush()
    assert [step.total_norm for step in record.window] == pytest.approx(norms)
    assert (record.total_norm, record.total_norm_max) == pytest.approx((norms[-1], norms[1]))
    assert record.probed


def test_the_end_of_a_fit_logs_what_no_cadence_has() -> None:
    logger, norms = Memory(), Norms()
    trainer(GradHealth(probe_every_n_steps=2), norms, logger=logger, log_every_n_steps=50, max_epochs=1).fit(
        Spiking(spike=1, lr=1e-5), batches()
    )
    logged = {step: 10 ** row["log10_total_norm"] for step, row in logger.rows.items()}
    assert logged == pytest.approx(by_hand(norms, logger.rows))


# --- 0 and nothing ---


@pytest.mark.parametrize(
    "name",
    ["forward_rms", "forward_mean", "backward_rms", "dead_fraction", "saturated_fraction", "weight_norm", "units"],
)
def test_a_measured_zero_is_taken_and_shown(name: str) -> None:
    shares = {"dead_fraction": 1.0, "units": 8, "activation": "relu", "forward_rms": 2.0, "weight_norm": 3.0}
    old = LayerStats("a", optimizer=0, **{**shares, name: 5})
    zero = LayerStats("a", optimizer=0, **{"forward_rms": 1.0, "weight_norm": 1.0, name: 0})
    assert getattr(latest(zero, old), name) == 0
    assert f"{name}=0" in repr(zero)
    nothing = LayerStats("a", optimizer=0)
    assert getattr(latest(nothing, old), name) == 5
    assert name not in repr(nothing)


def test_what_is_undefined_now_is_not_what_it_was() -> None:
    old = LayerStats("a", optimizer=0, forward_rms=1.0, backward_rms=1.0, forward_gain=2.0, backward_gain=0.5)
    new = LayerStats("a", optimizer=0, forward_rms=0.0)  # no gradient came back, and there is no ratio to 0
    known = latest(new, old)
    assert (known.forward_rms, known.backward_rms, known.forward_gain, known.backward_gain) == (0.0, None, None, None)


def test_signals_of_a_frozen_layer_are_those_of_the_last_probe() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.01)
    session = HealthSession(model, probe_every_n_steps=1)
    for scale in (1.0, 10.0):
        optimizer.zero_grad()
        x = torch.ones(4, 8) * scale
        model(x).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        session.flush()
    expected = float(model[0](torch.ones(4, 8) * 10.0).square().mean().sqrt())
    (first,) = [layer for layer in session.report().layers if layer.name == "0"]
    assert first.forward_rms == pytest.approx(expected, rel=1e-5)


class Dying(nn.Module):
    """A ReLU layer that a shift of its input kills and revives."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 16), activation, nn.Linear(16, 1)
        self.shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x) + self.shift))


@pytest.mark.parametrize(
    ("activation", "field", "shift"),
    [
        (nn.ReLU(), "dead_fraction", -100.0),
        (nn.ReLU6(), "dead_fraction", -100.0),
        (nn.Sigmoid(), "saturated_fraction", 100.0),
        (nn.Tanh(), "saturated_fraction", 100.0),
    ],
)
def test_a_layer_that_revives_is_no_longer_called_dead(activation: nn.Module, field: str, shift: float) -> None:
    model = Dying(activation)
    optimizer, session = torch.optim.SGD(model.parameters(), lr=1e-4), HealthSession(model, probe_every_n_steps=1)
    words = field.partition("_")[0]
    for step in range(40):
        model.shift = shift if step < 15 else 0.0
        optimizer.zero_grad()
        model(torch.randn(256, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        session.flush()
        first = next(layer for layer in session.report().layers if layer.name == "first")
        if step == 10:
            assert getattr(first, field) == 1.0
            assert words in layer_state(first, session.report().findings)[0]
        if 15 <= step < 18 and field == "dead_fraction":
            assert first.backward_rms is not None
    report = session.report()
    first = next(layer for layer in report.layers if layer.name == "first")
    assert getattr(first, field) == 0.0
    assert first.units == 16
    assert layer_state(first, report.findings)[0] == "recovered"
    (finding,) = [f for f in report.findings if words in str(f.condition)]
    assert finding.healed == finding.layers == ("first",)
    assert HealthReport.from_json(report.to_json()) == report


def test_a_blocked_gradient_is_zero_not_what_it_was() -> None:
    model = Dying(nn.ReLU())
    optimizer, session = torch.optim.SGD(model.parameters(), lr=1e-4), HealthSession(model, probe_every_n_steps=1)
    for step in range(10):
        model.shift = -100.0 if step >= 5 else 0.0
        optimizer.zero_grad()
        model(torch.randn(256, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        session.flush()
        first = session.report().layers[0]
        assert (first.backward_rms == 0.0) == (first.grad_norm == 0.0) == (step >= 5)


def test_zeros_are_logged_as_zeros() -> None:
    layer = LayerStats("a", optimizer=0, grad_norm=0.0, norm_ratio=0.0, update_to_weight=0.0, dead_fraction=0.0)
    steps = (
        StepStats(0, total_norm=0.0, skipped=False, clipped=False, armed=False, clip_coefficient=0.0, would_clip=0.0),
    )
    record = StepRecord(0, 0.0, 0.0, 0.0, 0.0, (layer,), steps, backward_gain=0.0, forward_gain=0.0)
    logged = scalars(record, 0)
    for name in ("forward_gain_per_layer", "dead_fraction_max", "gain_per_layer", "skipped_steps", "clipping_active"):
        assert logged[f"gradhealth/{name}"] == 0.0
    for name in ("total_norm", "applied_norm", "norm_ratio_min", "would_clip", "update_to_weight"):
        assert f"gradhealth/log10_{name}" not in logged  # 0 has no logarithm
    assert "gradhealth/saturated_fraction_max" not in logged
    assert len(scalars(StepRecord(0), 0)) == 2  # nothing was measured: counts only


def test_merging_is_the_same_in_any_grouping() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    judged = Judgement(default_rules(Thresholds()), {})
    session, records = HealthSession(model, probe_every_n_steps=3), []
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        records.append(session.flush())
    for record in records:
        judged.add(record)
    left = merged([merged(records[:5]), merged(records[5:])])
    assert left.to_json() == merged(records).to_json() == merged([merged(records[:1]), *records[1:]]).to_json()
    for one, other in zip(merged(records).layers, judged.layers.values(), strict=True):
        assert one.changed(grad_norm_max=None) == other.changed(grad_norm_max=None)
