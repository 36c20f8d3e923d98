"""The runs below a folder, read without a TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from lightning_gradhealth.tensorboard.loader import SAMPLES
from lightning_gradhealth.tensorboard.reading import Reader
from lightning_gradhealth.view.data import RunView


class Logs:
    """The event files below a folder.

    Args:
        folder: The folder; its runs are those that TensorBoard would show.

    Attributes:
        data: TensorBoard's data provider.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as empty:
        ...     Logs(Path(empty)).runs()
        []
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        guidance = {"gradhealth": SAMPLES, "gradhealth_events": 0}
        self._events = EventMultiplexer(tensor_size_guidance=guidance)
        self.data = MultiplexerDataProvider(self._events, self._folder)

    def reload(self) -> None:
        """Read what was added."""
        self._events.AddRunsFromDirectory(self._folder)
        self._events.Reload()

    def runs(self) -> list[RunView]:
        """All runs with data of ours, as the files are now."""
        self.reload()
        return sorted(Reader(self.data).runs(context.RequestContext(), ""), key=lambda view: view.name)

    def unread(self) -> list[str]:
        """Runs whose files have something in them, but nothing that can be read; TensorBoard passes over them."""
        return sorted(name for name, folder in self._events.RunPaths().items() if self._is_unread(name, Path(folder)))

    def _is_unread(self, name: str, folder: Path) -> bool:
        try:
            self._events.FirstEventTimestamp(name)
        except (ValueError, OSError):
            return any(file.is_file() and file.stat().st_size for file in folder.glob("*tfevents*"))
        return False
