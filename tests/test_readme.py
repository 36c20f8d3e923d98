"""README is true: its Python runs as it stands, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Classifier, batches, mlp
from torch import nn

import lightning_gradhealth as gh
from lightning_gradhealth.init import handlers
from lightning_gradhealth.sinks import layout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(handlers, "_RULES", dict(handlers._RULES))
    model = Classifier(mlp())
    names: dict[str, Any] = {
        "model": model,
        "train_loader": batches(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss_fn": nn.functional.cross_entropy,
        "gh": gh,
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "True" in capsys.readouterr().out
    assert (tmp_path / "health.md").read_text(encoding="utf-8").startswith("# Health: healthy")
    assert not names["report"].uncovered
    assert {entry.rule for entry in names["report"].entries} == {"init_mixer", "Linear"}


def test_names_exist() -> None:
    for name in set(re.findall(r"`gh\.(\w+)", README)):
        assert hasattr(gh, name), name
    for condition in gh.Condition:
        assert f"`{condition}`" in README
    for picture in re.findall(r"\]\((examples/[\w.]+)\)", README):
        assert (ROOT / picture).exists()
    charts = {title: str(chart) for title, chart in layout()["Grad Health"].items()}
    rows = re.findall(r"^\| ([A-Z][^|]*?) \| (`[^|]*`) \|", README, re.M)
    charted = {row: names for row, names in rows if any(title.startswith(row) for title in charts)}
    assert len(charted) == 6
    for row, names in charted.items():
        (patterns,) = [patterns for title, patterns in charts.items() if title.startswith(row)]
        assert all(name in patterns for name in re.findall(r"`(\w+)`", names))
