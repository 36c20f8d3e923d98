"""What is written for the tab: how much, how often, and that every number comes back."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tab import Tab, finding, record, write
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import lightning_gradhealth as gh
from lightning_gradhealth.loggers import LoggerSink
from lightning_gradhealth.loggers.events import KEPT, EventsWriter
from lightning_gradhealth.records import LayerStats, StepRecord, StepStats
from lightning_gradhealth.view.quantities import QUANTITIES


def events_of(folder: Path, plugin_only: bool = True) -> list[Event]:
    """All events of a run, in order; those with data of the tab."""
    files = sorted(folder.rglob("*tfevents*"))
    events = [Event.FromString(raw) for path in files for raw in RawEventFileLoader(str(path)).Load()]
    return [event for event in events if not plugin_only or any(_is_ours(value) for value in event.summary.value)]


def _is_ours(value: Any) -> bool:
    parts = value.tag.split("/")
    return parts[0].startswith("gradhealth") and value.HasField("tensor") and len(parts) == 3 and "text" not in parts[2]


def tags(event: Event) -> set[str]:
    return {value.tag.rsplit("/", 1)[-1] for value in event.summary.value}


# --- exact counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 12])
def test_one_event_a_logged_step_whatever_the_layers(depth: int, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    health = gh.GradHealth(report_dir=None)
    trainer(health, logger=logger, log_every_n_steps=2, max_steps=8).fit(Classifier(mlp(depth)), batches())
    *events, end = events_of(Path(logger.log_dir))
    assert (end.step, tags(end)) == (7, {"findings", "report"})
    assert [event.step for event in events] == [1, 3, 5, 7]
    for event in events:
        assert {"grad_norm", "norm_ratio", "total", "forward_rms", "update_to_weight"} <= tags(event)
        assert max(Counter(value.tag for value in event.summary.value).values()) == 1
    assert [("layers" in tags(event)) for event in events] == [True, False, False, False]
    described = [sum(value.HasField("metadata") for value in event.summary.value) for event in events]
    assert described[0] == len(events[0].summary.value)  # the first event says what all of it means
    assert sum(described[2:]) == 0  # and nothing is said twice


def test_every_number_comes_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    health = gh.GradHealth(report_dir=None)
    trainer(health, logger=logger, log_every_n_steps=4, max_steps=8).fit(Classifier(mlp(5)), batches())
    last = {layer.name: layer for layer in health.report().layers}
    values = {value.tag.rsplit("/", 1)[-1]: value for value in events_of(Path(logger.log_dir))[-2].summary.value}
    first = {value.tag.rsplit("/", 1)[-1]: value for value in events_of(Path(logger.log_dir))[0].summary.value}
    names = json.loads(first["layers"].metadata.plugin_data.content)["layers"]
    assert [name for name, *_ in names] == list(last)
    checked = 0
    for name in ("norm_ratio", "update_to_weight", "weight_norm", "forward_rms", "backward_rms"):
        array = tensor_util.make_ndarray(values[name].tensor)
        assert array.dtype == np.float16
        for coded, layer in zip(QUANTITIES[name].decode(array), last.values(), strict=True):
            value = getattr(layer, name)
            if value is not None:
                assert coded == pytest.approx(value, rel=0.01)
                checked += 1
    assert checked > 20


def test_histograms_grow_with_the_logarithm_of_a_run(tmp_path: Path) -> None:
    counts = (0,) * 10 + (5, 20, 7) + (0,) * 19
    records = [
        record(step, [1.0]).changed(layers=(LayerStats("a", grad_norm=1.0, forward_histogram=counts),))
        for step in range(2_000)
    ]
    write(tmp_path, records)
    written = [event.step for event in events_of(tmp_path) if "histogram" in tags(event)]
    assert len(written) < 250
    assert written[:30] == list(range(30))  # a short run has one at each logged step
    gaps = [(two - one) / two for one, two in zip(written[30:], written[31:], strict=False)]
    assert max(gaps) < 0.06
    histogram = Tab(tmp_path).get("layer", run=".", layer=0)["histogram"]
    assert len(histogram["step"]) == len(written)
    assert histogram["shares"][0] == pytest.approx([c / 32 for c in counts], abs=0.01)
    assert histogram["edges"][10] == 2.0**-12


def test_a_changed_model_has_names_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, [record(0, [1.0, 2.0]), record(1, [1.0, 2.0]), record(2, [1.0, 2.0, 3.0])])
    tab = Tab(tmp_path)
    layout = tab.get("layout", run=".")
    assert [(s["x0"], s["x1"], s["layers"]) for s in layout["schemas"]] == [(0, 1, 2), (2, 2, 3)]
    assert len(layout["layers"]) == 3
    old = tab.get("layout", run=".", schema=layout["schemas"][0]["schema"])
    assert len(old["layers"]) == 2
    assert tab.get("series", run=".")["step"] == [0, 1, 2]


def test_findings_are_written_when_they_change_and_at_no_other_step(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        events = EventsWriter()
        for step in range(10):
            found = [finding(last_step=step)] if step >= 3 else []
            active = {"exploding_gradients"} if 3 <= step < 6 else set()
            events.write(writer, record(step, [1.0]), found, active)
    assert [event.step for event in events_of(tmp_path) if "findings" in tags(event)] == [0, 3, 6]
    (shown,) = Tab(tmp_path).get("series", run=".")["findings"]
    assert shown["spans"] == [[3, 6]]
    assert not shown["active"]


def test_no_spike_is_lost_where_tensorboard_draws_lots(tmp_path: Path) -> None:
    spikes = {1_500: 1e4, 5_003: 1e6, 7_001: math.nan}
    records = []
    for step in range(3 * KEPT * 3):
        norm = spikes.get(step, 1.0)
        window = (StepStats(step, total_norm=norm, loss=1.0, non_finite=math.isnan(norm)),)
        records.append(record(step, [1.0, norm], total_norm_max=None if math.isnan(norm) else norm, window=window))
    write(tmp_path, records)
    tab = Tab(tmp_path, samples=300)  # TensorBoard keeps one event in thirty
    _, codes = tab.picture(run=".", metric="grad_norm", w=100)
    row = codes[1]
    assert row.count(255) == 1
    assert sum(code > 50 for code in row if code <= 250) == 2
    series = tab.get("series", run=".")
    assert [span["steps"] for span in series["spans"] if span["name"] == "non_finite"] == [[[7_001, 7_001]]]
    total = next(c for c in series["columns"] if c["name"] == "total_norm")["values"]
    assert "NaN" in total
    assert max(value for value in total if value != "NaN") == pytest.approx(1e6)


# --- who can be written to ---------------------------------------------------------------------------------------


def loop(session: gh.HealthSession, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 8)).square().mean()
        loss.backward()
        session.apply(session.observe(optimizer, loss=loss))
        optimizer.step()
        if step % 2:
            session.flush()


def test_a_plain_summary_writer_gets_scalars_charts_and_the_tab(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with SummaryWriter(str(tmp_path)) as writer:
        session = gh.HealthSession(model, loggers=writer)
        loop(session, model, optimizer)
        session.flush()  # there is nothing new: nothing is written
    assert [event.step for event in events_of(tmp_path)] == [1, 3, 5]
    scalars = {value.tag for event in events_of(tmp_path, False) for value in event.summary.value}
    assert {"gradhealth/findings", "gradhealth/log10_total_norm"} <= scalars
    assert "custom_scalars__config__" in scalars
    assert not [tag for tag in scalars if tag.startswith("gradhealth/layers/")]
    series = Tab(tmp_path).get("series", run=".")
    assert series["status"]["severity"] == "healthy"
    assert len(next(c for c in series["columns"] if c["name"] == "loss")["values"]) == 3


def test_conclude_writes_what_came_after_the_last_flush(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with SummaryWriter(str(tmp_path)) as writer:
        session = gh.HealthSession(model, loggers=[writer])
        loop(session, model, optimizer, steps=5)
        session.conclude()
    assert [event.step for event in events_of(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize("wrong", ["runs", SummaryWriter, 5, [object()]])
def test_what_is_no_logger_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="loggers must be a SummaryWriter, a logger of Lightning or a run"):
        gh.HealthSession(mlp(), loggers=wrong)


def test_tensorboardx_is_told_what_to_use_and_gets_scalars(caplog: pytest.LogCaptureFixture) -> None:
    class SummaryWriter:
        log_dir = "runs"

        def __init__(self) -> None:
            self.scalars: list[str] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append(tag)

        def add_text(self, tag: str, text: str, step: int) -> None:
            """Keep none."""

        def add_custom_scalars(self, layout: Any) -> None:
            """Keep none."""

        def flush(self) -> None:
            """Nothing waits."""

    SummaryWriter.__module__ = "tensorboardX.writer"
    writer = SummaryWriter()
    sink = LoggerSink()
    for step in range(3):
        sink.write([writer], record(step, [1.0]), [], ())
    (line,) = [entry.getMessage() for entry in caplog.records]
    assert "tensorboardX's SummaryWriter has no tensor events" in line
    assert "torch.utils.tensorboard.SummaryWriter" in line
    assert writer.scalars.count("gradhealth/log10_total_norm") == 3


def test_a_failing_event_file_costs_neither_training_nor_scalars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(EventsWriter, "write", broken)
    logger = TensorBoardLogger(str(tmp_path))
    health = gh.GradHealth(report_dir=None)
    run = trainer(health, logger=logger, log_every_n_steps=2, max_steps=8)
    run.fit(Classifier(), batches())
    assert run.global_step == health.report().steps == 8
    (line,) = [entry.getMessage() for entry in caplog.records if entry.name == "lightning_gradhealth"]
    assert "Grad Health tab (OSError: no space left on device); training and scalars go on" in line
    written = [v.tag for event in events_of(Path(logger.log_dir), False) for v in event.summary.value]
    assert written.count("gradhealth/findings") == 4


def test_a_writer_that_fails_in_a_loop_of_ones_own_does_not_end_it(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar = None  # type: ignore[method-assign, assignment]
    session = gh.HealthSession(model, loggers=writer)
    loop(session, model, optimizer)
    writer.close()
    assert session.report().healthy
    assert session.report().steps == 6


def test_two_callbacks_are_two_runs_of_the_tab(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    both = gh.GradHealth(report_dir=None), gh.GradHealth(layers="parameter", report_dir=None)
    trainer(*both, logger=logger, log_every_n_steps=2, max_steps=4).fit(Classifier(), batches())
    tab = Tab(Path(logger.log_dir))
    names = [run["run"] for run in tab.get("runs")["runs"]]
    assert names == [".", ". (gradhealth-2)"]
    one, two = (tab.get("layout", run=name)["layers"] for name in names)
    assert len(two) == 2 * len(one)


def test_what_is_written_does_not_change_training(tmp_path: Path) -> None:
    def weights(*callbacks: Any, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Classifier(mlp(4))
        trainer(*callbacks, log_every_n_steps=1, max_steps=6, **options).fit(model, batches())
        return [parameter.detach().clone() for parameter in model.parameters()]

    bare = weights()
    watched = weights(gh.GradHealth(), logger=TensorBoardLogger(str(tmp_path)))
    assert all(torch.equal(one, two) for one, two in zip(bare, watched, strict=True))


def test_a_record_without_layers_is_written(tmp_path: Path) -> None:
    write(tmp_path, [StepRecord(step=3, total_norm=1.0)])
    assert [event.step for event in events_of(tmp_path)] == [3]
