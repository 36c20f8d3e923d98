"""What the tests of the Grad Health tab share: event files made by hand, and a TensorBoard over them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend import application
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client, TestResponse

from lightning_gradhealth.loggers.events import EventsWriter
from lightning_gradhealth.records import Finding, LayerStats, StepRecord, StepStats
from lightning_gradhealth.tensorboard.loader import SAMPLES
from lightning_gradhealth.tensorboard.plugin import GradHealthPlugin

BASE = "/data/plugin/gradhealth/"


def record(step: int, norms: Iterable[float | None], **fields: Any) -> StepRecord:
    """A logged step whose layers have these gradient norms."""
    layers = tuple(LayerStats(f"net.{i}", 8, grad_norm=norm, norm_ratio=norm) for i, norm in enumerate(norms))
    window = fields.pop("window", (StepStats(step, total_norm=1.0, loss=0.5),))
    return StepRecord(
        **{"total_norm": 1.0, "total_norm_max": 1.0, "layers": layers, **fields}, step=step, window=window
    )


def finding(condition: str = "exploding_gradients", severity: str = "critical", **fields: Any) -> Finding:
    """A finding of layer net.0, at step 3."""
    plain = {"layers": ("net.0",), "first_step": 3, "last_step": 3, "summary": "it grows", "remedy": "lower the rate"}
    return Finding(condition, severity, **{**plain, **fields})  # type: ignore[arg-type]


def write(folder: Path, records: Iterable[StepRecord], found: Iterable[Finding] = (), suffix: str = "") -> None:
    """A run of these records; the findings come with the last."""
    known = list(records)
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        events = EventsWriter()
        for number, one in enumerate(known):
            told = list(found) if number == len(known) - 1 else []
            events.write(writer, one, told, {str(f.condition) for f in told})


class Tab:
    """The tab over a folder, without a server."""

    def __init__(self, folder: Path, path_prefix: str = "", samples: int = SAMPLES) -> None:
        guidance = {"gradhealth": samples, "gradhealth_events": 0}
        self.multiplexer = EventMultiplexer(tensor_size_guidance=guidance)
        self.folder = folder
        data = MultiplexerDataProvider(self.multiplexer, str(folder))
        plugin = GradHealthPlugin(TBContext(data_provider=data))
        app = application.TensorBoardWSGI([plugin], data_provider=data, path_prefix=path_prefix)
        self.client, self.base = Client(app), path_prefix + BASE
        self.reload()

    def reload(self) -> None:
        """Read what was added."""
        self.multiplexer.AddRunsFromDirectory(str(self.folder))
        self.multiplexer.Reload()

    def ask(self, path: str, **query: Any) -> TestResponse:
        return self.client.get(self.base + path, query_string=query)

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of an answer that must be one."""
        answer = self.ask(path, **query)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text)

    def picture(self, **query: Any) -> tuple[dict[str, Any], list[list[int]]]:
        """Head and codes."""
        answer = self.ask("picture", **query)
        assert answer.status_code == 200, answer.text
        return unpacked(answer.data)


def unpacked(data: bytes) -> tuple[dict[str, Any], list[list[int]]]:
    """Head and codes of a picture."""
    length = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + length])
    rows, columns = head["shape"]
    codes = list(data[4 + length :])
    assert len(codes) == rows * columns
    return head, [codes[row * columns : (row + 1) * columns] for row in range(rows)]


def environment(folder: Path) -> dict[str, str]:
    """An environment in which TensorBoard finds the plugin, also where the package's metadata is older than it."""
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    names = [point.name for point in importlib.metadata.entry_points(group="tensorboard_plugins")]
    if "gradhealth" not in names:
        info = folder / "gradhealth_entry-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradhealth-entry\nVersion: 0\n")
        point = "gradhealth = lightning_gradhealth.tensorboard.loader:GradHealthLoader\n"
        (info / "entry_points.txt").write_text(f"[tensorboard_plugins]\n{point}")
        paths.append(str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def server(logdir: Path, scratch: Path, *flags: str) -> Iterator[str]:
    """A real TensorBoard; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--reload_interval", "1", *flags], stderr=subprocess.PIPE, text=True, env=environment(scratch)
    )
    found: list[str] = []
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as said:
            for line in said:
                lines.append(line)
                if match := re.search(r"http://127\.0\.0\.1:\d+\S*", line):
                    found.append(match[0])
                    ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(60), "TensorBoard did not start in 60 s"
        assert found, "".join(lines)
        yield found[0]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)


def fetch(address: str, path: str, **query: Any) -> tuple[int, bytes]:
    """Status and body of an answer of a real server."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.1)
