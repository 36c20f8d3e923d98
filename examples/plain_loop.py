"""The same watch without Lightning: a plain loop, two lines more, and the same findings.

Trains scikit-learn's digits twice, at a sensible and at a wild learning rate, and prints both reports. With
`--half` in float16 with a loss scaler, with `--accumulate 4` in micro-batches, with `--clip` under adaptive clipping.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh


def train(learning_rate: float, options: argparse.Namespace) -> gh.HealthReport:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    gh.init_weights(model, scheme="he", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=options.half)
    session = gh.HealthSession(model, clip="adaptive" if options.clip else None)
    size, parts = 64 // options.accumulate, options.accumulate
    done = 0
    for _ in range(options.epochs):
        for x, y in DataLoader(data, batch_size=size, shuffle=True):
            with torch.autocast("cpu", torch.float16, enabled=options.half):
                loss = nn.functional.cross_entropy(model(x), y) / parts
            scaler.scale(loss).backward()
            session.add_loss(loss)  # the share of one micro-batch
            done += 1
            if done % parts:
                continue
            session.apply(session.observe(optimizer, grad_scaler=scaler))  # after backward, before the step
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if done % (50 * parts) == 0:
                session.flush()  # whenever you log: one read of the device
    session.close()
    return session.report()


def main(arguments: list[str] | None = None) -> list[gh.HealthReport]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--half", action="store_true", help="float16 with a loss scaler")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--clip", action="store_true", help='clip="adaptive"')
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, reports = Console(), []
    for rate in (0.05, 50.0):
        console.rule(f"SGD at {rate:g}")
        reports.append(train(rate, options))
        console.print(reports[-1])
    return reports


if __name__ == "__main__":
    main(sys.argv[1:])
