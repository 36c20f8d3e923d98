"""A bounded, max-pooled history of what was measured, whatever the length of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradhealth.records import StepRecord

METRICS = ("grad_norm_max", "norm_ratio", "grad_to_weight", "update_to_weight")

Matrix = NDArray[np.float32]


class History:
    """Keeps at most `limit` points, each the maximum over the same number of records.

    When it is full, neighbours are merged by their largest values and every point from then on takes twice as
    many records: spikes are never lost, and the beginning of a run keeps as much room as its end.

    Args:
        limit: Greatest number of points, even, at least 2.

    Attributes:
        steps: The loggers' x value of each point (of its latest record).
        totals: The largest total norm of each point; Inf where a step of it was not finite.
        names: The layers, in the order in which they came up.

    Example:
        >>> history = History(limit=4)
        >>> for step in range(10):
        ...     history.append(StepRecord(step=step, total_norm_max=float(step)))
        >>> history.steps, history.totals
        ([3, 7, 9], [3.0, 7.0, 9.0])
    """

    def __init__(self, limit: int = 256) -> None:
        if limit < 2 or limit % 2:
            raise ValueError(f"limit must be even and >= 2, got {limit}; leave it out for 256")
        self.limit = limit
        self.steps: list[int] = []
        self.totals: list[float] = []
        self.names: list[str] = []
        self._values: list[Matrix] = []
        self._stride = 1  # records a point
        self._filled = 0  # records in the last point

    def append(self, record: StepRecord) -> None:
        """Add a record, pooling where there is no room."""
        known = set(self.names)
        self.names += [layer.name for layer in record.layers if layer.name not in known]
        place = {name: row for row, name in enumerate(self.names)}
        values = np.full((len(self.names), len(METRICS)), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):
            for layer in record.layers:
                values[place[layer.name]] = [getattr(layer, metric) for metric in METRICS]
        total = np.inf if record.non_finite_steps else record.total_norm_max
        if self._filled in (0, self._stride):
            if len(self.steps) == self.limit:
                self._pool()
            self._filled = 0
            self.steps.append(record.step)
            self.totals.append(np.nan)
            self._values.append(values)
        self._filled += 1
        self.steps[-1] = record.step
        self.totals[-1] = float(np.fmax(self.totals[-1], np.nan if total is None else total))
        self._values[-1] = np.fmax(self._wide(-1), values)

    def _pool(self) -> None:
        """Merge neighbours, two into one, by their largest values."""
        pairs = range(0, len(self.steps), 2)
        self._values = [np.fmax(self._wide(i), self._wide(i + 1)) for i in pairs]
        self.totals = [float(np.fmax(self.totals[i], self.totals[i + 1])) for i in pairs]
        self.steps = [self.steps[i + 1] for i in pairs]
        self._stride *= 2

    def _wide(self, index: int) -> Matrix:
        """A point's values, NaN for layers that came up later."""
        values = self._values[index]
        missing = len(self.names) - len(values)
        return np.pad(values, ((0, missing), (0, 0)), constant_values=np.nan) if missing else values

    def matrix(self, metric: str) -> Matrix:
        """One metric over the run, shape (points, layers); NaN where it was not measured.

        Args:
            metric: One of `METRICS`.
        """
        column = METRICS.index(metric)
        if not self.steps:
            return np.zeros((0, len(self.names)), dtype=np.float32)
        return np.stack([self._wide(i)[:, column] for i in range(len(self.steps))])

    def trend(self) -> tuple[tuple[float, float], ...]:
        """Pairs of step and largest total norm."""
        return tuple(zip(map(float, self.steps), self.totals, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the history as primitives, with one numpy array under "values"."""
        width = (len(self.steps), len(self.names), len(METRICS))
        values = np.stack([self._wide(i) for i in range(len(self.steps))]) if self.steps else np.zeros(width)
        return {
            "steps": list(self.steps),
            "totals": list(self.totals),
            "names": list(self.names),
            "stride": self._stride,
            "filled": self._filled,
            "values": values.astype(np.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: The parts do not belong together.
        """
        steps, totals, names = (list(state[name]) for name in ("steps", "totals", "names"))
        values = np.asarray(state["values"], dtype=np.float32)
        if values.shape != (len(steps), len(names), len(METRICS)) or len(totals) != len(steps):
            raise ValueError(f"the history holds {values.shape} values for {len(steps)} steps and {len(names)} layers")
        self.steps, self.totals, self.names, self._values = steps, totals, names, list(values)
        self._stride, self._filled = int(state["stride"]), int(state["filled"])


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw positive values as a line of block characters, on a logarithmic scale; `!` marks NaN and Inf.

    Example:
        >>> sparkline([1.0, 10.0, 100.0, float("inf")])
        '▁▄█!'
    """
    size = max(1, -(-len(values) // width))
    pooled = [
        max(values[i : i + size], key=lambda v: np.inf if np.isnan(v) else v) for i in range(0, len(values), size)
    ]
    logs = [float(np.log10(v)) if 0 < v < np.inf else np.nan for v in pooled]
    finite = [v for v in logs if not np.isnan(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        ("!" if not np.isfinite(raw) else "▁") if np.isnan(v) else blocks[int(7 * (v - low) / ((high - low) or 1.0))]
        for raw, v in zip(pooled, logs, strict=True)
    )
