"""What a logged step costs its caller, and the disk: one tensor event for all layers beside a scalar each, in one run.

500 layers x 4 quantities. Logged steps of both ways take turns, so that a busy machine slows both alike; the caller's
time is what the calls take until they return. The event is built for a twentieth of the time and a fifteenth of the
disk (tests/benchmarks/test_events.py asserts what is exact). By hand: `python tests/benchmarks/events.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhealth.loggers.events import EventsWriter
from lightning_gradhealth.records import LayerStats, StepRecord, StepStats

QUANTITIES = ("grad_norm", "norm_ratio", "grad_to_weight", "update_to_weight")


@dataclass(frozen=True)
class Costs:
    """Of one logged step: seconds in the caller, bytes on disk, both for scalars and for the event."""

    scalars_s: float
    event_s: float
    scalars_bytes: float
    event_bytes: float

    @property
    def time_ratio(self) -> float:
        return self.scalars_s / self.event_s

    @property
    def disk_ratio(self) -> float:
        return self.scalars_bytes / self.event_bytes


def measure(layers: int = 500, steps: int = 30) -> Costs:
    """Write the same records both ways."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        one, two = SummaryWriter(f"{folder}/scalars"), SummaryWriter(f"{folder}/event")
        events = EventsWriter()
        times: tuple[list[float], list[float]] = ([], [])
        for step in range(steps):
            values = np.exp(3 * generator.standard_normal((layers, len(QUANTITIES))))
            rows = [dict(zip(QUANTITIES, map(float, row), strict=True)) for row in values]
            stats = tuple(LayerStats(f"model.layers.{i}.mlp.up_proj", 1, **row) for i, row in enumerate(rows))
            record = StepRecord(step, 1.0, 1.0, layers=stats, window=(StepStats(step, total_norm=1.0, loss=0.5),))
            start = time.perf_counter()
            for layer in stats:
                for name in QUANTITIES:
                    one.add_scalar(f"{name}/{layer.name}", getattr(layer, name), step)
            middle = time.perf_counter()
            one.flush()
            begin = time.perf_counter()
            events.write(two, record, [], ())
            end = time.perf_counter()
            two.flush()
            times[0].append(middle - start)
            times[1].append(end - begin)
        one.close()
        two.close()
        sizes = [sum(path.stat().st_size for path in Path(folder, way).iterdir()) for way in ("scalars", "event")]
    medians = [statistics.median(way) for way in times]
    return Costs(*medians, *(size / steps for size in sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    costs = measure(options.layers, options.steps)
    print(f"{'':10} {'caller, ms':>12} {'disk, kB':>10}")
    print(f"{'scalars':10} {costs.scalars_s * 1e3:12.2f} {costs.scalars_bytes / 1e3:10.1f}")
    print(f"{'one event':10} {costs.event_s * 1e3:12.2f} {costs.event_bytes / 1e3:10.1f}")
    print(f"{'ratio':10} {costs.time_ratio:12.1f} {costs.disk_ratio:10.1f}")


if __name__ == "__main__":
    main()
