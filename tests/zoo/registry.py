"""All architectures of the zoo."""

from __future__ import annotations

import importlib
import pkgutil

import zoo
from zoo.architecture import Architecture

_TOOLS = {"__main__", "architecture", "checks", "registry", "reachable", "table"}


def architectures() -> dict[str, Architecture]:
    """Those of all modules of this folder, by name."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(zoo.__path__):
        if module.name in _TOOLS or module.name.startswith("test_"):
            continue
        for architecture in importlib.import_module(f"zoo.{module.name}").ARCHITECTURES:
            if architecture.name in found:
                raise ValueError(f"two architectures are called {architecture.name}")
            found[architecture.name] = architecture
    return found
