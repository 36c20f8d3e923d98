"""GradHealth from a YAML file, through LightningCLI: clip objects by class_path, a rule of one's own, thresholds.

A small network learns scikit-learn's handwritten digits (no download) in a few seconds. What is watched and how it is
clipped stands in `lightning_cli.yaml`; a value that cannot be is told in a line or two.

    pip install "lightning-gradhealth[examples,cli]"
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from __future__ import annotations

import re
from typing import NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradhealth as gh


class Digits(pl.LightningModule):
    def __init__(self, depth: int = 8, width: int = 64, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        layers = [part for _ in range(depth - 1) for part in (nn.LazyLinear(width), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.LazyLinear(10))
        self.net(torch.zeros(1, 64))
        gh.init_weights(self.net, torch.zeros(1, 64), seed=0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class DigitsData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True)


class LossAbove(gh.Rule):
    """A rule of one's own: the loss is larger than it may be."""

    condition = "loss_above"

    def __init__(self, limit: float, patience: int = 3) -> None:
        super().__init__()
        self.limit, self.patience = limit, patience

    def check(self, record: gh.StepRecord) -> gh.Verdict | None:
        losses = [step.loss for step in record.window if step.loss is not None]
        if not losses or min(losses) <= self.limit:
            return None
        return gh.Verdict("warning", f"the loss is above {self.limit:g}: {min(losses):.3g}", "lower the learning rate")


class Parser(LightningArgumentParser):
    """Says what is wrong with a value, and not all that it could have been instead."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse tells of every type that was tried; what a class itself says of a value is the line that counts
        tried = r"- (?:Expected a |Not a valid subclass|Problem with given class_path|Does not validate)"
        lines = [line.strip() for line in message.splitlines()]
        said = [line[2:] for line in lines if line.startswith("- ") and not re.match(tried, line)]
        said = [line for line in said if not line.startswith(("a class path", "a dict ", "an import"))]
        said += [line for line in lines if "is not accepted" in line]
        self.exit(2, "".join(f"error: {line}\n" for line in dict.fromkeys(said) or [message]))


class Cli(LightningCLI):
    """LightningCLI whose errors are short."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            self.parser.error(str(error))


def main(arguments: ArgsType = None) -> Cli:
    cli = Cli(
        Digits, DigitsData, args=arguments, parser_class=Parser, save_config_callback=None, seed_everything_default=0
    )
    for callback in cli.trainer.callbacks:
        if isinstance(callback, gh.GradHealth):
            print(callback.report().verdict)
    return cli


if __name__ == "__main__":
    main()
