"""The only place that knows how strategies split a tensor over ranks.

A tensor is plain (the same on every rank), a DTensor (FSDP2, tensor parallelism) or a flat shard of FSDP1. The norm
of the whole is the root of the sum, over all ranks, of the squared norms of the parts. A part that several ranks
hold counts on each of them for its share, 1 / copies, so that one sum over the world is right for any mixture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; where nobody has imported that class, nobody has made one."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flat(tensor: Tensor) -> bool:
    """Whether a parameter is a flat shard of FSDP1, which has lost the shape of the whole.

    Args:
        tensor: A parameter. (FSDP1's gradients cannot be told from plain ones.)

    Example:
        >>> is_flat(nn.Linear(2, 2).weight)
        False
    """
    return bool(getattr(tensor, "_fsdp_flattened", False)) or type(tensor).__name__ == "FlatParameter"


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` holds, or may hold, only this rank's part: a DTensor or an FSDP1 flat shard.

    Args:
        tensor: A parameter, or a gradient that is a DTensor.

    Returns:
        True where a local norm would not be the norm of the whole tensor.

    Example:
        >>> is_sharded(nn.Linear(2, 2).weight)
        False
    """
    return is_flat(tensor) or _is_dtensor(tensor)


def is_partial(tensor: Tensor) -> bool:
    """Whether each rank holds only a summand of `tensor`, as the gradients of sequence parallel norms do.

    Args:
        tensor: A parameter or a gradient.

    Example:
        >>> is_partial(torch.ones(2))
        False
    """
    return _is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)


