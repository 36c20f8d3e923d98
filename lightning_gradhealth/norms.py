"""Accurate L2 norms of many tensors as one device vector, with no host read.

Small tensors are summed in float64 by one foreach call. Large float32 ones on a CPU are reduced to float32 norms
of blocks that are then summed in float64: as fast as plain float32 and right to 3e-7 at any size, but float32
squares leave its range beyond 1.8e19 and below 1e-22. Where `exact` is asked for, and on GPUs, where the
reduction waits for memory anyway, everything is accumulated in float64. MPS knows no float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 65_536
_BLOCK = 256
_CHUNK = 262_144


def dense(tensor: Tensor) -> Tensor:
    """Return a real, dense tensor with the same L2 norm as `tensor` (a view wherever possible).

    Args:
        tensor: Dense, sparse (COO or compressed) or complex, any shape.

    Example:
        >>> dense(torch.tensor([3 + 4j])).tolist()
        [[3.0, 4.0]]
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor


def flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in any order, without a copy where the memory is dense.

    Args:
        tensor: Dense, any shape.

    Example:
        >>> flat(torch.arange(4).view(2, 2).t()).tolist()
        [0, 1, 2, 3]
    """
    if not tensor.is_contiguous():
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))
    return tensor.reshape(-1)


def _blocked(tensor: Tensor, total: torch.dtype) -> Tensor:
    """Norm of a large float32 tensor: float32 norms of blocks, combined in `total`.

    Where the squares leave float32's range, the result is the norm of the largest block alone, looked at again
    in `total`: too small, but neither Inf nor 0 unless an element is. (An Inf in a tensor of which another
    block overflows may stay unseen at this step.)
    """
    elements = flat(tensor)
    whole = elements.numel() // _BLOCK * _BLOCK
    blocks, rest = elements[:whole].view(-1, _BLOCK), torch.linalg.vector_norm(elements[whole:], dtype=total)
    parts = torch.linalg.vector_norm(blocks, dim=1)
    norm = torch.linalg.vector_norm(parts, dtype=total)
    largest = torch.linalg.vector_norm(blocks.index_select(0, parts.argmax().reshape(1)), dtype=total)
    return torch.hypot(torch.where(norm.isfinite() & (norm > 0), norm, largest), rest)


def wide(device: torch.device) -> torch.dtype:
    """The dtype in which sums and statistics are kept: float64, where the device knows it.

    Example:
        >>> wide(torch.device("cpu")), wide(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


def norms(tensors: Sequence[Tensor], *, exact: bool = True) -> Tensor:
    """L2 norm of every tensor.

    Args:
        tensors: Any number of tensors of any shape, dtype, layout and device.
        exact: Accumulate everything in float64, so that the result is right to 1e-12 wherever float64 can
            hold the squares. False: large float32 tensors on a CPU in blocks (see the module); NaN, Inf and 0
            are right all the same.

    Returns:
        Shape (len(tensors),), float64 (float32 on devices without it), on the first tensor's device.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.full((4,), 1e20)]).tolist()
        [5.0, 2...e+20]
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    results: dict[int, Tensor] = {}
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        plain = tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_complex()
        view = tensor if plain else dense(tensor)
        device, dtype = view.device, view.dtype
        if device.type == "cpu" and view.numel() > _SMALL:
            quick = dtype is torch.float32 and not exact
            results[index] = _blocked(view, torch.float64) if quick else _chunked(view)
        elif device.type == "mps":
            results[index] = torch.linalg.vector_norm(view, dtype=torch.float32)
        else:
            indices, views = batches.setdefault((device, dtype), ([], []))
            indices.append(index)
            views.append(view)
    for indices, views in batches.values():
        results.update(zip(indices, torch._foreach_norm(views, 2, dtype=torch.float64), strict=True))
    home = tensors[0].device
    ordered = [results[index] for index in range(len(tensors))]
    return torch.stack([norm if norm.device == home else norm.to(home, non_blocking=True) for norm in ordered])


def norms_or_zero(
    tensors: Sequence[Tensor | None], device: torch.device | None = None, *, exact: bool = True
) -> Tensor:
    """The same with 0 for None.

    Args:
        tensors: See `norms`.
        device: Where the zeros belong; None: on the device of the first tensor.
        exact: See `norms`.

    Example:
        >>> norms_or_zero([None, torch.tensor([3.0, 4.0])]).tolist()
        [0.0, 5.0]
    """
    if device is None:
        device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
    zero = torch.zeros(0, device=device)
    return norms([zero if tensor is None else tensor for tensor in tensors], exact=exact)


def _chunked(tensor: Tensor) -> Tensor:
    """Norm of a large tensor on a CPU, all in float64 (whole, `_foreach_norm` is several times slower)."""
    chunks = torch._foreach_norm(torch.split(flat(tensor), _CHUNK), 2, dtype=torch.float64)
    total: Tensor = torch.linalg.vector_norm(torch.stack(chunks))
    return total


def read_once(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Bring any number of device vectors to the host in one transfer.

    Args:
        vectors: Tensors of any shape; they are flattened.

    Returns:
        One list of floats for each.

    Example:
        >>> read_once([torch.ones(2), torch.tensor(3.0)])
        [[1.0, 1.0], [3.0]]
    """
    if not vectors:
        return []
    device = next((vector.device for vector in vectors if vector.device.type != "cpu"), vectors[0].device)
    flat = torch.cat([vector.detach().reshape(-1).to(device, wide(device)) for vector in vectors]).tolist()
    result, start = [], 0
    for vector in vectors:
        result.append(flat[start : start + vector.numel()])
        start += vector.numel()
    return result
