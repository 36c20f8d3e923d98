"""What GradHealth costs, as the ratio of a watched training step to a bare one, measured in one run.

Bare and watched steps of the same model alternate in short blocks, so that a busy machine slows both alike.
Run it by hand: `python tests/benchmarks/overhead.py`; nothing here is asserted. The exact counters, which do
not depend on the machine, are in test_counters.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_gradhealth import HealthSession

BLOCK = 10


def perceptron(depth: int, width: int) -> nn.Module:
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def convnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(6):
        layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    return nn.Sequential(*layers)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 30 x 100, batch 64": (lambda: perceptron(30, 100), (64, 100)),
    "MLP 10 x 1000, batch 64": (lambda: perceptron(10, 1000), (64, 1000)),
    "CNN 7 x 32, batch 32 of 32 x 32": (convnet, (32, 3, 32, 32)),
    "Transformer 4 x 128, batch 16 of 64": (transformer, (16, 64, 128)),
}


def ratio(
    make: Callable[[], nn.Module], shape: tuple[int, ...], blocks: int, every: int, clip: str | None
) -> tuple[float, float]:
    """Milliseconds of a bare step, and median over the blocks of watched / bare."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    session = HealthSession(model, clip=clip, probe_every_n_steps=every, announce=lambda line: None)
    x = torch.randn(shape)
    done = 0

    def block(watched: bool) -> float:
        nonlocal done
        start = time.perf_counter()
        for _ in range(BLOCK):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if watched:
                session.apply(session.observe(optimizer, loss))
            optimizer.step()
            if watched:
                done += 1
                if done % every == 0:
                    session.flush()
        return (time.perf_counter() - start) / BLOCK

    block(False), block(True)  # warm up both
    pairs = [(block(False), block(True)) for _ in range(blocks)]
    return 1e3 * statistics.median(bare for bare, _ in pairs), statistics.median(w / bare for bare, w in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--every", type=int, default=50, help="steps between flushes and probes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, (make, shape) in CASES.items():
        bare, factor = ratio(make, shape, options.blocks, options.every, None)
        _, clipping = ratio(make, shape, options.blocks, options.every, "adaptive")
        print(
            f'{name:38s} bare {bare:7.2f} ms a step, watched / bare {factor:.3f}, with clip="adaptive" {clipping:.3f}'
        )
