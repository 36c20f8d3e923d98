"""Checks of arguments that this package shares; every error names argument, value and remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection


def one_of(argument: str, value: object, known: Collection[str]) -> None:
    """Raise a ValueError unless `value` is one of `known`."""
    if not isinstance(value, str) or value not in known:
        close = difflib.get_close_matches(str(value).lower(), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{argument} must be one of {', '.join(sorted(known))}, got {value!r}{hint}")


def positive(argument: str, value: object, remedy: str) -> None:
    """Raise a ValueError unless `value` is a finite number above 0."""
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{argument} must be > 0 and finite, got {value!r}; {remedy}")
