"""The tab in a real TensorBoard: runs that GradHealth has logged, opened in Chromium, with both of its loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier
from lightning.pytorch.loggers import TensorBoardLogger
from tab import server as tensorboard
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import lightning_gradhealth as gh
from browser.chromium import (
    NAN,
    NEEDS_IT,
    READY,
    chain,
    pixel,
    place,
    residual,
    settled,
    shown,
    zoom_of,
)

pytestmark = NEEDS_IT
TAB = "plugin_entry.html?name=gradhealth"


class Poison(pl.Callback):
    """Weights that are NaN from a step on."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 40:
            next(pl_module.parameters()).data.fill_(torch.nan)


def train(folder: Path, name: str, net: nn.Module, *callbacks: pl.Callback) -> None:
    """A fit of 60 steps, logged as users log."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(960, 8), torch.randint(0, 3, (960,)))
    pl.Trainer(
        max_epochs=1,
        log_every_n_steps=2,
        logger=TensorBoardLogger(folder, name="", version=name),
        callbacks=[gh.GradHealth(), *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Classifier(net), DataLoader(data, batch_size=16))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    train(folder, "healthy", residual())
    train(folder, "nan", residual(), Poison())
    train(folder, "vanishing", chain())
    return folder


@pytest.fixture(scope="module")
def server(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tensorboard(logs, tmp_path_factory.mktemp("entry")) as address:
        yield address


def tab_of(page: Any, selector: str = READY) -> Any:
    """The tab's frame, once it shows something."""
    for _ in range(150):
        inside = next((frame for frame in page.frames if TAB in frame.url), None)
        if inside is not None:
            inside.wait_for_selector(selector, state="attached")
            return inside
        page.wait_for_timeout(100)
    raise AssertionError("there is no tab")


@pytest.fixture
def tab(server: str, new_page: Callable[..., Any]) -> Callable[..., Any]:
    def go(state: str = "", query: str = "", **options: Any) -> tuple[Any, Any]:
        page = new_page(**options)
        health = "&health=" + state.replace("=", "%3D").replace("&", "%26") if state else ""
        page.goto(f"{server}{query}#gradhealth{health}")
        return page, tab_of(page)

    return go


def test_the_tab_shows_the_runs_and_their_cells(tab: Callable[..., Any]) -> None:
    page, inside = tab()
    assert "Grad Health".upper() in page.inner_text("tbdev-upload-button, mat-toolbar, app-header").upper()
    assert inside.get_attribute("html", "data-run") == "nan"
    verdicts = {line.get_attribute("data-run"): line.inner_text() for line in inside.query_selector_all(".runs button")}
    assert sorted(verdicts) == ["healthy", "nan", "vanishing"]
    assert "vanishing gradients since step" in verdicts["vanishing"]
    inside.select_option("#metric", "grad_norm")
    shown(inside, metric="grad_norm")
    assert pixel(inside, 55, 3) == NAN
    assert pixel(inside, 20, 3) != NAN


def test_hover_tells_the_exact_value(tab: Callable[..., Any]) -> None:
    page, inside = tab("run=healthy&metric=weight_norm")
    x, y = place(inside, 21, 2)
    box = page.query_selector("iframe").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    page.wait_for_timeout(400)
    tip = inside.inner_text("#tip")
    assert "blocks.0.attn" in tip
    assert "≈" not in tip  # the server's own number has replaced that of the colour
    said = inside.evaluate("fetch('value?run=healthy&metric=weight_norm&layer=2&step=21').then(r => r.json())")
    assert float(tip.split()[-1]) == pytest.approx(said["value"], rel=5e-3)


