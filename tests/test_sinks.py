"""What the loggers get: real fits, and every value read back from where each logger keeps it."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn

import lightning_gradhealth as gh
from lightning_gradhealth.loggers import LoggerSink
from lightning_gradhealth.loggers.panels import findings_text, layout
from lightning_gradhealth.loggers.scalars import check_log_layers, scalars, tags, worst_layers
from lightning_gradhealth.records import Finding, LayerStats, Severity, StepRecord, StepStats

Rows = dict[int, dict[str, float]]
HOSTILE = ("a|b", "a:b", "größe 1", "<img src=x onerror=alert(1)>", "__x__ *y*", "x/z", "[l](http://h)", "t\\")


class Logging(Classifier):
    """Logs its loss by `self.log`, and can be made to fall ill at one batch."""

    def __init__(self, *args: Any, ill_at: int = -1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ill_at = ill_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss * math.nan if self.global_step == self.ill_at else loss


class TwoOptimizers(Logging):
    """Steps two optimizers a batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net[:1], self.net[1:])]


# --- the loggers, and how to read what they wrote ------------------------------------------------------------


def read_csv(logger: CSVLogger) -> Rows:
    rows: Rows = defaultdict(dict)
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        for row in csv.DictReader(lines):
            step = int(row.pop("step"))
            rows[step] |= {name: float(value) for name, value in row.items() if value}
    return rows


def accumulator(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()


def read_tensorboard(logger: TensorBoardLogger) -> Rows:
    rows: Rows = defaultdict(dict)
    events = accumulator(logger)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows[event.step][tag] = event.value
    return rows


def read_mlflow(logger: MLFlowLogger) -> Rows:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(logger._tracking_uri)
    rows: Rows = defaultdict(dict)
    for name in client.get_run(logger.run_id).data.metrics:
        for metric in client.get_metric_history(logger.run_id, name):
            rows[metric.step][name] = metric.value
    return rows


def read_wandb(logger: WandbLogger) -> Rows:
    """From the file of an offline run: 7 bytes of header, then protobuf records in LevelDB's log format."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    block, full, last = 32768, 1, 4
    (path,) = Path(logger.experiment.dir).parent.glob("*.wandb")
    logger.experiment.finish()
    wandb.teardown()  # ends its service process, which may still hold back the last records
    data, at, part = path.read_bytes(), 7, b""
    rows: Rows = defaultdict(dict)
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (full, last):
            items = Record.FromString(part).history.item
            part = b""
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            if "trainer/global_step" in values:
                rows[values["trainer/global_step"]] |= values
    return rows


@dataclass
class Kept:
    """A logger, and what reads its values back."""

    logger: Logger
    read: Callable[[Any], Rows]

    def rows(self) -> Rows:
        return self.read(self.logger)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kept]]:
    """Makes a logger by its name; nothing leaves this machine, nothing stays on it."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # asked for where it is deprecated, as in 3.17
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    open_wandb = []

    def build(kind: str, **options: Any) -> Kept:
        if kind == "csv":
            return Kept(CSVLogger(tmp_path / "csv", **options), read_csv)
        if kind == "tensorboard":
            return Kept(TensorBoardLogger(tmp_path / "tensorboard", **options), read_tensorboard)
        if kind == "mlflow":
            pytest.importorskip("mlflow")
            return Kept(MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}", **options), read_mlflow)
        open_wandb.append(pytest.importorskip("wandb"))
        return Kept(WandbLogger(project="test", save_dir=tmp_path, offline=True, **options), read_wandb)

    yield build
    for wandb in open_wandb:
        wandb.teardown()


LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepRecord, int]]:
    """Every record that a callback hands to its loggers, with the number of active findings."""
    calls: list[tuple[StepRecord, int]] = []
    write = LoggerSink.write

    def spy(self: LoggerSink, loggers: Any, record: StepRecord, findings: Any, active: Any) -> None:
        calls.append((record, sum(f.severity is not Severity.INFO and f.condition in active for f in findings)))
        write(self, loggers, record, findings, active)

    monkeypatch.setattr(LoggerSink, "write", spy)
    return calls


