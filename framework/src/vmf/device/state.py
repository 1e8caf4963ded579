"""What a device's saved state and configuration may consist of, checked before a guest is stopped for them.

Both travel to other hosts, so they are plain data within the bounds of the teleport protocol's codec
(`vmf.teleport.protocol.codec`; a test holds the two together). Checking here, at the source, names the device and the
field; the target would only say that the bytes are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmf.device.base import Payload
from vmf.errors import StateError

MAX_DEPTH = 12
"""Of a body; the message around it has some levels of its own."""
MAX_ITEMS = 90_000
"""Of all bodies of a machine together."""
MAX_BYTES = 8000 * 1024
"""Encoded, of all bodies of a machine together."""
_HEAD = 9
"""The longest head of an encoded item, bytes."""
_WHERE = 80


def measure(value: Any, where: str = "", depth: int = 0) -> tuple[int, int]:
    """Items, and bytes at most, of plain data. Raises ValueError that names the place and what is wrong there."""
    if depth > MAX_DEPTH:
        raise ValueError(f"plain data at most {MAX_DEPTH} levels deep ({where[:_WHERE]} is deeper)")
    kind = type(value)
    if value is None or kind is bool:
        return 1, 1
    if kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"numbers of 64 bits ({where or 'it'} has a longer one)")
        return 1, _HEAD
    if kind is bytes:
        return 1, _HEAD + len(value)
    if kind is str:
        try:
            return 1, _HEAD + len(value.encode())
        except UnicodeEncodeError:
            raise ValueError(f"text that is Unicode ({where or 'it'} has a lone surrogate)") from None
    items, size = 1, _HEAD
    if kind in (list, tuple):
        for number, each in enumerate(value):
            more, bytes_ = measure(each, f"{where}[{number}]", depth + 1)
            items, size = items + more, size + bytes_
            _bounded(items, size, where)
        return items, size
    if isinstance(value, Mapping):
        for key, each in value.items():
            if type(key) is not str:
                raise ValueError(f"keys that are texts ({where or 'it'} has {type(key).__name__})")
            for part in (key, each):
                more, bytes_ = measure(part, f"{where}.{key}" if where else key, depth + 1)
                items, size = items + more, size + bytes_
            _bounded(items, size, where)
        return items, size
    raise ValueError(f"None, bool, int, str, bytes, list and dict only ({where or 'it'} is {kind.__name__})")


def _bounded(items: int, size: int, where: str) -> None:
    if items > MAX_ITEMS or size > MAX_BYTES:
        raise ValueError(_too_much(items, size) + (f" ({where[:_WHERE]} has more)" if where else ""))


def _too_much(items: int, size: int) -> str:
    return f"at most {MAX_BYTES >> 10} KiB" if size > MAX_BYTES else f"at most {MAX_ITEMS} values"


def payload_check(kind: str, version: int) -> Callable[[Any], Payload]:
    """For what `save` of a device of this kind returns: raises ValueError saying what was expected."""

    def check(result: Any) -> Payload:
        if not isinstance(result, Payload):
            raise ValueError("a Payload")
        if result.kind != kind or result.version != version:
            raise ValueError(
                f"a Payload of its own kind {kind} and version {version} (not {result.kind!r:.40},"
                f" {result.version!r:.20})"
            )
        if not isinstance(result.body, Mapping):
            raise ValueError(f"a Payload whose body is a mapping, not {type(result.body).__name__},")
        try:
            items, size = measure(result.body)
        except ValueError as error:
            raise ValueError(f"a Payload of {error}") from None
        if items > MAX_ITEMS or size > MAX_BYTES:
            raise ValueError(f"a Payload of {_too_much(items, size)} (it has {size >> 10} KiB in {items} values)")
        return result

    return check


def check_total(payloads: Sequence[Payload]) -> None:
    """Raises StateError when the whole state is more than one message of a teleport can carry."""
    sizes = [(measure(payload.body), payload.kind) for payload in payloads]
    items, size = (sum(each[0][which] for each in sizes) for which in (0, 1))
    if items > MAX_ITEMS or size > MAX_BYTES:
        largest = max(sizes)[1] if items > MAX_ITEMS else max((each[0][1], each[1]) for each in sizes)[1]
        raise StateError(
            f"the saved state of this machine has {size >> 10} KiB in {items} values, and {_too_much(items, size)} can"
            f" travel; the most of it is that of {largest}.",
            "Remove that device, or a part of its kind.",
        )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a definition as they can travel; what TOML has and the wire has not (dates, fractions) as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        try:
            measure(value)
        except ValueError:
            return str(value)
        return value

    return {str(name): plain(value) for name, value in options.items()}


def check_settings(result: Any) -> Mapping[str, Any]:
    """For what `settings` of a device returns."""
    if not isinstance(result, Mapping):
        raise ValueError("a mapping of names to plain values, or None")
    try:
        items, size = measure(result)
    except ValueError as error:
        raise ValueError(f"a mapping of {error}") from None
    if items > 1000 or size > 32 << 10:
        raise ValueError("a mapping of at most 1000 values and 32 KiB")
    return result
