"""A failure of ours never ends a training: it is told once, and from then on nothing more is done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch

from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.messages import reason_of, say

F = TypeVar("F", bound=Callable[..., Any])


class Guard:
    """Whether one run is still watched, shared by all who watch it.

    Args:
        asked: What the user has asked for that changes or ends the training, as "clipping"; it is named when it ends.

    Attributes:
        aside: Why nothing is watched any more; empty while all is well.
        close: Called when that is so, to take the hooks off.

    Example:
        >>> guard = Guard()
        >>> guard.aside
        ''
    """

    def __init__(self, asked: Sequence[str] = ()) -> None:
        self.aside = ""
        self.asked = list(asked)
        self.close: Callable[[], None] = _nothing

    @classmethod
    def of(cls, clip: object, on_non_finite: str, stop_on: object) -> Guard:
        """The guard of a run for which this was asked."""
        acting = {"clipping": clip is not None, "on_non_finite": on_non_finite != "warn", "stop_on": bool(stop_on)}
        return cls([name for name, asked in acting.items() if asked])

    def release(self) -> None:
        """Let go of what is watched; what has happened stays known."""
        self.close = _nothing

    def step_aside(self, why: str, error: Exception | None = None) -> None:
        """Stop watching for the rest of the run, and say so, once.

        Args:
            why: The reason, in one line.
            error: The exception behind it, if there is one.
        """
        if self.aside:
            return
        self.aside = why
        acts = f" WITHOUT {' and '.join(self.asked)}" if self.asked else ""
        say(f"gradhealth: steps aside for the rest of this run, training goes on{acts} ({why})", error=error)
        try:
            self.close()
        except Exception as failure:
            say(f"gradhealth: some hooks may be left on the model ({reason_of(failure)})")

    def failed(self, error: Exception, *, together: bool) -> None:
        """Step aside after a failure.

        Args:
            error: What was raised.
            together: It happened where other ranks go on.

        Raises:
            GradHealthError: Other ranks would go on clipping, skipping or stopping without this one.
        """
        if together and self.asked and world_size() > 1 and not self.aside:
            raise GradHealthError(
                f"GradHealth cannot step aside on one rank alone, while it acts on the others: {reason_of(error)}"
                " (see the cause above); without clip, on_non_finite and stop_on it can"
            ) from error
        self.step_aside(reason_of(error), error)

    def __getstate__(self) -> dict[str, Any]:
        """What belongs to this process stays here."""
        return {**vars(self), "close": _nothing}


class Guarded(Protocol):
    """What has a guard."""

    guard: Guard


def never_fatal(harmless: Callable[..., Any] | None = None, *, together: bool = False) -> Callable[[F], F]:
    """Let a method fail once: its guard steps aside, and the method and all others under that guard do nothing more.

    An error that is raised on purpose (`GradHealthError`) goes through.

    Args:
        harmless: Called with the method's arguments in its place, and gives what it returns; None: it returns None.
        together: Other ranks go on where this one fails, see `Guard.failed`.

    Example:
        >>> class Watcher:
        ...     def __init__(self):
        ...         self.guard = Guard()
        ...     @never_fatal(lambda self: 0.0)
        ...     def norm(self):
        ...         return 1 / 0
        >>> watcher = Watcher()
        >>> watcher.norm(), watcher.guard.aside
        (0.0, 'ZeroDivisionError: division by zero')
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            if not self.guard.aside:
                try:
                    return method(self, *args, **kwargs)
                except GradHealthError:
                    raise
                except Exception as error:
                    self.guard.failed(error, together=together)
            return None if harmless is None else harmless(self, *args, **kwargs)

        return cast(F, guarded)

    return decorate


def world_size() -> int:
    """Number of ranks that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _nothing() -> None:
    """There is nothing to close."""
