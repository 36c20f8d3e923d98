"""What the ranks measure of signals: the same model on parts of a batch, and fits by Lightning."""

from __future__ import annotations

import logging
from typing import Any

import fits
import lightning.pytorch as pl
import torch
from fits import Collectives, Fit, Watch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_gradhealth import GradHealth, HealthSession, Rule, StepRecord

STEPS, SAMPLES, EVERY = 8, 64, 4


class Keep(Rule):
    """Keeps every record as primitives."""

    condition = "keep"

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    def __deepcopy__(self, memo: Any) -> Keep:
        return self

    def check(self, record: StepRecord) -> None:
        self.records.append(record.to_dict())


class Net(nn.Module):
    """Its side branch is used by those batches whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.side, self.late = (
            nn.Linear(6, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, side: bool = False, late: bool = False) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        if side:
            h = h + self.side(h).tanh()
        if late:
            h = h + self.late(h).sigmoid()
        return self.head(h)


def batch(step: int) -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loop(steps: int = STEPS, how: str = "equal") -> dict[str, Any]:
    """A plain loop on this rank's part of every batch; one process has it all.

    Args:
        steps: How many.
        how: "equal"; "uneven": ranks have batches of different size; "side": only the last rank uses a branch; "late":
            all use a branch, but not at the first steps.
    """
    there = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)
    torch.manual_seed(3)
    model = Net().double()
    ready = DistributedDataParallel(model, find_unused_parameters=True) if there else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # all runs see the same weights
    keep, collectives = Keep(), Collectives()
    session = HealthSession(ready, probe_every_n_steps=EVERY, rules=[keep])
    session.signals.across_ranks = there
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(step).chunk(world)[rank]
        if how == "uneven":
            x = x[: 1 + 31 * rank]
        out = ready(x, side=how == "side" and rank == world - 1, late=how == "late" and step >= EVERY - 1)
        out.square().sum().backward()
        collectives.step = step
        with collectives:
            session.apply(session.observe(optimizer))
        optimizer.step()
        session.flush()
    note = session.signals.failure
    return {
        "records": keep.records,
        "collectives": [collectives.counts[step] for step in range(steps)],
        "hidden": session.signals.hidden,
        "failure": note,
    }


class Adversaries(pl.LightningModule):
    """Manual optimization of two networks, each with a step of its own in every batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        x = batch.chunk(world)[distributed.get_rank() if world > 1 else 0]
        first.zero_grad()
        self.manual_backward((self.critic(self.generator(x).detach()) - self.critic(x)).sum())
        first.step()
        second.zero_grad()
        self.manual_backward(-self.critic(self.generator(x)).sum())
        second.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.critic, self.generator)]


def adversaries(strategy: str) -> dict[str, Any]:
    """A fit; the rates are 0, so that all runs see the same weights."""
    keep = Keep()
    health = GradHealth(probe_every_n_steps=1, rules=[keep])
    devices = distributed.get_world_size() if distributed.is_initialized() else 1
    run = fits.trainer(health, strategy=strategy, devices=devices, max_steps=8)
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    run.fit(Adversaries(), DataLoader(batches, batch_size=None))
    report = health.report()
    return {"records": keep.records, "aside": report.aside, "notes": report.notes}


def fit(kind: str) -> dict[str, Any]:
    """A fit with every step probed, whose learning rate is 0."""
    keep, how = Keep(), Fit({"probe_every_n_steps": 1}, rate=0.0, steps=4)
    module, strategy, devices = fits.make(kind, how)
    health = GradHealth(probe_every_n_steps=1, rules=[keep])
    run = fits.trainer(health, Watch(how), strategy=strategy, devices=devices, max_steps=how.steps)
    run.fit(module, DataLoader(how.batches(), batch_size=None))
    report = health.report()
    return {"records": keep.records, "aside": report.aside, "notes": report.notes}


class FailsOnRankZero(GradHealth):
    """Steps aside on one rank only."""

    def _log(self, trainer: pl.Trainer, record: Any) -> None:
        if trainer.is_global_zero:
            raise OSError("no space left on device")


def alone(kind: str) -> dict[str, Any]:
    """A fit in which one rank steps aside, while the other goes on probing every step."""
    how = Fit({"probe_every_n_steps": 1}, steps=6)
    module, strategy, devices = fits.make(kind, how)
    health = FailsOnRankZero(probe_every_n_steps=1)
    run = fits.trainer(health, Watch(how), strategy=strategy, devices=devices, max_steps=how.steps, log_every_n_steps=2)
    run.fit(module, DataLoader(how.batches(), batch_size=None))
    return {"steps": run.global_step, "aside": health.report().aside, "seen": health.report().steps}


def everything() -> dict[str, Any]:
    """All that two ranks compute."""
    logging.getLogger("lightning_gradhealth").setLevel(logging.CRITICAL)  # in processes of their own
    answers: dict[str, Any] = {how: loop(20, how) for how in ("equal", "uneven", "side", "late")}
    answers |= {f"fit {kind}": fit(kind) for kind in ("ddp", "fsdp2", "tp", "sp", "fsdp1")}
    answers |= {f"alone {kind}": alone(kind) for kind in ("ddp", "fsdp2")}
    return {**answers, "adversaries": adversaries("ddp_find_unused_parameters_true")}
