"""Watch three trainings of one deep network: a sick one, the same one cured, and one with a wild learning rate.

The data are scikit-learn's handwritten digits (no download). Run it, read the three reports, then open the
TensorBoard logs that it has written.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh

DEPTH, WIDTH = 30, 100


class Digits(pl.LightningModule):
    """A 30-layer ReLU network without normalisation: deep enough for initialisation to decide everything."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        widths = [64] + [WIDTH] * (DEPTH - 1)
        hidden = [m for pair in zip(widths, widths[1:]) for m in (nn.Linear(*pair), nn.ReLU())]  # noqa: B905
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


@dataclass
class Run:
    """One training to compare."""

    name: str
    scheme: str | None
    learning_rate: float


RUNS = (
    Run("torch-default", None, 1e-3),
    Run("he", "he", 1e-3),
    Run("he-wild-rate", "he", 0.3),
)


def loaders() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, val_x, train_y, val_y = (torch.tensor(part) for part in parts)
    train = TensorDataset(train_x.float(), train_y)
    val = TensorDataset(val_x.float(), val_y)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=len(val))


def train(run: Run, epochs: int, logdir: Path, progress: bool) -> tuple[float, gh.HealthReport]:
    pl.seed_everything(0, verbose=False)
    model = Digits(run.learning_rate)
    if run.scheme:
        gh.init_weights(model, scheme=run.scheme, seed=0)
    health = gh.GradHealth()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[health],
        logger=TensorBoardLogger(logdir, name="", version=run.name),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    trainer.fit(model, *loaders())
    return float(trainer.callback_metrics["val_accuracy"]), health.report()


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, gh.HealthReport]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the layers are small: more threads only get in each other's way
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*")

    console = Console()
    results = {}
    for run in RUNS:
        start = f"init_weights(model, scheme={run.scheme!r})" if run.scheme else "torch's default initialisation"
        console.rule(f"[bold]{run.name}[/]: {start}, Adam at {run.learning_rate:g}")
        results[run.name] = train(run, options.epochs, options.logdir, options.progress)
        console.print(results[run.name][1])

    table = Table(title=f"{DEPTH} ReLU layers on handwritten digits, {options.epochs} epochs")
    for title in ("run", "rate", "accuracy", "GradHealth says"):
        table.add_column(title, overflow="fold")
    for run in RUNS:
        accuracy, report = results[run.name]
        verdict = "healthy" if report.healthy else ", ".join(f.condition for f in report.findings)
        table.add_row(run.name, f"{run.learning_rate:g}", f"{accuracy:.1%}", verdict)
    console.print(table)
    console.print(f"See the difference: [bold]tensorboard --logdir {options.logdir}[/] (tab Grad Health)")
    console.print(f"report: {options.logdir / RUNS[0].name / 'report.html'}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
