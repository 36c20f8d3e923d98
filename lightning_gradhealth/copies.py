"""What an object and its deep copies know of each other: which of them was used last."""

from __future__ import annotations

from typing import Any


class Shared:
    """One for an object and all its deep copies: libraries copy what they are given, and use the copy.

    Pickled, it begins afresh: another process has runs of its own.

    Attributes:
        last: The copy that was used last; None before.

    Example:
        >>> import copy
        >>> mine = {"shared": Shared()}
        >>> theirs = copy.deepcopy(mine)
        >>> theirs["shared"].last = theirs
        >>> mine["shared"].last is theirs
        True
    """

    def __init__(self) -> None:
        self.last: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()
