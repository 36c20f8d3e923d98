"""README is true: its Python runs as it stands, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from conftest import Classifier, batches, mlp
from torch import nn

import lightning_gradhealth as gh
from lightning_gradhealth.init import handlers
from lightning_gradhealth.loggers.panels import layout
from lightning_gradhealth.reports.rendering import plain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What README registers is forgotten again."""
    monkeypatch.setattr(handlers, "_RULES", dict(handlers._RULES))


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_every_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    model = Classifier(mlp())
    names: dict[str, Any] = {
        "model": model,
        "train_loader": batches(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loss_fn": nn.functional.cross_entropy,
        "gh": gh,
    }
    blocks = python_blocks()
    assert len(blocks) == 12
    for block in blocks:
        run(block, names)
    assert "True" in capsys.readouterr().out
    assert (tmp_path / "health.md").read_text(encoding="utf-8").startswith("# Health: healthy")
    report, model = names["report"], names["model"]
    assert not report.uncovered
    rules = [(entry.name, entry.rule, entry.scheme) for entry in report.entries]
    assert rules == [
        ("0.weight", "Linear", "orthogonal"),
        ("0.bias", "skipped", "kept"),
        ("1.table", "init_positions", "lecun"),
        ("4.weight", "Linear", "std"),
        ("4.bias", "skipped", "kept"),
    ]
    assert model[4].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model[1].table.std().item() == pytest.approx(0.02, rel=0.1)
    singular = torch.linalg.svdvals(model[0].weight.detach())
    assert singular.max().item() == pytest.approx(singular.min().item(), rel=1e-4)
    assert report.depth[0].after == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("mark", "width", "report"), [("report", 100, "report"), ("terminal", 80, "session")])
def test_a_report_is_that_of_the_code(mark: str, width: int, report: str) -> None:
    """Up to figures that another processor may round otherwise."""
    code, shown = re.search(rf"<!-- the {mark} -->\n```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S).groups()
    names = run(code, {"gh": gh, "rich": rich, "torch": torch, "nn": nn})
    source = names[report].report() if report == "session" else names[report]
    printed = plain(source, width=width)
    to_paste = f"README's report should read:\n{printed}"
    now, then = printed.split(), shown.split()
    assert len(now) == len(then), to_paste
    for ours, theirs in zip(now, then, strict=True):
        try:
            assert float(ours) == pytest.approx(float(theirs), rel=0.02), to_paste
        except ValueError:
            assert ours == theirs, to_paste


def test_the_first_screen_says_what_the_code_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Up to the figures, which depend on how torch draws on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    code, shown = re.search(
        r"<!-- the first screen -->\n```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S
    ).groups()
    assert len([line for line in code.splitlines() if line]) == 8
    torch.manual_seed(0)
    run(code, {})
    printed = capsys.readouterr().out[-2_000:]
    place, summary, *fix = shown.splitlines()
    condition = place.split(" in ")[0]
    assert f"{condition} in net.0 … net." in printed
    assert summary.split(":")[0] in printed
    assert printed.rstrip().endswith("\n".join(fix))


def test_a_large_model_gets_the_weights_of_one_process() -> None:
    (block,) = [block for block in python_blocks() if "fully_shard" in block]
    names = run(block, {"gh": gh, "torch": torch, "nn": nn})
    split = []
    names["fully_shard"] = lambda module, mesh: split.append(module)
    large = names["Large"]()
    large._device_mesh = {"data_parallel": None}
    large.configure_model()
    assert split == [large.net]
    assert all(parameter.is_meta for parameter in large.parameters())
    large.net.to_empty(device="cpu")
    for module in large.net:  # as Lightning does
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    whole = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 10))
    gh.init_weights(whole, torch.empty(1, 64), seed=0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(large.parameters(), whole.parameters(), strict=True))


def test_names_exist() -> None:
    for name in set(re.findall(r"`gh\.(\w+)", README)):
        assert hasattr(gh, name), name
    for condition in gh.Condition:
        assert f"`{condition}`" in README
    for picture in re.findall(r"\]\((examples/[\w.]+)\)", README):
        assert (ROOT / picture).exists()
    charts = {title: str(chart) for title, chart in layout()["Grad Health"].items()}
    rows = re.findall(r"^\| (\w[^|]*?) \| (`[^|]*`) \|", README, re.M)
    charted = {row: names for row, names in rows if any(title.startswith(row) for title in charts)}
    assert len(charted) == 6
    for row, names in charted.items():
        (patterns,) = [patterns for title, patterns in charts.items() if title.startswith(row)]
        assert all(name in patterns for name in re.findall(r"`(\w+)`", names))
