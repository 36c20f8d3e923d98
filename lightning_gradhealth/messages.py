"""How the package speaks: one function that prints a line and cannot raise, and text from outside made harmless.

Whatever a logging handler, a progress bar or an exception's own `str` does, training goes on.
"""

from __future__ import annotations

import contextlib
import html
import logging
import re
import traceback
import unicodedata
from collections.abc import Callable, Mapping

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


def in_words(value: object, most: int = 20) -> str:
    """A piece of evidence as a reader expects it, in one line of at most 1,000 characters.

    Args:
        value: A number, a text, or a list or dict of such.
        most: The greatest number of entries of a list or dict; of a longer one their number is said.

    Example:
        >>> in_words({"net.0": 0.73204, "net.2": [1, True]}), in_words(["a", "b", "c"], 2)
        ('net.0: 0.732, net.2: 1, True', 'a, b, … (3)')
    """
    if isinstance(value, (Mapping, list, tuple)):
        if isinstance(value, Mapping):
            parts = [f"{printable(name)}: {in_words(part, most)}" for name, part in list(value.items())[:most]]
        else:
            parts = [in_words(part, most) for part in value[:most]]
        value = ", ".join([*parts, f"… ({len(value)})"] if len(value) > most else parts)
    elif isinstance(value, float):
        value = f"{value:.3g}"
    return printable(value, 1_000)


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


def where_and_why(error: BaseException) -> str:
    """An exception's type, the first line of its text, and the place in the user's code where it was raised.

    Example:
        >>> print(where_and_why(ValueError("no such layer")))
        ValueError: no such layer
    """
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in ("torch", "lightning", "pytorch_lightning", "lightning_gradhealth"):
            place = f" (line {line} of {frame.f_code.co_filename}, in {frame.f_code.co_name})"
    return f"{reason_of(error)}{printable(place, _REASON)}"


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
