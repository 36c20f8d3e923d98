"""Run the zoo: `cd tests && python -m zoo [--only REGEX] [--seeds 3] [--jobs 1] [--json PATH]`."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import re
import sys
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
    run = functools.partial(examine_named, seeds=given.seeds)
    # a fresh process after some: what libraries keep adds up
    with multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=20) as pool:
        for result in pool.imap_unordered(run, names):
            results.append(result)
            print(line(results[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(as_json(results))
    print(f"\n{table(results)}")
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
