"""The answers of the tab's server: arguments that are looked at, and what they ask for."""

from __future__ import annotations

import gzip
import json
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from werkzeug import wrappers

from lightning_gradhealth.tensorboard.reading import Reader
from lightning_gradhealth.view import answers
from lightning_gradhealth.view.answers import MOST
from lightning_gradhealth.view.data import RunView

_FAR = 2**53  # whole numbers that JSON keeps


def _whole(request: wrappers.Request, name: str, default: int | None = None, least: int | None = None) -> int | None:
    """A whole number among the arguments.

    Raises:
        ValueError: It is none, or too small.
    """
    text = request.args.get(name)
    if text is None:
        return default
    try:
        if len(text) > 20:
            raise ValueError
        number = int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be >= {least}")
    return max(-_FAR, min(number, _FAR))


def _needed(request: wrappers.Request, name: str) -> int:
    number = _whole(request, name)
    if number is None:
        raise ValueError(f"{name} is missing")
    return number


def rows_of(text: str, count: int) -> list[tuple[int, int]]:
    """Ranges of layers as the page writes them.

    Args:
        text: As "0-3,4,7-9".
        count: Number of layers.

    Raises:
        ValueError: It is not that, or names layers that there are not.

    Example:
        >>> rows_of("0-3,4", 5)
        [(0, 3), (4, 4)]
    """
    parts = text.split(",")
    if len(parts) > MOST:
        raise ValueError(f"rows must be at most {MOST} ranges")
    rows = []
    for part in parts:
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and len(first) < 10 and len(last) < 10):
            raise ValueError("rows must be layers or ranges of them, as 0-3,4")
        if last and not (last.isascii() and last.isdigit()):
            raise ValueError("rows must be layers or ranges of them, as 0-3,4")
        row = (int(first), int(last or first))
        if not row[0] <= row[1] < count:
            raise ValueError("rows must be within the layers of the run")
        rows.append(row)
    if sum(last - first + 1 for first, last in rows) > 4 * max(count, MOST):
        raise ValueError("rows must not name layers over and over")
    return rows


class Routes:
    """What is answered under each path; a `LookupError` is a 404, a `ValueError` a 400.

    Args:
        data: TensorBoard's data provider.
    """

    def __init__(self, data: Any) -> None:
        self._reader = Reader(data)

    def runs(self, request: wrappers.Request) -> wrappers.Response:
        """The list of runs."""
        environ = request.environ
        views = self._reader.runs(plugin_util.context(environ), plugin_util.experiment_id(environ))
        return _json(request, answers.runs(views))

    def layout(self, request: wrappers.Request) -> wrappers.Response:
        """What a run consists of."""
        return _json(request, answers.layout(self._run(request)))

    def picture(self, request: wrappers.Request) -> wrappers.Response:
        """A heat map, as bytes."""
        view = self._run(request)
        versus, rows = request.args.get("versus"), request.args.get("rows")
        head, body = answers.picture(
            view,
            request.args.get("metric", ""),
            x0=_whole(request, "x0"),
            x1=_whole(request, "x1"),
            w=_whole(request, "w", 800, 1) or 1,
            h=_whole(request, "h", 1_000, 1) or 1,
            rows=None if rows is None else rows_of(rows, len(view.layers)),
            versus=None if versus is None else self._named(request, versus, None),
        )
        packed = gzip.compress(answers.packed(head, body), 1, mtime=0)
        answer: wrappers.Response = http_util.Respond(
            request, packed, "application/octet-stream", content_encoding="gzip"
        )
        return answer

    def series(self, request: wrappers.Request) -> wrappers.Response:
        """Columns, spans and findings of a run."""
        width = _whole(request, "w", MOST, 1) or 1
        view = self._run(request)
        return _json(request, answers.series(view, x0=_whole(request, "x0"), x1=_whole(request, "x1"), w=width))

    def layer(self, request: wrappers.Request) -> wrappers.Response:
        """The lines of one layer."""
        layer, width = _needed(request, "layer"), _whole(request, "w", 1_000, 1) or 1
        view, x0, x1 = self._run(request), _whole(request, "x0"), _whole(request, "x1")
        return _json(request, answers.layer(view, layer, x0=x0, x1=x1, w=width))

    def profile(self, request: wrappers.Request) -> wrappers.Response:
        """A quantity over depth."""
        step = _needed(request, "step")
        return _json(request, answers.profile(self._run(request), request.args.get("metric", ""), step))

    def value(self, request: wrappers.Request) -> wrappers.Response:
        """One exact value."""
        layer, step = _needed(request, "layer"), _needed(request, "step")
        return _json(request, answers.value(self._run(request), request.args.get("metric", ""), layer, step))

    def _run(self, request: wrappers.Request) -> RunView:
        if "run" not in request.args:
            raise ValueError("run is missing")
        return self._named(request, request.args["run"], request.args.get("schema"))

    def _named(self, request: wrappers.Request, name: str, schema: str | None) -> RunView:
        environ = request.environ
        return self._reader.run(plugin_util.context(environ), plugin_util.experiment_id(environ), name, schema)


def _json(request: wrappers.Request, data: Any) -> wrappers.Response:
    answer: wrappers.Response = http_util.Respond(request, json.dumps(data, allow_nan=False), "application/json")
    return answer
