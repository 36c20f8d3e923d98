"""Norms that never exceed a round number and are often exactly that: clipped before anybody measured them."""

from __future__ import annotations

import math
from typing import Any

_SAME = 1e-4  # clipping to 1.0 leaves 1 / (1 + 1e-6 / norm), in float32
_HITS = 5  # so often the greatest norm has to come back
_DIGITS = 2  # of a limit that somebody has typed; by chance a norm is as close to such a number once in 120


class Ceiling:
    """Follows the greatest norm of one optimizer, and how often it was reached.

    Example:
        >>> ceiling = Ceiling()
        >>> for norm in (0.3, 0.5, 0.4999999, 0.5, 0.2, 0.5, 0.5):
        ...     ceiling.add(norm)
        >>> ceiling.limit, ceiling.hits
        (0.5, 5)
    """

    def __init__(self, top: float = 0.0, hits: int = 0) -> None:
        self.top = top
        self.hits = hits

    def add(self, norm: float | None) -> None:
        """Take the norm of one step; one that is not finite is passed over."""
        if norm is None or not math.isfinite(norm) or norm <= 0:
            return
        if norm > self.top * (1 + _SAME):
            self.top, self.hits = norm, 0
        self.hits += norm >= self.top * (1 - _SAME)

    @property
    def limit(self) -> float | None:
        """The number that the norms look clipped to; None where they do not."""
        if self.hits < _HITS:
            return None
        rounded = float(f"{self.top:.{_DIGITS - 1}e}")
        return rounded if abs(rounded - self.top) <= _SAME * rounded else None

    def state(self) -> list[Any]:
        """What it takes to go on."""
        return [self.top, self.hits]
