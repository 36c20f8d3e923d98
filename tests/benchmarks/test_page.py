"""What of the tab's speed is exact: how much travels, and how often it is asked for."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from benchmarks.page import ENTRY, loaded, opening, run_of, write_run
from browser.chromium import CHROMIUM, FLAGS, sync_api
from tab import server, wait_for

from lightning_gradhealth.view.answers import packed, picture
from lightning_gradhealth.view.page import document
from lightning_gradhealth.view.payload import payload


def test_a_picture_of_ten_million_cells_travels_in_less_than_a_megabyte() -> None:
    head, cells = picture(run_of(1_000, 10_000), "norm_ratio", w=1_000, h=1_000)
    assert len(gzip.compress(packed(head, cells), 1)) < 1_000_000


@pytest.mark.parametrize("steps", [2_000, 10_000])
def test_the_report_stays_below_two_megabytes_however_long_the_run(steps: int) -> None:
    assert len(document(payload([run_of(1_000, steps)], width=800), "speed").encode()) < 2_000_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_tab_opens_with_few_requests(tmp_path: Path) -> None:
    write_run(tmp_path / "logs" / "run", 100, 200)
    with server(tmp_path / "logs", tmp_path / "info") as address, sync_api.sync_playwright() as playwright:
        wait_for(lambda: loaded(address, 199), 60)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        _, _, page, sent = opening(browser, address + ENTRY, times=1)
        names = page.evaluate("performance.getEntriesByType('resource').map((each) => each.name.split('/').pop())")
        browser.close()
    requests = [name for name in names if name != "favicon.ico"]  # the browser's own
    assert len(requests) <= 8, requests  # code, style, runs, layout, series, picture, one layer, one profile
    assert sent < 1_000_000
