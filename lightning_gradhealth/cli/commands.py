"""The commands, their arguments as their functions' signatures and docstrings say them."""

from __future__ import annotations

import functools
from argparse import HelpFormatter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from lightning_gradhealth.cli import demo, diagnose, explain, report, serve

# not by their functions' names: jsonargparse would look for `diagnose` in the package too, and find torch behind it
COMMANDS: Mapping[str, Callable[..., int]] = {
    "demo": demo.run,
    "report": report.run,
    "diagnose": diagnose.run,
    "explain": explain.run,
    "serve": serve.run,
}
# what a signature cannot say: a dash in a name, and a positional that may be left out
_BY_HAND: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "report": {"fail_on": {"name": "--fail-on", "options": {"metavar": "CONDITION,..."}}},
    "explain": {"condition": {"name": "condition", "options": {"nargs": "?"}}},
}
_ABOUT = "Training health from the command line: what GradHealth has found in runs, and what a model will do."


def parser() -> ArgumentParser:
    """The parser of all commands.

    Example:
        >>> parser().parse_args(["report", "runs", "--fail-on", "non_finite"]).report.fail_on
        'non_finite'
    """
    top = ArgumentParser(prog="gradhealth", description=_ABOUT, formatter_class=HelpFormatter)
    several = top.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = ArgumentParser(description=_about(command), formatter_class=HelpFormatter)
        by_hand = _BY_HAND.get(name, {})
        own.add_function_arguments(command, as_group=False, as_positional=True, skip=set(by_hand))
        said = {each.arg_name: each.description for each in docstring_parser.parse(command.__doc__ or "").params}
        for argument, how in by_hand.items():
            own.add_argument(how["name"], default="", help=said[argument], **how["options"])
        several.add_subcommand(name, own, help=_about(command))
    return top


def parsed(arguments: Sequence[str] | None) -> tuple[str, Callable[[], int]]:
    """The command that is asked for, and what runs it.

    Args:
        arguments: Those of the command line; None: those that this process was started with.

    Example:
        >>> parsed(["explain"])[0]
        'explain'
    """
    top = parser()
    chosen = top.parse_args(arguments)
    name = chosen.pop("subcommand")
    return name, functools.partial(COMMANDS[name], **chosen[name].as_dict())


def _about(command: Callable[..., int]) -> str:
    return (command.__doc__ or "").strip().partition("\n")[0]
