"""What is to be done to one parameter, by blocks, and how it is drawn: whole, on the CPU, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradhealth.init.schemes import drawing_dtype
from lightning_gradhealth.records import InitEntry
from lightning_gradhealth.sharding import is_sharded

Draw = Callable[[Tensor, torch.Generator], object]


@dataclass(frozen=True)
class Block:
    """What is to be done to a parameter or to a stretch of it along one axis; without `draw` it is left alone.

    `stream` names the random numbers of another block, of which this one gets a copy ("": it has its own).
    """

    entry: InitEntry
    draw: Draw | None
    axis: int = 0
    rows: slice | None = None
    stream: str = ""

    def part(self, tensor: Tensor) -> Tensor:
        """The stretch of a tensor of the parameter's shape that this block sets: the same memory."""
        return tensor if self.rows is None else tensor.movedim(self.axis, 0)[self.rows].movedim(0, self.axis)


def generator(seed: int, name: str) -> torch.Generator:
    """A stream of random numbers that depends on the seed and the name alone (`hash` differs by process)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def whole(target: Tensor, blocks: Sequence[Block], padding: int | None, seed: int) -> Tensor:
    """All values of a parameter: every block drawn contiguous and on the CPU, from the stream of its name.

    Args:
        target: The parameter, or what stands in for it: its shape and dtype count, and the values that are kept.
        blocks: They cover the parameter, see `check_blocks`.
        padding: The row of an embedding that is kept. Nobody can read it where the parameter is sharded or has no
            values yet: it becomes 0 then, as torch makes it.
        seed: The seed of the call.

    Raises:
        ValueError: Not every element was filled with a number that the parameter can hold.
    """
    numbers = torch.full(target.shape, torch.nan, dtype=drawing_dtype(target), device="cpu")
    for block in blocks:
        part = block.part(numbers)
        if block.draw is None:
            part.copy_(block.part(target.detach()))
            continue
        drawn = torch.full(part.shape, torch.nan, dtype=numbers.dtype, device="cpu")
        block.draw(drawn, generator(seed, block.stream or block.entry.name))
        part.copy_(drawn)
        if padding is not None:
            part[padding] = 0.0 if target.is_meta or is_sharded(target) else target.detach()[padding].to(part)
        if not part.to(target.dtype).isfinite().all():
            raise ValueError(
                f"the initializer {block.entry.rule} leaves NaN or Inf in {block.entry.name!r} ({target.dtype}): it"
                " must fill every element in place, by numbers that the dtype can hold"
            )
    return numbers


def check_blocks(name: str, shape: Sequence[int], blocks: Sequence[Block], *, readable: bool) -> None:
    """Raise unless the blocks set each row of a parameter exactly once, all along the same axis.

    Args:
        name: The parameter's name.
        shape: Its shape.
        blocks: Its blocks.
        readable: The parameter's values are all here, so that a block can be left alone beside others.
    """
    if all(block.rows is None for block in blocks):
        return
    rule = blocks[0].entry.rule
    axes = {block.axis % len(shape) for block in blocks if block.rows is not None}
    if len(axes) > 1:
        raise ValueError(
            f"the initializer {rule} cuts {name!r} along the axes {sorted(axes)}; cut it along one axis only"
        )
    (axis,) = axes
    times = [0] * shape[axis]
    for block in blocks:
        for row in range(len(times))[slice(None) if block.rows is None else block.rows]:
            times[row] += 1
    wrong = [row for row, count in enumerate(times) if count != 1]
    if wrong:
        where = f"row {wrong[0]}" if axis == 0 else f"index {wrong[0]} of axis {axis}"
        raise ValueError(
            f"the initializer {rule} sets {where} of {name!r} {times[wrong[0]]} times;"
            " give each of its rows exactly one block"
        )
    if not readable and len({block.draw is None for block in blocks}) > 1:
        raise ValueError(
            f"the initializer {rule} keeps a part of {name!r}, which is on the meta device or sharded, so that nobody"
            " can read it; draw every block, or keep the whole parameter"
        )
