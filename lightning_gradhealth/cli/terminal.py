"""Rich's console as the commands have it: one whose reader may go, as behind `| head`."""

from __future__ import annotations

from rich.console import Console


class Terminal(Console):
    """Lets a pipe that is closed be known; Rich would exit with 1, which says that something was found in a run."""

    def on_broken_pipe(self) -> None:
        """Raise what Rich has caught.

        Raises:
            BrokenPipeError: Always.
        """
        raise BrokenPipeError
