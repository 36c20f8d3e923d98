"""An exploding training without and with `clip="adaptive"`, side by side: as a table and in TensorBoard.

A tanh RNN whose recurrent weights stretch the signal by 1.2 at each of 64 time steps learns to predict the next
character of Python's own documentation, at a learning rate far too high. No download. Under a minute. (Such a run is
a gamble: with seed 2 it explodes, with others it may come through by itself.)
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradhealth as gh

LENGTH = 64


def text() -> tuple[Tensor, int]:
    from pydoc_data.topics import topics

    characters = "".join(sorted(topics.values()))[:300_000]
    number = {character: i for i, character in enumerate(sorted(set(characters)))}
    return torch.tensor([number[character] for character in characters]), len(number)


class Reader(pl.LightningModule):
    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, 32)
        self.rnn = nn.RNN(32, 128, batch_first=True)
        self.head = nn.Linear(128, kinds)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)
        self.rnn.weight_hh_l0.data.mul_(1.2)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        states, _ = self.rnn(self.embedding(batch[:, :-1]))
        loss = nn.functional.cross_entropy(self.head(states).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=3.0)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def train(clip: str | None, steps: int, logdir: Path) -> tuple[float, gh.HealthReport]:
    pl.seed_everything(2, verbose=False)
    ids, kinds = text()
    pieces = ids.unfold(0, LENGTH + 1, LENGTH)
    health = gh.GradHealth(clip=clip)
    model = Reader(kinds)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[health],
        logger=TensorBoardLogger(logdir, name="", version=clip or "none"),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(list(pieces), batch_size=32, shuffle=True))
    return torch.stack(model.losses[-50:]).mean().item(), health.report()


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, gh.HealthReport]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--logdir", type=Path, default=Path("runs/rescue"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*")

    console, results = Console(), {}
    for clip in (None, "adaptive"):
        console.rule(f"GradHealth(clip={clip!r})")
        results[str(clip)] = train(clip, options.steps, options.logdir)
        console.print(results[str(clip)][1])

    table = Table(title=f"A tanh RNN over {LENGTH} time steps, SGD at 3.0, {options.steps} steps", title_justify="left")
    for title in ("clip", "loss, last 50 steps", "largest gradient norm", "steps clipped", "GradHealth says"):
        table.add_column(title, overflow="fold")
    for clip, (loss, report) in results.items():
        largest = max((norm for _, norm in report.trend if math.isfinite(norm)), default=math.nan)
        share = f"{report.clipped_steps / report.steps:.1%}"
        table.add_row(clip, f"{loss:.3f}", f"{largest:.3g}", share, report.verdict)
    console.print(table)
    console.print(f"See both: [bold]tensorboard --logdir {options.logdir}[/] (tab Grad Health)")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
