"""Real Trainer fits on several ranks, each way of splitting a model, and everything that GradHealth says of them."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_gradhealth import GradHealth
from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.layers import clean_name
from lightning_gradhealth.sharding import local

STEPS = 20
PROBES = 5  # weights are probed at every fifth step, and at the first two
COUNTED = 6  # so many steps have their collectives counted, which takes time
BATCH, LENGTH, WIDTH = 8, 4, 6
CPU = torch.device("cpu")

Answer = dict[str, Any]


class Power(nn.Module):
    """Tame where its input is, and Inf where that is 1e10: a fault that only some batches bring about."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * x**5


class Net(nn.Module):
    """A block as in transformers, and a plain head; sizes that two ranks do not divide among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, 16)
        self.power = Power()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.norm(self.power(self.inp(x)))).tanh()).tanh())


@dataclass(frozen=True)
class Fit:
    """One fit. The batches are those of one process: each data-parallel rank takes its part of them.

    Attributes:
        health: What GradHealth is given; None: there is no GradHealth.
        optimizer: Makes the optimizer.
        rate: Its learning rate.
        more: Its other options.
        steps: How many.
        spikes: Steps whose targets are a thousand times as large.
        bad: Steps at which the last sample of the batch, which the last rank gets, overflows in `Net.power`.
        nan: Steps at which it is NaN already.
        late: Steps at which only the loss of the last rank is NaN, after the ranks have exchanged their outputs.
        poisoned: A step before which the last rank's part of one weight becomes NaN.
        options: Of the Trainer.
        resume: A checkpoint to go on from.
        save: Where to leave one at the end.
    """

    health: dict[str, Any] | None = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    rate: float = 0.05
    more: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    spikes: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    poisoned: int = -1
    options: dict[str, Any] = field(default_factory=dict)
    resume: str = ""
    save: str = ""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
        y = x.sum(-1, keepdim=True).sin() * (1000.0 if step in self.spikes else 1.0)
        if step in self.bad:
            x[-1] *= 1e10
        if step in self.nan:
            x[-1, 0, 0] = torch.nan
        return x, y

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch(step) for step in range(self.steps)]


ADAPTIVE = Fit({"clip": "adaptive"}, steps=24, spikes=(22,))


class Module(pl.LightningModule):
    """Takes its part of each batch, and the mean loss of it."""

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = Net()
        self.fit = fit
        self.parts, self.part = 1, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.fit.resume:
            batch = self.fit.batch(batch_idx)  # Lightning goes on counting, but begins the data again
        x, y = (side.chunk(self.parts)[self.part] for side in batch)
        out = self(x)
        loss = 5.0 * (out - y).square().mean()
        if self.fit.late:
            everyone = self.all_gather(out, sync_grads=True)
            bad = batch_idx in self.fit.late and self.part == self.parts - 1
            loss = loss * (torch.nan if bad else 1.0) + 0.1 * everyone.mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.fit.optimizer(self.parameters(), lr=self.fit.rate, **self.fit.more)

    def take_part(self, mesh: DeviceMesh | None = None) -> None:
        """Share the data among the ranks of a mesh of one dimension, or among all."""
        group = None if mesh is None else mesh.get_group()
        self.parts, self.part = distributed.get_world_size(group), distributed.get_rank(group)


class Split(Module):
    """Split by `split`, which says how the data are shared as well."""

    def __init__(self, fit: Fit, split: Callable[[Module], None]) -> None:
        super().__init__(fit)
        self.split: Callable[[Module], None] | None = split

    def configure_model(self) -> None:
        if self.split is not None:  # Lightning may call twice
            self.split(self)
            self.split = None


class FSDPOnCPU(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning refuses; two layers have a wrapper of their own."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        options = {"device_id": CPU, "sharding_strategy": self.sharding_strategy, **self.kwargs}
        model.net.inp = FullyShardedDataParallel(model.net.inp, **options)
        model.net.up = FullyShardedDataParallel(model.net.up, **options)
        return FullyShardedDataParallel(model, **options)


def _shard_all(module: Module, mesh: DeviceMesh) -> None:
    """Two layers each on its own; the rest belongs to the root, which gathers once and keeps it until the backward."""
    for child in (module.net.norm, module.net.up):
        fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _fsdp2(module: Module) -> None:
    _shard_all(module, module.device_mesh["data_parallel"])
    module.take_part(module.device_mesh["data_parallel"])


def _hsdp(module: Module) -> None:
    _shard_all(module, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    module.take_part()


def _columns_and_rows(module: Module) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(module.net, module.device_mesh["tensor_parallel"], plan)


def _sequence(module: Module) -> None:
    plan = {
        "inp": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(module.net, module.device_mesh["tensor_parallel"], plan)


def _both(module: Module) -> None:
    _columns_and_rows(module)
    _fsdp2(module)


def make(kind: str, fit: Fit) -> tuple[Module, Strategy | str, int]:
    """The module, the strategy and the number of devices."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if kind == "one":
        return Module(fit), "auto", 1
    if kind == "ddp":
        return Module(fit), kind, world
    if kind == "ddp_spawn":
        return Module(fit), kind, 2
    if kind == "fsdp1":
        return Module(fit), FSDPOnCPU(), world
    split, data = {
        "fsdp2": (_fsdp2, world),
        "tp": (_columns_and_rows, 1),
        "sp": (_sequence, 1),
        "hsdp": (_hsdp, world),
        "fsdp2_tp": (_both, 2),
    }[kind]
    return Split(fit, split), ModelParallelStrategy(data, world // data, save_distributed_checkpoint=False), world


# --- what is watched ---


class Collectives(TorchDispatchMode):
    """Counts what goes over the wire, by the Trainer's step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.counts: collections.Counter[int] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(("wait", "_wrap")):
            self.counts[self.step] += 1
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it take itself apart first
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Keeps everything that a fit did on this rank; it stands behind GradHealth among the callbacks."""

    def __init__(self, fit: Fit, folder: Path | None = None) -> None:
        self.fit = fit
        self.folder = folder
        self.health: GradHealth | None = None
        self.collectives = Collectives()
        self.before: dict[str, Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.unchanged: dict[int, bool] = {}
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.health = next((c for c in trainer.callbacks if isinstance(c, GradHealth)), None)
        if isinstance(pl_module, Module) and distributed.is_initialized() and not isinstance(pl_module, Split):
            pl_module.take_part()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step < COUNTED:
            self.collectives.step = trainer.global_step
            self.collectives.__enter__()
        if trainer.global_step == self.fit.poisoned and distributed.get_rank() == distributed.get_world_size() - 1:
            local(pl_module.net.up.weight.detach())[-1, -1] = torch.nan
        watched = trainer.global_step in (*self.fit.bad, *self.fit.nan, *self.fit.late)
        self.before = state_of(trainer) if watched else {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step - 1 == self.collectives.step:
            self.collectives.__exit__(None, None, None)
            self.collectives.step = -1
        if self.before:
            after = state_of(trainer)
            same = self.before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in self.before.items())
            self.unchanged[trainer.global_step - 1] = same and all(v.isfinite().all() for v in after.values())
        session = None if self.health is None else self.health._session
        if session is not None and session._last.window:
            self.steps.append(vars(session._last.window[-1]))
            self.layers.append({layer.name: vars(layer) for layer in session._last.layers})

    def on_exception(self, *_: Any) -> None:
        if self.collectives.step >= 0:
            self.collectives.__exit__(None, None, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        flat = isinstance(trainer.strategy.model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model) if flat else contextlib.nullcontext():
            for name, p in pl_module.named_parameters():
                whole = p.full_tensor() if isinstance(p, DTensor) else p
                self.weights[clean_name(name)] = whole.detach().clone()
        if self.folder is not None:
            torch.save(self.answer(), self.folder / f"{trainer.global_rank}.pt")

    def answer(self) -> Answer:
        """All of it, in a form that can be pickled and compared."""
        mine: Answer = {
            "steps": self.steps,
            "layers": self.layers,
            "unchanged": self.unchanged,
            "weights": self.weights,
            "collectives": [self.collectives.counts[step] for step in range(min(COUNTED, self.fit.steps))],
        }
        if self.health is not None:
            report = self.health.report()
            mine["report"] = json.loads(report.to_json())
            mine["findings"] = {str(finding.condition.value): str(finding) for finding in report.findings}
            mine["clippers"] = self.health.state_dict().get("monitor", {}).get("clippers")
        return mine


def state_of(trainer: pl.Trainer) -> dict[str, Tensor]:
    """A copy of this rank's part of the weights, and of everything that the optimizer remembers of them."""
    (optimizer,) = trainer.optimizers
    found = {}
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        entries = {"parameter": p.detach(), **optimizer.state.get(p, {})}
        found |= {f"{number}.{name}": local(value).detach().clone() for name, value in entries.items()}
    return found


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


def run(kind: str, fit: Fit, folder: Path | None = None) -> Answer:
    """Run one fit, and return what this rank has seen of it."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_gradhealth")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        return _run(kind, fit, folder)
    finally:  # one process is the tests' own
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _run(kind: str, fit: Fit, folder: Path | None) -> Answer:
    module, strategy, devices = make(kind, fit)
    watch = Watch(fit, folder)
    health = [] if fit.health is None else [GradHealth(**{"probe_every_n_steps": PROBES, **fit.health})]
    options = {"max_steps": fit.steps, **fit.options}
    run = trainer(*health, watch, strategy=strategy, devices=devices, **options)
    resume = {"ckpt_path": fit.resume, "weights_only": True} if fit.resume else {}
    error = ""
    try:
        run.fit(module, DataLoader(fit.batches(), batch_size=None), **resume)
    except GradHealthError as raised:
        error = f"{type(raised).__name__}: {raised}"
    if fit.save:
        run.save_checkpoint(fit.save)
    return {"error": error, "stopped": run.should_stop, **watch.answer()}


def run_all(fits: dict[str, tuple[str, Fit]]) -> dict[str, Answer]:
    """One after the other, in these processes."""
    return {name: run(*each) for name, each in fits.items()}


def plain_loop(fit: Fit, max_norm: float) -> tuple[list[float], dict[str, Tensor]]:
    """The slow twin: norms of every step and weights at the end, of SGD with clipping by norm, spelt out."""
    module = Module(fit)
    found = []
    for x, y in fit.batches():
        module.zero_grad()
        (5.0 * (module(x) - y).square().mean()).backward()
        norm = sum(p.grad.double().square().sum().item() for p in module.parameters()) ** 0.5
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(fit.rate * p.grad * min(1.0, max_norm / norm))
        found.append(norm)
    return found, {name: p.detach() for name, p in module.named_parameters()}
