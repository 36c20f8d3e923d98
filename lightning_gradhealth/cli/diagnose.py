"""`gradhealth diagnose`: a model before its first step, by the name of what makes it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

from lightning_gradhealth.cli.misuse import MisuseError
from lightning_gradhealth.cli.terminal import Terminal
from lightning_gradhealth.messages import printable, reason_of

_EXAMPLE = "e.g. package.module:function"


def run(factory: str, batch: str = "", budget: float | None = 30.0) -> int:
    """Look at the signal on its way through a model, forward and backward, before anything is trained.

    Args:
        factory: What makes the model, as package.module:function; the current folder is looked into. A function or a
            class without arguments, or a module.
        batch: What gives a batch, as package.module:function; without it the model's example_input_array is taken.
        budget: Seconds after which nothing more is begun; null: no limit.
    """
    from torch import nn

    import lightning_gradhealth as gh
    from lightning_gradhealth.preflight import diagnosis, ends
    from lightning_gradhealth.tracing.progress import working

    sys.path.insert(0, os.getcwd())
    made = _named("FACTORY", factory)
    model = made if isinstance(made, nn.Module) else _called("FACTORY", factory, made)
    if not isinstance(model, nn.Module):
        raise MisuseError(f"FACTORY: {printable(factory)} must give an nn.Module, got a {type(model).__name__}")
    try:
        if batch:
            flow = gh.diagnose(model, _called("--batch", batch, _named("--batch", batch)), budget=budget)
        else:
            inputs = _example(model, factory)
            opened = ends.opened(model)
            with working("diagnose", diagnosis.check_budget(budget)):
                flow = diagnosis.examine(opened, lambda: ends.from_outputs(opened, ends.copied(inputs)))
    except (TypeError, ValueError) as error:
        raise MisuseError(str(error)) from None
    Terminal(highlight=False).print(flow)
    return 0 if flow.healthy else 1


def _named(argument: str, name: str) -> Any:
    """What a name stands for.

    Raises:
        MisuseError: It cannot be imported, or is not there.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise MisuseError(f"{argument} must be a module and a name in it, {_EXAMPLE}, got {printable(name)}")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that ends the process has given no model
        raise MisuseError(f"{argument}: {printable(module_name)} cannot be imported: {_where(error)}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise MisuseError(f"{argument}: {printable(module_name)} has no {printable(path)}")
        found = getattr(found, part)
    return found


def _called(argument: str, name: str, function: Any) -> Any:
    """What a function gives.

    Raises:
        MisuseError: It cannot be called, or raises.
    """
    if not callable(function):
        raise MisuseError(f"{argument}: {printable(name)} cannot be called, it is a {type(function).__name__}")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise MisuseError(f"{argument}: {printable(name)}() fails: {_where(error)}") from None


def _example(model: Any, factory: str) -> Any:
    inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise MisuseError(
            f"--batch is missing, and the model of {printable(factory)} has no example_input_array; give"
            " --batch package.module:function, which returns a batch"
        )
    return inputs


def _where(error: BaseException) -> str:
    """An exception, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    return f"{reason_of(error)}{printable(place)}"
