"""What services get beside numbers: alerts, and the report as a page."""

from __future__ import annotations

import enum
import json
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import lightning_gradhealth as gh
from lightning_gradhealth.loggers import sink
from lightning_gradhealth.loggers.hosts import LONGEST_TITLE, host_of, title_of
from lightning_gradhealth.records import Finding

PAGE = "gradhealth/report/_type"  # as W&B names the parts of a value

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")


class Bad(pl.LightningModule):
    """A model whose loss is NaN at step 3; or never."""

    def __init__(self, sick: bool = True) -> None:
        super().__init__()
        self.net, self.sick = nn.Linear(4, 2), sick

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        return loss * float("nan") if self.sick and batch_idx == 3 else loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(logger: Logger | list[Logger], folder: Path, sick: bool = True, **options: Any) -> gh.GradHealth:
    health = gh.GradHealth(on_non_finite="skip", **options)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[health],
        logger=logger,
        accelerator="cpu",
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(Bad(sick))
    return health


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing leaves this machine, nothing stays on it."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    quiet = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}
    for name, value in quiet.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def wandb_records(folder: Path) -> list[Any]:
    """The records of the one offline run below a folder, which is over."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    data, at, part, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            records.append(Record.FromString(part))
            part = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def finish(run: Any) -> None:
    import wandb

    run.finish()
    wandb.teardown()


# --- W&B -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sick", [True, False])
def test_wandb_gets_an_alert_for_each_finding_and_the_page(tmp_path: Path, sick: bool) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    health = fit(logger, tmp_path, sick)
    finish(logger.experiment)
    records = wandb_records(tmp_path)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == (["non_finite at step 3"] if sick else [])
    assert [alert.text for alert in alerts] == [str(finding) for finding in health.report().findings][: int(sick)]
    assert all(
        alert.level == ("ERROR" if health.report().findings[0].severity == "critical" else "WARN") for alert in alerts
    )
    rows = [row for row in history(records) if PAGE in row]
    assert [row[PAGE] for row in rows] == ["html-file"]
    (page,) = list(tmp_path.rglob("media/**/*.html"))
    assert page.stat().st_size == rows[0]["gradhealth/report/size"]
    assert f"Training health: {health.report().verdict}" in page.read_text()


def test_the_page_is_no_step_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    counts = []
    for name in ("auto", None):
        folder = tmp_path / str(name)
        folder.mkdir()
        logger = WandbLogger(project="test", save_dir=folder, offline=True)
        fit(logger, folder, report_dir=name)
        logger.log_metrics({"mine": 1.0}, step=8)
        finish(logger.experiment)
        rows = history(wandb_records(folder))
        counts.append([row["_step"] for row in rows if "trainer/global_step" in row])
        assert any(PAGE in row for row in rows) == (name == "auto")
    assert counts[0] == counts[1]


def test_a_run_of_wandb_itself_serves_a_plain_loop(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    run = wandb.init(project="test", dir=tmp_path, mode="offline")
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    session = gh.HealthSession(net, loggers=run, on_non_finite="skip")
    for step in range(6):
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean() * (float("nan") if step == 2 else 1.0)
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
    session.flush()
    session.close()
    finish(run)
    records = wandb_records(tmp_path)
    alerts = [record.alert.title for record in records if record.WhichOneof("record_type") == "alert"]
    assert alerts == ["non_finite at step 2"]
    rows = history(records)
    assert any(row.get("gradhealth/non_finite_steps") == 1 and row["trainer/global_step"] == 5 for row in rows)
    assert any(PAGE in row for row in rows)


# --- MLflow ----------------------------------------------------------------------------------------------------


def test_mlflow_gets_the_page_and_the_json_as_artifacts(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    report = fit(logger, tmp_path).report()
    names = [file.path for file in logger.experiment.list_artifacts(logger.run_id, "gradhealth")]
    assert sorted(names) == ["gradhealth/report.html", "gradhealth/report.json"]
    (path,) = tmp_path.rglob("artifacts/gradhealth/report.json")
    assert gh.HealthReport.from_json(path.read_text()).to_json() == report.to_json()
    assert "Training health: non_finite" in path.with_suffix(".html").read_text()


def test_none_is_given_a_report_that_nobody_wants(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit(logger, tmp_path, report_dir=None)
    assert logger.experiment.list_artifacts(logger.run_id) == []


# --- Trackio ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> type:
    """What Trackio has for alerts: levels, and a run that prints them. The package needs others that are not here."""
    module = types.ModuleType("trackio")
    module.AlertLevel = enum.Enum("AlertLevel", {"INFO": "info", "WARN": "warn", "ERROR": "error"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)

    class Run:
        def __init__(self) -> None:
            self.alerts: list[tuple[str, str | None, Any]] = []
            self.rows: list[tuple[dict[str, Any], int | None]] = []

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self.rows.append((metrics, step))

        def alert(self, title: str, text: str | None = None, level: Any = None, step: int | None = None) -> None:
            self.alerts.append((title, text, level))
            print(f"[{level.value}] {title}: {text}")

    Run.__module__ = "trackio.run"
    return Run


class Keeper(Logger):
    """A logger of Lightning around the run of a service."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.experiment = run

    name, version = "keeper", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step)


