"""One I/O port as a bus handler.

The bus calls `handler.io_read(offset, size)`. Each port gets a handler of its own whose two functions are bound once,
so that an access costs a single Python call without any decoding. All chips here have 8-bit registers: a wider access
reaches the register at its own port only (an ISA bus would split it; no driver of these chips relies on that).
"""

from __future__ import annotations

from collections.abc import Callable

ReadFunction = Callable[[int, int], int]
WriteFunction = Callable[[int, int, int], None]


def read_ones(_offset: int, size: int) -> int:
    """What an undriven bus reads as."""
    return (1 << (8 * size)) - 1


def write_nothing(_offset: int, _size: int, _value: int) -> None:
    """A write that nobody takes."""


class Port:
    """A bus handler made of two functions."""

    __slots__ = ("io_read", "io_write")

    def __init__(self, read: ReadFunction = read_ones, write: WriteFunction = write_nothing) -> None:
        self.io_read = read
        self.io_write = write
