"""`gradhealth serve`: the page of the tab in a browser, without TensorBoard's front end."""

from __future__ import annotations

import threading
from pathlib import Path

from lightning_gradhealth.cli.misuse import MisuseError
from lightning_gradhealth.cli.report import folder_of
from lightning_gradhealth.messages import log, printable

HOST = "127.0.0.1"
RELOAD = 2.0  # seconds between two looks into the files


def run(logdir: Path, port: int = 6007) -> int:
    """Show the runs below a folder in a browser, live, to this machine alone, until Ctrl-C.

    Args:
        logdir: A folder as TensorBoard takes it.
        port: The port (default: 6007); 0: one that is free.
    """
    from lightning_gradhealth.tensorboard.logdir import Logs
    from lightning_gradhealth.tensorboard.serving import server

    if not 0 <= port <= 65535:
        raise MisuseError(f"--port must be between 0 and 65535, got {port}; leave it out for 6007")
    logs = Logs(folder_of(logdir))
    try:
        serving = server(logs.data, HOST, port)
    except OSError as error:
        raise MisuseError(
            f"port {port} cannot be opened: {error.strerror or error}; give another, e.g. --port {port + 1}, or --port"
            " 0"
            " for one that is free"
        ) from None
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            try:
                logs.reload()
            except Exception as error:  # a file that nobody thought of; what was read is still shown
                log.warning("gradhealth: %s could not be read", printable(logdir), exc_info=error)
            over.wait(RELOAD)

    threading.Thread(target=follow, daemon=True).start()
    print(f"Grad Health of {printable(logdir)}: http://{HOST}:{serving.port}/ (Ctrl-C ends it)", flush=True)
    try:
        serving.serve_forever()  # until Ctrl-C
    finally:
        over.set()
    return 0
