"""The tab's server side: routes, arguments that are looked at, and answers that are never a 500."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
from collections.abc import Callable, Mapping
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_gradhealth.messages import log
from lightning_gradhealth.tensorboard.reading import Reader
from lightning_gradhealth.view import answers
from lightning_gradhealth.view.answers import MOST
from lightning_gradhealth.view.data import RunView
from lightning_gradhealth.view.quantities import EVENTS_PLUGIN, PLUGIN

KINDS = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_FAR = 2**53  # whole numbers that JSON keeps

App = Callable[[Mapping[str, Any], Any], Any]
Handler = Callable[["GradHealthPlugin", wrappers.Request], wrappers.Response]


def _error(request: wrappers.Request, code: int, text: str) -> wrappers.Response:
    answer: wrappers.Response = http_util.Respond(request, json.dumps({"error": text}), "application/json", code)
    return answer


def guarded(handler: Handler) -> Callable[[GradHealthPlugin, Mapping[str, Any], Any], Any]:
    """A route: what is wrong with a request is a 400, what there is not a 404, and nothing is a 500."""

    @functools.wraps(handler)
    def app(self: GradHealthPlugin, environ: Mapping[str, Any], start_response: Any) -> Any:
        request = wrappers.Request(environ)  # type: ignore[arg-type]
        try:
            answer = handler(self, request)
        except LookupError as error:
            answer = _error(request, 404, str(error.args[0]) if error.args else "not found")
        except ValueError as error:
            answer = _error(request, 400, str(error)[:200])
        except Exception as error:  # an event file that nobody thought of: TensorBoard and other runs go on
            log.warning("gradhealth: %s could not be answered", request.path, exc_info=error)
            answer = _error(request, 400, f"this cannot be shown ({type(error).__name__})")
        return answer(environ, start_response)  # type: ignore[arg-type]

    return app


def _whole(request: wrappers.Request, name: str, default: int | None = None, least: int = -_FAR) -> int | None:
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
    if number < least:
        raise ValueError(f"{name} must be >= {least}")
    return min(number, _FAR)


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


class GradHealthPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Grad Health in TensorBoard.

    Args:
        context: What TensorBoard gives its plugins.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._reader = Reader(context.data_provider)
        self._files = {
            f"/{entry.name}": KINDS[suffix]
            for entry in importlib.resources.files("lightning_gradhealth.view").joinpath("web").iterdir()
            if (suffix := entry.name[entry.name.rfind(".") :]) in KINDS
        }

    def data_plugin_names(self) -> tuple[str, ...]:
        """Both names under which events are written."""
        return PLUGIN, EVENTS_PLUGIN

    def is_active(self) -> bool:
        """Always: without data the page says how to get some."""
        return True

    def frontend_metadata(self) -> Any:
        """The page is a module."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Grad Health")

    def get_plugin_apps(self) -> dict[str, App]:
        """The routes."""
        routes = {
            "/runs": self._runs,
            "/layout": self._layout,
            "/picture": self._picture,
            "/series": self._series,
            "/layer": self._layer,
            "/profile": self._profile,
            "/value": self._value,
        }
        return {**dict.fromkeys(self._files, self._static), **routes}

    # --- routes

    @guarded
    def _static(self, request: wrappers.Request) -> wrappers.Response:
        name = request.path[request.path.rfind("/") :]
        if name not in self._files:
            raise LookupError("no such file")
        content = importlib.resources.files("lightning_gradhealth.view").joinpath("web", name[1:]).read_bytes()
        answer: wrappers.Response = http_util.Respond(request, content, self._files[name])
        return answer

    @guarded
    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        environ = request.environ
        views = self._reader.runs(plugin_util.context(environ), plugin_util.experiment_id(environ))
        return _json(request, answers.runs(views))

    @guarded
    def _layout(self, request: wrappers.Request) -> wrappers.Response:
        return _json(request, answers.layout(self._run(request)))

    @guarded
    def _picture(self, request: wrappers.Request) -> wrappers.Response:
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

    @guarded
    def _series(self, request: wrappers.Request) -> wrappers.Response:
        width = _whole(request, "w", MOST, 1) or 1
        view = self._run(request)
        return _json(request, answers.series(view, x0=_whole(request, "x0"), x1=_whole(request, "x1"), w=width))

    @guarded
    def _layer(self, request: wrappers.Request) -> wrappers.Response:
        layer, width = _needed(request, "layer"), _whole(request, "w", 1_000, 1) or 1
        view, x0, x1 = self._run(request), _whole(request, "x0"), _whole(request, "x1")
        return _json(request, answers.layer(view, layer, x0=x0, x1=x1, w=width))

    @guarded
    def _profile(self, request: wrappers.Request) -> wrappers.Response:
        step = _needed(request, "step")
        return _json(request, answers.profile(self._run(request), request.args.get("metric", ""), step))

    @guarded
    def _value(self, request: wrappers.Request) -> wrappers.Response:
        layer, step = _needed(request, "layer"), _needed(request, "step")
        return _json(request, answers.value(self._run(request), request.args.get("metric", ""), layer, step))

    # --- arguments

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
