"""What the ranks compute: gradients of the same model, split in every way, and their norms by the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import reference
import torch
from counting import host_reads
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lightning_gradhealth.layers import clean_name
from lightning_gradhealth.norms import norms
from lightning_gradhealth.sharding import Sharding, is_flat, is_partial, is_sharded, local, reduced

CPU = torch.device("cpu")
Results = dict[str, dict[str, Any]]


class Net(nn.Module):
    """Sizes that no number of ranks divides, a bias of one element, a parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 5)
        self.head = nn.Linear(5, 1)
        self.unused = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(x).tanh())).tanh())


class Sequence(nn.Module):
    """A block as in transformers: its norm works on slices of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 4)
        self.down = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(self.inp(x))).tanh())


def make(kind: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return kind().to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def backward(model: nn.Module, x: Tensor) -> None:
    out = model(x)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    (10 * out.square().mean()).backward()


def my_part(mesh: DeviceMesh | None = None) -> Tensor:
    """The samples of this data-parallel rank."""
    group = None if mesh is None else mesh.get_group()
    return batch().chunk(distributed.get_world_size(group))[distributed.get_rank(group)]


def truth(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Gradient norm and weight norm of every parameter, from one process."""
    model = copy.deepcopy(model)
    backward(model, x)
    return {
        name: (0.0 if p.grad is None else reference.norm(p.grad), reference.norm(p))
        for name, p in model.named_parameters()
    }


def measure(
    model: nn.Module, expected: dict[str, tuple[float, float]], only: Iterable[str] | None = None
) -> dict[str, Any]:
    """Everything that `Sharding` says of a model whose gradients are there, and what was expected."""
    named = {clean_name(name): p for name, p in model.named_parameters()}
    named = {name: p for name, p in named.items() if only is None or name in only}
    parameters = list(named.values())
    gradients = [p.grad for p in parameters]
    with CommDebugMode() as setup:
        sharding = Sharding.of(model, parameters)
    result = {
        "names": list(named),
        "setup": setup.get_total_counts(),
        "sharded": sharding is not None,
        "expected": [expected[name][0] for name in named],
        "expected_weights": [expected[name][1] for name in named],
        "none_here": [gradient is None for gradient in gradients],
        "empty_here": [local(p).numel() == 0 for p in parameters],
        "partial": sum(gradient is not None and is_partial(gradient) for gradient in gradients),
        "flat": [is_flat(p) for p in parameters],
        "split": [is_sharded(p) for p in parameters],
    }
    if sharding is None:
        return result
    for attempt in ("", "_again"):  # the second time from what the first has remembered
        with CommDebugMode() as comm:
            parts = norms([local(gradient) for gradient in gradients if gradient is not None])
            whole, present = sharding.reduce_gradients(parts, gradients)
        result |= {
            f"norms{attempt}": whole.tolist(),
            f"present{attempt}": present.tolist(),
            f"collectives{attempt}": comm.get_total_counts(),
        }
    own = norms([local(p) for p in parameters])
    with host_reads() as reads:
        sharding.reduce_gradients(parts, gradients)
        sharding.reduce(own)
    with CommDebugMode() as comm:
        weights, doubled = sharding.reduce(own, 2 * own)
    return {
        **result,
        "weights": weights.tolist(),
        "doubled": doubled.tolist(),
        "weight_collectives": comm.get_total_counts(),
        "host_reads": reads.count,
        "numel": sharding.numel,
        "true_numel": [p.numel() for p in parameters],
    }


def measure_again(model: nn.Module, gradients: list[Tensor]) -> list[float]:
    """The norms of other tensors in the place of the gradients."""
    sharding = Sharding.of(model, list(model.parameters()))
    assert sharding is not None
    return sharding.reduce_gradients(norms([local(gradient) for gradient in gradients]), gradients)[0].tolist()


# --- two ranks ---


