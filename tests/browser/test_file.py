"""The page as one file: from disk, in a sandboxed frame, as srcdoc; and all that can be done with it."""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from browser.chromium import (
    INF,
    NAN,
    NEEDS_IT,
    READY,
    chain,
    pixel,
    place,
    residual,
    settled,
    shown,
    watched,
    zoom_of,
)
from lightning_gradhealth.view.data import Matrix, RunView
from lightning_gradhealth.view.page import document, frame
from lightning_gradhealth.view.payload import payload
from lightning_gradhealth.view.quantities import QUANTITIES
from lightning_gradhealth.view.rows import Layer

pytestmark = NEEDS_IT
HOSTILE = ["</script><script>document.title='owned'</script>", '"><img src=x onerror="document.title=\'owned\'">',
           "a" * 10_000, "\u202egnp.exe", "line\nbreak", "__proto__", "constructor", "\x1b[31m", "名前.層"]  # fmt: skip


@functools.cache
def runs() -> list[RunView]:
    def poison(step: int, x: Tensor) -> Tensor:
        return x if step < 40 else x * torch.nan

    return [watched("healthy", residual), watched("nan", residual, poison=poison), watched("vanishing", chain)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(document(payload(runs()), "three runs"), encoding="utf-8")
    return path


@pytest.fixture
def opened(saved: Path, new_page: Callable[..., Any]) -> Callable[..., Any]:
    def go(hash_: str = "", **options: Any) -> Any:
        page = new_page(offline=True, **options)
        page.goto(f"file://{saved}#{hash_}")
        page.wait_for_selector(READY, state="attached")
        return page

    return go


def test_the_sickest_run_is_shown_first_and_every_run_has_a_line(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.get_attribute("html", "data-run") == "nan"
    lines = {line.get_attribute("data-run"): line.inner_text() for line in page.query_selector_all(".runs button")}
    assert "healthy" in lines["healthy"].split("\n")[-1]
    assert re.search(r"non finite since step 4[0-2]", lines["nan"])
    assert "vanishing gradients" in lines["vanishing"]


def test_cells_have_the_colours_of_what_they_hold(opened: Callable[..., Any]) -> None:
    page = opened("run=nan&metric=grad_norm")
    assert pixel(page, 55, 3) == NAN
    assert pixel(page, 20, 3) not in (NAN, INF)
    page = opened("run=vanishing&metric=norm_ratio")
    first, last = pixel(page, 30, 0), pixel(page, 30, 14)
    assert first[2] > first[0] + 30  # far below the others: blue
    assert last[0] > last[2] + 30  # far above: red


def test_run_and_metric_switch_by_click_and_select(opened: Callable[..., Any]) -> None:
    page = opened()
    page.click('.runs button[data-run="healthy"]')
    shown(page, run="healthy")
    assert page.inner_text("#findings").count("Nothing was found") == 1
    page.select_option("#metric", "weight_norm")
    shown(page, metric="weight_norm")
    assert page.inner_text("figure.heat figcaption b") == "Weight norm"


def test_hover_tells_layer_step_and_value(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy&metric=grad_norm")
    page.mouse.move(*place(page, 21, 2))
    tip = page.inner_text("#tip")
    view = runs()[0]
    matrix = view.load("grad_norm")
    assert view.layers[2].name in tip
    assert matrix is not None
    value = float(tip.split("≈")[1].split()[0])
    at = int(np.searchsorted(matrix.steps, 21, side="right")) - 1
    assert value == pytest.approx(float(QUANTITIES["grad_norm"].decode(matrix.values)[at, 2]), rel=0.02)
    page.mouse.move(*place(page, 21, 0.5, "found"))
    page.mouse.move(5, 5)
    assert page.is_hidden("#tip")


def test_a_click_shows_the_layer_and_the_depth_at_that_step(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy")
    page.mouse.click(*place(page, 31, 4))
    name = runs()[0].layers[4].name
    page.wait_for_selector(f'body[data-layer="{name}"]', state="attached")
    assert name in page.inner_text("section.layer h3")
    assert "step 31" in page.inner_text("section.depth h3")
    plots = page.query_selector_all("section.layer figure")
    assert len(plots) >= 6
    assert "fitted gain per layer" in page.inner_text("section.depth p")
    page = opened("run=vanishing")  # a file keeps the histograms of layers that are in findings
    bins = page.query_selector('section.layer figure[aria-label="Histogram"] canvas')
    assert bins is not None
    assert len(set(bins.screenshot())) > 50


def test_layers_are_folded_and_filtered(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy")
    rows = lambda: page.evaluate("document.body.gradhealth.rows.map(row => row.label)")  # noqa: E731
    page.select_option("#fold", "2")
    settled(page)
    assert rows() == ["embed", *(f"▸ blocks.{i} (3)" for i in range(4)), "head"]
    box = page.evaluate("document.body.gradhealth.columns[0].heat.over.getBoundingClientRect().left")
    page.mouse.click(box + 40, place(page, 20, 1)[1])  # the name unfolds it
    settled(page)
    assert rows()[1:5] == ["blocks.0.norm", "blocks.0.attn", "blocks.0.mlp", "▸ blocks.1 (3)"]
    page.select_option("#fold", "0")
    page.fill("#filter", r"attn$|head")
    settled(page)
    assert rows() == [*(f"blocks.{i}.attn" for i in range(4)), "head"]
    assert page.inner_text("#filter-note") == "5 of 14 layers"
    page.fill("#filter", "(")
    page.wait_for_selector('#filter[aria-invalid="true"]')
    assert rows()[-1] == "head"
    page.fill("#filter", "no such layer")
    settled(page)
    assert rows() == []


def test_zoom_by_drag_wheel_and_keys_and_back(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy")
    whole = zoom_of(page)
    page.mouse.move(*place(page, 10, 3))
    page.mouse.down()
    page.mouse.move(*place(page, 30, 3), steps=4)
    page.mouse.up()
    settled(page)
    assert zoom_of(page) == pytest.approx([10, 30], abs=1)
    x, y = place(page, 20, 3)
    page.keyboard.down("Shift")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 200, y, steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    settled(page)
    moved = zoom_of(page)
    assert moved[0] > 12
    assert moved[1] - moved[0] == pytest.approx(20, abs=1)
    page.mouse.dblclick(x, y)
    settled(page)
    assert zoom_of(page) == whole
    page.keyboard.down("Control")
    page.mouse.wheel(0, -240)
    page.keyboard.up("Control")
    settled(page)
    assert zoom_of(page)[1] - zoom_of(page)[0] < 0.7 * (whole[1] - whole[0])
    page.click("#whole")
    settled(page)
    assert zoom_of(page) == whole


def test_the_picture_is_walked_and_heard_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy&metric=grad_norm&layer=embed&step=31")
    page.focus("figure.heat")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    heard = page.inner_text("#heard")
    assert "blocks.0.norm" in heard
    assert "step 33" in heard
    page.keyboard.press("Enter")
    page.wait_for_selector('body[data-layer="blocks.0.norm"]', state="attached")
    before = zoom_of(page)
    page.keyboard.press("+")
    settled(page)
    assert zoom_of(page)[1] - zoom_of(page)[0] < before[1] - before[0]
    page.keyboard.press("Escape")
    settled(page)
    assert zoom_of(page) == before
    page.keyboard.press("f")
    settled(page)
    assert page.evaluate("document.body.gradhealth.rows.map(row => row.label)")[1] == "▸ blocks.0 (3)"


def test_touch_pans_and_pinches(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy&x=10-30", has_touch=True)
    x, y = place(page, 20, 3)
    client = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        where = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(points)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})

    touch("touchStart", (x, y), (x + 60, y))
    for apart in (100, 160, 240):
        touch("touchMove", (x, y), (x + apart, y))
    touch("touchEnd")
    settled(page)
    near = zoom_of(page)
    assert near[1] - near[0] < 12
    touch("touchStart", (x, y))
    for moved in (20, 60, 120):
        touch("touchMove", (x - moved, y))
    touch("touchEnd")
    settled(page)
    assert zoom_of(page)[0] > near[0]


@pytest.mark.parametrize("mode", ["ratio", "beside"])
def test_two_runs_are_compared(opened: Callable[..., Any], mode: str) -> None:
    page = opened("run=nan&metric=grad_norm")
    page.select_option("#versus", "healthy")
    shown(page, versus="healthy")
    page.select_option("#mode", mode)
    settled(page)
    assert len(page.query_selector_all("figure.heat")) == (2 if mode == "beside" else 1)
    assert pixel(page, 55, 3) == NAN
    if mode == "ratio":  # the same seed: equal until the poison
        assert min(pixel(page, 20, 3)) > 240
        assert "ratio" in page.inner_text("figure.heat figcaption b")
    page.select_option("#versus", "")
    shown(page, versus="")


def test_findings_show_evidence_and_remedy_and_zoom(opened: Callable[..., Any]) -> None:
    page = opened("run=vanishing")
    card = page.wait_for_selector('[data-finding="vanishing_gradients"]')
    text = card.inner_text()
    assert "Remedy" in text
    assert "fitted gain" in text
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { value: { writeText: async t => { window.copied = t; } } })"
    )
    card.query_selector(".copy").click()
    page.wait_for_selector('.copy:text("copied")')
    assert "init_weights" in page.evaluate("window.copied")
    opened_nan = opened("run=nan")
    opened_nan.click('[data-finding="non_finite"] button:text("show")')
    settled(opened_nan)
    assert zoom_of(opened_nan)[0] > 20


def test_dark_and_light(opened: Callable[..., Any]) -> None:
    page = opened("run=healthy&metric=norm_ratio")
    light = pixel(page, 20, 3)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html.dark", state="attached")
    settled(page)
    dark = pixel(page, 20, 3)
    assert min(light) > 150
    assert max(dark) < 110
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"


def test_a_link_opens_the_same_view(opened: Callable[..., Any]) -> None:
    page = opened("run=vanishing&metric=weight_norm&layer=4&step=21&x=10-40&filter=^[0-9]$")
    again = opened(page.evaluate("location.hash.slice(1)"))
    for one in (page, again):
        assert one.get_attribute("html", "data-metric") == "weight_norm"
        assert one.get_attribute("body", "data-layer") == "4"
        assert zoom_of(one) == pytest.approx([10, 40], abs=1)
        assert one.input_value("#filter") == "^[0-9]$"


def test_the_picture_is_saved_as_png(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened("run=healthy")
    with page.expect_download() as download:
        page.click("#png")
    saved_as = tmp_path / download.value.suggested_filename
    download.value.save_as(saved_as)
    assert saved_as.name == "gradhealth-healthy-norm_ratio.png"
    assert saved_as.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert saved_as.stat().st_size > 20_000


@pytest.mark.parametrize("width", [360, 700, 1800])
def test_narrow_and_wide_windows_show_all_without_sideways_scrolling(opened: Callable[..., Any], width: int) -> None:
    page = opened("run=vanishing", viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.gradhealth.columns[0].heat.innerWidth") > width * 0.4


def test_it_opens_in_a_sandboxed_frame_and_as_srcdoc(new_page: Callable[..., Any], tmp_path: Path, saved: Path) -> None:
    text = saved.read_text(encoding="utf-8")
    host = tmp_path / "host.html"
    host.write_text(
        f'<!doctype html><meta charset="utf-8">{frame(text)}'
        f'<iframe id="blob" sandbox="allow-scripts" style="width:100%;height:800px"></iframe>'
        f"<script>fetch; const text = {json.dumps(text).replace('<', chr(92) + 'u003c')};"
        "document.getElementById('blob').src = URL.createObjectURL(new Blob([text], { type: 'text/html' }));</script>",
        encoding="utf-8",
    )
    page = new_page(offline=True)
    page.goto(f"file://{host}")
    for place_in_page in ("iframe[srcdoc]", "#blob"):
        inside = page.wait_for_selector(place_in_page).content_frame()
        inside.wait_for_selector(READY, state="attached")
        assert pixel(inside, 55, 3) == NAN


def test_nothing_of_a_hostile_name_runs_or_breaks_the_page(new_page: Callable[..., Any], tmp_path: Path) -> None:
    steps = np.arange(20)
    values = np.zeros((20, len(HOSTILE)), dtype=np.float16)
    evil = {
        "id": HOSTILE[0], "condition": HOSTILE[1], "severity": "critical", "active": True,
        "first_step": 3, "last_step": 19,
        "layers": HOSTILE, "layers_total": len(HOSTILE), "where": HOSTILE[1], "summary": HOSTILE[0], "healed": [],
        "evidence": [{"name": HOSTILE[1], "value": HOSTILE[0]}], "remedy": HOSTILE[1], "code": HOSTILE[0],
        "spans": [[3, 19]],
    }  # fmt: skip
    views = [
        RunView(
            name=name,
            schema="x",
            layers=[Layer(layer, HOSTILE[1], 3) for layer in HOSTILE],
            quantities=[QUANTITIES["grad_norm"]],
            load=lambda metric: Matrix(QUANTITIES[metric], steps, values),
            findings=[evil],
            last_step=19,
        )
        for name in HOSTILE
    ]
    path = tmp_path / "hostile.html"
    path.write_text(document(payload(views), HOSTILE[0]), encoding="utf-8")
    page = new_page(offline=True)
    page.goto(f"file://{path}")
    page.wait_for_selector(READY, state="attached")
    for index in (2, 3, 5):
        page.query_selector_all(".runs button")[index].click()
        settled(page)
    assert "owned" not in page.evaluate("document.title").replace(HOSTILE[0], "")
    assert html.unescape(page.title()) == HOSTILE[0]
    assert page.query_selector("img") is None
    assert len(page.query_selector_all("script")) == 2
    assert "\\u202e" in page.inner_text(".runs")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1300


def test_a_file_without_runs_says_so(new_page: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(document(payload([]), "nothing"), encoding="utf-8")
    page = new_page(offline=True)
    page.goto(f"file://{path}")
    page.wait_for_selector(READY, state="attached")
    assert "This file holds no run" in page.inner_text("body")
    assert "gh.GradHealth()" in page.inner_text("body")


def test_a_file_of_a_thousand_layers_stays_below_two_megabytes() -> None:
    random = np.random.default_rng(0)
    steps = np.arange(256) * 40
    layers = [Layer(f"blocks.{i // 12}.part_{i % 12}.linear", "linear", 4096) for i in range(1_000)]
    matrices = {
        name: Matrix(QUANTITIES[name], steps, random.normal(0, 3, (256, 1_000)).astype(np.float16))
        for name in ("norm_ratio", "grad_norm", "update_to_weight", "forward_rms")
    }
    offered = [QUANTITIES[name] for name in matrices]
    view = RunView(name="large", layers=layers, quantities=offered, load=matrices.get, last_step=int(steps[-1]))
    assert len(document(payload([view]), "large")) < 2_000_000


def test_zeros_are_marked_at_the_foot_of_a_logarithmic_axis(new_page: Callable[..., Any], tmp_path: Path) -> None:
    steps = np.arange(0, 100, 10)
    values = np.full((10, 1), -np.inf, dtype=np.float16)  # log2 of 0
    view = RunView(
        name="run",
        schema="x",
        layers=[Layer("frozen", "linear", 3)],
        quantities=[QUANTITIES["grad_norm"]],
        load=lambda metric: Matrix(QUANTITIES[metric], steps, values),
        last_step=90,
    )
    path = tmp_path / "zeros.html"
    path.write_text(document(payload([view]), "zeros"), encoding="utf-8")
    page = new_page(offline=True)
    page.goto(f"file://{path}")
    page.wait_for_selector(READY, state="attached")
    page.evaluate("document.body.gradhealth.pick(0, 50)")
    page.wait_for_selector('section.layer figure[aria-label="gradient norm"]')
    settled(page)
    drawn = page.evaluate(
        """() => {
          const { panel } = document.body.gradhealth.layerView.plots.get("grad_norm");
          panel.draw();
          const s = panel.scale, g = panel.canvas.getContext("2d"), height = panel.top + panel.innerHeight;
          const column = g.getImageData(panel.px(30) * s, 0, 1, height * s).data;
          return [height - 4, panel.top + 2].map((y) => [...column.slice(4 * Math.round(y * s))].slice(0, 4).join());
        }"""
    )
    assert drawn == ["0,114,178,255", "0,0,0,0"]
