"""The examples do what they say, run as a user runs them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.mark.slow
def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = importlib.import_module("quickstart").main(["--logdir", str(tmp_path / "runs")])
    sick, healthy, wild = (results[name] for name in ("torch-default", "he", "he-wild-rate"))
    assert "vanishing_gradients" in sick[1].conditions
    assert sick[1].findings[0].condition == "vanishing_gradients"
    assert sick[0] < 0.2
    assert healthy[1].healthy
    assert healthy[0] > 0.85
    assert "oversized_updates" in wild[1].conditions
    assert wild[1].findings[0].condition == "oversized_updates"
    assert wild[0] < 0.5
    shown = capsys.readouterr().out
    assert "tensorboard --logdir" in shown
    assert shown.count("GradHealth ─") == 3
    for run in results:
        assert list((tmp_path / "runs" / run).glob("events.out.tfevents.*"))


@pytest.mark.parametrize("options", [[], ["--half", "--accumulate", "4"], ["--clip"]])
def test_plain_loop(options: list[str]) -> None:
    healthy, wild = importlib.import_module("plain_loop").main(["--epochs", "3", *options])
    assert healthy.healthy
    assert not wild.healthy
    assert "oversized_updates" in wild.conditions


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_loop(precision: str) -> None:
    report = importlib.import_module("fabric_loop").main(["--accelerator", "cpu", "--precision", precision])
    assert report.healthy
    assert report.steps == 5 * 57 // 2
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]


@pytest.mark.slow
def test_rescue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = importlib.import_module("rescue").main(["--logdir", str(tmp_path)])
    (lost, sick), (loss, saved) = results["None"], results["adaptive"]
    assert "exploding_gradients" in sick.conditions
    assert lost > 5
    assert loss < 2
    assert saved.conditions <= {"oversized_updates"}  # the rate is too high after all
    assert 0 < saved.clipped_steps < 0.1 * saved.steps
    assert "adaptive_clipping" in {finding.condition for finding in saved.findings}
    assert "tensorboard --logdir" in capsys.readouterr().out
