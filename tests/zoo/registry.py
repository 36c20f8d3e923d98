"""All architectures of the zoo."""

from __future__ import annotations

import importlib
import pkgutil

from zoo import families
from zoo.architecture import Architecture


def architectures() -> dict[str, Architecture]:
    """Those of all families, by name."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(families.__path__, "zoo.families."):
        for architecture in importlib.import_module(module.name).ARCHITECTURES:
            if architecture.name in found:
                raise ValueError(f"two architectures are called {architecture.name}")
            found[architecture.name] = architecture
    return found