def reduced(tensor: Tensor) -> Tensor:
    """The tensor with the summands of the ranks added up, where each holds only one: a collective of its own.

    Args:
        tensor: A parameter or a gradient, of any kind and shape.

    Returns:
        The tensor itself, unless it is partial: then a DTensor of which the ranks hold replicas instead.

    Example:
        >>> gradient = torch.ones(2, 3)
        >>> reduced(gradient) is gradient
        True
    """
    if not (_is_dtensor(tensor) and is_partial(tensor)):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def on_whole(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the whole of a small tensor, split over the ranks as that is: a collective if it is.

    Args:
        tensor: Of any kind.
        function: Gives a tensor of the same shape for a plain one.

    Example:
        >>> on_whole(torch.tensor([1.0, 2.0]), torch.neg).tolist()
        [-1.0, -2.0]
    """
    if not _is_dtensor(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * tensor.device_mesh.ndim
    whole = function(tensor.redistribute(placements=everywhere).to_local())
    result = DTensor.from_local(whole, tensor.device_mesh, everywhere, run_check=False)
    return result.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def local(tensor: Tensor) -> Tensor:
    """This rank's part as a plain tensor, possibly an empty one.

    Args:
        tensor: A parameter or a gradient, of any kind and shape. A partial one is reduced first, see `reduced`.

    Returns:
        The tensor itself, or what it holds: the same memory, unless it was partial.

    Example:
        >>> gradient = torch.ones(2, 3)
        >>> local(gradient) is gradient
        True
    """
    if not _is_dtensor(tensor):
        return tensor
    whole = cast("DTensor", reduced(tensor))
    part = whole.to_local()
    wait: Callable[[], Tensor] | None = getattr(part, "wait", None)  # an AsyncCollectiveTensor is still on its way
    return part if wait is None else wait()


def fill(target: Tensor, full: Tensor) -> None:
    """Copy `full` into `target`, of which each rank may hold only a part: each cuts out its own, with no communication.

    Args:
        target: A parameter or a buffer on a real device, plain or a DTensor; parts may be uneven or empty.
        full: The values of the whole: a plain tensor of the whole's shape, the same on every rank; cast on the way.

    Raises:
        ValueError: The shapes differ; `target` is on the meta device, a flat shard of FSDP1, or a DTensor of which
            each rank holds a summand, or a part that chunking does not give.

    Example:
        >>> weight = torch.empty(2, dtype=torch.bfloat16)
        >>> fill(weight, torch.tensor([1.0, 2.0]))
        >>> weight.tolist()
        [1.0, 2.0]
    """
    if is_flat(target):
        raise ValueError(
            "target is a flat shard of FSDP1, which has lost its shape; fill it before the model is wrapped"
        )
    if target.is_meta:
        raise ValueError(
            "target is on the meta device and holds no values; materialise it by to_empty(device=...) first"
        )
    if target.shape != full.shape:
        raise ValueError(
            f"full must have the shape of the whole target, {tuple(target.shape)}, got {tuple(full.shape)};"
            " give the values of all ranks, not those of one"
        )
    with torch.no_grad():
        part = _part_of(full, target) if _is_dtensor(target) else full
        if part is not None:
            local(target.detach()).copy_(part)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, in one collective; every rank has to call it.

    Args:
        values: Any shape, the same on every rank; it may be overwritten.

    Returns:
        The sum, the same on every rank bit for bit, on the device of `values`; NaN and Inf of any rank reach all.

    Example:
        >>> sum_over_ranks(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    world = distributed.group.WORLD if distributed.is_available() else None
    if world is None:
        return values
    home, served = values.device, [device.type for device in world._device_types]
    if home.type not in served:  # offloaded to the CPU, but NCCL serves GPUs only
        values = values.to(served[0])
    distributed.all_reduce(values)
    return values.to(home)


def gather_objects(value: T) -> list[T]:
    """What every rank has to give, by rank; every rank has to call it.

    Args:
        value: Anything that can be pickled.

    Example:
        >>> gather_objects("mine")
        ['mine']
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def first_over_ranks(text: str) -> str:
    """The first text that is not empty on any rank, with its rank; every rank has to call it.

    Args:
        text: What this rank has to say, or nothing.

    Example:
        >>> first_over_ranks("here")
        'here'
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return text
    return next((f"{found}, on rank {rank}" for rank, found in enumerate(gather_objects(text)) if found), "")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give back the whole weights that it keeps between a forward pass and its backward.

    Args:
        model: A model of which a forward pass has run that no backward will follow.

    Example:
        >>> reshard(nn.Linear(2, 2))  # nothing to do
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


class Sharding:
    """How the parameters of one optimizer are split over the ranks, and norms of the whole from those of the parts.

    Every method that reduces is called by all ranks together, with a slot for each of the same parameters: where a
    rank has no gradient, or an empty shard, the slot stays.

    Args:
        model: The outermost model: with FSDP1, the one that `FullyShardedDataParallel` returned.
        parameters: All parameters of the optimizer, in the same order on every rank.

    Attributes:
        numel: The number of elements of each whole parameter; FSDP1 without `use_orig_params` counts its padding.

    Raises:
        ValueError: A parameter is a flat shard of an FSDP1 wrapper that is not in `model`.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> sharding = Sharding(layer, list(layer.parameters()))
        >>> sharding.numel
        [6, 2]
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        world = distributed.group.WORLD if distributed.is_available() else None
        self._world = 1 if world is None else world.size()
        self._device = parameters[0].device if parameters else torch.device("cpu")
        groups = _flat_groups(model) if any(is_flat(parameter) for parameter in parameters) else {}
        if any(is_flat(parameter) and id(parameter) not in groups for parameter in parameters):
            raise ValueError(
                "model does not contain the FullyShardedDataParallel wrapper of all its parameters;"
                " give the outermost model, which the wrapper returned (in Lightning: trainer.model)"
            )
        self._holders = [_holders(p) if _is_dtensor(p) else groups.get(id(p), 1) for p in parameters]
        self._own_shares = self._weigh(parameters)
        self.numel = [parameter.numel() for parameter in parameters]
        if groups:
            counts = torch.tensor(self.numel, dtype=torch.float64, device=self._device) * self._own_shares
            summed = sum_over_ranks(counts).tolist()
            self.numel = [
                round(count) if is_flat(parameter) else parameter.numel()
                for parameter, count in zip(parameters, summed, strict=True)
            ]
        self._layouts: list[Any] | None = None
        self._slots = self._present = self._shares_now = self._own_shares

    @classmethod
    def of(cls, model: nn.Module, parameters: Sequence[Tensor]) -> Sharding | None:
        """The sharding of `parameters`, or None where each rank holds all of them and nothing is to be reduced.

        Args:
            model: See the class.
            parameters: See the class.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> Sharding.of(layer, list(layer.parameters())) is None
            True
        """
        return cls(model, parameters) if any(map(is_sharded, parameters)) else None

    def reduce_gradients(
        self,
        norms: Tensor,
        gradients: Sequence[Tensor | None],
        sums: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> tuple[Tensor, ...]:
        """Norms of the whole gradients from the norms of this rank's parts, in one collective.

        Args:
            norms: L2 norm of `local(gradient)` for each gradient that is not None, in order, float64.
            gradients: The gradient of each parameter, None where this rank has none; a plain tensor for a DTensor
                parameter is taken for this rank's part of one that is split as the parameter is.
            sums: Each makes a vector that is to be summed over the ranks too, from what every gradient of this rank
                counts for, shape (n,): parts that several ranks hold count once.

        Returns:
            The norms, shape (n,), float64, 0 where there is no gradient; whether any rank has a gradient, shape (n,),
            bool; and the sums asked for. All are the same on every rank, on the device of the parameters.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> sharding = Sharding(layer, list(layer.parameters()))
            >>> sharding.reduce_gradients(torch.tensor([5.0]), [None, torch.tensor([3.0, 4.0])])
            (tensor([0., 5.], dtype=torch.float64), tensor([False,  True]))
        """
        layouts = [gradient if gradient is None else _layout(gradient) for gradient in gradients]
        if layouts != self._layouts:
            self._layouts = layouts
            there = [slot for slot, gradient in enumerate(gradients) if gradient is not None]
            self._slots = torch.tensor(there, dtype=torch.int64, device=self._device)
            self._shares_now = self._weigh(gradients)
            self._present = torch.zeros_like(self._shares_now).index_fill_(0, self._slots, 1.0)
        squares = norms.to(self._device, torch.float64).square()
        mine = torch.zeros_like(self._present).index_copy_(0, self._slots, squares) * self._shares_now
        own = [make(self._shares_now).to(self._device, torch.float64) for make in sums]
        vectors = [mine, self._present, *own]
        everything = sum_over_ranks(torch.cat(vectors))
        summed, ranks, *more = torch.split(everything, [len(vector) for vector in vectors])
        return summed.sqrt(), ranks > 0, *more

    def reduce(self, *norms: Tensor) -> tuple[Tensor, ...]:
        """Norms of whole tensors that are split as the parameters are, in one collective for all vectors.

        Args:
            norms: Vectors of L2 norms of this rank's parts, each of shape (n,): of weights, updates and the like.

        Returns:
            As many vectors of shape (n,), float64, the same on every rank, on the device of the parameters.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> Sharding(layer, list(layer.parameters())).reduce(torch.tensor([3.0, 4.0]))
            (tensor([3., 4.], dtype=torch.float64),)
        """
        squares = torch.stack([vector.to(self._device, torch.float64) for vector in norms]).square()
        return sum_over_ranks(squares * self._own_shares).sqrt().unbind()

    def _weigh(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """What this rank's sum of squares counts for in the sum over all ranks, shape (n,); 0 for None."""
        shares = [
            0.0 if tensor is None else (_holders(tensor) if _is_dtensor(tensor) else holders) / self._world
            for tensor, holders in zip(tensors, self._holders, strict=True)
        ]
        return torch.tensor(shares, dtype=torch.float64, device=self._device)


def _part_of(full: Tensor, target: DTensor) -> Tensor | None:
    """What this rank holds of a DTensor whose whole is `full`; None where it is not in the mesh."""
    if is_partial(target):
        raise ValueError(
            f"target is partial ({target.placements}): each rank holds a summand, and many sums are the same;"
            " redistribute it to Replicate() or Shard(...) first"
        )
    mesh = target.device_mesh
    where = mesh.get_coordinate()
    if where is None:
        return None
    part = full
    for dimension in _cutting_order(target):
        axis: int = target.placements[dimension].dim  # type: ignore[attr-defined]  # replicas are not cut
        pieces = part.chunk(mesh.size(dimension), axis)
        empty = part.narrow(axis, 0, 0)  # where there are fewer pieces than ranks
        part = pieces[where[dimension]] if where[dimension] < len(pieces) else empty
    if part.shape != target.to_local().shape:
        raise ValueError(
            f"target is split in a way that is not known: of {tuple(full.shape)} by {target.placements} on {mesh} this"
            f" rank holds {tuple(target.to_local().shape)}, not {tuple(part.shape)}; fill it before it is split"
        )
    return part


def _cutting_order(tensor: DTensor) -> list[int]:
    """The mesh dimensions that split a tensor, in the order in which they were applied.

    That is from left to right, but for strided ones: FSDP2, whose mesh dimension stands on the left, cuts up what
    tensor parallelism on the right has cut out already.
    """
    split = [dimension for dimension, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    strided = [dimension for dimension in split if hasattr(tensor.placements[dimension], "split_factor")]
    return [dimension for dimension in split if dimension not in strided] + strided[::-1]


def _layout(tensor: Tensor) -> Any:
    """What the share of a tensor depends on, from one step to the next."""
    return (tensor.device_mesh, tensor.placements) if _is_dtensor(tensor) else ()


def _holders(tensor: DTensor) -> int:
    """How many ranks it takes to hold the tensor once: those along the mesh dimensions that split it."""
    mesh = tensor.device_mesh
    holders = 1
    for dimension, placement in enumerate(tensor.placements):
        if not (placement.is_replicate() or placement.is_partial()):  # partial: `local` has made it a replica
            holders *= mesh.size(dimension)
    return holders


def _flat_groups(model: nn.Module) -> dict[int, int]:
    """How many ranks hold each parameter of an FSDP1 model once, by its identity."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    holders: dict[int, int] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):  # outer ones first: the innermost owns it
        split = module.sharding_strategy is not ShardingStrategy.NO_SHARD
        size = distributed.get_world_size(module.process_group) if split else 1
        holders.update((id(parameter), size) for parameter in module.parameters())
    return holders
