"""Save TensorBoard's Custom Scalars tab as a picture: `python examples/render_panels.py --logdir runs`.

It needs Playwright for Python (`pip install playwright`) and a Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
ALL_AT_ONCE = "--load_fast false --reload_interval 0 --reload_task blocking"  # serves when all runs are read
CARD = "tf-custom-scalar-multi-line-chart-card"


@contextlib.contextmanager
def tensorboard(logdir: Path, loading: str = ALL_AT_ONCE, timeout: float = 60.0) -> Iterator[str]:
    """A TensorBoard server over `logdir`, on a free port of this machine only; yields its address."""
    options = f"--host 127.0.0.1 --port 0 {loading}".split()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    addresses: queue.Queue[str] = queue.Queue()

    def read() -> None:  # to the end, or else the server would stop at a full pipe
        with server.stderr as lines:
            for line in lines:
                if found := re.search(r"http://\S+", line):
                    addresses.put(found[0])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield addresses.get(timeout=timeout)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        reader.join(10)


@contextlib.contextmanager
def custom_scalars(address: str, width: int = 1480, height: int = 1130) -> Iterator[Page]:
    """The Custom Scalars tab in a headless browser, its charts drawn, nothing smoothed and no outlier hidden."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"{address}#custom_scalars&_smoothingWeight=0")
            page.locator(CARD).locator("path.line").first.wait_for(state="attached")
            page.get_by_text("Ignore outliers in chart scaling").click()
            page.wait_for_load_state("networkidle")
            yield page
        finally:
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("panels.png"))
    options = parser.parse_args()
    with tensorboard(options.logdir) as address, custom_scalars(address) as page:
        page.locator(CARD).first.scroll_into_view_if_needed()
        page.screenshot(path=options.out)
    print(options.out)


if __name__ == "__main__":
    main()
