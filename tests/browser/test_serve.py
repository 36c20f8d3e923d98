"""`gradhealth serve` in Chromium: the page of the tab, by itself, and live."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tab import finding, record, wait_for, write

from browser.chromium import NEEDS_IT, shown

pytestmark = NEEDS_IT


def test_the_page_is_shown_and_grows_without_tensorboard(new_page: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a", [record(step, [1.0, 1e-3, 10.0]) for step in range(20)], [finding()])
    command = [sys.executable, "-m", "lightning_gradhealth.cli", "serve", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+/", process.stdout.readline())
            assert found is not None
            page = new_page()
            page.goto(found[0])
            shown(page, run="a", metric="norm_ratio")
            assert page.title() == "Grad Health"
            assert "exploding gradients" in page.inner_text("body")
            assert page.evaluate("document.querySelector('canvas').width") > 100
            write(tmp_path / "<b>later</b>", [record(step, [1.0]) for step in range(3)])
            wait_for(lambda: page.evaluate("document.body.gradhealth.runs.length") == 2)  # its policy allows no eval
            page.goto(f"{found[0]}#run=a&metric=grad_norm")
            page.reload()
            shown(page, run="a", metric="grad_norm")
        finally:
            process.terminate()