def two() -> Results:
    return {
        "plain": plain(),
        "fsdp2": fsdp2(),
        "float16": low_precision(torch.float16),
        "bfloat16": low_precision(torch.bfloat16),
        "nan": nan_on_one_rank(),
        "nan_in_one_copy": nan_in_one_copy(),
        "tensor_parallel": tensor_parallel(),
        "sequence_parallel": sequence_parallel(),
        "fsdp1": fsdp1(),
        "fsdp1_one_rank": fsdp1(only=["up.weight"]),
        "fsdp1_nested": fsdp1(nested=True),
        "fsdp1_grad_op": fsdp1(ShardingStrategy.SHARD_GRAD_OP),
        "fsdp1_no_shard": fsdp1(ShardingStrategy.NO_SHARD),
        "fsdp1_one_flat": fsdp1_one_flat(),
        "odd": odd_layouts(init_device_mesh("cpu", (2,))),
        "comes_and_goes": comes_and_goes(),
        "lost_wrapper": lost_wrapper(),
    }


def plain() -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    backward(model, batch())
    return measure(model, expected)


def shard_all(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp2() -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    shard_all(model, init_device_mesh("cpu", (2,)))
    backward(model, my_part())
    return measure(model, expected)


def low_precision(dtype: torch.dtype) -> dict[str, Any]:
    """The same batch on both ranks, so that their average is exact."""
    model = make(dtype=dtype)
    expected = truth(model, batch(dtype))
    shard_all(model, init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    backward(model, batch(dtype))
    return measure(model, expected)


def nan_on_one_rank() -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    shard_all(model, init_device_mesh("cpu", (2,)))
    backward(model, my_part())
    if distributed.get_rank() == 1:
        local(model.down.weight.grad)[-1, -1] = torch.nan
        local(model.norm.bias.grad)[0] = torch.inf
    return measure(model, expected)


def nan_in_one_copy() -> dict[str, Any]:
    """The ranks should hold the same, but one does not."""
    model = make()
    expected = truth(model, batch())
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(output_layouts=Replicate())})
    backward(model, batch())
    if distributed.get_rank() == 0:
        model.head.weight.grad.fill_(torch.nan)
    return measure(model, expected)


