"""What an argument may be: the checks of the whole package. Every error names the argument, its value and a remedy.

A value that is out of range is a ValueError, one of another type a TypeError. NumPy's scalars count as Python's
numbers. Tensors do not: to read one may wait for a device.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, TypeVar

from lightning_gradhealth.messages import printable

T = TypeVar("T")

_SHOWN = 100  # characters of a value


def wrong(argument: str, must: str, value: object, remedy: str) -> str:
    """The text of an error about an argument.

    Args:
        argument: Its name.
        must: What it must be.
        value: What it is.
        remedy: What to give instead, or a hint.

    Example:
        >>> wrong("clip", "a clipper", 1.0, "e.g. NormClip(1.0)")
        'clip must be a clipper, got 1.0; e.g. NormClip(1.0)'
    """
    return f"{argument} must be {must}, got {shown(value)}; {remedy}"


def shown(value: object) -> str:
    r"""A value as an error shows it: in one line, of a bounded length, whatever its `repr` does.

    Example:
        >>> shown("a\nb"), len(shown(list(range(1_000))))
        ("'a\\nb'", 100)
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__} without a repr"
    return printable(text, _SHOWN)


def check_type(argument: str, value: Any, kind: type[T] | tuple[type[T], ...], must: str, remedy: str) -> T:
    """Return a value of a type.

    Raises:
        TypeError: It has another.

    Example:
        >>> check_type("loss_key", "train_loss", str, "the name of a logged metric", 'e.g. "train_loss"')
        'train_loss'
    """
    if not isinstance(value, kind):
        raise TypeError(wrong(argument, must, value, remedy))
    return value


def takes(function: Callable[..., Any], number: int) -> bool:
    """Whether a function can be called with so many positional arguments; where it has no signature, it is believed.

    Example:
        >>> takes(print, 1), takes(lambda: None, 1)
        (True, False)
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # as of some functions written in C
        return True
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True


def check_flag(argument: str, value: Any, remedy: str = "leave it out for the default") -> bool:
    """Return a value that is True or False; 0 and 1 are not: they would say as well how many.

    Raises:
        TypeError: It is neither.

    Example:
        >>> check_flag("probe_compiled", True)
        True
    """
    if isinstance(value, bool) or _is_numpy_bool(value):
        return bool(value)
    raise TypeError(wrong(argument, "True or False", value, remedy))


def _is_numpy_bool(value: object) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def check_int(argument: str, value: Any, least: int | None, remedy: str, must: str = "an int") -> int:
    """Return a whole number, not below `least`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less than `least`.

    Example:
        >>> check_int("window", 0, 1, "leave it out for 1,000")
        Traceback (most recent call last):
        ...
        ValueError: window must be an int >= 1, got 0; leave it out for 1,000
    """
    bound = "" if least is None else f" >= {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(wrong(argument, must + bound, value, remedy))
    if least is not None and value < least:
        raise ValueError(wrong(argument, must + bound, value, remedy))
    return int(value)


def check_several(argument: str, value: Any, must: str, remedy: str) -> list[Any]:
    """Return what an iterable gives, as a list; a text is one value, not several.

    Raises:
        TypeError: It gives nothing, or is a text or bytes.

    Example:
        >>> check_several("stop_on", ("loss_spike",), "conditions", "name one")
        ['loss_spike']
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return list(value)
    except Exception as error:
        raise TypeError(wrong(argument, must, value, remedy)) from error


def check_number(
    argument: str, value: Any, remedy: str, *, above: float = 0.0, below: float = math.inf, at_most: float | None = None
) -> float:
    """Return a finite number within bounds.

    Raises:
        TypeError: It is no real number.
        ValueError: It is NaN, infinite, or not within `above` < value < `below` (or <= `at_most`).

    Example:
        >>> check_number("alpha", 1.0, ".97 is the paper's", below=1.0)
        Traceback (most recent call last):
        ...
        ValueError: alpha must be a finite number > 0 and < 1, got 1.0; .97 is the paper's
    """
    must = "a finite number" + (f" > {above:g}" if above > -math.inf else "")
    if at_most is not None:
        must += f" and <= {at_most:g}"
    elif below < math.inf:
        must += f" and < {below:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(wrong(argument, must, value, remedy))
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not above < number < below or (at_most is not None and number > at_most):
        raise ValueError(wrong(argument, must, value, remedy))
    return number


def check_choice(argument: str, value: Any, known: Collection[Any], remedy: str = "") -> Any:
    """Return a value that is one of those known; None only where it is known.

    Raises:
        ValueError: It is none of them; what is spelled alike is named.
        TypeError: It is no word at all.

    Example:
        >>> check_choice("mode", "fan", ("fan_in", "fan_out"))
        Traceback (most recent call last):
        ...
        ValueError: mode must be one of 'fan_in', 'fan_out', got 'fan'; did you mean 'fan_in'?
    """
    if (isinstance(value, str) or value is None) and value in known:
        return value
    words = [word for word in known if isinstance(word, str)]
    hint = _nearest(str(value), words) if isinstance(value, str) else ""
    endings = [f"did you mean {hint!r}?"] if hint else []
    endings += [remedy] if remedy or endings else ["choose one of them"]
    text = wrong(argument, f"one of {', '.join(map(repr, known))}", value, "; ".join(filter(None, endings)))
    raise ValueError(text) if isinstance(value, str) else TypeError(text)


