"""The page of the tab on a server of its own: the plugin's files and routes, and nothing of TensorBoard's front end."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from tensorboard.plugins.base_plugin import TBContext
from werkzeug import wrappers
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from lightning_gradhealth.tensorboard.plugin import GradHealthPlugin
from lightning_gradhealth.view.page import shell


class Site:
    """A WSGI application: the page, its files and its data; every other path is a 404.

    Only requests to this machine by its own name are answered, so that no page of elsewhere, whose name is made to
    point here, can read runs.

    Args:
        data: TensorBoard's data provider.

    Example:
        >>> from werkzeug.test import Client
        >>> client = Client(Site(None))
        >>> [client.get(path).status_code for path in ("/", "/index.js", "/../plugin.py", "/nothing")]
        [200, 200, 404, 404]
    """

    def __init__(self, data: Any) -> None:
        self._apps = GradHealthPlugin(TBContext(data_provider=data)).get_plugin_apps()

    def __call__(self, environ: Mapping[str, Any], start_response: Any) -> Any:
        """Answer one request."""
        path, host = environ.get("PATH_INFO", ""), environ.get("HTTP_HOST", "").rpartition(":")[0] or "localhost"
        if host not in ("127.0.0.1", "localhost"):
            answer = wrappers.Response("this server answers to 127.0.0.1 only", 403)
        elif environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            answer = wrappers.Response("this server only shows", 405)
        elif path == "/":
            page, policy = shell()
            answer = wrappers.Response(page, mimetype="text/html", headers={"Content-Security-Policy": policy})
        elif path in self._apps:
            return self._apps[path](environ, start_response)
        else:
            answer = wrappers.Response("not found", 404)
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer(environ, start_response)  # type: ignore[arg-type]


class _Quiet(WSGIRequestHandler):
    """Says nothing of requests: a page that is open asks every two seconds."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""


def server(data: Any, host: str, port: int) -> BaseWSGIServer:
    """A server that is bound already.

    Args:
        data: TensorBoard's data provider.
        host: The address.
        port: The port; 0: one that is free.

    Raises:
        OSError: The port is taken, or not allowed.
    """
    # werkzeug would print and exit where the port is taken
    with socket.create_server((host, port)) as bound:
        number = bound.getsockname()[1]
        return make_server(host, number, Site(data), threaded=True, request_handler=_Quiet, fd=bound.fileno())
