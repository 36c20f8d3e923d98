"""Weights that are computed from other parameters: by parametrizations, by torch's older hooks, by pruning.

What initializers see is the weight that the module computes with; what is written is what it is computed from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_POWER_ITERATIONS = 15  # as torch does when it registers a spectral norm


class Computed:
    """A weight that a module computes, and what it is computed from.

    Attributes:
        module: The module.
        attribute: The weight's name in the module.
        value: The weight: while a plan is made, the same tensor whenever the module is asked for it.
        originals: What it is computed from.
        refusal: Why it cannot be set; "": it can.
        binds: It can be set from the originals alone, so that nothing else needs a value on the meta device.
    """

    binds = False
    refusal = ""

    def __init__(self, module: nn.Module, attribute: str, originals: Sequence[nn.Parameter]) -> None:
        self.module, self.attribute, self.originals = module, attribute, tuple(originals)
        self.value: Tensor = getattr(module, attribute).detach()

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The values of the originals from which the module computes `weight`."""
        return (weight,)

    def settle(self, generator: torch.Generator) -> None:
        """Bring what else depends on the weight up to date, once the originals are written."""


class _Parametrized(Computed):
    def __init__(self, module: nn.Module, attribute: str) -> None:
        assert isinstance(module.parametrizations, nn.ModuleDict)
        chain = module.parametrizations[attribute]
        assert isinstance(chain, parametrize.ParametrizationList)
        super().__init__(module, attribute, [p for _, p in chain.named_parameters(recurse=False)])
        self.value = getattr(module, attribute)  # not detached: `cached` hands out this very tensor
        self._chain = chain
        self.binds = next(chain.buffers(), None) is None
        self.refusal = self._why_not()

    def _why_not(self) -> str:
        for part in self._chain:
            if not hasattr(part, "right_inverse"):
                return (
                    f"its parametrization {type(part).__name__} has no right_inverse, so that nothing can be assigned"
                )
        try:
            values = _backwards(copy.deepcopy(self._chain), self.value.detach())
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            return f"its parametrization refuses values: {type(error).__name__}: {reason}"
        if [value.shape for value in values] != [original.shape for original in self.originals]:
            return "the right_inverse of its parametrization does not give the shapes of the originals"
        return ""

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        if weight.dtype in (torch.bfloat16, torch.float16):  # QR is not to be had in these, or is far too coarse
            return _backwards_in_float32(self._chain, weight)
        return _backwards(self._chain, weight)

    def settle(self, generator: torch.Generator) -> None:
        received: tuple[Tensor, ...] = tuple(p.detach() for _, p in self._chain.named_parameters(recurse=False))
        for part in self._chain:
            settle(part, received[0], generator)
            received = (part(*received),)


def _backwards(chain: parametrize.ParametrizationList, weight: Tensor) -> tuple[Tensor, ...]:
    """What `ParametrizationList.right_inverse` would store; some parametrizations remember a part of it."""
    value: Tensor | Sequence[Tensor] = weight
    for part in reversed(list(chain)):
        value = part.right_inverse(value)  # type: ignore[operator]
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _backwards_in_float32(chain: parametrize.ParametrizationList, weight: Tensor) -> tuple[Tensor, ...]:
    """The same worked out in float32; what the parametrizations remember and store is rounded."""
    values = _backwards(chain, weight.float())
    for part in chain:
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.dtype is torch.float32:
                setattr(part, name, buffer.to(weight.dtype))
    return tuple(value.to(weight.dtype) for value in values)


@singledispatch
def settle(parametrization: nn.Module, weight: Tensor, generator: torch.Generator) -> None:
    """Bring what a parametrization remembers of a weight up to date: nothing, for most."""


@settle.register
def _(parametrization: _SpectralNorm, weight: Tensor, generator: torch.Generator) -> None:
    if weight.ndim > 1:
        # The singular vectors of the old weight know nothing of the new one: its norm would come out far too small.
        for name in ("_u", "_v"):
            _restart(getattr(parametrization, name), generator)
        parametrization._power_method(parametrization._reshape_weight_to_matrix(weight), _POWER_ITERATIONS)


def _restart(vector: Tensor, generator: torch.Generator) -> None:
    drawn = torch.empty(vector.shape, dtype=torch.float64).normal_(generator=generator)
    vector.copy_(drawn / drawn.norm())


class _WeightNormed(Computed):
    """The older `torch.nn.utils.weight_norm`, which ignores what is assigned to the weight."""

    binds = True

    def __init__(self, module: nn.Module, hook: WeightNorm) -> None:
        name = hook.name
        super().__init__(module, name, [module._parameters[f"{name}_{part}"] for part in ("g", "v")])  # type: ignore[misc]
        self._hook = hook

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.norm_except_dim(weight, 2, self._hook.dim), weight

    def settle(self, generator: torch.Generator) -> None:
        self._hook(self.module, None)


class _SpectralNormed(Computed):
    """The older `torch.nn.utils.spectral_norm`."""

    def __init__(self, module: nn.Module, hook: SpectralNorm) -> None:
        super().__init__(module, hook.name, [module._parameters[f"{hook.name}_orig"]])  # type: ignore[list-item]
        self._hook = hook

    def settle(self, generator: torch.Generator) -> None:
        for name in ("u", "v"):
            _restart(getattr(self.module, f"{self.attribute}_{name}"), generator)
        iterations, self._hook.n_power_iterations = self._hook.n_power_iterations, _POWER_ITERATIONS
        try:
            setattr(self.module, self.attribute, self._hook.compute_weight(self.module, do_power_iteration=True))
        finally:
            self._hook.n_power_iterations = iterations


class _Pruned(Computed):
    """A weight under a pruning mask, which goes on to hold."""

    def __init__(self, module: nn.Module, hook: prune.BasePruningMethod) -> None:
        name = hook._tensor_name
        super().__init__(module, name, [module._parameters[f"{name}_orig"]])  # type: ignore[list-item]
        self._hook = hook

    def settle(self, generator: torch.Generator) -> None:
        self._hook(self.module, None)


@singledispatch
def from_hook(hook: object, module: nn.Module) -> Computed | None:
    """The weight that a forward pre-hook computes; None where it computes none."""
    return None


@from_hook.register
def _(hook: WeightNorm, module: nn.Module) -> Computed:
    return _WeightNormed(module, hook)


@from_hook.register
def _(hook: SpectralNorm, module: nn.Module) -> Computed:
    return _SpectralNormed(module, hook)


@from_hook.register
def _(hook: prune.BasePruningMethod, module: nn.Module) -> Computed:
    return _Pruned(module, hook)


def has_computed(model: nn.Module) -> bool:
    """Whether a module of the model computes a weight by a parametrization."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


def originals(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters from which torch's parametrizations and older hooks compute weights.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> [tuple(original.shape) for original in originals(weight_norm(nn.Linear(3, 2)))]
        [(2, 1), (2, 3)]
    """
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            yield from module.parameters(recurse=False)
        for hook in module._forward_pre_hooks.values():
            if (found := from_hook(hook, module)) is not None:
                yield from found.originals


def computed_weights(model: nn.Module) -> Iterator[Computed]:
    """All weights of a model that are computed from parameters; run it inside `parametrize.cached()`."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for attribute, chain in module.parametrizations.items():
                if any(True for _ in chain.parameters(recurse=False)):
                    yield _Parametrized(module, attribute)
        for hook in module._forward_pre_hooks.values():
            if (found := from_hook(hook, module)) is not None:
                yield found
