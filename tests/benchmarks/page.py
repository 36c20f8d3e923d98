"""How fast the Grad Health tab is: a real TensorBoard and a real browser, beside a bare canvas in the same browser.

For 100 layers x 1,000 steps and 1,000 layers x 10,000 steps: the time from opening the tab, on a server that has loaded
the run, until heat map and curves are drawn, and until all is; a redraw; what travels; the report in one file. The
tab is built for .5 s and 1 s until it is drawn, 100 ms, 1 MB and 2 MB. Machines differ, so that each time stands beside
that of a page which does nothing but fill a canvas of the same size. By hand: `cd tests && python -m benchmarks.page`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from browser.chromium import CHROMIUM, FLAGS, READY, sync_api
from rich.console import Console
from rich.table import Table
from tab import fetch, server, wait_for
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhealth.loggers.events import EventsWriter
from lightning_gradhealth.records import LayerStats, StepRecord, StepStats
from lightning_gradhealth.view.data import Matrix, RunView
from lightning_gradhealth.view.page import document
from lightning_gradhealth.view.payload import payload
from lightning_gradhealth.view.quantities import QUANTITIES
from lightning_gradhealth.view.rows import Layer

SIZE = {"width": 1400, "height": 1000}
ENTRY = "data/plugin_entry.html?name=gradhealth"
BARE = """<!doctype html><html><body><canvas width=1400 height=1000></canvas><script>
const canvas = document.querySelector("canvas"), g = canvas.getContext("2d"), image = g.createImageData(1400, 1000);
const pixels = new Uint32Array(image.data.buffer);
for (let i = 0; i < pixels.length; i += 1) pixels[i] = 0xff000000 | i;
g.putImageData(image, 0, 0);
performance.mark("gradhealth-painted");
document.documentElement.dataset.ready = "yes";
</script></body></html>"""
# notes when the page is ready, in milliseconds since it was opened
WATCH = """new MutationObserver(() => {
  if (document.documentElement?.dataset.ready) window.readyAt ??= performance.now();
}).observe(document, { attributes: true, subtree: true, childList: true });"""


@dataclass(frozen=True)
class Speed:
    """Of one size of run; milliseconds, and bytes that travel."""

    layers: int
    steps: int
    painted: float
    complete: float
    bare: float
    redraw: float
    bare_redraw: float
    travels: int
    report: int


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


def write_run(folder: Path, layers: int, steps: int) -> None:
    """Event files of a noisy run: noise compresses worst."""
    random = np.random.default_rng(0)
    names = [f"blocks.{i // 12}.part_{i % 12}" for i in range(layers)]
    with SummaryWriter(str(folder)) as writer:
        events = EventsWriter()
        for step in range(steps):
            norms = np.exp(2.0 * random.standard_normal(layers)).tolist()
            stats = tuple(LayerStats(n, 1, grad_norm=v, norm_ratio=v) for n, v in zip(names, norms, strict=True))
            window = (StepStats(step, total_norm=1.0, loss=0.5),)
            events.write(writer, StepRecord(step, 1.0, 1.0, layers=stats, window=window), [], ())


def opening(browser: Any, address: str, times: int = 7) -> tuple[float, float, Any, int]:
    """Median times until the page is drawn and until it is complete, the last page, and the bytes it was sent."""
    painted, complete, sent, page = [], [], [], None
    for _ in range(times):
        if page is not None:
            page.close()
        page, sizes = browser.new_page(viewport=SIZE), []
        page.on("requestfinished", lambda request, sizes=sizes: sizes.append(request.sizes()["responseBodySize"]))
        page.add_init_script(WATCH)
        page.goto(address)
        page.wait_for_selector(READY, state="attached", timeout=60_000)
        painted.append(page.evaluate("performance.getEntriesByName('gradhealth-painted')[0].startTime"))
        complete.append(page.evaluate("window.readyAt"))
        sent.append(sum(sizes))
    return statistics.median(painted), statistics.median(complete), page, max(sent)


def redraws(page: Any) -> tuple[float, float]:
    """Median time of a redraw, and of filling a canvas of that size."""
    return tuple(  # type: ignore[return-value]
        page.evaluate(
            """() => {
              const panel = document.body.gradhealth.columns[0].heat, w = panel.canvas.width, h = panel.canvas.height;
              const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
              const g = canvas.getContext("2d"), image = new ImageData(w, h);
              const pixels = new Uint32Array(image.data.buffer);
              const plain = () => {
                for (let i = 0; i < pixels.length; i += 1) pixels[i] = 0xff000000 | i;
                g.putImageData(image, 0, 0);
              };
              const timed = (draw) => { const t = performance.now(); draw(); return performance.now() - t; };
              const median = (draw) => Array.from({ length: 15 }, () => timed(draw)).sort((a, b) => a - b)[7];
              return [median(() => panel.draw()), median(plain)];
            }"""
        )
    )


def loaded(address: str, last: int) -> bool:
    """Whether the server has read the run to its end."""
    status, answer = fetch(address, "data/plugin/gradhealth/layout", run="run")
    return status == 200 and json.loads(answer)["x1"] == last


def measure(layers: int, steps: int) -> Speed:
    """Write a run, serve it, open it."""
    with tempfile.TemporaryDirectory() as scratch:
        logs, bare = Path(scratch, "logs"), Path(scratch, "bare.html")
        write_run(logs / "run", layers, steps)
        bare.write_text(BARE)
        with server(logs, Path(scratch, "info")) as address, sync_api.sync_playwright() as playwright:
            wait_for(lambda: loaded(address, steps - 1), 180)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            bare_painted, _, page, _ = opening(browser, f"file://{bare}")
            painted, complete, page, sent = opening(browser, address + ENTRY)
            ours, theirs = redraws(page)
            browser.close()
    report = document(payload([run_of(layers, min(steps, 4_000))], width=800), "speed")
    return Speed(layers, steps, painted, complete, bare_painted, ours, theirs, sent, len(report.encode()))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only 100 layers x 1,000 steps")
    options = parser.parse_args(arguments)
    table = Table(title="The Grad Health tab, beside a bare canvas in the same browser")
    for title in ("layers x steps", "drawn", "complete", "canvas", "redraw", "canvas", "travels", "report"):
        table.add_column(title, justify="right")
    for layers, steps in ((100, 1_000), (1_000, 10_000))[: 1 if options.small else 2]:
        speed = measure(layers, steps)
        times = (speed.painted, speed.complete, speed.bare, speed.redraw, speed.bare_redraw)
        sizes = (speed.travels, speed.report)
        table.add_row(
            f"{layers:,} x {steps:,}", *(f"{t:.0f} ms" for t in times), *(f"{s / 1e3:,.0f} kB" for s in sizes)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
