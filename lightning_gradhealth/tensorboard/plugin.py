"""The tab as TensorBoard loads it: little, so that it starts as fast; the rest comes with the first request."""

from __future__ import annotations

import functools
import importlib.resources
import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_gradhealth.messages import log

if TYPE_CHECKING:
    from lightning_gradhealth.tensorboard.routes import Routes

DATA_NAMES = ("gradhealth", "gradhealth_events")  # as in view/quantities.py, which is not loaded yet
ENTRY = "/index.js"
ROUTES = ("runs", "layout", "picture", "series", "layer", "profile", "value")
KINDS = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}

App = Callable[[Mapping[str, Any], Any], Any]


def _error(request: wrappers.Request, code: int, text: str) -> wrappers.Response:
    answer: wrappers.Response = http_util.Respond(request, json.dumps({"error": text}), "application/json", code)
    return answer


class GradHealthPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Grad Health in TensorBoard.

    Args:
        context: What TensorBoard gives its plugins.
    """

    plugin_name = DATA_NAMES[0]

    def __init__(self, context: Any) -> None:
        self._data = context.data_provider
        self._lock = threading.Lock()
        self._known: Routes | None = None
        self._files = {
            f"/{entry.name}": KINDS[suffix]
            for entry in importlib.resources.files("lightning_gradhealth.view").joinpath("web").iterdir()
            if (suffix := entry.name[entry.name.rfind(".") :]) in KINDS
        }

    def data_plugin_names(self) -> tuple[str, ...]:
        """Both names under which events are written."""
        return DATA_NAMES

    def is_active(self) -> bool:
        """Always: without data the page says how to get some."""
        return True

    def frontend_metadata(self) -> Any:
        """The page is a module."""
        return base_plugin.FrontendMetadata(es_module_path=ENTRY, tab_name="Grad Health")

    def get_plugin_apps(self) -> dict[str, App]:
        """The routes: the page's files, by a list that is made once, and its data."""
        files = {path: functools.partial(self._guarded, functools.partial(self._file, path)) for path in self._files}
        data = {f"/{name}": functools.partial(self._guarded, functools.partial(self._answer, name)) for name in ROUTES}
        return {**files, **data}

    def _guarded(
        self, handler: Callable[[wrappers.Request], wrappers.Response], environ: Mapping[str, Any], start_response: Any
    ) -> Any:
        """What is wrong with a request is a 400, what there is not a 404, and nothing is a 500."""
        request = wrappers.Request(environ)  # type: ignore[arg-type]
        try:
            answer = handler(request)
        except LookupError as error:
            answer = _error(request, 404, str(error.args[0]) if error.args else "not found")
        except ValueError as error:
            answer = _error(request, 400, str(error)[:200])
        except Exception as error:  # an event file that nobody thought of: TensorBoard and other runs go on
            log.warning("gradhealth: %s could not be answered", request.path, exc_info=error)
            answer = _error(request, 400, f"this cannot be shown ({type(error).__name__})")
        return answer(environ, start_response)  # type: ignore[arg-type]

    def _file(self, path: str, request: wrappers.Request) -> wrappers.Response:
        if path == ENTRY:  # with all modules: TensorBoard takes longer for twenty requests than for their content
            from lightning_gradhealth.view.page import bundle

            content = bundle(path[1:]).encode()
        else:
            content = importlib.resources.files("lightning_gradhealth.view").joinpath("web", path[1:]).read_bytes()
        answer: wrappers.Response = http_util.Respond(request, content, self._files[path])
        return answer

    def _answer(self, name: str, request: wrappers.Request) -> wrappers.Response:
        with self._lock:
            if self._known is None:
                from lightning_gradhealth.tensorboard.routes import Routes

                self._known = Routes(self._data)
            routes = self._known
        answer: wrappers.Response = getattr(routes, name)(request)
        return answer
