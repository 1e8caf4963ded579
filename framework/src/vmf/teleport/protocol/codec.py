"""Bounded CBOR (RFC 8949): the subset that message bodies may use.

A decoder that is handed hostile bytes must not build anything before it knows how big it gets. `scan` walks over the
encoded items first and refuses what the protocol never needs: tags, floats, indefinite lengths, numbers that are not
in their shortest form, map keys that are not text or appear twice, more than `MAX_ITEMS` items, nesting deeper than
`MAX_DEPTH`. What it lets through `cbor2` decodes to None, bool, int (64 bits), str, bytes, list and dict only.
"""

from __future__ import annotations

from typing import Any

import cbor2

MAX_DEPTH = 16
MAX_ITEMS = 100_000

_SHORTEST = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}
"""Least argument that needs the additional-information value, RFC 8949 section 3."""


def scan(data: bytes) -> None:
    """Raises ValueError, in words, unless `data` is exactly one item of the subset."""
    size = len(data)
    budget = MAX_ITEMS

    def item(position: int, depth: int, only_text: bool = False) -> int:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise ValueError(f"more than {MAX_ITEMS} items")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if position >= size:
            raise ValueError("truncated body")
        major, info = data[position] >> 5, data[position] & 31
        position += 1
        if only_text and major != 3:
            raise ValueError("a map key that is not text")
        if major == 7:
            if info not in (20, 21, 22):
                raise ValueError("a float or an undefined simple value")
            return position
        if major == 6:
            raise ValueError("a tag")
        if info < 24:
            argument = info
        elif info <= 27:
            width = 1 << (info - 24)
            argument = int.from_bytes(data[position : position + width], "big")
            position += width
            if position > size:
                raise ValueError("truncated body")
            if argument < _SHORTEST[info]:
                raise ValueError("a number not in its shortest form")
        else:
            raise ValueError("an indefinite or reserved length")
        if major in (0, 1):
            return position
        if argument > size - position:
            raise ValueError("a length beyond the end of the body")
        if major in (2, 3):
            return position + argument
        if major == 4:
            for _ in range(argument):
                position = item(position, depth + 1)
            return position
        keys: set[bytes] = set()
        for _ in range(argument):
            end = item(position, depth + 1, only_text=True)
            key = data[position:end]
            if key in keys:
                raise ValueError("a map key that appears twice")
            keys.add(key)
            position = item(end, depth + 1)
        return position

    if item(0, 0) != size:
        raise ValueError("bytes after the end of the body")


def decode(data: bytes) -> Any:
    """The one item in `data`. Raises ValueError only."""
    scan(data)
    try:
        return cbor2.loads(data)
    except Exception as error:  # noqa: BLE001 - cbor2 raises several kinds (bad UTF-8 too): all mean "bad body"
        raise ValueError(f"undecodable CBOR ({type(error).__name__})") from None


def encode(value: Any) -> bytes:
    """Encode plain data. Raises ValueError for anything that `decode` would refuse."""
    try:
        data: bytes = cbor2.dumps(value)
    except Exception as error:  # noqa: BLE001 - as above
        raise ValueError(f"not plain data: {error}") from None
    scan(data)
    return data
