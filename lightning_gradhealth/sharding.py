"""The only place that knows how strategies split a tensor over ranks."""

from __future__ import annotations

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` holds, or may hold, only this rank's part: a DTensor or an FSDP1 flat shard.

    Args:
        tensor: A parameter or a gradient.

    Returns:
        True where a local norm would not be the norm of the whole tensor.

    Example:
        >>> is_sharded(torch.nn.Linear(2, 2).weight)
        False
    """
    if getattr(tensor, "_fsdp_flattened", False) or type(tensor).__name__ == "FlatParameter":
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