def fit(model: Any, *loggers: Any, max_steps: int = 12, **options: Any) -> gh.GradHealth:
    asked = {key: options.pop(key) for key in ("log_layers", "layers", "clip") if key in options}
    health = gh.GradHealth(report_dir=None, **asked)
    kept = [item.logger if isinstance(item, Kept) else item for item in loggers]
    trainer(health, logger=kept, log_every_n_steps=4, max_steps=max_steps, **options).fit(model, batches())
    return health


def expected(record: StepRecord, active: int) -> dict[str, float]:
    """The obvious twin of what a logger should get, all layers included."""
    ratios = [layer.norm_ratio for layer in record.layers if layer.norm_ratio is not None]
    updates = [layer.update_to_weight for layer in record.layers if layer.update_to_weight is not None]
    values: dict[str, float] = {
        "gradhealth/total_norm": record.window[-1].total_norm,
        "gradhealth/total_norm_max": max(step.total_norm for step in record.window),
        "gradhealth/log10_total_norm": math.log10(max(step.total_norm for step in record.window)),
        "gradhealth/log10_norm_ratio_min": math.log10(min(ratios)),
        "gradhealth/log10_norm_ratio_max": math.log10(max(ratios)),
        "gradhealth/gain_per_layer": record.backward_gain,
        "gradhealth/forward_gain_per_layer": record.forward_gain,
        "gradhealth/log10_update_to_weight": math.log10(np.median(updates)),
        "gradhealth/non_finite_steps": 0.0,
        "gradhealth/findings": float(active),
    }
    for name in ("dead_fraction", "saturated_fraction"):
        shares = [getattr(layer, name) for layer in record.layers if getattr(layer, name) is not None]
        if shares:
            values[f"gradhealth/{name}_max"] = max(shares)
    for layer in record.layers:
        values[f"gradhealth/layers/log10_grad_norm/{layer.name}"] = math.log10(layer.grad_norm)
        values[f"gradhealth/layers/log10_update_to_weight/{layer.name}"] = math.log10(layer.update_to_weight)
    return values


def ours(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("gradhealth/")}


# --- each logger -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_value_is_read_back_at_lightnings_own_x(kind: str, make: Any, written: Any) -> None:
    kept = make(kind)
    fit(Logging(), kept, log_layers=True)
    rows = kept.rows()
    assert [record.step for record, _ in written] == [3, 7, 11]
    assert [step for step in sorted(rows) if "train_loss" in rows[step]] == [3, 7, 11]
    assert [step for step in sorted(rows) if ours(rows[step])] == [3, 7, 11]
    precision = 1e-6 if kind == "tensorboard" else 1e-15  # it keeps single precision
    for record, active in written:
        assert ours(rows[record.step]) == pytest.approx(expected(record, active), rel=precision)


@pytest.mark.parametrize("kind", LOGGERS)
def test_odd_layer_names_and_two_optimizers(kind: str, make: Any, written: Any) -> None:
    kept = make(kind)
    model = TwoOptimizers()
    model.net = nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in HOSTILE))
    fit(model, kept, log_layers=True)
    rows, names = kept.rows(), tags([layer.name for layer in written[0][0].layers])
    assert [record.step for record, _ in written] == [3, 5]  # two optimizer steps a batch
    for record, _ in written:
        row = rows[record.step]
        assert {f"gradhealth/layers/log10_grad_norm/{tag}" for tag in names.values()} <= set(row)
        for layer in record.layers:
            value = row[f"gradhealth/layers/log10_grad_norm/{names[layer.name]}"]
            assert value == pytest.approx(math.log10(layer.grad_norm), rel=1e-6)
        for number in (0, 1):
            total = next(s.total_norm for s in reversed(record.window) if s.optimizer == number)
            assert row[f"gradhealth/optimizer{number}/total_norm"] == pytest.approx(total, rel=1e-6)


def test_one_optimizer_has_no_norm_of_its_own(make: Any, written: Any) -> None:
    fit(Logging(), make("csv"))
    assert not [name for name in scalars(*written[0]) if "optimizer" in name]


def test_several_loggers_at_once_get_the_same(make: Any) -> None:
    several = [make("csv", name="one"), make("csv", name="two"), make("tensorboard")]
    fit(Logging(), *several, log_layers=True)
    one, two, three = (kept.rows() for kept in several)
    assert {step: ours(row) for step, row in one.items()} == {step: ours(row) for step, row in two.items()}
    for step, row in one.items():
        assert ours(row) == pytest.approx(ours(three[step]), rel=1e-6)


