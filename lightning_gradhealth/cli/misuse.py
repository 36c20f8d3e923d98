"""What ends a command before it has begun: what was asked for cannot be done, and what to do instead."""

from __future__ import annotations

import importlib.util


class MisuseError(Exception):
    """A command was asked for what it cannot do; its text says why, and ends in a remedy. The exit code is 2."""


def needs(module: str, what: str, extra: str) -> None:
    """Check that a module of an extra is installed.

    Args:
        module: The module.
        what: What it is there for, and its package.
        extra: The extra of this package that installs it.

    Raises:
        MisuseError: It is not.

    Example:
        >>> needs("no_such_module", "the demo needs scikit-learn", "examples")
        Traceback (most recent call last):
        ...
        lightning_gradhealth.cli.misuse.MisuseError: the demo needs scikit-learn, which is not installed:
        pip install "lightning-gradhealth[examples]"
    """
    if importlib.util.find_spec(module) is None:
        raise MisuseError(f'{what}, which is not installed: pip install "lightning-gradhealth[{extra}]"')
