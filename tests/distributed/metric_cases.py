"""What the ranks compute with metrics: each rank has a part of the samples, or of the gradients."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import reference
import torch
from cases import Sequence, backward, batch, flat, make, my_part, sequence_plan, shard_all
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection

from lightning_gradhealth.metrics import (
    DeadUnitFraction,
    GradientNorm,
    GradientNormRatio,
    SaturatedUnitFraction,
    SignalGain,
)

Answer = dict[str, Any]
ROWS = (5, 3)  # samples of each rank in each of two updates
UNITS = 12


def samples() -> Tensor:
    """Before the activation, for both ranks; some units are dead, or saturated, on one of them only."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2 * sum(ROWS), UNITS, generator=generator, dtype=torch.float64)
    x[:, :4] -= 20.0
    x[-1, :2] = 1.0  # on the last rank these are alive
    return x


def parts(rank: int) -> list[Tensor]:
    start, rows = 2 * sum(ROWS[:rank]), ROWS[rank]
    return [samples()[start + update * rows : start + (update + 1) * rows] for update in (0, 1)]


def metrics(**options: Any) -> dict[str, Metric]:
    return {
        "dead": DeadUnitFraction(**options),
        "saturated": SaturatedUnitFraction("sigmoid", **options),
        "gain": SignalGain(**options),
    }


def give(metrics: dict[str, Metric], x: Tensor) -> None:
    metrics["dead"].update(x.relu())
    metrics["saturated"].update(x.sigmoid())
    metrics["gain"].update(x, x.sigmoid())


def results(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: metric.compute().item() for name, metric in metrics.items()}


def two() -> Answer:
    return {
        "uneven": uneven(),
        "one_rank": one_rank(),
        "nowhere": results(metrics()),
        "calls": calls(),
        "mismatch": mismatch(),
        "ddp": gradients(DistributedDataParallel(make(Sequence)), my_part()),
        "fsdp2": gradients(shard_all(make(Sequence), init_device_mesh("cpu", (2,))), my_part()),
        "fsdp1": gradients(flat(make(Sequence), ShardingStrategy.FULL_SHARD), my_part()),
        "sequence_parallel": gradients(
            parallelize_module(make(Sequence), init_device_mesh("cpu", (2,)), sequence_plan()), batch()
        ),
        "apart": apart(),
        "fit": fit(),
    }


def uneven() -> Answer:
    """Each rank its own number of samples; twice computed, and once more after another update."""
    here = metrics()
    for part in parts(distributed.get_rank()):
        give(here, part)
    first, again = results(here), results(here)
    give(here, parts(distributed.get_rank())[0])
    local = metrics(sync_on_compute=False)
    for part in parts(distributed.get_rank()):
        give(local, part)
    return {"first": first, "again": again, "more": results(here), "local": results(local)}


def one_rank() -> dict[str, float]:
    """The first rank has seen nothing."""
    here = metrics()
    if distributed.get_rank() == 1:
        for part in parts(1):
            give(here, part)
    return results(here)


def calls() -> Answer:
    """With `dist_sync_on_step` a call gives the value of this batch over all ranks."""
    metric = DeadUnitFraction(dist_sync_on_step=True)
    steps = [metric(part.relu()).item() for part in parts(distributed.get_rank())]
    return {"steps": steps, "all": metric.compute().item()}


def mismatch() -> str:
    metric = DeadUnitFraction()
    metric.update(torch.ones(2, 3 + distributed.get_rank()))
    try:
        metric.compute()
    except ValueError as error:
        return str(error)
    return ""


def gradients(model: nn.Module, x: Tensor) -> Answer:
    """Two updates, of the gradients and of three times as large ones, through a collection."""
    collection = MetricCollection(
        {
            "mean": GradientNorm(),
            "greatest": GradientNorm("max"),
            "ratios": GradientNormRatio(),
            "smallest": GradientNormRatio(reduction="min"),
        }
    )
    backward(model, x)
    collection.update(model=model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(3.0)
    collection.update(model=model)
    return {
        **{name: value.tolist() for name, value in collection.compute().items()},
        "names": collection["ratios"].layer_names,
        "of_parameters": of_parameters(model),
    }


def of_parameters(model: nn.Module) -> float | str:
    try:
        return GradientNorm()(model.parameters()).item()
    except ValueError as error:
        return str(error)


def expected_gradients() -> Answer:
    """The same in one process, by the twin."""
    model = make(Sequence)
    backward(model, batch())
    norm = math.hypot(*reference.layer_norms(model).values())
    ratios = reference.norm_ratios(model)
    return {
        "mean": 2 * norm,
        "greatest": 3 * norm,
        "ratios": list(ratios.values()),
        "smallest": min(ratios.values()),
        "names": tuple(ratios),
        "of_parameters": 3 * norm,
    }


def apart() -> float:
    """Gradients that differ over ranks, as before they are reduced: the mean of the norms."""
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([3.0, 4.0]) * (1 + distributed.get_rank())
    metric = GradientNorm()
    metric.update(weight)
    return metric.compute().item()


class Logged(pl.LightningModule):
    """Logs what its only layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(UNITS, UNITS).double()
        self.dead, self.norm = DeadUnitFraction(), GradientNorm()
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(UNITS))
            self.layer.bias.zero_()

    def training_step(self, x: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.layer(x[0]).relu()
        self.dead.update(hidden)
        self.log("dead", self.dead, on_step=False, on_epoch=True)
        return hidden.square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norm.update(self)
        self.log("norm", self.norm, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit() -> dict[str, float]:
    """An epoch of one batch on each rank."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Logged(), DataLoader(TensorDataset(samples()), batch_size=sum(ROWS)))
    return {name: value.item() for name, value in trainer.logged_metrics.items()}
