"""All that a page needs of some runs, in one piece: what the file carries in place of a server."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from typing import Any

from lightning_gradhealth.view import answers
from lightning_gradhealth.view.data import RunView

SHOWN = 12  # layers whose histograms go along
LIMIT = 1_400_000  # bytes: as base64 within a page below 2 MB


def payload(runs: Sequence[RunView], width: int = 400, height: int = 1_000, limit: int = LIMIT) -> bytes:
    """Runs with their pictures, compressed; with less detail where that would be too large.

    Args:
        runs: The runs.
        width: Greatest number of columns of a picture.
        height: Greatest number of rows of a picture.
        limit: Greatest size in bytes.

    Example:
        >>> len(payload([])) < 200
        True
    """
    while True:
        data = gzip.compress(_raw(runs, width, height), 9, mtime=0)
        if len(data) <= limit or (width <= 16 and height <= 16):
            return data
        shrink = (limit / len(data)) ** 0.5 * 0.95
        width, height = max(16, int(width * shrink)), max(16, int(height * shrink))


def _histograms(view: RunView) -> list[dict[str, Any]]:
    """The histograms of a few layers: those of findings first, then evenly over depth."""
    if view.histograms() is None:
        return []
    place = {layer.name: index for index, layer in enumerate(view.layers)}
    named = [place[name] for finding in view.findings for name in finding["layers"] if name in place]
    spread = [index * len(place) // SHOWN for index in range(SHOWN)] if place else []
    chosen = list(dict.fromkeys([*named[: SHOWN // 2], *spread, *named]))[:SHOWN]
    entries = [{"run": view.name, "layer": at, "histogram": answers.histogram(view, at)} for at in sorted(chosen)]
    return [entry for entry in entries if entry["histogram"] is not None]


def _raw(runs: Sequence[RunView], width: int, height: int) -> bytes:
    pictures: list[dict[str, Any]] = []
    body = bytearray()
    for view in runs:
        for quantity in view.quantities:
            if view.load(quantity.name) is None:
                continue
            head, cells = answers.picture(view, quantity.name, w=width, h=height)
            pictures.append({**head, "run": view.name, "offset": len(body), "size": len(cells)})
            body += cells
    head = {
        **answers.runs(runs),
        "layouts": [answers.layout(view) for view in runs],
        "series": [answers.series(view, w=width) for view in runs],
        "pictures": pictures,
        "layers": [entry for view in runs for entry in _histograms(view)],
        "profiles": [],
    }
    return answers.packed(head, bytes(body))
