"""The slow, obvious twin: everything in float64, one tensor at a time, read at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def norm(tensor: Tensor) -> float:
    """L2 norm, scaled so that nothing leaves float64's range."""
    dense = tensor.detach()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())
    return math.sqrt(math.fsum((dense.double() ** 2).flatten().tolist()))


def layer_norms(model: nn.Module) -> dict[str, float]:
    """Gradient norm of every module that directly owns parameters with a gradient."""
    result = {}
    for name, module in model.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            result[name] = math.hypot(*(norm(gradient) for gradient in gradients))
    return result


def norm_ratios(model: nn.Module) -> dict[str, float]:
    """RMS gradient of every such module over their geometric mean."""
    rms = {}
    for name, value in layer_norms(model).items():
        own = model.get_submodule(name).parameters(recurse=False)
        rms[name] = value / math.sqrt(sum(p.numel() for p in own if p.grad is not None))
    positive = [value for value in rms.values() if 0 < value < math.inf]
    scale = math.prod(value ** (1 / len(positive)) for value in positive)
    return {name: value / scale for name, value in rms.items()}
