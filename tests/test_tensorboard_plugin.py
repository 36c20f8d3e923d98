"""The tab's server side: what it answers, whatever stands in the event files and in the requests."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Classifier, batches, mlp, trainer
from hypothesis import HealthCheck, given, settings, strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tab import BASE, Tab, environment, fetch, finding, record, server, unpacked, wait_for, write
from tensorboard.backend import application
from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from werkzeug.test import Client

import lightning_gradhealth as gh
from lightning_gradhealth.loggers.events import EventsWriter
from lightning_gradhealth.tensorboard.plugin import DATA_NAMES, GradHealthPlugin
from lightning_gradhealth.view.quantities import EVENTS_PLUGIN, PLUGIN, QUANTITIES

pytestmark = [  # TensorBoard's readers leave files open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ARGUMENTS = ["run", "metric", "layer", "step", "x0", "x1", "w", "h", "rows", "versus", "schema"]
FIELDS = ("severity", "first_step", "last_step", "layers", "layers_total", "evidence", "active", "code")
ROUTES: dict[str, dict[str, Any]] = {
    "runs": {},
    "layout": {},
    "series": {},
    "picture": {"metric": "grad_norm"},
    "layer": {"layer": 0},
    "profile": {"metric": "grad_norm", "step": 1},
    "value": {"metric": "grad_norm", "layer": 0, "step": 1},
}


def healthy(folder: Path, steps: int = 4) -> None:
    write(folder, [record(step, [1.0, 2.0]) for step in range(steps)])


def check_healthy(tab: Tab, run: str = "good") -> None:
    """A run of `healthy` is answered in full, whatever stands beside it."""
    assert run in [entry["run"] for entry in tab.get("runs")["runs"]]
    assert [layer["name"] for layer in tab.get("layout", run=run)["layers"]] == ["net.0", "net.1"]
    _, codes = tab.picture(run=run, metric="grad_norm")
    assert codes == [[0] * 4, [250] * 4]
    assert tab.get("series", run=run)["step"] == [0, 1, 2, 3]


def check_survives(tab: Tab) -> None:
    """Every route answers every run with 200, 400 or 404, and with JSON that can be read."""
    runs = tab.get("runs")["runs"]
    for name in [entry["run"] for entry in runs]:
        for route, query in ROUTES.items():
            answer = tab.ask(route, run=name, **query)
            assert answer.status_code in (200, 400, 404), (route, answer.text)
            if route == "picture" and answer.status_code == 200:
                unpacked(answer.data)
            else:
                json.loads(answer.text)
        metrics = tab.get("layout", run=name)["metrics"]
        for metric in metrics:
            assert tab.ask("picture", run=name, metric=metric["name"]).status_code in (200, 404)


# --- a real run ----------------------------------------------------------------------------------------------------


def test_a_real_fit_is_shown(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="wild")
    health = gh.GradHealth(clip="adaptive", report_dir=None)
    trainer(health, logger=logger, log_every_n_steps=2, max_steps=12).fit(Classifier(mlp(6), lr=1e3), batches())
    tab, report = Tab(tmp_path), health.report()
    (run,) = tab.get("runs")["runs"]
    assert (run["run"], run["first_step"], run["last_step"]) == ("wild", 1, 11)
    worst = report.findings[0]
    assert run["status"]["severity"] == str(worst.severity)
    layout = tab.get("layout", run="wild")
    assert [layer["name"] for layer in layout["layers"]] == [layer.name for layer in report.layers]
    assert [metric["name"] for metric in layout["metrics"]] == [
        name for name in QUANTITIES if name in {metric["name"] for metric in layout["metrics"]}
    ]
    series = tab.get("series", run="wild")
    assert [f["condition"] for f in series["findings"]] == [str(f.condition) for f in report.findings]
    for shown, found in zip(series["findings"], report.findings, strict=True):
        assert (shown["first_step"], shown["layers"]) == (found.first_step, list(found.layers))
        assert (shown["summary"], shown["remedy"], shown["code"]) == (found.summary, found.remedy, found.code)
        assert {entry["name"] for entry in shown["evidence"]} <= set(found.evidence)
    columns = {column["name"]: column["values"] for column in series["columns"]}
    assert {"total_norm", "applied_norm", "loss", "learning_rate", "clipped_fraction", "armed"} <= set(columns)
    for index, layer in enumerate(report.layers):
        value = tab.get("value", run="wild", metric="weight_norm", layer=index, step=11)["value"]
        assert value == pytest.approx(layer.weight_norm, rel=0.01)


def test_steps_of_clipping_and_skipping_are_exact(tmp_path: Path) -> None:
    class Ill(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_step in (3, 6, 7) else loss

    logger = TensorBoardLogger(str(tmp_path), name="", version="ill")
    health = gh.GradHealth(on_non_finite="skip", clip=gh.NormClip(0.01), report_dir=None)
    trainer(health, logger=logger, log_every_n_steps=5, max_steps=12).fit(Ill(), batches())
    spans = {span["name"]: span["steps"] for span in Tab(tmp_path).get("series", run="ill")["spans"]}
    assert spans["skipped"] == spans["non_finite"] == [[3, 3], [6, 7]]
    assert spans["clipped"][-1][1] == 11


def test_a_resumed_run_shows_what_counts(tmp_path: Path) -> None:
    write(tmp_path / "run", [record(step, [1.0]) for step in range(10)], suffix=".a")
    time.sleep(1.1)  # the files' names go by the second
    write(tmp_path / "run", [record(step, [16.0]) for step in range(5, 8)], suffix=".b")
    tab = Tab(tmp_path)
    head, codes = tab.picture(run="run", metric="grad_norm")
    assert head["columns"] == list(range(8))
    assert codes == [[0] * 5 + [250] * 3]
    assert tab.get("series", run="run")["step"] == list(range(8))


def test_a_run_that_is_being_written_grows(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer, events = SummaryWriter(str(tmp_path / "run")), EventsWriter()
    tab = Tab(tmp_path)
    assert tab.get("runs")["runs"] == []
    stamps = []
    for step in range(3):
        events.write(writer, record(step, [1.0]), [finding()] if step == 2 else [], {"exploding_gradients"})
        writer.flush()
        tab.reload()
        (run,) = tab.get("runs")["runs"]
        assert run["last_step"] == step
        stamps.append(run["stamp"])
        assert tab.picture(run="run", metric="grad_norm")[0]["columns"] == list(range(step + 1))
        assert run["status"]["severity"] == ("critical" if step == 2 else "healthy")
    assert stamps == sorted(set(stamps))
    writer.close()


def test_several_runs_and_their_ratio(tmp_path: Path) -> None:
    write(tmp_path / "a", [record(step, [8.0, 1.0]) for step in range(3)])
    write(tmp_path / "b", [record(step, [1.0, 4.0]) for step in range(3)])
    tab = Tab(tmp_path)
    assert [run["run"] for run in tab.get("runs")["runs"]] == ["a", "b"]
    head, codes = tab.picture(run="a", metric="grad_norm", versus="b")
    values = [head["lo"] + row[0] / 250 * (head["hi"] - head["lo"]) for row in codes]
    assert values == pytest.approx([3, -2], abs=0.05)


def test_folded_and_filtered_layers_are_rows_that_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [record(0, [float(2**i) for i in range(10)])])
    head, codes = Tab(tmp_path).picture(run=".", metric="grad_norm", rows="0-3,9,5")
    assert head["rows"] == [[0, 3], [9, 9], [5, 5]]
    values = [round(head["lo"] + row[0] / 250 * (head["hi"] - head["lo"])) for row in codes]
    assert values == [3, 9, 5]  # norms: the largest


def test_under_a_path_prefix(tmp_path: Path) -> None:
    healthy(tmp_path / "good")
    check_healthy(Tab(tmp_path, path_prefix="/deep/down"))


# --- requests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Tab:
    folder = tmp_path_factory.mktemp("logs")
    healthy(folder / "good")
    return Tab(folder)


@pytest.mark.parametrize(
    ("route", "query", "status"),
    [
        ("layout", {}, 400),
        ("layout", {"run": "bad"}, 404),
        ("layout", {"run": "good", "schema": "00000000"}, 404),
        ("picture", {"run": "good"}, 404),
        ("picture", {"run": "good", "metric": "../../etc/passwd"}, 404),
        ("picture", {"run": "good", "metric": "grad_norm", "w": "600.59"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "w": "0"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "w": "9" * 400}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "x0": "nan"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "x0": "9" * 19, "x1": "-" + "9" * 18}, 200),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": "0-5"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": "-1"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": ""}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": "1-0"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": ",".join(["0"] * 2_001)}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "rows": "²"}, 400),
        ("picture", {"run": "good", "metric": "grad_norm", "versus": "bad"}, 404),
        ("layer", {"run": "good"}, 400),
        ("layer", {"run": "good", "layer": "2"}, 404),
        ("layer", {"run": "good", "layer": "-1"}, 404),
        ("profile", {"run": "good", "metric": "grad_norm"}, 400),
        ("value", {"run": "good", "metric": "x", "layer": "0", "step": "0"}, 404),
    ],
)
def test_wrong_requests_are_told_in_a_line(route: str, query: dict[str, str], status: int, good: Tab) -> None:
    answer = good.ask(route, **query)
    assert answer.status_code == status
    if status != 200:
        assert set(json.loads(answer.text)) == {"error"}
        assert 0 < len(json.loads(answer.text)["error"]) <= 200


@given(
    st.sampled_from(sorted(ROUTES)),
    st.dictionaries(st.sampled_from(ARGUMENTS), st.text(max_size=30)),
)
def test_no_request_is_a_500(good: Tab, route: str, query: dict[str, str]) -> None:
    assert good.ask(route, **query).status_code in (200, 400, 404)
    assert good.ask(route, **{"run": "good", "metric": "grad_norm", **query}).status_code in (200, 400, 404)


@pytest.mark.parametrize(
    "path",
    [
        "../plugin.py",
        "..%2fplugin.py",
        "%2e%2e/plugin.py",
        "page.py",
        "web/app.js",
        "index.js/../../page.py",
        "nope.js",
        "",
    ],
)
def test_only_the_files_of_the_page_are_served(path: str, good: Tab) -> None:
    assert good.ask(path).status_code == 404


def test_the_files_of_the_page_are_served(good: Tab) -> None:
    kinds = {"index.js": "text/javascript", "style.css": "text/css"}
    for name, kind in kinds.items():
        answer = good.ask(name)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith(kind)


def test_caps(good: Tab) -> None:
    head, _ = good.picture(run="good", metric="grad_norm", w=10**9, h=10**9)
    assert head["shape"] == [2, 4]


# --- hostile event files -------------------------------------------------------------------------------------------

NAMES = [
    "<img src=x onerror=alert(1)>", '"quotes\' `and` \\', "n" * 10_000, "\u202egnp.exe", "two\nlines\x00\x1b[31m", "",
    "</script><script>alert(1)</script>", "__proto__", "constructor", "{{7*7}}", "a/../../b", "💥" * 50, "\ud7ff\ufffe",
]  # fmt: skip


def test_hostile_layer_names_come_back_as_they_are(tmp_path: Path) -> None:
    layers = tuple(gh.LayerStats(name, grad_norm=1.0, kind=name[:50]) for name in NAMES)
    write(tmp_path, [record(0, []).changed(layers=layers)], [finding(layers=tuple(NAMES), summary=NAMES[0])])
    tab = Tab(tmp_path)
    assert [layer["name"] for layer in tab.get("layout", run=".")["layers"]] == NAMES
    (shown,) = tab.get("series", run=".")["findings"]
    assert shown["layers"] == NAMES
    assert shown["summary"] == NAMES[0]
    for route in ROUTES:
        assert "html" not in tab.ask(route, run=".", **ROUTES[route]).headers["Content-Type"]
    check_survives(tab)


@pytest.mark.parametrize("name", ["<b>", "a&b=c", "über #1", "r" * 150, "..."])
def test_hostile_run_names(name: str, tmp_path: Path) -> None:
    healthy(tmp_path / name)
    check_healthy(Tab(tmp_path), name)


def tensor(
    array: np.ndarray[Any, Any] | None = None,
    shape: tuple[int, ...] | None = None,
    kind: int | None = None,
    text: bytes | None = None,
) -> Any:
    """A tensor of an event, that may say of itself what is not so."""
    if text is not None:
        return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text])
    assert array is not None
    kinds = {"<f2": types_pb2.DT_HALF, "<f4": types_pb2.DT_FLOAT, "|u1": types_pb2.DT_UINT8, "<i8": types_pb2.DT_INT64}
    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=n) for n in (array.shape if shape is None else shape)]
    return tensor_pb2.TensorProto(
        dtype=kinds[array.dtype.str] if kind is None else kind,
        tensor_content=array.tobytes(),
        tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=dims),
    )


def event(step: int, values: dict[str, tuple[Any, bytes]]) -> Event:
    """Tag -> tensor and metadata."""
    found = []
    for tag, (content, about) in values.items():
        value = summary_pb2.Summary.Value(tag=tag, tensor=content)
        value.metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
        whole = "/events/" in tag or tag.endswith("/peak")
        value.metadata.plugin_data.plugin_name = "gradhealth_events" if whole else "gradhealth"
        value.metadata.plugin_data.content = about
        found.append(value)
    return Event(step=step, wall_time=1.0 + step, summary=summary_pb2.Summary(value=found))


def put(folder: Path, events: list[Event]) -> None:
    writer = EventFileWriter(str(folder))
    for one in events:
        writer.add_event(one)
    writer.close()


S = "gradhealth/0123abcd"
LAYERS = json.dumps({"layers": [["a", "", 1], ["b", "", 1]]}).encode()
NORM = json.dumps({"name": "grad_norm", "scale": "log2"}).encode()
TOTAL = json.dumps({"columns": ["total_norm", "loss"]}).encode()
U1, F2, F4 = (np.zeros(2, kind) for kind in ("u1", "<f2", "<f4"))
SOUND = {
    f"{S}/layers": (tensor(U1), LAYERS),
    f"{S}/grad_norm": (tensor(F2), NORM),
    f"{S}/total": (tensor(F4), TOTAL),
    "gradhealth/events/findings": (tensor(text=b'{"findings": []}'), b"{}"),
    "gradhealth/events/spans": (tensor(text=b"{}"), b"{}"),
}
DEEP = b"[" * 100_000 + b"]" * 100_000
SPOILT: dict[str, dict[str, tuple[Any, bytes]]] = {
    "layers: no JSON": {f"{S}/layers": (tensor(U1), b"\xff{not json")},
    "layers: deep JSON": {f"{S}/layers": (tensor(U1), DEEP)},
    "layers: numbers": {f"{S}/layers": (tensor(U1), b'{"layers": [[1, 2, 3]]}')},
    "layers: no list": {f"{S}/layers": (tensor(U1), b'{"layers": 5}')},
    "layers: others than values": {f"{S}/layers": (tensor(U1), b'{"layers": [["a", "", 1]]}')},
    "metric: no JSON": {f"{S}/grad_norm": (tensor(F2), b"\x00")},
    "metric: another name": {f"{S}/grad_norm": (tensor(F2), b'{"name": "x"}')},
    "metric: a wrong shape": {f"{S}/grad_norm": (tensor(F2, shape=(3,)), NORM)},
    "metric: a huge shape": {f"{S}/grad_norm": (tensor(F2, shape=(2**40,)), NORM)},
    "metric: a negative shape": {f"{S}/grad_norm": (tensor(F2, shape=(-1,)), NORM)},
    "metric: rank 2": {f"{S}/grad_norm": (tensor(np.zeros((1, 2), "<f2")), NORM)},
    "metric: rank 0": {f"{S}/grad_norm": (tensor(np.zeros((), "<f2")), NORM)},
    "metric: empty": {f"{S}/grad_norm": (tensor(np.zeros(0, "<f2")), NORM)},
    "metric: a text": {f"{S}/grad_norm": (tensor(text=b"x"), NORM)},
    "metric: whole numbers": {f"{S}/grad_norm": (tensor(np.zeros(2, "<i8")), NORM)},
    "metric: no such type": {f"{S}/grad_norm": (tensor(F2, kind=99), NORM)},
    "metric: NaN and Inf": {f"{S}/grad_norm": (tensor(np.array([np.nan, np.inf], "<f2")), NORM)},
    "metric: not measured": {f"{S}/grad_norm": (tensor(np.full(2, -65504, "<f2")), NORM)},
    "metric: odd meaning": {
        f"{S}/grad_norm": (tensor(F2), b'{"name": "grad_norm", "scale": 7, "palette": [], "neutral": NaN, "title": {}}')
    },
    "total: no columns": {f"{S}/total": (tensor(F4), b"{}")},
    "total: odd columns": {f"{S}/total": (tensor(F4), b'{"columns": [{}, 5]}')},
    "total: another number": {f"{S}/total": (tensor(np.zeros(9, "<f4")), TOTAL)},
    "total: NaN": {f"{S}/total": (tensor(np.array([np.nan, np.inf], "<f4")), TOTAL)},
    "findings: no JSON": {"gradhealth/events/findings": (tensor(text=b"{"), b"{}")},
    "findings: numbers": {"gradhealth/events/findings": (tensor(text=b'{"findings": [1, null, [], {}]}'), b"{}")},
    "findings: odd fields": {
        "gradhealth/events/findings": (
            tensor(text=b'{"findings": [{"condition": "x", "severity": 5, "layers": {}, "first_step": NaN,'
                        b' "evidence": 3, "last_step": 1e400, "layers_total": "y", "healed": [7]}]}'), b"{}"
        ),
    },
    "findings: a vector": {"gradhealth/events/findings": (tensor(F4), b"{}")},
    "spans: odd": {
        "gradhealth/events/spans": (tensor(text=b'{"armed": [[1], "x", [5, 2], [0, 1e9]], "clipped": 4}'), b"{}")
    },
    "histogram: short": {f"{S}/histogram": (tensor(np.array([3, 5, 1], "u1")), b"{}")},
    "histogram: beyond the bins": {f"{S}/histogram": (tensor(np.array([31, 200], "u1")), b"{}")},
    "peak: short": {f"{S}/peak": (tensor(F4), b"{}")},
    "odd tags": {tag: (tensor(F2), NORM) for tag in ("gradhealth/../x", "gradhealth/ABC/d/e", f"{S}/")},
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
def test_one_spoilt_tag_costs_no_other_run_and_no_500(spoilt: str, tmp_path: Path) -> None:
    healthy(tmp_path / "good")
    put(tmp_path / "bad", [event(step, {**SOUND, **SPOILT[spoilt]}) for step in range(3)])
    tab = Tab(tmp_path)
    check_healthy(tab)
    check_survives(tab)
    if spoilt.startswith(("findings", "spans", "histogram", "peak", "total")):
        assert tab.ask("picture", run="bad", metric="grad_norm").status_code in (200, 404)


@pytest.mark.parametrize("steps", [[0, 0, 0], [5, 3, 1], [2, 9, 2, 9], [-5, 2**62, 3], [0]])
def test_duplicated_and_unsorted_steps(steps: list[int], tmp_path: Path) -> None:
    put(tmp_path / "bad", [event(step, SOUND) for step in steps])
    healthy(tmp_path / "good")
    tab = Tab(tmp_path)
    check_healthy(tab)
    check_survives(tab)
    head, _ = tab.picture(run="bad", metric="grad_norm")
    assert head["columns"] == sorted(set(head["columns"]))


def test_steps_with_rows_of_another_length_are_left_out(tmp_path: Path) -> None:
    wide = {**SOUND, f"{S}/grad_norm": (tensor(np.zeros(5, "<f2")), NORM)}
    put(tmp_path, [event(0, SOUND), event(1, wide), event(2, SOUND)])
    assert Tab(tmp_path).picture(run=".", metric="grad_norm")[0]["columns"] == [0, 2]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_damage_anywhere(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("logs")
    healthy(folder / "good")
    write(folder / "bad", [record(step, [1.0, 2.0]) for step in range(3)], [finding()])
    (path,) = (folder / "bad").iterdir()
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content) + data.draw(st.binary(max_size=40)))
    tab = Tab(folder)
    check_healthy(tab)
    check_survives(tab)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("grad_norm") | VALUES, "scale": VALUES, "palette": VALUES, "neutral": VALUES, "title": VALUES,
        "layers": st.lists(st.lists(VALUES, min_size=3, max_size=3), max_size=3) | VALUES, "columns": VALUES,
        "findings": st.lists(
            st.fixed_dictionaries(
                {"condition": st.text(max_size=5)},
                optional=dict.fromkeys(FIELDS, VALUES),
            ), max_size=3,
        ) | VALUES,
        "armed": VALUES, "clipped": VALUES,
    },
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=SHAPED, metric=SHAPED, total=SHAPED, found=SHAPED, spans=SHAPED,
    row=st.lists(st.floats(width=16), min_size=2, max_size=2),
)  # fmt: skip
def test_any_json_in_place_of_ours(
    layers: Any,
    metric: Any,
    total: Any,
    found: Any,
    spans: Any,
    row: list[float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    texts = [json.dumps(part).encode() for part in (layers, metric, total, found, spans)]
    values = {
        f"{S}/layers": (tensor(U1), texts[0] if "layers" in layers else LAYERS),
        f"{S}/grad_norm": (tensor(np.array(row, "<f2")), texts[1]),
        f"{S}/total": (tensor(F4), texts[2] if "columns" in total else TOTAL),
        "gradhealth/events/findings": (tensor(text=texts[3]), b"{}"),
        "gradhealth/events/spans": (tensor(text=texts[4]), b"{}"),
    }
    put(folder / "bad", [event(step, values) for step in range(2)])
    healthy(folder / "good")
    tab = Tab(folder)
    check_healthy(tab)
    check_survives(tab)


def test_an_error_of_ours_leaves_tensorboard_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy(tmp_path / "good")
    tab = Tab(tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("lightning_gradhealth.view.answers.layout", broken)
    answer = tab.ask("layout", run="good")
    assert answer.status_code == 400
    assert json.loads(answer.text) == {"error": "this cannot be shown (ZeroDivisionError)"}
    assert tab.get("series", run="good")["step"] == [0, 1, 2, 3]


def test_without_data_the_tab_is_there_all_the_same(tmp_path: Path) -> None:
    tab = Tab(tmp_path)
    assert tab.get("runs") == {"version": 1, "runs": []}
    listing = json.loads(tab.client.get("/data/plugins_listing").text)
    assert listing["gradhealth"]["enabled"]
    assert listing["gradhealth"]["tab_name"] == "Grad Health"


# --- what TensorBoard has to load, and a real one --------------------------------------------------------------------


def test_neither_torch_nor_lightning_is_imported() -> None:
    code = (
        "import sys, pkgutil, importlib, lightning_gradhealth.view, lightning_gradhealth.tensorboard.loader\n"
        "for package in (lightning_gradhealth.view, lightning_gradhealth.tensorboard):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'rich', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_tensorboard_starts_no_more_than_50_ms_later() -> None:
    """What entry point and plugin take, beside what TensorBoard imports anyway; the median of seven."""
    code = (
        "import time, tensorboard.main, tensorboard.default, tensorboard.backend.http_util, werkzeug, numpy\n"
        "import tensorboard.data.provider, tensorboard.plugin_util, tensorboard.plugins.base_plugin as base\n"
        "plugins = tensorboard.default.get_static_plugins()\n"
        "start = time.process_time()\n"
        "from lightning_gradhealth.tensorboard.loader import GradHealthLoader\n"
        "GradHealthLoader().load(base.TBContext()).get_plugin_apps()\n"
        "print(time.process_time() - start)\n"
    )
    took = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(7)
    ]
    assert statistics.median(took) <= 0.05, took


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--load_fast", "false"), ("--path_prefix", "/deep")], ids=["fast", "python", "prefix"]
)
def test_a_real_server_with_either_loader(flags: tuple[str, ...], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    healthy(logs / "good")
    write(logs / "sick", [record(step, [1.0, math.nan]) for step in range(5)], [finding()])
    put(logs / "bad", [event(step, {**SOUND, f"{S}/grad_norm": (tensor(F2, shape=(3,)), NORM)}) for step in range(3)])
    with server(logs, tmp_path, *flags) as address:
        base = f"{address.rstrip('/')}{BASE}"

        def runs() -> dict[str, Any]:
            return {run["run"]: run for run in json.loads(fetch(base, "runs")[1])["runs"]}

        wait_for(lambda: {"good", "sick", "bad"} <= set(runs()))
        assert runs()["sick"]["status"]["condition"] == "exploding_gradients"
        assert fetch(base, "picture", run="bad", metric="grad_norm")[0] == 404
        head, codes = unpacked(fetch(base, "picture", run="sick", metric="grad_norm")[1])
        assert head["columns"] == [0, 1, 2, 3, 4]
        assert codes[1] == [255] * 5
        assert json.loads(fetch(base, "series", run="sick")[1])["findings"][0]["layers"] == ["net.0"]
        assert fetch(base, "index.js")[0] == 200
        write(logs / "good", [record(step, [1.0, 2.0]) for step in range(4, 7)], suffix=".more")
        wait_for(lambda: runs()["good"]["last_step"] == 6)


def test_a_package_with_an_old_entry_is_found_in_the_servers_environment(tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print([e.name for e in m.entry_points(group='tensorboard_plugins')])"
    names = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment(tmp_path)
    ).stdout
    assert names.count("'gradhealth'") == 1


def test_the_plugin_reads_what_the_writer_writes() -> None:
    assert (PLUGIN, EVENTS_PLUGIN) == DATA_NAMES


def test_a_data_provider_that_fails_is_no_500() -> None:
    client = Client(application.TensorBoardWSGI([GradHealthPlugin(TBContext(data_provider=None))]))
    answer = client.get(BASE + "runs")
    assert answer.status_code == 400