def test_x_values_under_accumulation_and_at_the_end(make: Any) -> None:
    kept = make("csv")
    fit(Logging(), kept, max_steps=10, accumulate_grad_batches=2)
    rows = kept.rows()
    assert [step for step in sorted(rows) if "train_loss" in rows[step]] == [3, 7]
    assert [step for step in sorted(rows) if ours(rows[step])] == [3, 7, 9]  # what came after the last cadence


def test_what_is_not_finite_is_left_out(make: Any, written: Any) -> None:
    kept = make("csv")
    fit(Logging(ill_at=7), kept, max_steps=8)
    rows = kept.rows()
    assert math.isnan(written[1][0].total_norm)
    finite = max(step.total_norm for step in written[1][0].window if math.isfinite(step.total_norm))
    assert rows[7]["gradhealth/log10_total_norm"] == pytest.approx(math.log10(finite))  # of the steps before
    assert "gradhealth/log10_norm_ratio_min" in rows[3]
    assert "gradhealth/log10_norm_ratio_min" not in rows[7]
    assert rows[7]["gradhealth/non_finite_steps"] == 1
    assert all(math.isfinite(value) for row in rows.values() for value in ours(row).values())


# --- which layers ------------------------------------------------------------------------------------------


def logged_layers(rows: Rows, step: int) -> list[str]:
    start = "gradhealth/layers/log10_grad_norm/"
    return sorted(name.removeprefix(start) for name in rows[step] if name.startswith(start))


@pytest.mark.parametrize(("log_layers", "count"), [("auto", 10), (3, 3), (True, 14), (False, 0), (0, 0)])
def test_log_layers(log_layers: Any, count: int, make: Any, written: Any) -> None:
    kept, other = make("tensorboard"), make("csv")
    fit(Logging(mlp(depth=14)), kept, other, log_layers=log_layers)
    rows, others = kept.rows(), other.rows()
    first = written[0][0].layers
    worst = sorted(first, key=lambda layer: -abs(math.log(layer.norm_ratio)))[:count]
    for step in (3, 7, 11):  # the choice of the first record stays, so that lines go on
        assert logged_layers(others, step) == sorted(layer.name for layer in worst)
        # the tab shows all layers of TensorBoard's runs
        assert logged_layers(rows, step) == ([] if log_layers == "auto" else logged_layers(others, step))
    config = accumulator(kept.logger).Tensors("custom_scalars__config__")
    chosen = Layout.FromString(config[0].tensor_proto.string_val[0])
    assert ("Grad Health: layers" in [category.title for category in chosen.category]) == (
        count > 0 and log_layers != "auto"
    )


def test_worst_layers_puts_zero_and_inf_first_and_the_unmeasured_last() -> None:
    ratios = {"fine": 1.0, "zero": 0.0, "small": 1e-3, "infinite": math.inf, "large": 10.0, "unknown": None}
    layers = [LayerStats(name, norm_ratio=ratio) for name, ratio in ratios.items()]
    assert worst_layers(layers, 3) == ["zero", "small", "infinite"]
    assert worst_layers(layers, 5) == ["fine", "zero", "small", "infinite", "large"]
    assert worst_layers(layers, 99) == list(ratios)


@pytest.mark.parametrize("wrong", [-1, "all", 1.5, None])
def test_log_layers_refuses(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="log_layers must be"):
        check_log_layers(wrong)


def test_tags_are_plain_and_no_two_alike() -> None:
    named = tags([*HOSTILE, "", "net.0"])
    assert len(set(named.values())) == len(HOSTILE) + 2
    assert all(re.fullmatch(r"[a-zA-Z0-9_.-]+", tag) for tag in named.values())
    assert named["net.0"] == "net.0"


