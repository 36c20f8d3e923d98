"""What a logged step costs, counted: one write, and a fifteenth of the disk of a scalar for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.events import measure
from tab import record
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhealth.loggers.events import EventsWriter


def test_the_disk_takes_a_fifteenth_of_scalars() -> None:
    assert measure(steps=6).disk_ratio >= 15


def test_a_step_is_one_event_however_many_layers(tmp_path: Path, monkeypatch: Any) -> None:
    written = []
    with SummaryWriter(str(tmp_path)) as writer:
        file = writer._get_file_writer()
        monkeypatch.setattr(file, "add_summary", lambda summary, global_step: written.append(global_step))
        events = EventsWriter()
        for step in range(3):
            events.write(writer, record(step, [1.0] * 500), [], ())
    assert written == [0, 1, 2]
