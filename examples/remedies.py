"""The remedies of the field side by side, on two sick networks: what each does to the accuracy and to the health.

- A sigmoid network of 20 layers on scikit-learn's handwritten digits, in which the gradient dies out: better weights at
  the start, a gamma on them, other activations, normalisation, residual connections, and some of these together.
- A tanh RNN over 100 characters of Python's own documentation, at a learning rate at which its gradient explodes:
  clipping by norm, by value, by sign and adaptively, orthogonal recurrent weights, a smaller rate.

    python examples/remedies.py                         # about two minutes on one core
    python examples/remedies.py --quick                 # the main rows, trained for less long
    python examples/remedies.py --markdown remedies.md  # the table as Markdown too

No download. Accuracies are those on data that was not trained on. Not every remedy helps by itself: LayerNorm cannot
keep images apart that one sigmoid layer after the other makes more alike, and orthogonal weights do not mend a rate
that is too high. Nor does adaptive clipping at every seed (it fails at 2): it waits for a norm that stands out from
those before, but this rate asks for clipping all the time. The figures are those of one seed
(--seed).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh

DEPTH, WIDTH = 20, 64  # of the sigmoid network
LENGTH, STATES = 100, 128  # of the sequences, and of the RNN's state
HELD_OUT = 100  # sequences
LAST = 20  # steps that the loss shown is the mean of

Split = tuple[TensorDataset, TensorDataset]  # to train on, to test on


class Case(NamedTuple):
    """One training: a network, how it starts, and what is done to its gradients."""

    remedy: str
    net: Callable[[], nn.Module]
    init: dict[str, Any] | None = None  # arguments of init_weights; None: left as it was built
    clip: Any = None
    rate_factor: float = 1.0
    quick: bool = False  # one of those that --quick trains


class Task(NamedTuple):
    """What a sick network is to learn, and the ways to help it."""

    name: str
    title: str
    data: Callable[[], Split]
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    warmup: float  # share of the steps over which the rate rises
    batch: int
    epochs: int
    quick_epochs: int
    cases: Callable[[], list[Case]]


class Outcome(NamedTuple):
    """What one training has come to."""

    accuracy: float
    loss: float
    report: gh.HealthReport


class Learner(pl.LightningModule):
    """Classifies: digits by their images, or at each place of a text the character that follows."""

    def __init__(self, net: nn.Module, task: Task, rate: float) -> None:
        super().__init__()
        self.net, self.task, self.rate = net, task, rate
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x).flatten(0, -2), y.flatten())
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.task.optimizer(self.net.parameters(), lr=self.rate)
        warmup = max(1.0, self.task.warmup * self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --- a deep sigmoid network: the gradient vanishes ----------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def deep(
    activation: type[nn.Module] = nn.Sigmoid, norm: type[nn.Module] | None = None, residual: bool = False
) -> Callable[[], nn.Module]:
    """A deep network, still to be built; by default the sick one."""

    def act() -> list[nn.Module]:
        return [norm(WIDTH), activation()] if norm else [activation()]

    def hidden() -> nn.Module:
        weight = nn.Linear(WIDTH, WIDTH)
        # a branch ends with its weights: after an activation it could only add what is positive, layer upon layer
        return Residual(nn.Sequential(*act(), weight)) if residual else nn.Sequential(*act(), weight)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, WIDTH), *(hidden() for _ in range(DEPTH - 1)), *act(), nn.Linear(WIDTH, 10))

    return build


def deep_cases() -> list[Case]:
    auto: dict[str, Any] = {}
    return [
        Case("none: sigmoid, torch's default", deep(), quick=True),
        Case("init_weights(net)", deep(), auto),
        Case("init_weights(net, gamma=3)", deep(), {"gamma": 3}),
        Case("LayerNorm", deep(norm=nn.LayerNorm)),
        Case("BatchNorm", deep(norm=nn.BatchNorm1d), quick=True),
        Case("residual connections", deep(residual=True)),
        Case("ReLU", deep(nn.ReLU)),
        Case("tanh + init_weights(net)", deep(nn.Tanh), auto),
        Case("ReLU + init_weights(net)", deep(nn.ReLU), auto, quick=True),
        Case("LeakyReLU + init_weights(net)", deep(nn.LeakyReLU), auto),
        Case("ELU + init_weights(net)", deep(nn.ELU), auto),
        Case("SELU + init_weights(net)", deep(nn.SELU), auto),
        Case("ReLU + BatchNorm", deep(nn.ReLU, nn.BatchNorm1d)),
        Case("ReLU + LayerNorm + init_weights(net)", deep(nn.ReLU, nn.LayerNorm), auto),
        Case("ReLU + residual + init_weights(net)", deep(nn.ReLU, residual=True), auto),
        Case("ReLU + LayerNorm + residual + init_weights(net)", deep(nn.ReLU, nn.LayerNorm, residual=True), auto),
    ]


def digits() -> Split:
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    return TensorDataset(train_x.float(), train_y), TensorDataset(test_x.float(), test_y)


# --- a tanh RNN over long sequences: the gradient explodes --------------------------------------------------


def text() -> tuple[Tensor, int]:
    from pydoc_data.topics import topics

    characters = "".join(sorted(topics.values()))[:300_000]
    number = {character: i for i, character in enumerate(sorted(set(characters)))}
    return torch.tensor([number[character] for character in characters]), len(number)


class Reader(nn.Module):
    """An RNN whose recurrent weights are orthogonal, times a stretch: what a time step does to a small signal."""

    def __init__(self, stretch: float) -> None:
        super().__init__()
        kinds = text()[1]
        self.embedding = nn.Embedding(kinds, 32)
        self.rnn = nn.RNN(32, STATES, batch_first=True)
        self.head = nn.Linear(STATES, kinds)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain=stretch)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


def wild() -> nn.Module:
    return Reader(1.3)


def calm() -> nn.Module:
    return Reader(1.0)


def recurrent_cases() -> list[Case]:
    return [
        Case("none: W = 1.3 x orthogonal, no clipping", wild, quick=True),
        Case("clip=NormClip(1)", wild, clip=gh.NormClip(1.0), quick=True),
        Case("clip=ValueClip(0.01)", wild, clip=gh.ValueClip(0.01)),
        Case("clip=SignClip(0.001)", wild, clip=gh.SignClip(0.001)),  # steps of rate * 0.001 in every weight
        Case('clip="adaptive"', wild, clip="adaptive"),
        Case("orthogonal W", calm),
        Case("orthogonal W + clip=NormClip(1)", calm, clip=gh.NormClip(1.0)),
        Case("a tenth of the rate", wild, rate_factor=0.1),
    ]


def characters() -> Split:
    pieces = text()[0].unfold(0, LENGTH + 1, LENGTH)
    x, y = pieces[:, :-1], pieces[:, 1:]
    return TensorDataset(x[:-HELD_OUT], y[:-HELD_OUT]), TensorDataset(x[-HELD_OUT:], y[-HELD_OUT:])


# --- both ---------------------------------------------------------------------------------------------------

TASKS = (
    Task(
        "deep",
        f"{DEPTH} sigmoid layers of {WIDTH} on digits, Adam",
        digits,
        torch.optim.Adam,
        rate=1e-3,
        warmup=0.0,
        batch=64,
        epochs=25,
        quick_epochs=10,
        cases=deep_cases,
    ),
    Task(
        "recurrent",
        f"tanh RNN over {LENGTH} characters of text, SGD",
        characters,
        torch.optim.SGD,
        rate=3.0,
        warmup=0.35,
        batch=32,
        epochs=3,
        quick_epochs=1,
        cases=recurrent_cases,
    ),
)


def train(task: Task, case: Case, split: Split, epochs: int, seed: int) -> Outcome:
    pl.seed_everything(seed, verbose=False)
    train_set, test_set = split
    net = case.net()
    if case.init is not None:
        gh.init_weights(net, train_set.tensors[0][: task.batch], seed=seed, **case.init)
    model = Learner(net, task, task.rate * case.rate_factor)
    health = gh.GradHealth(clip=case.clip)
    trainer = pl.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        callbacks=[health],
        logger=False,
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    batches = DataLoader(train_set, batch_size=task.batch, shuffle=True, drop_last=True)
    trainer.fit(model, batches, DataLoader(test_set, batch_size=len(test_set)))
    loss = torch.stack(model.losses[-LAST:]).mean().item()
    return Outcome(float(trainer.callback_metrics["accuracy"]), loss, health.report())


def rows(results: dict[str, dict[str, Outcome]]) -> Iterator[tuple[str, ...]]:
    """The table's cells; of each task first the title, then its trainings."""
    for task in TASKS:
        yield (task.title, "", "", "")
        for remedy, (accuracy, loss, report) in results[task.name].items():
            shown = f"{loss:.3g}" if math.isfinite(loss) else str(loss)
            yield (remedy, f"{accuracy:.1%}", shown, report.verdict)


