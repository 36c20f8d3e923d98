"""Record: a frozen dataclass that turns into JSON and back. NaN and infinities travel as strings."""

from __future__ import annotations

import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, cast

from lightning_gradhealth.validation import check_choice, wrong

R = TypeVar("R", bound="Record")

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    """Turn records, enums, tuples and non-finite floats into what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, frozenset, set)):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, value: Any) -> Any:
    """Rebuild a value of the annotated type `kind` from what `_encode` made of it; what does not fit stays as it is."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_decode_part(f"[{index}]", args[0], item) for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _decode_part(f"[{key!r}]", args[1], item) for key, item in value.items()}
    if kind in (float, Any) and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(kind, type) and issubclass(kind, Record) and isinstance(value, Mapping):
        return kind._of(value)
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
        return check_choice("", value, tuple(member.value for member in kind)) and kind(value)
    return float(value) if kind is float and type(value) is int else value


class _UnreadableError(ValueError):
    """What is wrong with data, and where in it."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where.lstrip('.')} {self.what}".strip().replace(" .", ".")


def _decode_part(where: str, kind: Any, value: Any) -> Any:
    """Decode a part, and say in an error where it is."""
    try:
        return _decode(kind, value)
    except _UnreadableError as error:
        raise _UnreadableError(where + error.where, error.what) from error
    except (ValueError, TypeError) as error:
        raise _UnreadableError(where, str(error).strip()) from error


def _words(kind: Any) -> str:
    """A type as an error names it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is tuple:
        return f"a tuple of {_words(args[0])}"
    if origin is dict:
        return "a dict"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


_WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}
_NUMBERS = {float: numbers.Real, int: numbers.Integral}


def _fits(kind: Any) -> Callable[[Any], bool]:
    """A function that tells whether a value is of the annotated type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        either = [_fits(arg) for arg in args]
        return lambda value: any(fits(value) for fits in either)
    if origin is tuple:
        part = _fits(args[0])
        return lambda value: isinstance(value, tuple) and all(map(part, value))
    if origin is dict:
        return lambda value: isinstance(value, Mapping)
    if kind in _NUMBERS:
        number = _NUMBERS[kind]
        return lambda value: type(value) is kind or (isinstance(value, number) and not isinstance(value, bool))
    if isinstance(kind, type):
        return lambda value: isinstance(value, kind)
    return lambda value: True


def _plain_types(kind: Any) -> frozenset[type]:
    """Types whose values fit `kind` whatever they hold, so that most values need no closer look."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return frozenset().union(*map(_plain_types, typing.get_args(kind)))
    numbers_too = {float: (float, int), int: (int,)}
    return frozenset(numbers_too.get(kind, (kind,) if isinstance(kind, type) and not typing.get_origin(kind) else ()))


@functools.cache
def _checks_of(kind: Hashable) -> list[tuple[str, frozenset[type], Callable[[Any], bool], Any]]:
    """The fields of a record class: name, types that fit as they are, what tells of others whether they fit."""
    known = _types_of(kind)
    names = [f.name for f in fields(cast(Any, kind))]
    return [(name, _plain_types(known[name]), _fits(known[name]), known[name]) for name in names]


@functools.cache
def _types_of(kind: Hashable) -> dict[str, Any]:
    """The resolved annotations of a record class (resolving them anew for every record is slow)."""
    return typing.get_type_hints(kind)


@dataclass(frozen=True)
class Record:
    """Base of all records: a frozen dataclass that makes the round trip through JSON."""

    def __post_init__(self) -> None:
        """Check that every field has the type that it is declared with; a list is as good as a tuple.

        Raises:
            TypeError: One has another.
        """
        values = self.__dict__
        for name, plain, fits, kind in _checks_of(cast("Hashable", type(self))):
            value = values[name]
            if type(value) in plain or fits(value):
                continue
            if isinstance(value, list) and fits(tuple(value)):
                object.__setattr__(self, name, tuple(value))
                continue
            owner = type(self).__name__
            raise TypeError(wrong(name, _words(kind), value, f"it is a field of {owner}"))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as dicts, lists, strings, numbers and None only (NaN and Inf as strings)."""
        encoded: dict[str, Any] = _encode(self)
        return encoded

    def changed(self: R, **fields: Any) -> R:
        """Return a copy with other values of some fields, several times faster than to build it anew."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **fields)
        return copy

    @classmethod
    def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
        """Rebuild a record from `to_dict`'s result; unknown keys of a newer version are ignored.

        Raises:
            TypeError: `data` is no dict.
            ValueError: It is not what `to_dict` returned; the message says where.
        """
        must = f"what {cls.__name__}.to_dict() returned"
        if not isinstance(data, Mapping):
            raise TypeError(wrong("data", must, data, "it is no dict"))
        try:
            return cls._of(data)
        except (ValueError, TypeError) as error:
            raise ValueError(wrong("data", must, data, str(error))) from error

    @classmethod
    def _of(cls: type[R], data: Mapping[str, Any]) -> R:
        known = _types_of(cast("Hashable", cls))
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        for name in missing:
            if name not in data:
                raise _UnreadableError("", f"has no {name!r}")
        return cls(**{key: _decode_part(f".{key}", known[key], value) for key, value in data.items() if key in known})

    def to_json(self, indent: int | None = None) -> str:
        """Return the record as a JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Rebuild a record from `to_json`'s result.

        Raises:
            TypeError: `text` is no text.
            ValueError: It is not what `to_json` returned; the message says where.
        """
        must = f"what {cls.__name__}.to_json() returned"
        if not isinstance(text, (str, bytes, bytearray)):
            raise TypeError(wrong("text", must, text, "give the content of a saved .json file"))
        try:
            data = json.loads(text)
            if not isinstance(data, Mapping):
                raise _UnreadableError("", "it is no JSON object")
            return cls._of(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(wrong("text", must, text, str(error))) from error
