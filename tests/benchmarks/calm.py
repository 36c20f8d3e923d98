"""Adaptive clipping over a larger grid of small, noisy regressions than the suite's: how many does it touch?

Three tasks, SGD and Adam at five rates, batches of 1 to 64, 8 seeds, 2,000 steps: those that learn. Measured: 11 of 952
clipped within their first 100 steps, none in more than 2 steps and .5 % of its steps, wherever one stops. Two
constants of the gate were chosen with this grid in sight; fresh data and weights gave 2 of 949, and none. By hand, a
minute: `cd tests && python -m benchmarks.calm`.
"""

from __future__ import annotations

import itertools

import test_calm_runs as small
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Train, replay and print."""
    small.SEEDS, small.STEPS = 8, 2_000
    small.RATES.update(sgd=(0.003, 0.01, 0.03, 0.05, 0.1), adam=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
    small.MOSTLY = 0.8  # some diverge at the highest rates
    table = Table("task", "optimizer", "batch", "runs that learn", "touched in 100 steps", "over the budget")
    sums = [0, 0, 0]
    for task, optimizer, batch in itertools.product(small.WIDTHS, small.RATES, (1, 4, 16, 64)):
        acted = small._clipped(task, optimizer, batch)
        over = (acted.cumsum(0) > small._most_allowed()).any(0)
        counts = [acted.shape[1], int(acted[:100].any(0).sum()), int(over.sum())]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        table.add_row(task, optimizer, str(batch), *map(str, counts))
    table.add_row("all", "", "", *map(str, sums))
    Console().print(table)


if __name__ == "__main__":
    main()
