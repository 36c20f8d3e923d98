"""What an inhabitant of the zoo is: a model, a batch, a loss.

A module of `families` exports `ARCHITECTURES: tuple[Architecture, ...]` and imports its libraries only inside of what
builds a model, so that names can be listed without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Library:
    """A module of a library that is imported where something of it is first asked for.

    Example:
        >>> Library("collections").OrderedDict()
        OrderedDict()
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what inspection asks of any object
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


@dataclass(frozen=True)
class Architecture:
    """One architecture of one library, small enough for a CPU.

    All randomness comes from torch's global state: whoever calls `model` or `batch` seeds it before.

    Attributes:
        name: Its name, unique: `library/model`.
        family: The row of the table that it counts in: "vision", "detection", "language", "speech", "diffusion",
            "flow", "graph", "operator", "ode", "medical", "coordinates", ...
        model: Builds it with the library's own init, dropout off where the library allows it.
        batch: Builds (inputs, target): inputs a tuple of positional or a dict of keyword arguments of `forward`;
            target what the loss takes, None where the model gives the loss itself.
        loss: `loss(outputs, target)`: one number.
        daily: Whether it also runs without `--zoo`: a dozen do, each in a few seconds.
        sick: Why the library's own init is ill, as the slow twin says, too; "": `diagnose` has to find it healthy.
        uncovered: A regular expression of the parameters that `init_weights` rightly does not know, such as those that
            the forward pass never uses.
    """

    name: str
    family: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss: Callable[[Any, Any], Tensor]
    daily: bool = False
    sick: str = ""
    uncovered: str = ""

    @property
    def library(self) -> str:
        """The library that it comes from."""
        return self.name.partition("/")[0]
