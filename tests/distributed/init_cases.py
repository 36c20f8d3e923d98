"""What the ranks compute: tensors filled in part, and models that become real by several ways of splitting them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from fits import trainer
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gradhealth.init import InitContext, init_weights, plan_init, register_initializer
from lightning_gradhealth.sharding import fill, local

SEED = 3
OPTIONS: dict[str, Any] = {"scheme": "he", "seed": SEED, "skip": r"frozen\..*"}

LOADED = ("up.weight", "lstm.weight_hh_l0")

Results = dict[str, dict[str, Any]]


# --- tensors ---


def placements(world: int) -> Iterator[tuple[str, DeviceMesh, list[Any]]]:
    """Every way of splitting a tensor of two axes that `distribute_tensor` knows."""
    line = init_device_mesh("cpu", (world,))
    for name, each in {"rows": Shard(0), "columns": Shard(1), "last": Shard(-1), "copies": Replicate()}.items():
        yield name, line, [each]
    grid = init_device_mesh("cpu", (world // 2, 2))
    for first in (Shard(0), Shard(1), Replicate()):
        for second in (Shard(0), Shard(1), Replicate()):
            yield f"{first} {second}", grid, [first, second]


SHAPES = [(8, 4), (5, 3), (1, 7), (3, 1), (0, 2)]


def filled(world: int) -> Results:
    """Tensors filled by the package, and whether they are what torch itself makes of the whole."""
    results: Results = {}
    for name, mesh, split in placements(world):
        right, whole, silent = [], [], []
        for shape in SHAPES:
            full = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            expected = distribute_tensor(full.bfloat16(), mesh, split)
            target = distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), mesh, split)
            with CommDebugMode() as comm:
                fill(nn.Parameter(target), full)
            silent.append(comm.get_total_counts() == 0)
            right.append(torch.equal(target.to_local(), expected.to_local()))
            whole.append(torch.equal(target.full_tensor(), full.bfloat16()))
        results[name] = {"right": all(right), "whole": all(whole), "silent": all(silent)}
    return results


def part(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).clone()


def filled_strided() -> Results:
    """FSDP2 over tensor parallelism cuts up what is cut out already; the truth is what it makes of a real model."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    results: Results = {}
    for rows, columns in ((8, 8), (6, 5), (9, 7), (3, 3), (2, 9)):
        model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, columns))
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        for value in whole.values():
            distributed.broadcast(value, 0)
        model.load_state_dict(whole)
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        expected = {name: part(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.zero_()
            fill(p, whole[name])
        results[f"{rows}x{columns}"] = {
            "wrong": [name for name, p in model.named_parameters() if not torch.equal(part(p), expected[name])],
            "strided": any("_StridedShard" in repr(p.placements) for p in model.parameters()),
            "empty": any(local(p).numel() == 0 for p in model.parameters()),
        }
    return results


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refused() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    odd = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)], run_check=False, shape=(4, 2), stride=(2, 1))
    return {
        "partial": error_of(lambda: fill(DTensor.from_local(torch.zeros(2), mesh, [Partial()]), torch.zeros(2))),
        "flat": error_of(lambda: fill(flat.weight, torch.zeros(4, 4))),
        "shape": error_of(lambda: fill(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]), torch.zeros(2, 2))),
        "odd": error_of(lambda: fill(odd, torch.zeros(4, 2))),
    }


def outside_the_mesh() -> bool:
    """A rank that holds nothing of a tensor has nothing to fill."""
    mesh = DeviceMesh("cpu", [0])
    target = DTensor.from_local(torch.zeros(2), mesh, [Replicate()], run_check=False)
    fill(target, torch.ones(2))
    return target.to_local().tolist() == ([1.0, 1.0] if distributed.get_rank() == 0 else [])


# --- models ---


class Raw(nn.Module):
    """Parameters of its own, a buffer that it makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.ones(3, 5))
        self.gates = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))])
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)

    def reset_parameters(self) -> None:
        self.mask.copy_(torch.ones(3, 3).tril())


@register_initializer(Raw)
def raw(module: Raw, context: InitContext) -> None:
    context.weight_(module.mixing, fan_in=3, fan_out=5)
    for gate in module.gates:
        context.weight_(gate, fan_in=4, fan_out=4)


class Zoo(nn.Module):
    """All sorts of modules, in sizes that two ranks do not divide among them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6, padding_idx=1)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.batch = nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.lstm = nn.LSTM(6, 3, bidirectional=True)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.low = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.raw = Raw()
        self.frozen = nn.Linear(3, 3)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).tanh()))


