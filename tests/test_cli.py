"""The command line: the same findings as in the process that trained, exit codes for CI, and no traceback."""

from __future__ import annotations

import base64
import contextlib
import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from hypothesis import HealthCheck, given, settings, strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tab import fetch, finding, record, wait_for, write
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import lightning_gradhealth as gh
from lightning_gradhealth.cli import main
from lightning_gradhealth.cli.commands import COMMANDS, parsed
from lightning_gradhealth.cli.demo import quickstart
from lightning_gradhealth.loggers.events import EventsWriter
from lightning_gradhealth.records import HealthReport
from lightning_gradhealth.rules.meaning import MEANINGS
from lightning_gradhealth.tensorboard.logdir import Logs
from lightning_gradhealth.view.data import RunView
from lightning_gradhealth.view.health import health_of

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; whatever it says, it is no traceback."""
    command = [sys.executable, "-m", "lightning_gradhealth.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


def chain(depth: int = 14) -> nn.Sequential:
    """A chain of sigmoids: its gradients vanish."""
    hidden = [part for _ in range(depth) for part in (nn.Sigmoid(), nn.Linear(16, 16))]
    return nn.Sequential(nn.Linear(8, 16), *hidden, nn.Linear(16, 3))


class Spoil(pl.Callback):
    """Makes the weights NaN, or interrupts the fit, at a step."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.error is not None:
                raise self.error
            next(pl_module.parameters()).data.fill_(torch.nan)


def fit(
    folder: Path, name: str, net: nn.Module, *others: pl.Callback, lr: float = 0.05, **options: Any
) -> HealthReport:
    """A fit that is logged as users log; the run's own report."""
    health = gh.GradHealth(report_dir=None, **options)
    logger = TensorBoardLogger(folder, name="", version=name)
    fitted = trainer(health, *others, logger=logger, log_every_n_steps=2, max_steps=40)
    torch.manual_seed(0)
    with contextlib.suppress(RuntimeError, SystemExit):  # Lightning makes an exit of Ctrl-C
        fitted.fit(Classifier(net, lr=lr), batches(samples=256, size=16))
    return health.report()


