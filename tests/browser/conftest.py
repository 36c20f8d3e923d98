"""One Chromium for the tests of a module, and pages whose errors are failures.

Not one for all: while Playwright's loop is running, tests elsewhere can start none of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser.chromium import CHROMIUM, FLAGS, sync_api


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; whatever one of them says on its console is a failure."""
    said: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1300, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda line: said.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in said if not _of_tensorboard(line)] == []


def _of_tensorboard(line: str) -> bool:
    """What TensorBoard's own front end says in every tab."""
    return any(
        known in line for known in ("Three.js", "Polymer", "favicon", "fonts.g", "experimentalPlugin", "passive event")
    )
