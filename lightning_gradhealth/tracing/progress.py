"""Work that somebody waits for: a bar from the third second on, on a terminal only, and a budget of seconds.

No thread: the bar is drawn where the work says how far it is, and by nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PATIENCE = 3.0  # seconds after which somebody wonders
EVERY = 0.1  # seconds between two pictures
_COLOUR = "#6206E0"  # that of Lightning's RichProgressBar


class OutOfTimeError(BaseException):
    """The budget is spent; no `except Exception` around a forward pass may take it for an error of the model."""


class Work:
    """One piece of work.

    Args:
        title: What is being done, as "init_weights".
        budget: Seconds that it may take; None: any number.
        console: Where the bar is drawn, a rich console; None: stderr.
        clock: Gives the time in seconds.
        shown: Whether there may be a bar.

    Example:
        >>> seconds = iter([0.0, 1.0, 9.0])
        >>> work = Work("diagnose", budget=5.0, clock=lambda: next(seconds))
        >>> work.is_over, work.is_over
        (False, True)
    """

    def __init__(
        self,
        title: str,
        budget: float | None = None,
        console: Any = None,
        clock: Callable[[], float] = time.monotonic,
        shown: bool = True,
    ) -> None:
        self._title, self._budget, self._console, self._clock = title, budget, console, clock
        self._begun = self._drawn = clock()
        self._stage, self._done = "", 0
        self._total: int | None = None
        self._bar: Any = None
        self._hidden = not shown
        self._may_stop = False
        self._left: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return self._is_over(self._clock())

    def _is_over(self, now: float) -> bool:
        return self._budget is not None and now - self._begun > self._budget

    def leave(self, what: str) -> None:
        """Note down what is not looked at, as the budget is spent."""
        self._left.append(what)

    @property
    def notes(self) -> list[str]:
        """What the report is to say of the budget."""
        if not self._left:
            return []
        return [f"not looked at, as the budget of {self._budget:g} s is spent: {'; '.join(self._left)}"]

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What runs inside ends where the budget does, by `OutOfTimeError`."""
        self._may_stop = True
        try:
            yield
        finally:
            self._may_stop = False

    def tick(self, stage: str = "", done: int = 0, total: int | None = None) -> None:
        """Say how far the work is.

        Args:
            stage: What is being done now; "": the same as before.
            done: How many of its parts are done.
            total: How many there are; None: not known.

        Raises:
            OutOfTimeError: The budget is spent, and the work may be left as it is.
        """
        if stage:
            self._stage, self._done, self._total = stage, done, total
        now = self._clock()
        if self._may_stop and self._is_over(now):
            raise OutOfTimeError
        if not self._hidden and now - self._begun > PATIENCE and now - self._drawn > EVERY:
            self._drawn = now
            self._draw()

    def close(self) -> None:
        """Take the bar away."""
        bar, self._bar, self._hidden = self._bar, None, True
        if bar is not None:
            try:
                bar.stop()
            except Exception:  # whatever a terminal may do that has gone: there is no bar to be seen then
                return

    def _draw(self) -> None:
        try:
            if self._bar is None:
                self._bar = _bar_on(self._console)
                self._hidden = self._bar is None
            if self._bar is not None:
                if not self._bar.tasks:
                    self._bar.start()
                    self._bar.add_task(self._title, stage="", total=None)
                self._bar.update(self._bar.task_ids[0], stage=self._stage, completed=self._done, total=self._total)
                self._bar.refresh()
        except Exception:  # a terminal that has gone is no reason to stop
            self.close()


def _bar_on(console: Any) -> Any:
    """A bar in the look of Lightning's; None where nobody looks: a pipe, a notebook, CI, ranks other than the first."""
    from rich.console import Console  # slow to import, and few ever wait so long
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True) if console is None else console
    seen = console.is_terminal and console.file.isatty() and not console.is_jupyter and not console.is_dumb_terminal
    elsewhere = any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if not seen or elsewhere or os.environ.get("CI"):
        return None
    console.on_broken_pipe = _broken_pipe  # rich's own ends the process
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style=_COLOUR, finished_style=_COLOUR, pulse_style=_COLOUR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[stage]}", style="dim"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _broken_pipe() -> None:
    raise BrokenPipeError


_CURRENT: ContextVar[Work | None] = ContextVar("lightning_gradhealth_work", default=None)


@contextmanager
def working(title: str, budget: float | None = None, *, shown: bool = True) -> Iterator[Work]:
    """A piece of work; one inside another is a part of it, and has no bar and no budget of its own.

    Args:
        title: What is being done.
        budget: Seconds that it may take; None: any number.
        shown: Whether there may be a bar; not where somebody else draws one.

    Example:
        >>> with working("init_weights") as outer, working("diagnose", budget=1.0) as inner:
        ...     tick("drawing weights", 1, 2)
        ...     inner is outer
        True
    """
    outer = _CURRENT.get()
    if outer is not None:
        yield outer
        return
    work = Work(title, budget, shown=shown)
    token = _CURRENT.set(work)
    try:
        yield work
    finally:
        _CURRENT.reset(token)
        work.close()


def tick(stage: str = "", done: int = 0, total: int | None = None) -> None:
    """Say how far the work is that is being done, if any: see `Work.tick`."""
    work = _CURRENT.get()
    if work is not None:
        work.tick(stage, done, total)