def _nearest(word: str, known: Sequence[str]) -> str:
    """The word that was meant, or ""."""
    by_key = {each.lower(): each for each in known}
    return by_key[close[0]] if (close := difflib.get_close_matches(word.lower(), by_key, n=1)) else ""


def check_names(argument: str, value: Any, must: str, remedy: str) -> tuple[str, ...]:
    """Return several names as a tuple: of a list, a tuple or another sequence, but not of one text or of a set.

    Raises:
        TypeError: It is no sequence, or what it holds is no text.

    Example:
        >>> check_names("layers", ["0", "2"], "names of layers", 'e.g. ("net.0",)')
        ('0', '2')
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(wrong(argument, must, value, remedy))
    for name in value:
        if not isinstance(name, str):
            raise TypeError(wrong(argument, must, value, remedy))
    return tuple(value)


def check_ints(argument: str, value: Any, remedy: str) -> tuple[int, ...]:
    """Return several whole numbers as a tuple.

    Raises:
        TypeError: It is no sequence of them.

    Example:
        >>> check_ints("in_axes", [0, -1], "write in_axes=[0]")
        (0, -1)
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(wrong(argument, "integers", value, remedy))
    return tuple(check_int(argument, number, None, remedy) for number in value)


def check_regex(argument: str, pattern: Any, remedy: str) -> str:
    """Return a regular expression.

    Raises:
        TypeError: It is no text.
        ValueError: It is empty, or no regular expression.

    Example:
        >>> check_regex("ignore", "(", "it is matched against layer names")
        Traceback (most recent call last):
        ...
        ValueError: ignore: '(' is not a valid regular expression (missing ), unterminated subpattern at position 0);
        it is matched against layer names
    """
    if not isinstance(pattern, str):
        raise TypeError(wrong(argument, "a regular expression", pattern, remedy))
    if not pattern:
        raise ValueError(f"{argument}: '' is not a valid regular expression (it is empty); {remedy}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{argument}: {shown(pattern)} is not a valid regular expression ({error}); {remedy}"
        ) from error
    return pattern


def check_regexes(argument: str, value: Any, remedy: str) -> tuple[str, ...]:
    """Return one or several regular expressions as a tuple; an empty sequence is an empty tuple.

    Raises:
        TypeError: It is neither a text nor a sequence of texts.
        ValueError: One of them is empty, or no regular expression.

    Example:
        >>> check_regexes("skip", "head.*", "they match whole names"), check_regexes("skip", [], "leave it out")
        (('head.*',), ())
    """
    if isinstance(value, str):
        return (check_regex(argument, value, remedy),)
    if isinstance(value, (bytes, Set)) or not isinstance(value, Sequence):
        raise TypeError(wrong(argument, "regular expressions", value, remedy))
    return tuple(check_regex(argument, pattern, remedy) for pattern in value)


def check_path(argument: str, value: Any, remedy: str) -> str:
    """Return the path of a file as text.

    Raises:
        TypeError: It is no path.
        ValueError: It is empty, or on another machine.

    Example:
        >>> from pathlib import Path
        >>> check_path("path", Path("health.md"), 'e.g. "health.md"')
        'health.md'
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(wrong(argument, "the path of a file", value, remedy))
    if not path:
        raise ValueError(wrong(argument, "the path of a file", value, remedy))
    if is_remote(path):
        raise ValueError(wrong(argument, "the path of a file on this machine", value, remedy))
    return path


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of a place elsewhere, which would be taken for a folder here.

    Args:
        path: The path; a `Path` has one of the two slashes only.

    Example:
        >>> is_remote("s3://bucket/runs"), is_remote("runs/first"), is_remote("C:/runs")
        (True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def check_keys(argument: str, state: Any, keys: Sequence[str]) -> None:
    """Raise unless a state is a mapping that has some keys.

    Raises:
        TypeError: It is no mapping.
        ValueError: A key is missing.

    Example:
        >>> check_keys("state", {}, ("monitor",))
        Traceback (most recent call last):
        ...
        ValueError: state must be what state_dict() returned, got {}; it has no 'monitor'
    """
    must = "what state_dict() returned"
    if not isinstance(state, Mapping):
        raise TypeError(wrong(argument, must, state, "it is no dict"))
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(wrong(argument, must, state, f"it has no {missing[0]!r}"))


def likely_meant(word: str, known: Sequence[str]) -> str:
    """Which of the known words is meant by one that is misspelt or written in another form; "" if none is.

    Example:
        >>> likely_meant("Modules", ("module", "parameter")), likely_meant("encoder", ("module", "parameter"))
        ('module', '')
    """
    if not word.isidentifier():
        return ""
    low = word.lower()
    for each in known:
        alike = difflib.SequenceMatcher(None, low, each).ratio() >= 0.8
        if alike or low[:5] == each[:5]:  # "params"
            return each
    return ""
