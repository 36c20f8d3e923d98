"""The same watch in a Fabric loop: any device, strategy and precision, with accumulation and clipping.

Trains scikit-learn's digits and prints the report. On a GPU try `--precision 16-mixed`, on several
`--devices 2 --strategy fsdp`; on a CPU `--devices 2 --strategy ddp` works too.
"""

from __future__ import annotations

import argparse
import sys

import torch
from lightning.fabric import Fabric
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh


def main(arguments: list[str] | None = None) -> gh.HealthReport:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,
        precision=options.precision,
    )
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    gh.init_weights(model, scheme="he", seed=0)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=64 // options.accumulate, shuffle=True))

    session = gh.HealthSession(model, clip="adaptive", on_non_finite="skip")
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed precision
    done = 0
    for _ in range(options.epochs):
        for x, y in loader:
            done += 1
            last = done % options.accumulate == 0
            with fabric.no_backward_sync(model, enabled=not last):
                loss = nn.functional.cross_entropy(model(x), y) / options.accumulate
                fabric.backward(loss)
            session.add_loss(loss)
            if last:
                session.apply(session.observe(optimizer, grad_scaler=scaler))  # after backward, before the step
                optimizer.step()
                optimizer.zero_grad()
                if done % (50 * options.accumulate) == 0:
                    session.flush()  # whenever you log: one read of the device
    session.close()
    report = session.report()
    if fabric.is_global_zero:
        Console().print(report)
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
