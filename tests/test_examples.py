"""The examples do what they say, run as a user runs them."""

from __future__ import annotations

import importlib
import math
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
    assert "oversized_updates" in {finding.condition for finding in wild.findings}  # clipping may save what can be


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


def test_custom_module(capsys: pytest.CaptureFixture[str]) -> None:
    report, variances, accuracy = importlib.import_module("custom_module").main(["--epochs", "3"])
    assert not report.uncovered
    rules = {entry.name: (entry.rule, entry.scheme) for entry in report.entries}
    assert rules["patches.weight"][0] == rules["layers.0.branch.out"][0] == "traced"
    assert rules["positions.table"][0] == "init_positions"
    assert {rules[f"layers.0.branch.qkv[{block}]"][0] for block in range(3)} == {"Attention"}
    assert {rules[f"layers.1.branch.into[{block}]"][0] for block in range(2)} == {"SwiGLU"}
    assert rules["layers.0.scale"] == ("state", "kept")
    names = [point.name for point in report.depth]
    assert list(variances["calibrated"]) == names  # what the example measures by itself is what the library has seen
    assert all(variance == pytest.approx(1, abs=0.05) for variance in variances["calibrated"].values())
    for name, variance in variances["as drawn"].items():
        normed = 1 / 3 if name == "patches.weight" or name.endswith(("out", "back")) else 1  # a norm takes their scale
        least = 0.02 if name == "head.weight" or name.endswith("out") else 0.5  # what reads a mean over tokens has less
        assert least * normed < variance < 2, name  # the weight before a scale of .1 does not make up for it
    assert accuracy > 0.7
    assert "Variance of what a weight gives" in capsys.readouterr().out


def test_deep_nets_linear_and_signal(capsys: pytest.CaptureFixture[str]) -> None:
    results = importlib.import_module("deep_nets").main(["--only", "linear,signal"])
    assert all(deviation < 1e-14 for row in results["linear"].values() for deviation in row)
    signal = results["signal"]
    for name, per_layer in (("torch's default", 1 / 6), ("Xavier", 1 / 2), ("He", 1), ("auto", 1)):
        square, gradient = signal[name]
        expected = per_layer**29  # from the first to the last of 30 layers
        assert 1 / 3 < square / expected < 3, name
        assert 1 / 2 < gradient / math.sqrt(expected) < 2, name
    assert "3e-23" in capsys.readouterr().out


def test_deep_nets_refuses_a_part_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("deep_nets").main(["--only", "mlp,lstm"])
    assert "linear,signal,mlp,cnn,residual, got lstm" in capsys.readouterr().err


@pytest.mark.slow
def test_deep_nets_mlp() -> None:
    rows = importlib.import_module("deep_nets").main(["--only", "mlp"])["mlp"]
    chance = math.log(10)
    for default, xavier, he, auto in zip(*rows.values(), strict=True):  # 22 layers, then 30
        assert default == pytest.approx(chance, abs=0.01)
        assert xavier < chance + 0.01
        assert max(he, auto) < 1.2 < xavier
    (at_22, at_30) = rows["Xavier"]
    assert at_22 < at_30 - 0.3
    assert at_30 > 2.2


@pytest.mark.slow
def test_deep_nets_cnn() -> None:
    rows = importlib.import_module("deep_nets").main(["--only", "cnn"])["cnn"]
    for name in ("delta-orthogonal", "auto"):
        (accuracy,) = rows.pop(name)
        assert accuracy > 0.7, name
    assert all(accuracy < 0.5 for (accuracy,) in rows.values()), rows


@pytest.mark.slow
def test_deep_nets_residual() -> None:
    rows = importlib.import_module("deep_nets").main(["--only", "residual"])["residual"]
    first, accuracy = rows.pop("He, no care")
    assert 1e14 < first < 1e17  # a block triples the variance: sqrt(3)^64 = 1.9e15
    assert math.isnan(accuracy)
    assert all(first < 4 for first, _ in rows.values())
    tamed = [rows[name][1] for name in ('residual="fixup"', 'residual="zero_last"', "auto")]
    assert min(tamed) > 0.85
    assert rows["GPT-2"][1] < min(tamed)


@pytest.mark.slow
def test_remedies(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell of the table is folded
    written = tmp_path / "remedies.md"
    results = importlib.import_module("remedies").main(["--quick", "--markdown", str(written)])
    deep, recurrent = (list(results[task].items()) for task in ("deep", "recurrent"))
    (_, dead), *cured = deep
    assert dead.accuracy < 0.2
    assert dead.report.findings[0].condition == "vanishing_gradients"
    assert len(cured) == 2
    for remedy, outcome in cured:
        assert outcome.accuracy > 0.8, remedy
        assert outcome.report.healthy, remedy
    (_, wild), (_, clipped) = recurrent
    assert wild.loss > 5
    assert "exploding_gradients" in wild.report.conditions
    assert clipped.loss < 3.5
    assert "exploding_gradients" not in clipped.report.conditions
    assert clipped.report.clipped_steps > 0 == wild.report.clipped_steps
    lines = written.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {4}
    shown = capsys.readouterr().out
    for remedy, outcome in deep + recurrent:
        row = next(row for row in cells if row[0] == f"`{remedy}`")
        assert row[1:] == [f"{outcome.accuracy:.1%}", f"{outcome.loss:.3g}", outcome.report.verdict]
        assert remedy in shown


def test_remedies_lists_what_can_be_trained() -> None:
    """Every network is built, started as its row says, and gives what the task asks for."""
    example = importlib.import_module("remedies")
    for task in example.TASKS:
        x, y = (tensor[:8] for tensor in task.data()[0].tensors)
        cases = task.cases()
        assert len({case.remedy for case in cases}) == len(cases)
        assert cases[0].quick  # the sick one is what the others are compared with
        for case in cases:
            net = case.net()
            if case.init is not None:
                before = [parameter.clone() for parameter in net.parameters()]
                example.gh.init_weights(net, x, seed=0, **case.init)
                changed = [(a != b).any() for a, b in zip(before, net.parameters(), strict=True)]
                assert any(changed), case.remedy
            assert net(x).shape[:-1] == y.shape, case.remedy
