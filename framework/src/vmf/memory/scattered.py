"""Many pieces of guest RAM as one list of buffers, without a Python object for each.

A guest gives a disk request as a hundred buffers or more. `RamRanges` is a sequence of views of them, for whoever wants
views, and an array of `struct iovec` for whoever calls the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from vmf.memory.guest import GuestMemory

Ranges = npt.NDArray[np.uint64]
"""Shape (n, 2): start and length in bytes of each piece."""


class RamRanges(Sequence[memoryview]):
    """Pieces of guest RAM in their order. As long as it lives the mapping is not taken away.

    Attributes:
        ranges: offset in the mapping and length of each piece, bytes; inside RAM.
    """

    __slots__ = ("_address", "_base", "_nbytes", "ranges")

    def __init__(self, memory: GuestMemory, ranges: Ranges, nbytes: int | None = None) -> None:
        """The caller has checked that every piece lies in RAM, and perhaps added up their lengths."""
        self._fill(memory.buffer[:], memory.address, ranges, nbytes)

    def _fill(self, base: memoryview, address: int, ranges: Ranges, nbytes: int | None) -> None:
        self._base, self._address, self.ranges, self._nbytes = base, address, ranges, nbytes

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        if self._nbytes is None:
            self._nbytes = int(self.ranges[:, 1].sum())
        return self._nbytes

    def __len__(self) -> int:
        return len(self.ranges)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> RamRanges: ...

    def __getitem__(self, index: int | slice) -> memoryview | RamRanges:
        if isinstance(index, slice):
            part = RamRanges.__new__(RamRanges)
            part._fill(self._base, self._address, self.ranges[index], None)
            return part
        start, length = self.ranges[index].tolist()
        return self._base[start : start + length]

    def __iter__(self) -> Iterator[memoryview]:
        base = self._base
        for start, length in self.ranges.tolist():
            yield base[start : start + length]

    def iovecs(self) -> Ranges:
        """A new array of `struct iovec` (<sys/uio.h>): the address in this process and the length of each piece."""
        vectors = self.ranges.copy()
        vectors[:, 0] += np.uint64(self._address)
        return vectors


def total_bytes(buffers: Sequence[memoryview]) -> int:
    """Bytes in all of them."""
    return buffers.nbytes if isinstance(buffers, RamRanges) else sum(map(len, buffers))
