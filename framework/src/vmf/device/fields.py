"""Strict reading of saved state: every field there, none left over, every value in its range.

A schema maps field names to checks. A check returns the value or raises `ValueError` with what it expected; `read`
turns that into a StateError naming the device and the field. Nothing is changed by reading. For device plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vmf.device.base import Payload
from vmf.errors import StateError

Check = Callable[[object], Any]
Schema = Mapping[str, Check]

MAX_TIME = (1 << 63) - 1
"""Guest times are nanoseconds below this."""


def integer(low: int, high: int) -> Check:
    """A whole number in [low, high]."""

    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


BYTE = integer(0, 0xFF)
TIME = integer(0, MAX_TIME)


def boolean(value: object) -> bool:
    """True or False."""
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def optional(check: Check) -> Check:
    """None, or what `check` accepts."""
    return lambda value: None if value is None else check(value)


def octets(low: int, high: int) -> Check:
    """Between `low` and `high` bytes."""

    def check(value: object) -> bytes:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise ValueError(f"{low} to {high} bytes" if low != high else f"{low} bytes")
        return value

    return check


def listing(count: int, check: Check) -> Check:
    """A list of exactly `count` values, each accepted by `check`."""

    def check_all(value: object) -> list[Any]:
        if type(value) is not list or len(value) != count:
            raise ValueError(f"a list of {count}")
        return [check(item) for item in value]

    return check_all


def record(schema: Schema) -> Check:
    """A nested mapping with exactly the fields of `schema`."""

    def check(value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError("a mapping")
        return _fields(value, schema)

    return check


def _fields(body: Mapping[Any, object], schema: Schema) -> dict[str, Any]:
    missing = [name for name in schema if name not in body]
    if missing:
        raise ValueError(f"the field {missing[0]!r}, which is missing")
    extra = [name for name in body if name not in schema]
    if extra:
        raise ValueError(f"no field {extra[0]!r:.80}")
    values = {}
    for name, check in schema.items():
        try:
            values[name] = check(body[name])
        except ValueError as error:
            raise ValueError(f"in {name!r} {error}") from None
    return values


def read(payload: Payload, kind: str, version: int, schema: Schema) -> dict[str, Any]:
    """The checked fields of a payload. Raises StateError."""
    if payload.kind != kind:
        raise StateError(f"{kind} cannot take the state of a {payload.kind}.")
    if payload.version != version:
        raise StateError(
            f"{kind}: version {payload.version} of its state is not known here (known: {version}).",
            "Bring both hosts to the same release of vmf.",
        )
    try:
        return _fields(payload.body, schema)
    except ValueError as error:
        raise StateError(f"{kind}: its saved state is wrong: expected {error}.") from None
