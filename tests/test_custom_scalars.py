"""TensorBoard's Custom Scalars panel holds one layout a run: the user's charts and ours stand in it together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import Classifier, batches, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhealth import GradHealth, NormClip
from lightning_gradhealth.loggers import LoggerSink, panels
from lightning_gradhealth.records import StepRecord

MINE = {"Mine": {"losses": ["Multiline", ["loss", "val"]], "band": ["Margin", ["a", "b", "c"]]}}
OURS = {"Grad Health": {"norm": ["Multiline", ["gradhealth/log10_total_norm"]]}}


def panel(folder: Path) -> dict[str, list[str]]:
    """What the panel shows: category -> titles."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder)))
    answer = CustomScalarsPlugin(context).layout_impl(RequestContext(), "")
    shown = json.loads(answer) if isinstance(answer, str) else answer
    return {part["title"]: [chart["title"] for chart in part["chart"]] for part in shown["category"]}


@pytest.mark.parametrize("hook", ["__init__", "on_fit_start", "on_train_batch_end", "on_train_end"])
@pytest.mark.parametrize("way", ["layout", "lines", "margin"])
def test_a_users_charts_stay_whenever_they_come(hook: str, way: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))

    def add() -> None:
        writer = logger.experiment
        if way == "layout":
            writer.add_custom_scalars(MINE)
        elif way == "lines":
            writer.add_custom_scalars_multilinechart(["loss"], "Mine", "losses")
        else:
            writer.add_custom_scalars_marginchart(["a", "b", "c"], "Mine", "losses")

    class Adds(pl.Callback):
        pass

    if hook == "__init__":
        add()
    else:
        setattr(Adds, hook, lambda self, *args: add())
    trainer(GradHealth(), Adds(), logger=logger, max_epochs=1, log_every_n_steps=2).fit(Classifier(), batches())
    shown = panel(tmp_path)
    assert shown["Mine"] == (["losses", "band"] if way == "layout" else ["losses"])
    assert "Grad Health" in shown


def test_a_run_that_goes_on_keeps_what_was_there(tmp_path: Path) -> None:
    first = SummaryWriter(str(tmp_path))
    first.add_custom_scalars(MINE)
    first.close()
    second = SummaryWriter(str(tmp_path), filename_suffix=".second")
    panels.show(second, OURS)
    second.close()
    assert panel(tmp_path) == {"Mine": ["losses", "band"], "Grad Health": ["norm"]}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_writer_of_ones_own_keeps_its_charts_whatever_its_folder_is_given_as(kind: Any, tmp_path: Path) -> None:
    writer = SummaryWriter(kind(tmp_path))
    writer.add_custom_scalars(MINE)
    LoggerSink().write([writer], StepRecord(0, total_norm=1.0), [], ())
    writer.close()
    assert set(panel(tmp_path)) == {"Mine", "Grad Health"}


def test_the_latest_charts_of_the_user_count(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    panels.show(writer, OURS)
    writer.add_custom_scalars(MINE)
    writer.add_custom_scalars({"Other": {"x": ["Multiline", ["x"]]}})
    panels.show(writer, {"Grad Health": {"new": ["Multiline", ["y"]]}})
    writer.close()
    assert panel(tmp_path) == {"Other": ["x"], "Grad Health": ["new"]}


class Recorder(Logger):
    """A logger that keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        """Keep none."""


@pytest.mark.parametrize("options", [{"layers": "parameter"}, {"probe_every_n_steps": 3, "clip": NormClip(0.05)}])
def test_two_instances_write_names_of_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    recorder, tensorboard = Recorder(), TensorBoardLogger(str(tmp_path))
    first, second = GradHealth(), GradHealth(**options)
    run = trainer(first, second, logger=[recorder, tensorboard], max_epochs=1, log_every_n_steps=2)
    run.fit(Classifier(), batches())
    written = [(step, name) for step, row in recorder.rows for name in row if name.startswith("gradhealth")]
    assert len(written) == len(set(written))
    assert {name.partition("/")[0] for _, name in written} == {"gradhealth", "gradhealth-2"}
    assert {"Grad Health", "Grad Health 2"} <= set(panel(tmp_path))
    for report in (first.report(), second.report()):
        assert report.steps == run.global_step
