"""What was read from event files, kept while nothing is added to it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar, cast

CACHED = 256 * 2**20  # bytes

T = TypeVar("T")


class Cache:
    """What was read last, as long as nothing was added; the oldest goes where there is too much.

    Args:
        limit: Bytes.

    Example:
        >>> cache = Cache(10)
        >>> cache.get("key", 1, lambda: ("value", 5)), cache.get("key", 1, lambda: ("other", 5))
        ('value', 'value')
        >>> cache.get("key", 2, lambda: ("other", 5))
        'other'
    """

    def __init__(self, limit: int = CACHED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, tuple[Any, Any, int]] = OrderedDict()

    def get(self, key: Any, stamp: Any, make: Callable[[], tuple[T, int]]) -> T:
        """What is known under a key, or what `make` gives.

        Args:
            key: The key.
            stamp: Another one than before: it is made anew.
            make: Gives it, and its size in bytes.
        """
        with self._lock:
            known = self._known.get(key)
            if known is not None and known[0] == stamp:
                self._known.move_to_end(key)
                return cast(T, known[1])
        value, size = make()
        with self._lock:
            self._known[key] = (stamp, value, size)
            self._known.move_to_end(key)
            while len(self._known) > 1 and sum(entry[2] for entry in self._known.values()) > self._limit:
                self._known.popitem(last=False)
        return value