def tensor_parallel() -> dict[str, Any]:
    """`norm`, `head` and `unused` stay plain."""
    model = make()
    expected = truth(model, batch())
    plan = {"up": ColwiseParallel(output_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    backward(model, batch())
    return measure(model, expected)


def sequence_plan() -> dict[str, Any]:
    return {
        "inp": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }


def sequence_parallel() -> dict[str, Any]:
    model = make(Sequence)
    expected = truth(model, batch())
    parallelize_module(model, init_device_mesh("cpu", (2,)), sequence_plan())
    backward(model, batch())
    before = [p.grad.to_local().clone() for p in model.parameters()]
    result = measure(model, expected)
    result["untouched"] = all(
        torch.equal(was, p.grad.to_local()) for was, p in zip(before, model.parameters(), strict=True)
    )
    sums = [reduced(p.grad) for p in model.parameters()]
    result["reduced"] = [whole is not p.grad for whole, p in zip(sums, model.parameters(), strict=True)]
    result["of_sums"] = measure_again(model, sums)
    result["of_parts"] = measure_again(model, [local(whole) for whole in sums])
    for p in model.parameters():
        p.grad.to_local().mul_(3.0)
    result["scaled"] = measure(model, expected)["norms"]
    return result


def flat(model: nn.Module, strategy: ShardingStrategy, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model, sharding_strategy=strategy, device_id=CPU, **{"use_orig_params": True, **options}
    )


def fsdp1(
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD, nested: bool = False, only: list[str] | None = None
) -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    numel = {name: p.numel() for name, p in model.named_parameters()}
    if nested:  # a wrapper within, with a strategy of its own
        model.down = flat(model.down, ShardingStrategy.NO_SHARD)
    wrapped = flat(model, strategy)
    backward(wrapped, my_part())
    result = measure(wrapped, expected, only)
    return {**result, "true_numel": [numel[name] for name in result["names"]]}


def fsdp1_one_flat() -> dict[str, Any]:
    """All parameters in one, and nothing else left."""
    model = make()
    expected = truth(model, batch())
    wrapped = flat(model, ShardingStrategy.FULL_SHARD, use_orig_params=False)
    backward(wrapped, my_part())
    grad = sum(g**2 for g, _ in expected.values()) ** 0.5
    weight = sum(w**2 for _, w in expected.values()) ** 0.5
    numel = sum(p.numel() for p in make().parameters())
    return {**measure(wrapped, {"_flat_param": (grad, weight)}), "true_numel": [numel + numel % 2]}  # padded


def odd_layouts(mesh: DeviceMesh) -> dict[str, Any]:
    """Gradients that are not split as their parameters are, and one that is still on its way."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    model = nn.Module()
    expected, dims = {}, mesh.ndim
    whole, split, summands = [Replicate()] * dims, [Shard(0)] * dims, [Partial()] * dims
    for name, owned, given in (
        ("replica_split", whole, split),
        ("split_replica", split, whole),
        ("replica_partial", whole, summands),
        ("columns", split, [Shard(1)] * dims),
        ("late", whole, None),
    ):
        p = nn.Parameter(distribute_tensor(value, mesh, owned))
        grad = distribute_tensor(value, mesh, given or split)
        p.grad = grad if given else grad.redistribute(placements=whole, async_op=True)
        model.register_parameter(name, p)
        expected[name] = (reference.norm(value), reference.norm(value))
    result = measure(model, expected)
    result["late"] = [type(p.grad.to_local()).__name__ for p in model.parameters()][-1]
    result["types"] = [type(local(p.grad)).__name__ for p in model.parameters()]
    return result


def comes_and_goes() -> dict[str, Any]:
    """Gradients that are there at one step and not at the next: what is remembered must follow."""
    model = make()
    shard_all(model, init_device_mesh("cpu", (2,)))
    parameters = list(model.parameters())
    sharding = Sharding.of(model, parameters)
    assert sharding is not None
    backward(model, my_part())
    seen = []
    for missing in (0, 3, None, 3):
        gradients = [None if slot == missing else p.grad for slot, p in enumerate(parameters)]
        parts = norms([local(gradient) for gradient in gradients if gradient is not None])
        whole, present = sharding.reduce_gradients(parts, gradients)
        seen.append((whole.tolist(), present.tolist()))
    return {"seen": seen}


def lost_wrapper() -> dict[str, Any]:
    wrapped = flat(make(), ShardingStrategy.FULL_SHARD)
    try:
        Sharding.of(wrapped.module, list(wrapped.parameters()))
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


# --- four ranks ---


def four() -> Results:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {
        "hsdp": hsdp(mesh),
        "copies": copies(mesh),
        "fsdp2_tp": fsdp2_and_tensor_parallel(mesh),
        "fsdp2_sp": fsdp2_and_sequence_parallel(mesh),
        "fsdp1_hybrid": fsdp1_hybrid(mesh),
        "odd": odd_layouts(mesh),
    }


def hsdp(mesh: DeviceMesh) -> dict[str, Any]:
    """Split over two ranks, and that twice."""
    model = make()
    expected = truth(model, batch())
    shard_all(model, mesh)
    backward(model, my_part())
    return measure(model, expected)


def copies(mesh: DeviceMesh) -> dict[str, Any]:
    """The mesh of the parameters is a part of the world: the rest holds copies that no placement shows."""
    model = make()
    expected = truth(model, batch())
    shard_all(model, mesh["inner"])
    backward(model, my_part(mesh["inner"]))
    return measure(model, expected)


def fsdp2_and_tensor_parallel(mesh: DeviceMesh) -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    plan = {"up": ColwiseParallel(output_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh["inner"], plan)
    shard_all(model, mesh["outer"])
    backward(model, my_part(mesh["outer"]))
    result = measure(model, expected)
    result["placements"] = [str(getattr(p, "placements", None)) for p in model.parameters()]
    return result


def fsdp2_and_sequence_parallel(mesh: DeviceMesh) -> dict[str, Any]:
    model = make(Sequence)
    expected = truth(model, batch())
    parallelize_module(model, mesh["inner"], sequence_plan())
    shard_all(model, mesh["outer"])
    backward(model, my_part(mesh["outer"]))
    return measure(model, expected)


def fsdp1_hybrid(mesh: DeviceMesh) -> dict[str, Any]:
    model = make()
    expected = truth(model, batch())
    numel = [p.numel() for p in model.parameters()]
    wrapped = flat(model, ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)
    backward(wrapped, my_part())
    return {**measure(wrapped, expected), "true_numel": numel}
