"""Verdicts of rules as plain data: what a rule of the user's gives is checked here, and nowhere else."""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from lightning_gradhealth.messages import printable
from lightning_gradhealth.records import Severity
from lightning_gradhealth.validation import shown

ENTRIES = 1_000  # of a list or dict of the evidence
TEXT = 2_000  # characters of a text
_DEPTH = 4
_INT = 2**63


def plain(value: Any, depth: int = 0) -> Any:
    """A value of the evidence as numbers, strings, lists and dicts; whatever else it is, in words.

    Example:
        >>> plain({"f": len, "half": 0.5, "all": (1, 2)})
        {'f': '<built-in function len>', 'half': 0.5, 'all': [1, 2]}
    """
    if isinstance(value, Enum):
        return plain(value.value, depth)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value) if len(value) <= TEXT else printable(value, TEXT)
    if isinstance(value, int):
        return int(value) if -_INT <= value < _INT else shown(f"{value:.3e}" if abs(value) < 1e300 else "a huge number")
    if isinstance(value, numbers.Real):
        return float(value)
    if depth < _DEPTH:
        if isinstance(value, Mapping):
            pairs = list(value.items())[:ENTRIES]
            return {_key(key): plain(item, depth + 1) for key, item in pairs}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item, depth + 1) for item in list(value)[:ENTRIES]]
        if hasattr(value, "tolist"):  # arrays, tensors and their numbers
            flat = value.reshape(-1)[:ENTRIES] if getattr(value, "ndim", 0) else value
            return plain(flat.tolist(), depth + 1)
    return shown(value)


def _key(key: Any) -> str:
    return str(plain(key)) if isinstance(key, (str, int, float, Enum)) else shown(key)


def severity_of(value: Any) -> Severity:
    """The severity of a verdict.

    Raises:
        TypeError: It is none.
    """
    try:
        return Severity(value)
    except (ValueError, TypeError):
        raise TypeError(f'severity must be "info", "warning" or "critical", got {shown(value)}') from None


def layers_of(value: Any) -> tuple[str, ...]:
    """The layers of a verdict; a single name is one layer.

    Raises:
        TypeError: They are not names.
    """
    if isinstance(value, str):
        return (str.__str__(value),)
    if value is None:
        return ()
    names = list(value) if isinstance(value, (list, tuple, set, frozenset)) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers must be names of layers, got {shown(value)}; e.g. tuple(layer.name for layer in ...)")
    return tuple(dict.fromkeys(str.__str__(name) for name in names))


def step_of(value: Any, otherwise: int) -> int:
    """The first step of a verdict as an int.

    Args:
        value: What the rule gave; None: it does not know.
        otherwise: The step of the record: nothing begins after it.

    Raises:
        TypeError: It is no whole number.
    """
    if value is None:
        return otherwise
    if hasattr(value, "item") and not getattr(value, "ndim", 0):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return max(0, min(operator.index(value), otherwise))
    except TypeError:
        raise TypeError(f"first_step must be an int or None, got {shown(value)}") from None


def text_of(value: Any, limit: int = TEXT) -> str:
    """A text of a verdict in one line."""
    return "" if value is None else printable(value, limit)


_IMPORTS = {"gh": "import lightning_gradhealth as gh", "nn": "from torch import nn", "torch": "import torch"}


def code_of(value: Any) -> str:
    """A verdict's code, its lines kept, after the imports that it needs to run where it is pasted.

    Example:
        >>> code_of("gh.init_weights(model, batch)").splitlines()
        ['import lightning_gradhealth as gh', 'gh.init_weights(model, batch)']
    """
    code = "" if value is None else "\n".join(printable(line, TEXT) for line in str(value).splitlines()[:50])
    imports = [line for name, line in _IMPORTS.items() if re.search(rf"(?<![\w.]){name}\.", code) and line not in code]
    return "\n".join(["; ".join(imports), code]) if imports else code