def test_run_click_compare_and_zoom(tab: Callable[..., Any]) -> None:
    page, inside = tab("run=healthy&metric=grad_norm")
    inside.select_option("#versus", "nan")
    shown(inside, versus="nan")
    assert pixel(inside, 55, 3) == NAN
    assert min(pixel(inside, 20, 3)) > 240  # the same run until then
    inside.evaluate("document.body.gradhealth.x.set(30, 50)")
    settled(inside)
    assert pixel(inside, 45, 3) == NAN
    inside.select_option("#mode", "beside")
    settled(inside)
    assert len(inside.query_selector_all("figure.heat")) == 2
    assert zoom_of(inside) == pytest.approx([30, 50], abs=1)
    inside.click('.runs button[data-run="vanishing"]')
    shown(inside, run="vanishing")
    assert "vanishing gradients" in inside.inner_text("#findings")
    inside.focus("figure.heat")
    page.keyboard.press("ArrowDown")
    assert "step" in inside.inner_text("#heard")


def test_a_link_of_the_whole_page_opens_the_same_view(tab: Callable[..., Any], server: str) -> None:
    page, _ = tab("run=vanishing&metric=weight_norm&layer=net.4&step=21&x=10-40")
    link = page.url
    assert link.startswith(f"{server}#gradhealth&health=")
    again, inside = tab(link.split("health=", 1)[1].replace("%3D", "=").replace("%26", "&"))
    assert inside.get_attribute("html", "data-metric") == "weight_norm"
    assert zoom_of(inside) == pytest.approx([10, 40], abs=1)
    assert again.url == link


def test_tensorboards_dark_mode_is_followed(tab: Callable[..., Any]) -> None:
    page, inside = tab("run=healthy", query="?darkMode=true")
    inside.wait_for_selector("html.dark", state="attached")
    assert max(pixel(inside, 20, 3)) < 110
    page.evaluate("document.body.classList.remove('dark-mode')")
    inside.wait_for_selector("html:not(.dark)", state="attached")
    settled(inside)
    assert min(pixel(inside, 20, 3)) > 150


def test_the_python_loader_shows_the_same(logs: Path, tmp_path: Path, new_page: Callable[..., Any]) -> None:
    with tensorboard(logs, tmp_path, "--load_fast", "false") as address:
        page = new_page()
        for _ in range(20):  # it reads more slowly than a page opens
            page.goto(f"{address}#gradhealth&health=run%3Dnan%26metric%3Dgrad_norm")
            inside = tab_of(page)
            if inside.query_selector(".runs") and len(inside.query_selector_all(".runs button")) == 3:
                break
            page.wait_for_timeout(500)
        assert pixel(inside, 55, 3) == NAN
        assert "non finite" in inside.inner_text("#findings")


def test_an_empty_folder_says_how_to_get_data_and_a_growing_run_is_seen_with_the_zoom_kept(
    tmp_path: Path, new_page: Callable[..., Any]
) -> None:
    writer = SummaryWriter(tmp_path / "logs" / "live")
    net = residual(2)
    session = gh.HealthSession(net, probe_every_n_steps=1, loggers=writer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def go_on(steps: int) -> None:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(net(torch.randn(16, 8)), torch.randint(0, 3, (16,)))
            optimizer.zero_grad()
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
            session.flush()
        writer.flush()

    with tensorboard(tmp_path / "logs", tmp_path) as address:
        page = new_page()
        page.goto(f"{address}#gradhealth")
        inside = tab_of(page, ".empty")
        assert "gh.GradHealth()" in inside.inner_text(".empty")
        go_on(20)
        inside.wait_for_selector("html[data-run=live][data-ready]", state="attached")
        last = int(inside.get_attribute("body", "data-last"))
        inside.evaluate("document.body.gradhealth.x.set(5, 12)")
        settled(inside)
        go_on(20)
        inside.wait_for_selector("body[data-grown]", state="attached", timeout=8_000)  # a reload and a look, twice
        assert int(inside.get_attribute("body", "data-last")) > last
        assert zoom_of(inside) == pytest.approx([5, 12], abs=0.5)
        inside.click("#whole")
        settled(inside)
        assert zoom_of(inside)[1] > last + 1
        page.close()  # it looks for more, and would miss the server
    session.close()
    writer.close()