class Traced(nn.Module):
    """What only a forward pass shows: activations as functions, raw weights, a residual branch without norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.mixing = nn.Parameter(torch.randn(10, 3, 5))
        self.slope = nn.PReLU()
        self.inner, self.outer = nn.Linear(15, 8), nn.Linear(8, 15)
        self.head = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.stem(x))
        x = self.slope(torch.einsum("bi,iho->bho", x, self.mixing)).flatten(1)
        x = x + self.outer(self.inner(x).relu())
        return self.head(x * torch.sigmoid(x))


def traced() -> dict[str, Any]:
    """The gains that a forward pass shows are the same on meta, before sharding and in one process."""
    sample, options = torch.zeros(4, 6), {"seed": SEED, "residual": "depth"}
    model = Traced()
    gains = [entry.gain for entry in init_weights(model, sample, **options).entries if entry.gain]
    expected = gathered(model)
    answer: dict[str, Any] = {"gains": gains}
    with torch.device("meta"):
        late = Traced()
    plan_init(late, sample, **options, overrides={"slope.*": {"value": 0.25}}).bind()
    for layer in (late.inner, late):
        fully_shard(layer)
    late.to_empty(device="cpu")
    reset_all(late)
    answer["bound"] = differing(gathered(late), expected)
    real = Traced()
    plan = plan_init(real, sample, **options)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    parallelize_module(real, mesh, {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
    answer["refused"] = error_of(lambda: init_weights(real, sample, **options))
    plan.apply()
    answer["applied"] = differing(gathered(real), expected)
    return answer


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by all their names, whole; every rank has to call it."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    found = {name: tensor.detach() for name, tensor in named}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def alone() -> dict[str, Tensor]:
    """The truth: what one process makes of a real model."""
    model = Zoo()
    init_weights(model, **OPTIONS)
    return gathered(model)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of what is not the same, bit for bit; frozen ones aside, which one process makes at random."""
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.startswith("frozen.")]
    return [n for n in names if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    fully_shard(model.low, mesh=mesh)  # of another dtype than the rest
    fully_shard(model.down, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "norm": SequenceParallel()}
    parallelize_module(model, mesh, plan)


class Late(pl.LightningModule):
    """Has no model before Lightning says where; then it is made on the meta device, bound and split."""

    def __init__(self, split: Callable[[nn.Module, DeviceMesh], None], rate: float = 0.0) -> None:
        super().__init__()
        self.split, self.rate = split, rate
        self.net: Zoo | None = None
        self.found: dict[str, Tensor] = {}
        self.kinds: set[str] = set()

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = Zoo()
            plan_init(self.net, **OPTIONS).bind()
            self.split(self.net, self.device_mesh)

    def on_train_start(self) -> None:
        self.found = gathered(self.net)
        self.kinds = {"split" if isinstance(p, DTensor) else "whole" for p in self.net.parameters()}

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [*self.net.up.parameters(), *self.net.down.parameters(), *self.net.head.parameters()]
        return torch.optim.Adam(trained, lr=self.rate)


def fit(module: Late, data: int, steps: int = 1, resume: str = "") -> pl.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    strategy = ModelParallelStrategy(data, distributed.get_world_size() // data, save_distributed_checkpoint=False)
    run = trainer(strategy=strategy, devices=distributed.get_world_size(), max_steps=steps, num_sanity_val_steps=0)
    batches = DataLoader(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)).unbind(), batch_size=None)
    run.fit(module, batches, batches, **({"ckpt_path": resume, "weights_only": True} if resume else {}))
    return run


def by_fsdp2(model: nn.Module, mesh: DeviceMesh) -> None:
    shard(model, mesh["data_parallel"])


