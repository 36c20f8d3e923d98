"""Draws README's pictures of the tab anew: `cd tests && python -m browser.pictures`, with the package installed.

Trains what the quickstart trains, opens TensorBoard on its logs and saves the tab, light and dark, and the figure of
the first run's report, as palette PNGs.
"""

from __future__ import annotations

import argparse
import io
import runpy
import tempfile
from pathlib import Path

from PIL import Image
from tab import server

from browser.chromium import CHROMIUM, FLAGS, sync_api
from browser.test_tab import tab_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VIEW = "run%3Dtorch-default%26metric%3Dbackward_rms"
SIZE = {"width": 1280, "height": 1000}


def save(picture: Image.Image, path: Path) -> None:
    """Save it with a palette that keeps rare colours."""
    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Train, look and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXAMPLES)
    parser.add_argument("--logdir", type=Path, help="logs of the quickstart; none: train now")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logdir or Path(folder)
        if options.logdir is None:
            quickstart = runpy.run_path(str(EXAMPLES / "quickstart.py"))
            results = quickstart["main"](["--no-progress", "--logdir", str(logs)])
            figure, _ = results["torch-default"][1].plot()
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=100)
            save(Image.open(drawn), options.out / "report_plot.png")
        with server(logs, Path(folder)) as address, sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=SIZE, color_scheme=scheme)
                dark = "?darkMode=true" if scheme == "dark" else ""
                page.goto(f"{address}{dark}#gradhealth&health={VIEW}")
                tab_of(page)
                save(Image.open(io.BytesIO(page.screenshot())), options.out / f"tab_{scheme}.png")
                page.close()
            browser.close()


if __name__ == "__main__":
    main()
