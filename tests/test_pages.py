"""The report as a file: when it is written, where, that it is whole or not there, and that a training never minds."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh
from lightning_gradhealth import pages
from lightning_gradhealth.records import HealthReport
from lightning_gradhealth.view.page import document, script


class At(pl.Callback):
    """Raises at a step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            raise self.error


def fit(*callbacks: pl.Callback, **options: Any) -> pl.LightningModule:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 8), torch.randint(0, 3, (96,)))
    model = Classifier()
    arguments = {
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
        **options,
    }
    pl.Trainer(**arguments).fit(model, DataLoader(data, batch_size=16))
    return model


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*report*"))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_it_is_written_to_the_runs_own_folder_at_the_end(kind: Any, tmp_path: Path) -> None:
    health = gh.GradHealth()
    fit(health, logger=kind(tmp_path, name="run"))
    assert files(tmp_path) == ["run/version_0/report.html", "run/version_0/report.json"]
    folder = tmp_path / "run" / "version_0"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert len(text) < 2_000_000
    saved = HealthReport.from_json((folder / "report.json").read_text())
    assert saved.steps == 12
    assert saved.findings == health.report().findings


@pytest.mark.parametrize("error", [RuntimeError("a bug of the user's"), KeyboardInterrupt()])
def test_it_is_written_when_a_run_dies_or_is_interrupted(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(gh.GradHealth(), At(error), logger=CSVLogger(tmp_path, name="run"))
    folder = tmp_path / "run" / "version_0"
    assert HealthReport.from_json((folder / "report.json").read_text()).steps == 7
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("health", "options"),
    [({}, {"logger": False}), ({"report_dir": None}, {}), ({}, {"fast_dev_run": 3})],
    ids=["no logger", "report_dir=None", "fast_dev_run"],
)
def test_nothing_is_written_where_nobody_asked(
    health: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(gh.GradHealth(**health), **{"logger": CSVLogger(tmp_path), **options})
    assert files(tmp_path) == []


def test_it_goes_where_it_is_told_and_two_do_not_overwrite_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    fit(gh.GradHealth(report_dir=folder), gh.GradHealth(report_dir=str(folder), layers="parameter"), logger=False)
    names = ["mine/report-2.html", "mine/report-2.json", "mine/report.html", "mine/report.json"]
    assert files(tmp_path) == names


@pytest.mark.parametrize("failure", ["full disk", "read-only folder", "a file in the way"])
def test_a_failing_write_is_told_once_and_leaves_nothing_behind(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "here"
    if failure == "a file in the way":
        target.write_text("a file")
    if failure == "full disk":

        def full(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fdopen", full)
    if failure == "read-only folder":

        def denied(*_: Any, **__: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("tempfile.mkstemp", denied)
    health = gh.GradHealth(report_dir=target)
    model = fit(health, logger=False)
    told = [record.getMessage() for record in caplog.records if "report could not be written" in record.getMessage()]
    assert len(told) == 1
    assert health.report().steps == 12
    assert [path for path in tmp_path.rglob("*") if "report" in path.name] == []
    other = fit(gh.GradHealth(report_dir=None), logger=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_old_report_stays_whole_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.keep(HealthReport(steps=3, step=2), tmp_path, tell=lambda line: None)
    before = (tmp_path / "report.html").read_bytes()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    lines: list[str] = []
    pages.keep(HealthReport(steps=9, step=8), tmp_path, tell=lines.append)
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(lines) == 1
    assert "no space left" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_default_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    with_report = fit(gh.GradHealth(), logger=CSVLogger(tmp_path))
    state = torch.get_rng_state()
    bare = fit(logger=False)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(with_report.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [3, True, "", "s3://bucket/runs", Path("gs://bucket/runs"), "file:///tmp"])
def test_a_wrong_report_dir_is_told_at_construction(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="report_dir must be"):
        gh.GradHealth(report_dir=bad)


def test_a_report_shows_itself_in_a_notebook_and_saves_itself_as_a_page(tmp_path: Path) -> None:
    health = gh.GradHealth()
    fit(health, logger=False)
    report = health.report()
    frame = report._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts allow-downloads"')
    path = report.save(tmp_path / "health.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "_recorded" not in json.dumps(report.to_dict())


def test_what_was_recorded_is_no_field(tmp_path: Path) -> None:
    health = gh.GradHealth()
    fit(health, logger=False)
    report = health.report()
    assert "_recorded" in vars(report)
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report), HealthReport.from_json(report.to_json())):
        assert twin == report
        assert twin._repr_html_().startswith("<iframe")
    shown = pages.recorded(HealthReport.from_json(report.to_json()))
    assert [layer.name for layer in shown.layers] == [layer.name for layer in report.layers]


def test_a_page_carries_one_script_that_its_policy_names() -> None:
    page = document(b"data", "</title><script>alert(1)</script>")
    assert page.count("<script") == 2  # the data, which are no code, and the code
    assert "script-src 'sha256-" in page
    assert "unsafe-inline" not in page
    assert "</script" not in script()
    assert "innerHTML" not in script()
    assert "eval(" not in script()


def test_no_file_of_the_page_is_long_and_none_imports_what_is_not_there() -> None:
    folder = Path(pages.__file__).parent / "view" / "web"
    modules = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.js")}
    for name, text in modules.items():
        assert len(text.splitlines()) <= 400, name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "http:", "https:"):
            assert word not in text, (name, word)
    assert "health" not in modules["chart.js"].lower()
