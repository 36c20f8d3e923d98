"""How steep activations are, from what goes into them, in numpy: the twin's view of dead and saturated units."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch


def slope_of(activation: str, before: np.ndarray) -> np.ndarray:
    """The derivative of an activation over its greatest, from what goes into it."""
    with np.errstate(over="ignore"):
        if activation == "relu":
            return (before > 0).astype(float)
        if activation == "relu6":
            return ((before > 0) & (before < 6)).astype(float)
        if activation == "sigmoid":
            s = 1 / (1 + np.exp(-before))
            return 4 * s * (1 - s)
        if activation == "tanh":
            return 1 - np.tanh(before) ** 2
        if activation == "softmax":  # what `spread` gives already
            return before
        if activation == "tanh output":  # what comes out of it, where nothing else can be seen
            return 1 - before**2
        if activation == "hardtanh":
            return (np.abs(before) < 1).astype(float)
        if activation == "hardsigmoid":
            return (np.abs(before) < 3).astype(float)
        if activation == "softsign":
            return 1 / (1 + np.abs(before)) ** 2
    raise AssertionError(f"no twin of {activation}")


def spread(attention: Any, x: np.ndarray) -> np.ndarray:
    """How far each head looks around: 1 - sum p^2 over its greatest, shape (samples, queries, heads)."""
    with torch.no_grad():
        q, k = (
            part.double()(torch.from_numpy(x)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part in map(copy.deepcopy, (attention.query, attention.key))
        )
    logits = attention.scale * (q @ k.transpose(-1, -2)).numpy() / math.sqrt(q.shape[-1])
    looks = np.ones(logits.shape[-2:], dtype=bool)
    looks = np.tril(looks) if attention.causal else looks
    logits = np.where(looks, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    keys = looks.sum(-1)
    wide = (1 - (p**2).sum(-1))[..., keys > 1] / (1 - 1 / keys[keys > 1])
    return np.moveaxis(wide, 1, -1)
