"""How the package speaks: one function that prints a line and cannot raise, and text from outside made harmless.

Whatever a logging handler, a progress bar or an exception's own `str` does, training goes on.
"""

from __future__ import annotations

import contextlib
import html
import logging
import re
import unicodedata
from collections.abc import Callable

log = logging.getLogger("lightning_gradhealth")

_AS_IT_IS = {"markup": False}  # for rich's handler: `[/x]` in a layer's name is no markup
_REASON = 300  # characters: torch's errors may have a hundred lines


def printable(text: object, limit: int | None = None) -> str:
    r"""Text from outside in one line: control and formatting characters are escaped, and it may be cut in the middle.

    Args:
        text: The text, or anything that has one.
        limit: The greatest number of characters to return; None: no limit.

    Example:
        >>> print(printable("a\nb\x1b[31m"), printable("m" * 300, 9))
        a\nb\x1b[31m mmmm…mmmm
    """
    raw = _text(text)
    line = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _escaped(c) for c in raw)
    if limit is None or len(line) <= limit:
        return line
    half = (limit - 1) // 2
    return f"{line[: limit - 1 - half]}…{line[len(line) - half :]}"


def _text(text: object) -> str:
    try:
        return str(text)
    except Exception as error:
        return f"<{type(text).__name__} without text: {type(error).__name__}>"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if ord(character) != 0xA0 else " "


def as_markdown(text: object) -> str:
    r"""Markdown that shows a text as it is in one line, also in a cell of a table, whatever it is.

    Example:
        >>> print(as_markdown("a|b <i> [l](http://x)"))
        a\|b &lt;i&gt; \[l\](http://x)
    """
    line = html.escape(printable(" ".join(_text(text).split(" "))), quote=False)
    # an underscore within a word emphasises nothing
    return re.sub(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)


def reason_of(error: BaseException) -> str:
    """An exception's type and the first line of its text, also where asking for that text raises.

    Example:
        >>> reason_of(ValueError("no such layer"))
        'ValueError: no such layer'
    """
    try:
        first = str(error).strip().partition("\n")[0]
    except Exception as unreadable:
        first = f"its text cannot be had: {type(unreadable).__name__}"
    name = type(error).__name__
    return printable(f"{name}: {first}" if first else name, _REASON)


def say(line: str, *, through: Callable[[str], None] | None = None, error: BaseException | None = None) -> None:
    """Print one line, and never raise: what fails on the way is passed over.

    Args:
        line: What to say.
        through: Takes the line instead of the logger "lightning_gradhealth"; where it fails, the logger gets the line.
        error: An exception whose traceback the logger is given.

    Example:
        >>> def broken(line):
        ...     raise OSError("the pipe is closed")
        >>> say("gradhealth: all is well", through=broken)  # the logger has it now
    """
    line = printable(line)
    if through is not None:
        try:
            through(line)
            return
        except Exception as failure:
            line = f"{line} (told here since {printable(type(through).__name__)} failed: {reason_of(failure)})"
    # a handler or a filter of the user's may raise, and a traceback may not be printable
    with contextlib.suppress(Exception):
        log.warning("%s", line, exc_info=error, extra=_AS_IT_IS)
        return
    if error is not None:
        with contextlib.suppress(Exception):
            log.warning("%s (%s)", line, reason_of(error), extra=_AS_IT_IS)
