"""Prints what GradHealth finds in the clinic: precision and recall of every condition, misses and false alarms.

python tests/clinic/table.py --seeds 3 --jobs 2
"""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]  # the package, and what the tests share

from clinic import Outcome  # noqa: E402

Row = tuple[str, int, Outcome]


def visit(name: str, seed: int) -> Row:
    """One training, examined and judged, in a process of its own or not."""
    import torch
    from catalogue import CATALOGUE
    from clinic import examine, judge

    torch.set_num_threads(1)
    logger = logging.getLogger("lightning_gradhealth")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return name, seed, judge(CATALOGUE[name], examine(CATALOGUE[name], seed))
    finally:
        logger.setLevel(level)


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for every condition, and one for all.

    Recall: of the findings that a label demands, how many were made, in time and in the right layers. Precision: of
    those and the findings that a label forbids, how many were right. What a label allows counts for neither.
    """
    hits, misses, alarms = Counter[str](), Counter[str](), Counter[str]()
    for _, _, outcome in rows:
        hits.update(outcome.hits)
        misses.update(name for name, _ in outcome.misses)
        alarms.update(name for name, _ in outcome.alarms)
    lines = [
        "| condition | to be found | found | recall | false alarms | precision | reports |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted({*hits, *misses, *alarms}):
        lines.append(_line(name, hits[name], misses[name], alarms[name]) + f" {_reports(name)} |")
    return "\n".join([*lines, _line("all", hits.total(), misses.total(), alarms.total()) + " |"])


def _reports(condition: str) -> str:
    """The public reports behind the cases of a condition."""
    from catalogue import ALL

    cases = (case for case in ALL if case.report and any(condition in wanted.conditions for wanted in case.must))
    return "; ".join(dict.fromkeys(case.report for case in cases))


def _line(name: str, hits: int, misses: int, alarms: int) -> str:
    wanted, said = hits + misses, hits + alarms
    recall = f"{hits / wanted:.2f}" if wanted else "–"
    precision = f"{hits / said:.2f}" if said else "–"
    return f"| {name} | {wanted} | {hits} | {recall} | {alarms} | {precision} |"


def complaints(rows: Iterable[Row]) -> list[str]:
    return [f"{name}, seed {seed}: {text}" for name, seed, outcome in rows for text in outcome.complaints]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each scenario")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", default="", help="part of the names of the scenarios")
    arguments = parser.parse_args()

    from catalogue import ALL

    chosen = [case for case in ALL if arguments.only in case.name]
    names, seeds = zip(*((case.name, seed) for case in chosen for seed in range(arguments.seeds)), strict=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool:
        rows = list(pool.map(visit, names, seeds, chunksize=4))
    sick = sum(bool(case.must) for case in chosen)
    print(f"{sick} sick and {len(chosen) - sick} healthy trainings, {arguments.seeds} seeds each\n")
    print(table(rows))
    print("", *(complaints(rows) or ["No misses, no false alarms."]), sep="\n")


if __name__ == "__main__":
    main()
