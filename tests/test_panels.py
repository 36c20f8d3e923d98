"""The panels in a real TensorBoard server: over HTTP, and as a browser draws them."""

from __future__ import annotations

import importlib.util
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_gradhealth as gh
from lightning_gradhealth.loggers.panels import layout

pytestmark = pytest.mark.slow

RUNS = {"calm": 0.05, "wild": 1e3}
TITLES = [title for charts in layout().values() for title in charts]


@pytest.fixture(scope="module")
def panels() -> ModuleType:
    """The example that draws the panels."""
    path = Path(__file__).parents[1] / "examples" / "render_panels.py"
    spec = importlib.util.spec_from_file_location("render_panels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """The logs of two real fits."""
    for name, rate in RUNS.items():
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        health = gh.GradHealth(clip="adaptive", log_layers=True)
        trainer(health, logger=logger, log_every_n_steps=4, max_steps=12).fit(
            Classifier(mlp(depth=6), lr=rate), batches()
        )
        assert health.report().healthy == (name == "calm")
    return tmp_path


@pytest.fixture
def address(panels: ModuleType, logdir: Path) -> Iterator[str]:
    with panels.tensorboard(logdir) as url:
        yield url


def get(address: str, path: str, **query: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address}data/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.loads(answer.read())


def check_http(address: str) -> None:
    shown = get(address, "plugin/custom_scalars/layout")["category"]
    assert {c["title"]: [chart["title"] for chart in c["chart"]] for c in shown} == {
        title: list(charts) for title, charts in layout().items()
    }
    for category in shown:
        for chart in category["chart"]:
            for tag in chart["multiline"]["tag"]:
                found = get(address, "plugin/custom_scalars/scalars", run="calm", tag=tag)
                assert found["regex_valid"]
                assert found["tag_to_events"], chart["title"]
                for events in found["tag_to_events"].values():
                    assert [step for _, step, _ in events] == [3, 7, 11]
    texts = get(address, "plugin/text/text", run="wild", tag="gradhealth/findings/text_summary")
    assert "<strong>oversized_updates</strong> (critical)" in texts[0]["text"]
    assert re.search(r"<p>Remedy: \w", texts[0]["text"])
    assert list(get(address, "plugin/text/tags")) == ["wild"]


def test_the_server_returns_layout_scalars_and_text(address: str) -> None:
    check_http(address)


def test_so_does_the_server_with_the_default_fast_loader(panels: ModuleType, logdir: Path) -> None:
    with panels.tensorboard(logdir, loading="--reload_interval 1") as address:
        deadline = time.monotonic() + 30
        while set(get(address, "plugin/text/tags")) != {"wild"} or set(get(address, "runs")) != set(RUNS):
            assert time.monotonic() < deadline, "the runs were not loaded in 30 s"
            time.sleep(0.2)
        check_http(address)


def test_a_browser_draws_every_chart(panels: ModuleType, address: str, tmp_path: Path) -> None:
    if panels.CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    pytest.importorskip("playwright")
    with panels.custom_scalars(address) as page:
        cards = page.locator(panels.CARD)
        assert cards.count() == len(TITLES)
        for title in TITLES:
            card = cards.filter(has=page.get_by_text(title, exact=True))
            card.wait_for()
            card.locator("path.line").first.wait_for(state="attached")
        findings = cards.filter(has_text="Active findings")
        colours = {line.get_attribute("stroke") for line in findings.locator("path.line").all()}
        assert len(colours) == len(RUNS)
        page.screenshot(path=tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 20_000