SICK: dict[str, Any] = {
    "vanishing": lambda folder: fit(folder, "vanishing", chain()),
    "wild": lambda folder: fit(folder, "wild", mlp(12), lr=30.0),
    "adaptive": lambda folder: fit(folder, "adaptive", mlp(12), lr=30.0, clip="adaptive"),
    "nan": lambda folder: fit(folder, "nan", mlp(), Spoil(20)),
    "healthy": lambda folder: fit(folder, "healthy", mlp()),
    "failed": lambda folder: fit(folder, "failed", chain(), Spoil(31, RuntimeError("a bad batch"))),
    "interrupted": lambda folder: fit(folder, "interrupted", chain(), Spoil(31, KeyboardInterrupt())),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, HealthReport]]:
    """Runs with known diseases, and what each said of itself."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("vanishing", "nan", "healthy")
    return folder, {name: SICK[name](folder) for name in names}


# --- report: the same as in the process that trained -------------------------------------------------------------


@pytest.mark.parametrize("name", list(SICK))
def test_the_report_of_a_run_is_read_from_its_event_files(name: str, tmp_path: Path) -> None:
    own = SICK[name](tmp_path)
    assert (name == "healthy") is own.healthy
    main(["report", str(tmp_path), "--json", str(tmp_path / "out.json")])
    (read,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert read.pop("run") == name
    assert HealthReport.from_dict(read).to_json() == own.to_json()
    assert read == json.loads(own.to_json())  # layers, trend, notes and verdict, too


def test_the_page_of_a_run_that_has_ended_shows_its_last_evidence(tmp_path: Path) -> None:
    own = SICK["vanishing"](tmp_path)
    (view,) = Logs(tmp_path).runs()
    assert [(f["id"], f["last_step"]) for f in view.findings] == [(f.id, f.last_step) for f in own.findings]
    shown = {entry["name"]: entry["value"] for entry in view.findings[0]["evidence"]}
    assert shown["first_to_last"] == own.findings[0].evidence["first_to_last"]


def test_a_loop_of_ones_own_writes_its_report_when_the_session_closes(tmp_path: Path) -> None:
    net = chain()
    with SummaryWriter(str(tmp_path)) as writer:
        session = gh.HealthSession(net, probe_every_n_steps=2, loggers=writer)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(40):
            loss = nn.functional.cross_entropy(net(torch.randn(32, 8)), torch.randint(0, 3, (32,)))
            optimizer.zero_grad()
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
            if step % 4 == 3:
                session.flush()
        session.close()
        session.close()
    (view,) = Logs(tmp_path).runs()
    assert "vanishing_gradients" in session.report().conditions
    assert health_of(view).to_dict() == session.report().to_dict()


def test_a_writer_that_is_closed_already_gets_no_new_file(tmp_path: Path) -> None:
    net = mlp()
    writer = SummaryWriter(str(tmp_path))
    session = gh.HealthSession(net, loggers=writer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net(torch.randn(4, 8)).sum().backward()
    session.apply(session.observe(optimizer))
    session.flush()
    writer.close()
    session.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_of_a_run_without_an_end_the_last_that_was_written_is_told(tmp_path: Path) -> None:
    told = finding(first_step=3, last_step=3, evidence={"factor": 1e4}, code="lower()", remedy="lower the rate")
    records = [record(step, [1.0 + step, None, float("nan")]) for step in range(5)]
    write(tmp_path, records, [told])
    (view,) = Logs(tmp_path).runs()
    report = health_of(view)
    assert report.findings == (told.changed(last_step=4),)  # it held to the end
    assert [layer.name for layer in report.layers] == ["net.0", "net.1", "net.2"]
    assert report.layers[0].grad_norm == pytest.approx(5.0, rel=1e-3)
    assert report.layers[1].grad_norm is None
    assert report.layers[2].grad_norm != report.layers[2].grad_norm
    assert (report.step, report.steps, len(report.trend)) == (4, 5, 5)
    assert "killed" in report.notes[0]


def test_a_run_that_goes_on_after_its_report_is_told_as_it_goes_on(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        events = EventsWriter()
        events.write(writer, record(0, [1.0]), [], ())
        events.end(writer, HealthReport(steps=1, step=0), ())
    assert health_of(Logs(tmp_path).runs()[0]) == HealthReport(steps=1, step=0)
    write(tmp_path, [record(step, [1.0]) for step in range(1, 5)], [finding()], suffix=".resumed")
    assert health_of(Logs(tmp_path).runs()[0]).conditions == {"exploding_gradients"}


def test_a_run_that_is_begun_again_ends_where_it_is_now(tmp_path: Path) -> None:
    write(tmp_path, [record(step, [1.0]) for step in range(50)])
    write(tmp_path, [record(step, [1.0]) for step in range(10)], [finding()], suffix=".again")
    (view,) = Logs(tmp_path).runs()
    assert (view.last_step, health_of(view).steps, view.findings[0]["last_step"]) == (9, 10, 9)


# --- report: exit codes, files and words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail_on", "code"),
    [
        ((), 0),
        (("--fail-on", "exploding_gradients,dead_units"), 0),
        (("--fail-on", "vanishing_gradients"), 1),
        (("--fail-on", "loss-spike, non-finite"), 1),
    ],
)
def test_exit_codes_of_report(runs: tuple[Path, Any], fail_on: Sequence[str], code: int) -> None:
    done = run("report", str(runs[0]), *fail_on)
    assert done.returncode == code, done.stderr
    assert ("gradhealth report: found" in done.stderr) is (code == 1)
    for name in ("vanishing", "nan", "healthy"):
        assert str(runs[0] / name) in done.stdout.replace("\n", "")
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80


def test_an_info_fails_nothing(tmp_path: Path) -> None:
    write(tmp_path, [record(0, [1.0])], [finding("loss_spike", "info")])
    assert main(["report", str(tmp_path), "--fail-on", "loss_spike"]) == 0


def test_a_condition_of_a_rule_of_ones_own_can_fail_a_run(tmp_path: Path) -> None:
    write(tmp_path, [record(0, [1.0])], [finding("loss_above", "warning")])
    assert main(["report", str(tmp_path), "--fail-on", "loss_above"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "{runs}", "--fail-on", "exploding_gradient"], "did you mean 'exploding_gradients'?"),
        (["report", "{runs}/nowhere"], "which does not exist"),
        (["report", "{root}/pyproject.toml"], "which is a file"),
        (["report", "{root}/examples"], "callbacks=[gh.GradHealth()]"),
        (["report", "{runs}", "--html", "{root}/pyproject.toml/page.html"], "cannot be written"),
        (["report", "{runs}", "--html", "s3://bucket/page.html"], "not on this machine"),
        (["report", "{runs}", "--json", "-", "--md", "-"], "once"),
        (["report"], "logdir"),
        (["explain", "exploding"], "did you mean"),
        (["explian", "loss_spike"], "explain"),
        (["serve", "{runs}/nowhere"], "which does not exist"),
        (["serve", "{runs}", "--port", "99999"], "between 0 and 65535"),
        (["demo", "--epochs", "0"], "must be >= 1"),
        (["demo", "--logdir", "{root}/pyproject.toml"], "which is a file"),
    ],
)
def test_bad_use_is_said_and_gives_2(runs: tuple[Path, Any], arguments: list[str], said: str) -> None:
    done = run(*(argument.format(runs=runs[0], root=ROOT) for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == "" or "--html" in arguments


def test_several_runs_in_one_page_one_json_and_one_markdown(runs: tuple[Path, Any], tmp_path: Path) -> None:
    files = {suffix: tmp_path / "made" / f"report.{suffix}" for suffix in ("html", "json", "md")}
    options = [part for suffix, path in files.items() for part in (f"--{suffix}", str(path))]
    assert main(["report", str(runs[0]), *options]) == 0
    data = re.search('id="data">([^<]*)<', files["html"].read_text())
    assert data is not None
    payload = gzip.decompress(base64.b64decode(data[1]))
    head = json.loads(payload[4 : 4 + int.from_bytes(payload[:4], "little")])
    assert [entry["run"] for entry in head["runs"]] == ["healthy", "nan", "vanishing"]
    read = json.loads(files["json"].read_text())["runs"]
    assert [(one["run"], one["healthy"]) for one in read] == [("healthy", True), ("nan", False), ("vanishing", False)]
    assert re.findall("^# .*/(\\w+)$", files["md"].read_text(), re.MULTILINE) == ["healthy", "nan", "vanishing"]


@pytest.mark.parametrize("kind", ["json", "md", "html"])
def test_a_dash_is_standard_output_and_has_it_to_itself(runs: tuple[Path, Any], kind: str) -> None:
    done = run("report", str(runs[0]), f"--{kind}", "-")
    assert done.returncode == 0
    assert done.stdout.startswith({"json": "{", "md": "# ", "html": "<!doctype"}[kind])
    assert "vanishing_gradients" in done.stderr
    if kind == "json":
        assert len(json.loads(done.stdout)["runs"]) == 3


def test_a_pipe_that_is_closed_is_no_error(runs: tuple[Path, Any]) -> None:
    command = f"{sys.executable} -m lightning_gradhealth.cli report {runs[0]} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 141  # and not 1, which says that something was found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    "arguments", [["explain", "loss_spike"], ["report", "{runs}"], ["report", "{runs}", "--md", "-"]]
)
def test_output_that_cannot_be_written_is_said_and_gives_2(runs: tuple[Path, Any], arguments: list[str]) -> None:
    command = [sys.executable, "-m", "lightning_gradhealth.cli", *(each.format(runs=runs[0]) for each in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert f"gradhealth {arguments[0]}: OSError: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr


# --- report: whatever stands in the files ------------------------------------------------------------------------

HOSTILE = "[bold red]\x1b[31m\u202erun\n|`*<script>" + "x" * 300


def test_names_from_event_files_are_escaped_in_the_terminal(tmp_path: Path) -> None:
    layers = tuple(layer.changed(name=f"{HOSTILE}{i}") for i, layer in enumerate(record(0, [1.0, 2.0]).layers))
    told = finding(layers=(f"{HOSTILE}0",), summary=HOSTILE, remedy=HOSTILE, code=HOSTILE)
    folder = tmp_path / "\x1b[31m\u202e[b]"
    write(folder, [record(0, [1.0]).changed(layers=layers)], [told])
    with SummaryWriter(str(tmp_path / "own")) as writer:
        events = EventsWriter()
        events.write(writer, record(0, [1.0]).changed(layers=layers), [told], ())
        events.end(writer, HealthReport((told,), layers, 0, 1, notes=(HOSTILE,), unwatched=(HOSTILE,)), ())
    done = run("report", str(tmp_path), "--md", str(tmp_path / "a.md"))
    assert done.returncode == 0
    for text in (done.stdout, (tmp_path / "a.md").read_text()):
        assert not {"\x1b", "\u202e", "\r"} & set(text)
    assert "[bold red]\\x1b[31m\\u202erun\\n" in done.stdout.replace("│", "").replace("\n", "").replace(
        " ", ""
    ).replace("boldred", "bold red")


@pytest.mark.parametrize(
    "report",
    [
        {"findings": "no"},
        {"findings": [{"condition": "loss_spike"}]},
        {"steps": "many"},
        {"findings": [finding().changed(evidence={"factor": 10**400}).to_dict()], "steps": 1},
    ],
)
def test_of_a_report_that_is_none_the_rest_of_the_run_is_told(report: Any, tmp_path: Path) -> None:
    class Written(HealthReport):
        def to_dict(self) -> dict[str, Any]:
            return {"layers": [], **report}

    write(tmp_path / "other", [record(0, [1.0])])
    with SummaryWriter(str(tmp_path / "hostile")) as writer:
        events = EventsWriter()
        events.write(writer, record(0, [1.0]), [finding()], ("exploding_gradients",))
        events.end(writer, Written((finding(),), step=0), ("exploding_gradients",))
    done = run("report", str(tmp_path), "--fail-on", "exploding_gradients")
    assert done.returncode == 1
    assert str(tmp_path / "other") in done.stdout.replace("\n", "")


def test_a_run_that_cannot_be_read_is_said_and_gives_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def read(view: Any) -> HealthReport:
        if view.name == "odd":
            raise OverflowError("too large")
        return HealthReport(steps=1)

    monkeypatch.setattr("lightning_gradhealth.view.health.health_of", read)
    for name in ("odd", "other"):
        write(tmp_path / name, [record(0, [1.0])])
    assert main(["report", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "healthy after 1" in shown.out
    assert "odd cannot be read: OverflowError: too large" in shown.err


def test_a_file_in_which_nothing_can_be_read_is_said_and_gives_2(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "other", [record(0, [1.0])])
    for name, content in (("odd", b"no event" * 100), ("just begun", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1").write_bytes(content)
    (tmp_path / "just begun" / "events.out.tfevents.2").symlink_to(tmp_path / "gone")
    assert main(["report", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "odd cannot be read: no event could be read" in shown.err
    assert "just begun" not in shown.err


def test_a_run_of_which_nothing_is_known_is_not_called_healthy() -> None:
    assert not health_of(RunView("run", last_step=9)).healthy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    SICK["vanishing"](folder)
    return next(folder.rglob("*tfevents*")).read_bytes()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_files_that_are_damaged_are_no_traceback(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    at = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=64))
    (folder / "events.out.tfevents.1.a").write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    assert main(["report", str(folder)]) in (0, 2)


# --- explain -----------------------------------------------------------------------------------------------------


def test_every_condition_is_explained() -> None:
    assert list(MEANINGS) == sorted(MEANINGS, key=list(MEANINGS).index)
    assert set(MEANINGS) == set(gh.Condition)


@pytest.mark.parametrize("condition", list(gh.Condition))
def test_an_explanation_has_the_figures_of_the_thresholds(condition: gh.Condition, capsys: Any) -> None:
    template = MEANINGS[condition].when
    names = re.findall(r"{(\w+)}", template)
    assert not re.search(r"\d(?:e-?\d+)?\b(?! samples| %)", re.sub("1e-3 is usual", "", template))
    for name in names:
        other = gh.Thresholds(**{name: getattr(gh.Thresholds(), name) / 2 if _is_share(name) else 7})
        assert f"{name} {getattr(other, name):g}" in MEANINGS[condition].told(other).when
    assert main(["explain", str(condition)]) == 0
    shown = capsys.readouterr().out
    for name in names:
        assert f"{name} {getattr(gh.Thresholds(), name):g}" in " ".join(shown.split())
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(title in shown for title in ("when:", "what to do:", "source:"))


def _is_share(name: str) -> bool:
    return isinstance(getattr(gh.Thresholds(), name), float)


def test_explain_lists_all(capsys: Any) -> None:
    assert main(["explain"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line in set(map(str, gh.Condition))] == [str(each) for each in MEANINGS]


# --- diagnose ----------------------------------------------------------------------------------------------------

MODELS = """
    import torch
    from torch import nn
    import lightning.pytorch as pl
    from lightning_gradhealth import init_weights

    def healthy():
        net = nn.Sequential(*(m for _ in range(9) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 3))
        init_weights(net, torch.randn(8, 32), seed=0)
        return net

    def sick():
        return nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(32, 32), nn.Sigmoid())), nn.Linear(32, 3))

    class Module(pl.LightningModule):
        example_input_array = torch.randn(300, 32)

        def __init__(self):
            super().__init__()
            self.net = healthy()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

    ready = Module()
    x = lambda: torch.randn(300, 32)
    pair = lambda: (torch.randn(300, 32), torch.randint(0, 3, (300,)))
    wrong = lambda: torch.randn(300, 5)
    number = 3
    text = lambda: "no module"

    def broken():
        raise RuntimeError("no weights here")

    def ends():
        raise SystemExit(0)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, with modules to import."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "models.py").write_text(textwrap.dedent(MODELS))
    (tmp_path / "faulty.py").write_text("import torch\nprint(no_such_name)\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in ("some", "some.models", "faulty", "script"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["some.models:healthy", "--batch", "some.models:x"], 0, "healthy before the first step"),
        (["some.models:sick", "--batch", "some.models:x"], 1, "vanishing_gradients"),
        (["some.models:Module"], 0, "healthy before the first step"),
        (["some.models:ready", "--batch", "some.models:pair"], 0, "healthy before the first step"),
        (["some.models:healthy"], 2, "has no example_input_array; give --batch"),
        (["some.models:healthy", "--batch", "some.models:wrong"], 2, "300"),
        (["some.models.healthy"], 2, "FACTORY must be a module and a name in it"),
        (["some.model:healthy"], 2, "FACTORY: some.model cannot be imported: ModuleNotFoundError"),
        (["some.models:helthy"], 2, "FACTORY: some.models has no helthy"),
        (["some.models:number"], 2, "cannot be called, it is a int"),
        (["some.models:text"], 2, "must give an nn.Module, got a str"),
        (["some.models:broken"], 2, "some.models:broken() fails: RuntimeError: no weights here"),
        (["faulty:model"], 2, "faulty.py, line 2"),
        (["script:model"], 2, "script cannot be imported: SystemExit"),
        (["some.models:ends"], 2, "some.models:ends() fails: SystemExit"),
        (["some.models:healthy", "--batch", "some.models:y"], 2, "--batch: some.models has no y"),
    ],
)
def test_diagnose(models: Path, arguments: list[str], code: int, said: str, capsys: Any) -> None:
    assert main(["diagnose", *arguments]) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code == 2 else shown.out)


