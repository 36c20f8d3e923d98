"""Who owns a parameter, what it is called, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.blocks import generator
from lightning_gradhealth.init.parametrized import Computed, computed_weights
from lightning_gradhealth.init.schemes import why_no_shape
from lightning_gradhealth.isolation import RandomState
from lightning_gradhealth.layers import clean_name
from lightning_gradhealth.sharding import fill


@dataclass(eq=False)
class Owned:
    """A parameter as initializers see it: one of the model's own, or a weight that is computed from some of them.

    Attributes:
        parameter: The parameter, or the computed weight.
        names: All its names: the first is its own, the others are ties.
        owners: The modules that own it, in the order of the names.
        originals: The model's parameters that are written, with their names: itself, or what it is computed from.
        computed: How it is computed; None for a parameter.
        padding: The row that an embedding, its owner or tied to it, never looks up for training.
    """

    parameter: Tensor
    names: list[str]
    owners: list[nn.Module]
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    computed: Computed | None = None
    padding: int | None = None

    @property
    def name(self) -> str:
        """Its own name."""
        return self.names[0]

    @property
    def module(self) -> nn.Module:
        """The module that owns it first."""
        return self.owners[0]

    @property
    def all_names(self) -> list[str]:
        """Its names and those of what it is computed from."""
        return list(dict.fromkeys([*self.names, *self.originals]))

    @property
    def main(self) -> str:
        """The original that the report speaks of: the one with the shape of the weight."""
        shaped = [name for name, original in self.originals.items() if original.shape == self.parameter.shape]
        return (shaped or list(self.originals))[0]

    def values(self, weight: Tensor, seed: int) -> tuple[Tensor, ...]:
        """The values of the originals that make the weight what it shall be."""
        if self.computed is None:
            return (weight,)
        state = RandomState.now()  # a parametrization may draw what completes a basis
        try:
            torch.default_generator.manual_seed(generator(seed, f"{self.name}: completed").initial_seed())
            return self.computed.split(weight.to(self.parameter.dtype))
        finally:
            state.restore()

    def write(self, weight: Tensor, seed: int) -> None:
        """Make the weight what it shall be."""
        first = next(iter(self.originals.values()))
        values = self.values(weight if self.computed is None else weight.to(first.device), seed)
        for original, value in zip(self.originals.values(), values, strict=True):
            fill(original, value)
        if self.computed is not None:
            self.computed.settle(generator(seed, f"{self.name}: settled"))

    def present(self) -> Tensor:
        """The weight as the module computes it now."""
        return next(iter(self.originals.values())).detach() if self.computed is None else _settled(self.computed)


def _settled(computed: Computed) -> Tensor:
    """A computed weight without the side effects that computing it has while the module trains."""
    training = [(part, part.training) for part in computed.module.modules()]
    try:
        computed.module.eval()
        value: Tensor = getattr(computed.module, computed.attribute).detach()
        return value
    finally:
        for part, flag in training:
            part.training = flag


def check_shapes(model: nn.Module) -> None:
    """Raise a ValueError where a parameter has no shape yet, or has lost it."""
    for path, parameter in model.named_parameters():
        if (reason := why_no_shape(parameter)) is not None:
            raise ValueError(f"the parameter {clean_name(path)!r} of model must have its shape, but it {reason}")


def owned_by(model: nn.Module) -> list[Owned]:
    """All parameters, in registration order, each once, with its owners and all its names.

    Args:
        model: The model; where it has parametrized weights, inside `parametrize.cached()`.
    """
    computed = {id(original): each for each in computed_weights(model) for original in each.originals}
    found: dict[int, Owned] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = clean_name(path)
        source = computed.get(id(parameter))
        if source is None:
            module = modules[path.rpartition(".")[0]]
            own, owned = name, found.setdefault(id(parameter), Owned(parameter, [], []))
        else:
            module, own = source.module, ".".join(filter(None, (_owner_of(name), source.attribute)))
            owned = found.setdefault(id(source), Owned(source.value, [], [], computed=source))
        if all(original is not parameter for original in owned.originals.values()):
            owned.originals[name] = parameter
        if own not in owned.names:
            owned.names.append(own)
            owned.owners.append(module)
        if owned.padding is None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            owned.padding = module.padding_idx
    return list(found.values())


def _owner_of(name: str) -> str:
    """The path of the module that computes a weight from a parameter of this name."""
    path = name.rpartition(".")[0]
    return path.rpartition("parametrizations.")[0].rstrip(".") if "parametrizations." in path else path
