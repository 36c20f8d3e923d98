"""How sharp attention is: 1 - sum p^2 over the keys, the summed derivatives of a softmax, 0 where it is one-hot."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.signals.kinds import Kind, saved, shown_name

QUERIES = 64  # of fused attention, whose weights are never stored, these many queries are computed again
SEQUENCES = 8

ATTENTION = Kind("attention", slope=lambda openness: openness)


def openness_of(node: Any) -> tuple[Tensor, int] | None:
    """1 - sum p^2 of every query of an attention over the greatest there is, and the axis of the heads.

    Args:
        node: The autograd node of a softmax, or of a fused attention, its saved tensors not freed yet.

    Returns:
        The values, shape (batch, heads, queries) with axis 1, or (1, 1, batch and heads, queries) where these cannot be
        told apart; None where nothing was kept.

    Example:
        >>> scores = torch.zeros(1, 2, 4, 4, requires_grad=True)
        >>> values, axis = openness_of(torch.softmax(scores, -1).grad_fn)
        >>> values[0, 0].tolist(), axis
        ([1.0, 1.0, 1.0, 1.0], 1)
    """
    if shown_name(node) in ("Softmax", "SafeSoftmax"):
        weights = saved(node, "result")
        if (
            weights is None
            or weights.ndim < 3
            or weights.shape[-1] < 2
            or node._saved_dim % 2**64 not in (weights.ndim - 1, 2**64 - 1)
        ):
            return None
        return _openness(weights), 1
    query, key = saved(node, "query"), saved(node, "key")
    if query is None or key is None or query.ndim != 4 or key.shape[2] < 2:  # one key leaves nothing to choose
        return None
    mask = saved(node, "attn_mask") if hasattr(node, "_saved_attn_mask") else saved(node, "attn_bias")
    return _openness(_weights(query, key, mask, bool(getattr(node, "_saved_is_causal", False)), _scale(node, query))), 1


def _openness(weights: Tensor) -> Tensor:
    values = (1 - weights.float().square().sum(-1)) / (1 - 1 / weights.shape[-1])
    return values.flatten(0, -2).unsqueeze(0).unsqueeze(0) if values.ndim != 3 else values


def _scale(node: Any, query: Tensor) -> float:
    given = getattr(node, "_saved_scale", None)
    return 1 / math.sqrt(query.shape[-1]) if given is None else float(given)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The attention weights of some queries of some sequences, shape (sequences, heads, queries, keys)."""
    length, keys = query.shape[2], key.shape[2]
    step = -(-length // QUERIES)
    key = key[:SEQUENCES].repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped queries share keys
    scores = query[:SEQUENCES, :, ::step].float() @ key.float().transpose(-1, -2) * scale
    if mask is not None:
        mask = mask.expand(*query.shape[:2], length, keys)[:SEQUENCES, :, ::step]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if causal:
        rows = torch.arange(0, length, step, device=query.device)
        later = torch.arange(keys, device=query.device) > rows.unsqueeze(1)
        scores = scores.masked_fill(later, -math.inf)
    return torch.nan_to_num(scores.softmax(-1))


FUSED = {
    *("ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention", "ScaledDotProductFusedAttention"),
}
