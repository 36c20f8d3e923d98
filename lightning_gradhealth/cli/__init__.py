"""The command line: `gradhealth demo | report | diagnose | explain | serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_gradhealth.cli.misuse import MisuseError, needs
from lightning_gradhealth.messages import reason_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line; None: those that this process was started with.

    Returns:
        The exit code: 0; 1 where something is wrong with a run or a model; 2 where nothing could be looked at.

    Example:
        >>> main(["explain", "loss_spike"])
        loss_spike
        ...
        0
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = ""
    try:
        for module in ("jsonargparse", "docstring_parser"):
            needs(module, "the command line needs jsonargparse[signatures]", "cli")
        from lightning_gradhealth.cli.commands import parsed

        command, run = parsed(arguments)
        code = run()
        print(end="", flush=True)  # what cannot be written is known now
        return code
    except MisuseError as error:
        print(f"gradhealth{command and f' {command}'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as behind `| head`
        _say_no_more()
        return 141
    except OSError as error:  # as on a full disk
        print(f"gradhealth{command and f' {command}'}: {reason_of(error)}", file=sys.stderr)
        _say_no_more()
        return 2


def _say_no_more() -> None:
    """What is left to say goes nowhere; Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