def test_trackio_prints_an_alert_and_no_line_is_printed_twice(
    tmp_path: Path, trackio: Callable[[], Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = trackio()
    fit(Keeper(run), tmp_path)
    assert [(title, level.value) for title, _, level in run.alerts] == [("non_finite at step 3", "warn")]
    told = capsys.readouterr().out + caplog.text
    assert told.count("non_finite since") + told.count("warning: non_finite") == 1
    assert run.rows


@pytest.mark.parametrize("condition", ["x" * 300, "loss\nspike\x1b[31m"])
def test_titles_are_short_and_plain(condition: str) -> None:
    title = title_of(Finding(condition, "warning", (), 3, 3))
    assert len(title) <= LONGEST_TITLE
    assert title.isprintable()


# --- images only -----------------------------------------------------------------------------------------------


def test_a_writer_of_tensorboardx_gets_a_figure(tmp_path: Path) -> None:
    tensorboard_x = pytest.importorskip("tensorboardX")
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with tensorboard_x.SummaryWriter(str(tmp_path)) as writer:
        session = gh.HealthSession(net, loggers=writer)
        for _ in range(6):
            optimizer.zero_grad()
            loss = net(torch.ones(3, 4)).square().mean()
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
        session.flush()
        session.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["gradhealth/report"]
    (image,) = events.Images("gradhealth/report")
    assert (image.step, image.width > 400, image.height > 300) == (5, True, True)


# --- what goes wrong -------------------------------------------------------------------------------------------


class Broken:
    """A run of a service that is down."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows = 0

    def log(self, metrics: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.rows += 1

    def alert(self, **kwargs: Any) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


Broken.__module__ = "wandb.sdk.wandb_run"


def test_a_service_that_fails_is_told_once_and_the_finding_is_told_by_us(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Broken()
    health = fit(Keeper(run), tmp_path)
    assert "non_finite" in health.report().verdict
    assert run.calls == 1
    assert caplog.text.count("Wandb shows neither alerts nor reports (ConnectionError: no route to host)") == 1
    assert caplog.text.count("warning: non_finite") == 1
    assert run.rows >= 4


def test_a_report_that_cannot_be_made_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")

    def fails(report: Any) -> str:
        raise MemoryError

    monkeypatch.setattr(sink, "page_of", fails)
    fit(MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}"), tmp_path)
    assert caplog.text.count("no report for the loggers (MemoryError)") == 1


def test_a_long_run_shows_its_report_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(sink, "page_of", lambda report: made.append(report.step) or "<!doctype html>")
    times = iter([0.0, *(300.0 * step for step in range(100))])
    monkeypatch.setattr(sink.time, "monotonic", lambda: next(times))
    run = Broken()
    run.alert = lambda **kwargs: None  # type: ignore[method-assign]
    writer = sink.LoggerSink()
    for step in range(9):
        writer.keep_up([run], lambda step=step: gh.HealthReport(step=step, steps=step + 1))  # type: ignore[misc]
    assert 2 <= len(made) <= 4


def test_only_services_are_taken_for_one() -> None:
    assert host_of(nn.Linear(1, 1)) is None
    assert host_of(Keeper(object())) is None
    with pytest.raises(TypeError, match="loggers must be a SummaryWriter"):
        gh.HealthSession(nn.Linear(1, 1), loggers=[print])
