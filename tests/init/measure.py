"""The slow, obvious twin of what the report predicts: hooks that look at what every weight gives.

It knows nothing of the tracer: layers of torch are watched by forward hooks, raw parameters tell themselves
(`samples.Probed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from samples import Probed
from scipy import special, stats
from torch import Tensor, nn
from torch.nn import functional as F


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the model on a tensor, a tuple of positional arguments or a dict of named ones."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def output_variances(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Variance of what every weight gives, without its bias, over all samples and units, by the weight's name.

    Of a weight that is used more than once: the mean over its uses. Dropout acts and batch norms look at the
    batch where the model is in training mode, as it is when training starts.

    Args:
        model: The model; its batch norms' running statistics move as in any forward pass.
        inputs: As for `run`.
    """
    owners: dict[int, str] = {}
    found: dict[str, list[Tensor]] = {}

    def watch(module: nn.Module, prefix: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for name, z in outputs(module, args, kwargs, output).items():
                weight = module.get_parameter(name) if name in dict(module.named_parameters()) else None
                full = f"{prefix}.{name}" if prefix else name
                full = full if weight is None else owners.setdefault(id(weight), full)
                found.setdefault(full, []).append(z.detach().double())

        return hook

    for name, parameter in model.named_parameters():
        owners.setdefault(id(parameter), name)
    handles = []
    for prefix, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(module, prefix), with_kwargs=True))
        if isinstance(module, Probed):
            module.probed = {}
    try:
        with torch.no_grad():
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, Probed):
                module.probed = None
    return {name: sum(float(z.var(correction=0)) for z in seen) / len(seen) for name, seen in found.items()}


def output_gradients(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Root mean square of the gradient at what every weight gives, for standard normal gradients at the outputs.

    Of weights with a module of their own (no packed projections, no gates) and of raw parameters that tell
    themselves.

    Args:
        model: The model, every module of which is used once.
        inputs: As for `run`.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for prefix, module in model.named_modules():
        if outputs.dispatch(type(module)) is _weighted:
            name = f"{prefix}.weight"
            handles.append(module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output})))
        if isinstance(module, Probed):
            module.probed = {}
    try:
        result = run(model, inputs)
        for prefix, module in model.named_modules():
            if isinstance(module, Probed):
                seen.update({f"{prefix}.{name}": z for name, z in (module.probed or {}).items()})
                module.probed = None
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(11))
        gradients = torch.autograd.grad(result, list(seen.values()), cotangent)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(g.double().square().mean().sqrt()) for name, g in zip(seen, gradients, strict=True)}


@singledispatch
def outputs(module: nn.Module, args: Any, kwargs: Any, output: Any) -> dict[str, Tensor]:
    """What the weights of one module gave in one call, without biases; nothing of modules without weights."""
    return {}


def _weighted(module: Any, args: Any, kwargs: Any, output: Tensor) -> dict[str, Tensor]:
    if module.bias is None:
        return {"weight": output}
    dims = getattr(module, "kernel_size", ())  # of a convolution, whose channels come before the positions
    return {"weight": output - module.bias.reshape(-1, *(1 for _ in dims))}


def _recurrent(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> dict[str, Tensor]:
    return {"weight_ih_l0": F.linear(args[0], module.weight_ih_l0)}


def _attention(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> dict[str, Tensor]:
    result = {"out_proj.weight": output[0] - module.out_proj.bias}
    if module.in_proj_weight is not None:
        blocks = module.in_proj_weight.chunk(3)
        result["in_proj_weight"] = torch.stack([F.linear(x, w) for x, w in zip(args[:3], blocks, strict=True)])
        return result
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return result | {n: F.linear(x, getattr(module, n)) for n, x in zip(names, args[:3], strict=True)}


for _kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear):
    outputs.register(_kind, _weighted)
for _kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    outputs.register(_kind, _weighted)
outputs.register(nn.RNNBase, _recurrent)
outputs.register(nn.MultiheadAttention, _attention)


@outputs.register
def _probed(module: Probed, args: Any, kwargs: Any, output: Any) -> dict[str, Tensor]:
    return dict(module.probed or {})


def rectifier_log_growth(width: int) -> tuple[float, float]:
    """Mean and variance of log(mean square behind / before) of one layer of He weights and ReLU, at finite width.

    For any fixed x the pre-activations are independent normal numbers of variance 2 |x|^2 / width. Each is
    positive with probability 1/2, whatever its size, so that the squared length behind the rectifier is
    (2 / width) |x|^2 times a chi-square of K degrees of freedom, K binomial(width, 1/2). The logarithm of a
    chi-square of k degrees has the mean digamma(k / 2) + log 2 and the variance trigamma(k / 2). As only x's
    length counts, layers are independent: for a deep net both numbers are multiplied by the depth.

    Args:
        width: The number of outputs; the number of inputs cancels.
    """
    k = range(1, width + 1)  # K = 0 has the probability 2^-width
    chances = stats.binom.pmf(k, width, 0.5)
    means = [special.digamma(n / 2) + math.log(2) + math.log(2 / width) for n in k]
    squares = [special.polygamma(1, n / 2) + mean**2 for n, mean in zip(k, means, strict=True)]
    mean = math.fsum(chances * means)
    return mean, math.fsum(chances * squares) - mean**2
