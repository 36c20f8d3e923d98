"""The same watch without Lightning: a plain loop, two lines more, and the same findings.

Trains scikit-learn's digits twice, at a sensible and at a wild learning rate, and prints both reports.
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


def train(learning_rate: float, epochs: int) -> gh.HealthReport:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    gh.init_weights(model, scheme="he", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    session = gh.HealthSession(model)
    step = 0
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            session.apply(session.observe(optimizer, loss))  # after backward, before the step
            optimizer.step()
            step += 1
            if step % 50 == 0:
                session.flush()  # whenever you log: one read of the device
    session.close()
    return session.report()


def main(arguments: list[str] | None = None) -> list[gh.HealthReport]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, reports = Console(), []
    for rate in (0.05, 50.0):
        console.rule(f"SGD at {rate:g}")
        reports.append(train(rate, options.epochs))
        console.print(reports[-1])
    return reports


if __name__ == "__main__":
    main(sys.argv[1:])
