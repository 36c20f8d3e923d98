"""What clippers are worth: two trainings that explode, under every clipper, and twenty calm ones under "adaptive".

Run it by hand: `python tests/benchmarks/clipping.py --jobs 2` (half an hour on two cores; `--quick` takes one seed of
each). Nothing here is asserted. The gate was tuned on seeds 0 to 4 and 20 to 29 and on the calm seeds 0 to 3; seeds 5
to 14 were looked at on the way; seeds from 30 on were not.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from scenarios import CALM_NETS, Outcome, calm, character_rnn, deep_mlp

import lightning_gradhealth as gh

Make = Callable[[], gh.Clipper | str | None]

CLIPPERS: dict[str, Make] = {
    "none": lambda: None,
    **{f"NormClip({limit:g})": partial(gh.NormClip, limit) for limit in (0.1, 1.0, 10.0, 100.0)},
    "ValueClip(0.1)": lambda: gh.ValueClip(0.1),
    "SignClip(1e-3)": lambda: gh.SignClip(1e-3),
    "PercentileClip()": gh.PercentileClip,
    "ZScoreClip()": gh.ZScoreClip,
    "UnitwiseClip()": gh.UnitwiseClip,
    "LayerwiseClip()": gh.LayerwiseClip,
    "Chain(Unitwise, Norm 1)": lambda: gh.Chain([gh.UnitwiseClip(), gh.NormClip(1.0)]),
    "adaptive": lambda: "adaptive",
}
SCENARIOS: dict[str, Callable[..., Outcome]] = {
    "1: character RNN, loss": character_rnn,
    "1 with loss x 100, rate / 100": partial(character_rnn, scale=100.0),
    "2: deep MLP, heavy tails, clean MSE": deep_mlp,
}


def explode(scenario: str, clipper: str, seed: int) -> Outcome:
    torch.set_num_threads(1)
    return SCENARIOS[scenario](CLIPPERS[clipper](), seed)


def stay_calm(net: str, seed: int) -> tuple[Outcome, bool]:
    """The run with "adaptive", and whether its weights are bit for bit those of the run without."""
    torch.set_num_threads(1)
    with_gate, without = calm(net, "adaptive", seed), calm(net, None, seed)
    return with_gate, all(map(torch.equal, with_gate.weights, without.weights))


def _figure(scores: Sequence[float]) -> tuple[str, ...]:
    mean = statistics.fmean(scores)
    return (f"{mean:.4g}" if math.isfinite(mean) else "NaN", *(f"{score:.4g}" for score in scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed of each")
    parser.add_argument("--seeds", nargs="*", default=["0-4", "5-9", "30-34"], help="groups of seeds, as 0-4")
    parser.add_argument("--calm-seeds", nargs="*", default=["0-3", "10-13"], help="the same for the calm runs")
    parser.add_argument("--only", nargs="*", choices=list(CLIPPERS), default=list(CLIPPERS), help="these clippers")
    options = parser.parse_args()
    console = Console(width=140)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for scenario in SCENARIOS:
            for seeds in _groups(options.seeds, options.quick):
                table = Table(title=f"{scenario}; seeds {seeds[0]} to {seeds[-1]}", title_justify="left")
                for title in ("clipper", "mean", *(f"seed {seed}" for seed in seeds), "steps clipped"):
                    table.add_column(title, justify="left" if title == "clipper" else "right")
                tasks = [(scenario, clipper, seed) for clipper in options.only for seed in seeds]
                outcomes = pool.starmap(explode, tasks, chunksize=1)
                for number, clipper in enumerate(options.only):
                    mine = outcomes[number * len(seeds) : (number + 1) * len(seeds)]
                    share = statistics.fmean(outcome.clipped / outcome.steps for outcome in mine)
                    table.add_row(clipper, *_figure([outcome.score for outcome in mine]), f"{share:.1%}")
                console.print(table)
        for seeds in _groups(options.calm_seeds, options.quick):
            runs = [(net, seed) for net in CALM_NETS for seed in seeds]
            table = Table(title='calm runs under "adaptive", 2,000 steps each', title_justify="left")
            for title in ("net", "seed", "steps clipped", "share", "weights as without clipping"):
                table.add_column(title)
            for (net, seed), (outcome, same) in zip(runs, pool.starmap(stay_calm, runs, chunksize=1), strict=True):
                share = f"{outcome.clipped / outcome.steps:.2%}"
                table.add_row(net, str(seed), str(outcome.clipped), share, "bit for bit" if same else "no")
            console.print(table)


def _groups(texts: Sequence[str], quick: bool) -> list[range]:
    bounds = [[int(part) for part in text.split("-")] for text in texts]
    return [range(first, first + 1 if quick else last + 1) for first, last in bounds]


if __name__ == "__main__":
    main()
