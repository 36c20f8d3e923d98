"""Record: a frozen dataclass that turns into JSON and back. NaN and infinities travel as strings."""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, cast

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
    """Rebuild a value of the annotated type `kind` from what `_encode` made of it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        return tuple(_decode(args[0], item) for item in value)
    if origin is dict:
        return {key: _decode(args[1], item) for key, item in value.items()}
    if kind in (float, Any) and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return float(value) if kind is float else value


@functools.cache
def _types_of(kind: Hashable) -> dict[str, Any]:
    """The resolved annotations of a record class (resolving them anew for every record is slow)."""
    return typing.get_type_hints(kind)


@dataclass(frozen=True)
class Record:
    """Base of all records: a frozen dataclass that makes the round trip through JSON."""

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
    def from_dict(cls: type[R], data: dict[str, Any]) -> R:
        """Rebuild a record from `to_dict`'s result; unknown keys of a newer version are ignored."""
        known = _types_of(cast("Hashable", cls))
        return cls(**{key: _decode(known[key], value) for key, value in data.items() if key in known})

    def to_json(self, indent: int | None = None) -> str:
        """Return the record as a JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Rebuild a record from `to_json`'s result."""
        return cls.from_dict(json.loads(text))