def by_columns_and_rows(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize(model, mesh["tensor_parallel"])


def by_both(model: nn.Module, mesh: DeviceMesh) -> None:
    by_columns_and_rows(model, mesh)
    by_fsdp2(model, mesh)


def materialised(split: Callable[[nn.Module, DeviceMesh], None], data: int) -> dict[str, Any]:
    """By Lightning, in a real fit."""
    module = Late(split)
    fit(module, data)
    return {
        "wrong": differing(module.found, alone()),
        "kinds": module.kinds,
        "frozen": [module.found[f"frozen.{name}"] for name in ("weight", "bias")],
        "mine": {name: part(p) for name, p in module.net.named_parameters()},
    }


def by_fabric() -> dict[str, Any]:
    def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        by_fsdp2(model, mesh)
        return model

    world = distributed.get_world_size()
    fabric = Fabric(
        accelerator="cpu",
        devices=world,
        strategy=FabricStrategy(split, data_parallel_size=world, tensor_parallel_size=1),
    )
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = Zoo()
    was_meta = all(p.is_meta for p in model.parameters())
    plan_init(model, **OPTIONS).bind()
    wrapped = fabric.setup(model)
    return {"wrong": differing(gathered(wrapped.module), alone()), "was_meta": was_meta}


def bound_late() -> dict[str, Any]:
    """Bound after it was split, and materialised as torch's own recipe has it, in any order."""
    with torch.device("meta"):
        model = Zoo()
    shard(model)
    plan_init(model, **OPTIONS).bind()
    model.to_empty(device="cpu")
    for module in reversed(list(model.modules())):
        getattr(module, "reset_parameters", lambda: None)()
    return {"wrong": differing(gathered(model), alone())}


def partly_real() -> dict[str, Any]:
    """A pretrained part holds its values; to_empty() loses them, and those that a checkpoint has brought already."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        model = Zoo()
    model.frozen = nn.Linear(3, 3).requires_grad_(False)
    nn.init.normal_(model.frozen.weight, generator=generator)
    real = model.frozen.weight.detach().clone()
    plan_init(model, **OPTIONS).bind()
    shard(model)
    loaded = {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in LOADED}
    strict = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, {"frozen.weight": real, **loaded}, options=strict)
    assigned = not any(model.get_parameter(name).is_meta for name in LOADED)
    model.to_empty(device="cpu")
    reset_all(model)
    found = gathered(model)
    return {
        "wrong": differing(found, alone()),
        "loaded": differing({name: found[name] for name in LOADED}, loaded),
        "kept": torch.equal(found["frozen.weight"], real),
        "assigned": assigned,
    }


def split_already(split: Callable[[nn.Module], None]) -> dict[str, Any]:
    """A real model whose parameters are DTensors."""
    model = Zoo()
    split(model)
    before = gathered(model.frozen)
    with CommDebugMode() as comm:
        init_weights(model, **OPTIONS)
    return {
        "wrong": differing(gathered(model), alone()),
        "frozen": differing(gathered(model.frozen), before),
        "collectives": comm.get_total_counts(),
    }


def checkpoints() -> dict[str, Any]:
    """Loaded into split parameters, before and after these have got the values of the plan."""
    whole = {name: torch.full_like(value, 2) for name, value in Zoo().state_dict().items()}
    answer = {}
    for early in (True, False):
        with torch.device("meta"):
            model = Zoo()
        plan_init(model, **OPTIONS).bind()
        shard(model)
        model.to_empty(device="cpu")
        for again in (early, False):
            if not again:
                reset_all(model)
            set_model_state_dict(model, dict(whole), options=StateDictOptions(full_state_dict=True))
        reset_all(model)
        found = {name: value for name, value in gathered(model).items() if name in whole}
        answer["before" if early else "after"] = differing(found, whole)
    return answer


def reset_all(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def resumed(path: str) -> dict[str, Any]:
    """A fit that trains, and one that goes on from its checkpoint, each from the meta device."""
    first = Late(by_fsdp2, rate=0.1)
    run = fit(first, distributed.get_world_size(), steps=2)
    trained = gathered(first.net)
    run.save_checkpoint(path)
    run.validate(first, run.val_dataloaders, verbose=False)
    validated = gathered(first.net)
    second = Late(by_fsdp2, rate=0.1)
    fit(second, distributed.get_world_size(), steps=3, resume=path)
    went_on = gathered(second.net)
    reset_all(second.net)
    return {
        "moved": differing(trained, first.found),
        "validated": differing(validated, trained),
        "resumed": differing(second.found, trained),
        "reset": differing(gathered(second.net), went_on),
        "hooks": [key for key in torch.load(path, weights_only=True)["state_dict"] if "reset" in key],
    }


def two(folder: str) -> dict[str, Any]:
    torch.rand(1 + distributed.get_rank())  # the ranks' random states differ
    mesh = init_device_mesh("cpu", (2,))
    return {
        "filled": filled(2),
        "refused": refused(),
        "outside": outside_the_mesh(),
        "fsdp2": materialised(by_fsdp2, 2),
        "tp": materialised(by_columns_and_rows, 1),
        "fabric": by_fabric(),
        "late": bound_late(),
        "partly": partly_real(),
        "traced": traced(),
        "real_fsdp2": split_already(shard),
        "real_tp": split_already(lambda model: parallelize(model, mesh)),
        "checkpoints": checkpoints(),
        "resumed": resumed(f"{folder}/last.ckpt"),
    }


def four() -> dict[str, Any]:
    return {"filled": filled(4), "strided": filled_strided(), "fsdp2_tp": materialised(by_both, 2)}