HEAD = ("remedy", "accuracy", "loss", "GradHealth says")


def table(results: dict[str, dict[str, Outcome]]) -> Table:
    shown = Table(title=f"Two sick networks and their remedies (loss: mean of the last {LAST} steps)")
    for title in HEAD:
        shown.add_column(title, overflow="fold", justify="right" if title in ("accuracy", "loss") else "left")
    for cells in rows(results):
        if not any(cells[1:]):
            shown.add_section()
            shown.add_row(cells[0], style="bold")
        else:
            shown.add_row(f"  {cells[0]}", *cells[1:], style="green" if cells[-1] == "healthy" else None)
    return shown


def markdown(results: dict[str, dict[str, Outcome]]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---|---:|---:|---|"]
    for first, *rest in rows(results):
        name = f"`{first}`" if any(rest) else f"**{first}**"
        lines.append(f"| {' | '.join((name, *rest))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Outcome]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the main rows, trained for less long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the layers are small: more threads only get in each other's way
    for name in ("lightning.pytorch", "lightning_gradhealth"):  # the verdicts are in the table
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*")

    console = Console()
    results: dict[str, dict[str, Outcome]] = {}
    for task in TASKS:
        split, found = task.data(), results.setdefault(task.name, {})
        for case in task.cases():
            if case.quick or not options.quick:
                with console.status(f"{task.title}: {case.remedy}"):
                    epochs = task.quick_epochs if options.quick else task.epochs
                    found[case.remedy] = train(task, case, split, epochs, options.seed)
    console.print(table(results))
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
        console.print(f"The same as Markdown: {options.markdown}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
