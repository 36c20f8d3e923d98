"""What a probed step costs, as its ratio to a bare one, and what all other steps cost; measured in one run.

Bare, unprobed and probed steps of the same model alternate in short blocks, so that a busy machine slows all alike. In
the probed blocks every step is probed; in the unprobed ones none is. What the flush takes, which reads and judges,
stands by itself, as the share of one step. The limits are 1.6 for the transformer, 2.5 for narrow perceptrons and 1 for
unprobed steps (but for the gradients' own norms: see overhead.py). Run it by hand: `python tests/benchmarks/probes.py`;
nothing here is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_gradhealth import GradientMonitor, HealthSession

BLOCK = 10
NEVER = 1_000_000


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(*[module for _ in range(100) for module in (nn.Linear(width, width), nn.ReLU())])


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Transformer 6 x 128, batch 16 of 64": (transformer, (16, 64, 128)),
    "MLP 100 x 100, batch 128": (lambda: perceptron(100), (128, 100)),
    "MLP 100 x 64, batch 64": (lambda: perceptron(64), (64, 64)),
}


class Loop:
    """Steps of one model under one watcher, or under none."""

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], watcher: str) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.x = torch.randn(shape)
        every = {"probed": 1, "unprobed": NEVER}
        self.watcher: HealthSession | GradientMonitor | None = None
        if watcher in every:
            self.watcher = HealthSession(self.model, probe_every_n_steps=every[watcher], announce=lambda line: None)
        elif watcher == "gradients":
            self.watcher = GradientMonitor(self.model)
        self.flush = 0.0
        for _ in range(3):  # beyond the early probes, as soon as the units have samples enough
            self.block()

    def block(self) -> float:
        """Seconds a step; those of the flush, which reads and judges, are kept by themselves."""
        start = time.perf_counter()
        for _ in range(BLOCK):
            self.optimizer.zero_grad()
            self.model(self.x).square().mean().backward()
            if self.watcher is not None:
                self.watcher.apply(self.watcher.observe(self.optimizer))
            self.optimizer.step()
        steps = time.perf_counter() - start
        if self.watcher is not None:
            self.watcher.flush()
            self.flush = (time.perf_counter() - start - steps) / BLOCK
        return steps / BLOCK


def ratios(make: Callable[[], nn.Module], shape: tuple[int, ...], blocks: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a bare step, and the median over the blocks of each watcher's steps over the bare ones."""
    loops = {name: Loop(make, shape, name) for name in ("bare", "gradients", "unprobed", "probed")}
    times = [{name: loop.block() for name, loop in loops.items()} for _ in range(blocks)]
    bare = statistics.median(each["bare"] for each in times)
    found = {name: statistics.median(each[name] / each["bare"] for each in times) for name in list(loops)[1:]}
    return 1e3 * bare, found | {"flush of a probed step": loops["probed"].flush / bare}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, (make, shape) in CASES.items():
        bare, found = ratios(make, shape, options.blocks)
        shown = ", ".join(f"{watcher} / bare {ratio:.3f}" for watcher, ratio in found.items())
        print(f"{name:38s} bare {bare:7.2f} ms a step, {shown}")
