"""How fast the page is, in ratios to a bare canvas of the same size and the same browser: machines differ."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser.chromium import NEEDS_IT, READY
from lightning_gradhealth.view.answers import packed, picture
from lightning_gradhealth.view.data import Matrix, RunView
from lightning_gradhealth.view.page import document
from lightning_gradhealth.view.payload import payload
from lightning_gradhealth.view.quantities import QUANTITIES
from lightning_gradhealth.view.rows import Layer

pytestmark = NEEDS_IT


def run_of(layers: int, steps: int) -> RunView:
    """A noisy run: noise is what compresses worst."""
    random = np.random.default_rng(0)
    matrices = {
        name: Matrix(QUANTITIES[name], np.arange(steps), random.normal(0, 2, (steps, layers)).astype(np.float16))
        for name in ("norm_ratio", "grad_norm")
    }
    return RunView(
        name=f"{layers} layers",
        layers=[Layer(f"blocks.{i // 12}.part_{i % 12}", "linear", 4_096) for i in range(layers)],
        quantities=[QUANTITIES[name] for name in matrices],
        load=matrices.get,
        last_step=steps - 1,
    )


def test_a_picture_of_ten_million_cells_travels_in_less_than_a_megabyte() -> None:
    head, cells = picture(run_of(1_000, 10_000), "norm_ratio", w=1_000, h=1_000)
    assert len(gzip.compress(packed(head, cells), 1)) < 1_000_000


@pytest.mark.parametrize("layers", [100, 1_000])
def test_a_redraw_costs_little_more_than_the_pixels_themselves(
    layers: int, new_page: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(document(payload([run_of(layers, 4_000)], width=800), "speed"), encoding="utf-8")
    page = new_page(offline=True, viewport={"width": 1400, "height": 1000})
    page.goto(f"file://{path}")
    page.wait_for_selector(READY, state="attached")
    ours, bare = page.evaluate(
        """() => {
          const panel = document.body.gradhealth.columns[0].heat, w = panel.canvas.width, h = panel.canvas.height;
          const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
          const g = canvas.getContext("2d"), image = new ImageData(w, h), pixels = new Uint32Array(image.data.buffer);
          const plain = () => {
            for (let i = 0; i < pixels.length; i += 1) pixels[i] = 0xff000000 | i;
            g.putImageData(image, 0, 0);
          };
          const median = (draw) => {
            const timed = () => { const t = performance.now(); draw(); return performance.now() - t; };
            const times = Array.from({ length: 15 }, timed);
            return times.sort((a, b) => a - b)[7];
          };
          return [median(() => panel.draw()), median(plain)];
        }"""
    )
    print(f"{layers} layers: a redraw {ours:.1f} ms, a bare canvas {bare:.1f} ms")
    assert ours < 15 * bare + 10
    assert ours < 100
