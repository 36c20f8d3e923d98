"""A sample of the elements of many gradients, by which the directions of two steps can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradhealth.norms import dense, flat

TENSORS, SAMPLE = 32, 4_096  # of the largest ones, and evenly spaced elements of each: half a megabyte at most


def sample(tensors: Sequence[Tensor | None], shares: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Elements of the largest tensors, shape (n,), at the same places at every step, on the device of the first.

    Args:
        tensors: Of any shape; None, sparse and empty ones are passed over: their elements have no fixed places.
        shares: What each of them counts for, shape (len(tensors),).

    Returns:
        The elements, and what each counts for, shape (n,), where shares are given.

    Example:
        >>> sample([torch.ones(3), None, torch.zeros(1)], torch.tensor([0.5, 0.0, 1.0]))
        (tensor([1., 1., 1., 0.]), tensor([0.5000, 0.5000, 0.5000, 1.0000]))
    """
    there = [i for i, t in enumerate(tensors) if t is not None and t.layout is torch.strided and t.numel()]
    places = sorted(sorted(there, key=lambda i: -_size(tensors[i]))[:TENSORS])
    parts = [_evenly(flat(dense(tensor))) for i in places if (tensor := tensors[i]) is not None]
    if not parts:
        device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
        return torch.zeros(0, device=device), None if shares is None else torch.zeros(0, device=device)
    home, counts = parts[0].device, [len(part) for part in parts]
    elements = torch.cat([part.to(home, non_blocking=True) for part in parts])
    if shares is None:
        return elements, None
    own = shares.to(home).index_select(0, torch.tensor(places, device=home))
    return elements, own.repeat_interleave(torch.tensor(counts, device=home), output_size=len(elements))


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _evenly(elements: Tensor) -> Tensor:
    """Elements at even distances, at least half of `SAMPLE` where there are as many."""
    apart = -(-len(elements) // SAMPLE)
    return elements.narrow(0, 0, len(elements) // apart * apart).view(-1, apart).select(1, 0)
