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
