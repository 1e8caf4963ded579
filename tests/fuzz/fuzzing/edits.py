"""Plain data with small mistakes in it: what a mutated CBOR body seldom is, a right structure with one wrong value."""

from __future__ import annotations

import copy
from typing import Any

from fuzzing import Choices

_EDGES = (
    0, 1, -1, 2, 7, 8, 15, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
    1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), -(1 << 64),
)  # fmt: skip


def _value(choices: Choices, old: Any) -> Any:
    kind = choices.number() % 12
    if kind == 0:
        return _EDGES[choices.number() % len(_EDGES)]
    if kind == 1:
        return choices.number(8)
    if kind == 2:
        return choices.take(choices.number(2) % 600)
    if kind == 3:
        return choices.take(choices.number() % 40).decode("utf-8", "replace")
    if kind == 4:
        return (None, True, False, [], {}, "", b"")[choices.number() % 7]
    if kind == 5:
        return [_value(choices, None) for _ in range(choices.number() % 5)]
    if kind == 6 and isinstance(old, int):
        return old ^ 1 << choices.number() % 64
    if kind == 7 and isinstance(old, int):
        return old + choices.number() - 128
    if kind == 8 and isinstance(old, bytes) and old:
        at = choices.number(2) % len(old)
        return old[:at] + bytes([choices.number()]) + old[at + 1 :]
    if kind == 9 and isinstance(old, bytes | list):
        return old[: choices.number(2) % (len(old) + 1)]
    if kind == 10 and isinstance(old, bytes | list):
        return old + old[: choices.number(2) % 64]
    return choices.number(4)


def edited(value: Any, choices: Choices, most: int = 4) -> Any:
    """A copy of plain data with up to `most` edits: a value replaced, left out, or put in."""
    made = [copy.deepcopy(value)]
    for _ in range(choices.number() % (most + 1)):
        holder: Any = made
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and choices.number() % 8:
            holder = holder[key]
            number = choices.number(2)
            key = sorted(holder)[number % len(holder)] if isinstance(holder, dict) else number % len(holder)
        action = choices.number() % 8
        if action == 0 and holder is not made:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[choices.take(3).decode("latin-1")] = _value(choices, None)
        elif action == 1 and isinstance(holder, list) and holder is not made:
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = _value(choices, holder[key])
    return made[0]
