"""What the tests share: one thread, a fixed seed, small models."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import companions  # noqa: F401  (before lightning, which comes to import torchvision)
import lightning.pytorch as pl
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
settings.register_profile("project", deadline=None, derandomize=True)  # the same examples on any machine, in any time
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random models to try (the same 100 each time, unless more are asked for), and how much of the zoo."""
    parser.addoption("--random-models", type=int, default=None, help="try so many random models, others each time")
    parser.addoption("--zoo", action="store_true", help="try all architectures of tests/zoo, not only the daily ones")


@pytest.fixture(autouse=True)
def quiet_and_repeatable() -> Iterator[None]:
    """One thread, a fixed seed, and none of Lightning's advice on small data."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        for advice in (
            ".*does not have many workers.*",
            ".*The number of training batches.*",
            ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
            "Sparse invariant checks are implicitly disabled.*",
            ".*Sparse CSR tensor support is in beta state.*",
            ".*callbacks used to create the checkpoint need to be provided.*",
            ".*`training_step` returned `None`.*",
            ".*GPU available but not used.*",
            ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ):
            warnings.filterwarnings("ignore", message=advice)
        logger = logging.getLogger("lightning_gradhealth")
        level = logger.level
        yield
        logger.setLevel(level)  # examples silence it


def mlp(depth: int = 4, width: int = 16, inputs: int = 8, outputs: int = 3) -> nn.Sequential:
    """ReLU layers between `inputs` and `outputs`."""
    widths = [inputs] + [width] * (depth - 1)
    hidden = [module for pair in zip(widths, widths[1:]) for module in (nn.Linear(*pair), nn.ReLU())]  # noqa: B905
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class Classifier(pl.LightningModule):
    """A small classifier around any network."""

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        super().__init__()
        self.net = net if net is not None else mlp()
        self.make_optimizer = optimizer
        self.options = options or {"lr": 0.05}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), **self.options)


def batches(samples: int = 64, size: int = 8, inputs: int = 8, outputs: int = 3, shuffle: bool = False) -> DataLoader:
    """Learnable data: the class is the largest of the first inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, inputs, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :outputs].argmax(1)), batch_size=size, shuffle=shuffle)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer that writes nothing, unless told otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
        "max_epochs": 100,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test a registry of initializers of its own."""
    from lightning_gradhealth.init import handlers

    fresh = functools.singledispatch(handlers.initialize.registry[object])
    for kind, handler in handlers.initialize.registry.items():
        fresh.register(kind, handler)
    monkeypatch.setattr(handlers, "initialize", fresh)
    monkeypatch.setattr(handlers, "_RULES", dict(handlers._RULES))