# --- TensorBoard's panels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_every_chart_of_the_layout_finds_its_scalars(prefix: str, make: Any) -> None:
    kept = make("tensorboard", prefix=prefix)
    fit(Logging(), kept, clip="adaptive", log_layers=True)
    events = accumulator(kept.logger)
    config = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    shown = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in config.category
    }
    patterns = layout()
    assert shown == {title: {name: tags for name, (_, tags) in charts.items()} for title, charts in patterns.items()}
    known = events.Tags()["scalars"]
    for charts in shown.values():
        for expressions in charts.values():
            for expression in expressions:
                assert any(re.match(expression, tag) for tag in known), expression
    layer = next(tag for tag in known if tag.endswith("layers/log10_grad_norm/net.0"))
    assert not any(re.match(tag, layer) for charts in [shown["Grad Health"]] for t in charts.values() for tag in t)


def test_findings_are_told_as_text_when_there_are_new_ones(make: Any) -> None:
    kept = make("tensorboard")
    health = fit(Logging(lr=1e3), kept)
    told = accumulator(kept.logger).Tensors("gradhealth/findings/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in told]
    findings = health.report().findings
    assert findings
    assert len(texts) <= len(findings)
    assert told[0].step == 3
    for finding in findings:
        (told_of,) = [part for part in paragraphs(texts[-1]) if part[0].startswith(f"{finding.condition} (")]
        assert f" in {finding.where}, " in told_of[0]
        assert re.search(rf"step {finding.first_step}:", told_of[0])
        assert told_of[1] == f"Remedy: {finding.remedy}"


def paragraphs(text: str) -> list[list[str]]:
    """The findings as TensorBoard's Text panel shows them: each a list of its paragraphs, without markup."""
    page = markdown_to_safe_html(text)
    assert set(re.findall(r"<(\w+)", page)) <= {"p", "strong", "hr"}
    return [
        [html.unescape(re.sub(r"<[^>]*>", "", part)) for part in re.findall(r"<p>(.*?)</p>", finding, re.DOTALL)]
        for finding in re.split(r"<hr\s*/?>", page)
    ]


@pytest.mark.parametrize("name", [*HOSTILE, "`c`", "a &amp; b", "\\|", "two\nlines", "![i](http://h/i.png)", "<b>"])
def test_the_text_shows_any_layer_name_as_it_is(name: str) -> None:
    finding = Finding("dead | alive", Severity.WARNING, (name,), 3, 4, f"{name}: a|b", {}, 'use f(x, scheme="he")')
    plain = name.replace("\n", "\\n")
    first = f"dead | alive (warning) in {plain}, since step 3: {plain}: a|b."
    assert paragraphs(findings_text([finding, finding])) == [[first, 'Remedy: use f(x, scheme="he")']] * 2


# --- when a logger fails, or is not there ------------------------------------------------------------------


class Broken(CSVLogger):
    """Fails at what GradHealth writes, and only there."""

    calls = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("gradhealth/") for name in metrics):
            self.calls += 1
            raise ConnectionError("the disk is\non fire")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_is_told_once_and_disturbs_nobody(make: Any, tmp_path: Path, caplog: Any) -> None:
    broken, kept = Broken(tmp_path / "broken"), make("csv")
    health = fit(Logging(), broken, kept)
    (warning,) = [entry for entry in caplog.records if entry.name == "lightning_gradhealth"]
    assert "Broken could not write (ConnectionError: the disk is" in warning.getMessage()
    assert broken.calls == 2  # all scalars, and once more the totals only
    assert [step for step, row in sorted(kept.rows().items()) if ours(row)] == [3, 7, 11]
    assert [step for step, row in sorted(read_csv(broken).items()) if "train_loss" in row] == [3, 7, 11]
    assert health.report().steps == 12


class Strict(CSVLogger):
    """Takes what MLflow takes, empties what it is given, and refuses all that `refused` matches."""

    refused = "$^"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name in metrics:
            if len(name) > 250 or not re.fullmatch(r"[\w\-./ :]+", name, re.ASCII) or re.search(self.refused, name):
                raise ValueError(f"invalid metric name {name}")
        super().log_metrics(dict(metrics), step)
        metrics.clear()