def test_diagnose_finds_modules_in_the_folder_where_it_is_run(models: Path) -> None:
    done = run("diagnose", "some.models:Module", cwd=models)
    assert done.returncode == 0
    assert "healthy before the first step" in done.stdout


# --- README ------------------------------------------------------------------------------------------------------


def test_every_command_of_readme_is_one() -> None:
    section = re.search(r"## Command line\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)
    assert section is not None
    lines = re.findall(r"^gradhealth (.*?)(?:\s+#.*)?$", section[1], re.MULTILINE)
    assert {parsed(line.split())[0] for line in lines} == set(COMMANDS)


# --- what is imported, and what is not there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["report", "--help"], ["report", "{runs}"], ["explain", "non_finite"], ["serve", "{runs}"]],
)
def test_what_only_reads_imports_neither_torch_nor_lightning(runs: tuple[Path, Any], arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ["--port", str(taken.getsockname()[1])] if arguments[0] == "serve" else []
        said = [argument.format(runs=runs[0]) for argument in arguments] + port
        code = (
            "import sys\nfrom lightning_gradhealth.cli import main\n"
            f"try: code = main({said!r})\nexcept SystemExit as end: code = end.code\n"
            "print('\\n', code, sorted({'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.splitlines()[-1].strip() == f"{2 if port else 0} []"


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("jsonargparse", ["explain"], 'pip install "lightning-gradhealth[cli]"'),
        ("docstring_parser", ["explain"], 'pip install "lightning-gradhealth[cli]"'),
        ("sklearn", ["demo"], 'pip install "lightning-gradhealth[examples]"'),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    module: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


# --- demo --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_makes_runs_and_says_how_to_look(tmp_path: Path) -> None:
    done = run("demo", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("tensorboard --logdir runs", "report: runs/torch-default/report.html", "gradhealth report runs"):
        assert said in done.stdout
    assert (tmp_path / "runs" / "torch-default" / "report.html").exists()
    assert len(Logs(tmp_path / "runs").runs()) == 3


def test_the_wheel_has_the_quickstart_where_the_demo_looks_for_it() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"force-include\]\n\"(.*?)\" = \"(.*?)\"", project)
    assert listed is not None
    assert ROOT / listed[1] == quickstart()
    assert (ROOT / listed[2]).parent == Path(sys.modules["lightning_gradhealth.cli.demo"].__file__ or "").parent


# --- serve -------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(runs: tuple[Path, Any], tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """A server over a copy of the runs: its address, the folder, the process."""
    folder = tmp_path / "logs"
    shutil.copytree(runs[0], folder)
    command = [sys.executable, "-m", "lightning_gradhealth.cli", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    watch = threading.Timer(60, process.kill)
    watch.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found is not None, line
        yield found[0], folder, process
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


def test_the_page_is_served_live_and_ends_on_ctrl_c(served: tuple[str, Path, subprocess.Popen[str]]) -> None:
    address, folder, process = served

    def names() -> list[str]:
        return [entry["run"] for entry in json.loads(fetch(address, "runs")[1])["runs"]]

    wait_for(lambda: len(names()) == 3)
    assert fetch(address, "")[0] == fetch(address, "index.js")[0] == fetch(address, "style.css")[0] == 200
    assert json.loads(fetch(address, "layout", run="vanishing")[1])["run"] == "vanishing"
    write(folder / "later", [record(0, [1.0])])
    wait_for(lambda: "later" in names())
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=20)
    assert process.returncode == 0
    assert (said.strip(), complained) == ("", "")


@pytest.mark.parametrize(
    "path",
    [
        "../../../pyproject.toml",
        "%2e%2e/plugin.py",
        "..%2f..%2fpyproject.toml",
        "index.js/../../page.py",
        "/etc/passwd",
        "style.css%00",
        "data/plugins_listing",
        "layout?run=../nan",
        "layout?run=nan&schema=../x",
    ],
)
def test_path_tricks_are_404(served: tuple[str, Path, subprocess.Popen[str]], path: str) -> None:
    host, port = re.findall(r"//(.*):(\d+)/", served[0])[0]
    wait_for(lambda: len(json.loads(fetch(served[0], "runs")[1])["runs"]) == 3)
    with socket.create_connection((host, int(port)), timeout=20) as raw:  # as it is written: clients tidy paths up
        raw.sendall(f"GET /{path} HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n".encode())
        assert raw.makefile("rb").readline().split()[1] == b"404"


def test_only_this_machine_by_its_own_name_is_answered(served: tuple[str, Path, subprocess.Popen[str]]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for headers, data, code in (({"Host": "evil.example:80"}, None, 403), ({}, b"x", 405)):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            opener.open(urllib.request.Request(f"{served[0]}runs", data, headers), timeout=20)


def test_a_port_that_is_taken_is_said(runs: tuple[Path, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", str(runs[0]), "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} cannot be opened" in done.stderr
    assert f"--port {port + 1}" in done.stderr


# --- LightningCLI ------------------------------------------------------------------------------------------------


def config(folder: Path, old: str = "", new: str = "") -> Path:
    """The example's YAML file, with one value changed."""
    text = (ROOT / "examples" / "lightning_cli.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    return folder / "config.yaml"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module, run from an empty folder."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])
    return importlib.import_module("lightning_cli")


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "verdict"), [("5.0", "healthy"), ("0.0", "loss_above")])
def test_clip_objects_and_rules_come_from_yaml(
    example: Any, tmp_path: Path, limit: str, verdict: str, capsys: Any
) -> None:
    example.main(["fit", "--config", str(config(tmp_path, "limit: 5.0", f"limit: {limit}"))])
    assert capsys.readouterr().out.splitlines()[-1] == verdict
    (view,) = Logs(tmp_path / "runs").runs()
    report = health_of(view)
    assert report.verdict == verdict
    assert report.clipped_steps > 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_norm: 1.0", "max_norm: big", "Expected a <class 'float'>. Got value: big"),
        ("clipping: 0.01", "factor: 0.01", "'factor' is not accepted"),
        ("lightning_gradhealth.NormClip", "lightning_gradhealth.NormClop", "no attribute 'NormClop'"),
        ("on_non_finite: skip", "on_non_finite: jump", "'warn', 'skip', 'raise', 'stop'"),
        ("time_ratio: 100.0", "time_ratio: -3.0", "Thresholds: time_ratio must be a finite number > 0, got -3.0"),
        ("stop_on: exploding_gradients", "stop_on: exploding", "'exploding' is no condition"),
    ],
)
def test_a_wrong_value_in_yaml_shows_its_message(
    example: Any, old: str, new: str, said: str, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["fit", "--config", str(config(tmp_path, old, new))])
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) <= 10


def test_a_wrong_value_in_yaml_takes_one_line_of_a_terminal(tmp_path: Path) -> None:
    path = config(tmp_path, "max_norm: 1.0", "max_norm: -1")
    command = [sys.executable, str(ROOT / "examples" / "lightning_cli.py"), "fit", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[-1] == "error: NormClip: max_norm must be a finite number > 0, got -1.0; 1.0 is usual"
    assert len(lines) <= 10
