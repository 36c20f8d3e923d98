"""The results of the zoo as lines, a table by family, and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from zoo.checks import WITHIN, Result


def line(result: Result) -> str:
    """One architecture on a line, and what failed below it."""
    if result.skipped:
        return f"{result.name:40s} skipped: {result.skipped}"
    ratio = "    -" if result.ratio is None else f"{result.ratio:5.2f}"
    seconds = " ".join(
        f"{name} {result.seconds[name]:.1f} s" for name in ("init_weights", "diagnose") if name in result.seconds
    )
    total = sum(value for name, value in result.seconds.items() if name.startswith("all of"))
    said = "ok  " if not result.failures else "FAIL"
    first = f"{said} {result.name:40s} {ratio}  {seconds}, all {total:.0f} s"
    return "\n".join([first, *(f"     {check.name}: {check.reason[:300]}" for check in result.failures)])


def table(results: Sequence[Result]) -> str:
    """By family: how many there are, how many pass, the ratios of losses, and seconds; in Markdown."""
    rows = ["| family | architectures | all checks pass | loss within 1.5 | worst | seconds of init, of diagnose |"]
    rows.append("|---|---|---|---|---|---|")
    run = [result for result in results if not result.skipped]
    for family in sorted({result.family for result in run}):
        rows.append(_row(family, [result for result in run if result.family == family]))
    rows.append(_row("all", run))
    return "\n".join(rows)


def _row(family: str, results: Sequence[Result]) -> str:
    ratios = [result.ratio for result in results if result.ratio is not None]
    within = f"{sum(ratio <= WITHIN for ratio in ratios)} of {len(results)}"
    worst = max(results, key=lambda result: result.ratio or 0.0, default=None)
    which = f"{worst.ratio:.2f} ({worst.name})" if worst is not None and worst.ratio is not None else "-"
    clean = f"{sum(not result.failures for result in results)}"
    slowest = [
        f"{max((result.seconds.get(name, 0.0) for result in results), default=0.0):.1f}"
        for name in ("init_weights", "diagnose")
    ]
    return f"| {family} | {len(results)} | {clean} | {within} | {which} | up to {', '.join(slowest)} |"


def as_json(results: Sequence[Result]) -> str:
    """All that was seen."""
    return json.dumps([dataclasses.asdict(result) for result in results], indent=1)
