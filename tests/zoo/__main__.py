"""Run the zoo: `cd tests && python -m zoo [--only REGEX] [--seeds 3] [--jobs 1] [--json PATH]`."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from zoo.checks import Result, examine_named
from zoo.registry import architectures
from zoo.table import as_json, line, table


def main() -> int:
    """0 where all pass, else 1."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression: of the names, those in which it is found")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train from")
    parser.add_argument("--jobs", type=int, default=1, help="how many architectures at a time")
    parser.add_argument("--json", type=Path, help="write everything that was seen to this file")
    given = parser.parse_args()
    names = [name for name in architectures() if re.search(given.only, name)]
    results: list[Result] = []
    # a fresh process each: what a library leaves behind, or a crash of it, is nobody else's
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context, max_tasks_per_child=20) as pool:
        for done in as_completed([pool.submit(examine_named, name, given.seeds) for name in names]):
            results.append(done.result())
            print(line(results[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(as_json(results))
    print(f"\n{table(results)}")
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