@pytest.mark.parametrize(
    "names",
    [
        ("m" * 300, "n"),
        ("a" * 170 + "b" * 170, "a" * 170 + "c" + "b" * 169),
        ("ü/β (1)", "ü/γ (1)"),
        ("x" * 9_999, "y"),
    ],
)
def test_long_and_odd_names_cost_no_logger_its_scalars(names: tuple[str, str], make: Any, tmp_path: Path) -> None:
    net = nn.Sequential(OrderedDict(((names[0], nn.Linear(8, 8)), (names[1], nn.Linear(8, 3)))))
    strict, kept = Strict(tmp_path / "strict"), make("csv")
    fit(Logging(net), strict, kept, log_layers=True)
    rows, others = read_csv(strict), kept.rows()
    assert [step for step, row in sorted(rows.items()) if ours(row)] == [3, 7, 11]
    assert {step: ours(row) for step, row in rows.items()} == {step: ours(row) for step, row in others.items()}
    assert len(logged_layers(rows, 3)) == 2


@pytest.mark.parametrize("refused", ["layers/log10_grad", "layers/log10_update", "/layers/.*net.0"])
def test_a_logger_that_refuses_layers_gets_the_totals(refused: str, tmp_path: Path, caplog: Any) -> None:
    strict = Strict(tmp_path)
    strict.refused = refused
    fit(Logging(), strict)
    rows = {step: ours(row) for step, row in read_csv(strict).items() if ours(row)}
    assert sorted(rows) == [3, 7, 11]
    assert all("gradhealth/log10_total_norm" in row and not logged_layers(rows, step) for step, row in rows.items())
    (warning,) = [entry for entry in caplog.records if entry.name == "lightning_gradhealth"]
    assert "Strict refused the scalars of layers" in warning.getMessage()


def test_panels_that_cannot_be_written_are_told_once(make: Any, monkeypatch: Any, caplog: Any) -> None:
    kept = make("tensorboard")
    monkeypatch.setattr(kept.logger.experiment, "add_custom_scalars", None)
    fit(Logging(), kept)
    (warning,) = [entry for entry in caplog.records if entry.name == "lightning_gradhealth"]
    assert "TensorBoardLogger could not write" in warning.getMessage()


@pytest.mark.parametrize("kind", LOGGERS)
def test_other_ranks_write_nothing(kind: str, make: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    kept = make(kind)
    before = set(tmp_path.rglob("*"))
    finding = Finding("loss_spike", Severity.WARNING, (), 3, 3)
    step = StepStats(3, total_norm=1.0)
    LoggerSink().write([kept.logger], StepRecord(3, total_norm=1.0, window=(step,)), [finding], {"loss_spike"})
    assert set(tmp_path.rglob("*")) == before
    assert not caplog.records


def test_no_logger_no_writing(written: Any) -> None:
    fit(Logging())
    assert written == []


# --- clipping ----------------------------------------------------------------------------------------------------


def test_what_clipping_did_is_written_under_its_own_names(make: Any, written: Any) -> None:
    kept = make("csv")
    fit(Logging(), kept, clip=gh.NormClip(0.1))
    rows, records = kept.rows(), [record for record, _ in written]
    assert records[-1].clipped_steps == len(records[-1].window)
    for record in records:
        row = rows[record.step]
        assert row["gradhealth/log10_applied_norm"] == pytest.approx(-1.0, rel=1e-6)
        smallest = min(0.1 / step.total_norm for step in record.window)
        assert row["gradhealth/log10_clip_coefficient"] == pytest.approx(math.log10(smallest), rel=1e-6)
        assert row["gradhealth/clipped_fraction"] == 1.0
        assert "gradhealth/clipping_active" not in row
        assert "gradhealth/log10_would_clip" not in row


def test_a_gate_says_whether_it_is_open_and_a_dry_run_what_it_would_do(make: Any, written: Any) -> None:
    kept = make("csv")
    fit(Logging(), kept, clip=gh.WhenExploding(dry_run=True))
    logged = {record.step: record for record, _ in written}
    assert logged
    for step, record in logged.items():
        row = kept.rows()[step]
        assert row["gradhealth/clipping_active"] == 0.0
        assert row["gradhealth/log10_would_clip"] == row["gradhealth/log10_clip_coefficient"] == 0.0
        assert row["gradhealth/log10_applied_norm"] == pytest.approx(math.log10(record.total_norm), rel=1e-6)


def test_nothing_of_clipping_without_a_clipper(make: Any) -> None:
    kept = make("csv")
    fit(Logging(), kept)
    names = {name for row in kept.rows().values() for name in row}
    assert not names & {
        f"gradhealth/{name}" for name in ("log10_clip_coefficient", "clipped_fraction", "clipping_active")
    }
