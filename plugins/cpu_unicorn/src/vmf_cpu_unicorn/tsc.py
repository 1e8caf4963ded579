"""The host's time-stamp counter, which is what the engine's RDTSC counts (plus an offset of the guest's)."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from functools import lru_cache

# RDTSC; SHL RDX,32; OR RAX,RDX; RET
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

_MEASURE_SPAN_NS = 20_000_000
_ROUNDS = 5


class _Code:
    """Keeps the page of machine code alive with the function in it."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(_READ_TSC)
        prototype = ctypes.PYFUNCTYPE(ctypes.c_uint64)
        self.read: Callable[[], int] = prototype(ctypes.addressof(ctypes.c_char.from_buffer(self._page)))


@lru_cache(maxsize=1)
def _code() -> _Code:
    return _Code()


def host_tsc() -> int:
    """The counter now."""
    return _code().read()


def _pair() -> tuple[int, int]:
    """(counter, monotonic ns) of one instant, to some 100 ns: the tightest of several attempts."""
    read = _code().read
    best: tuple[int, int, int] | None = None
    for _ in range(8):
        before = read()
        now = time.monotonic_ns()
        after = read()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, now)
    assert best is not None
    return best[1], best[2]


@lru_cache(maxsize=1)
def host_tsc_khz() -> int:
    """Rate of the counter in kHz, measured against CLOCK_MONOTONIC, cached. Takes about 100 ms, once a process.

    Five spans of 20 ms, the median counts: a span that the scheduler tore apart is then no harm. Agreement is some
    5 ppm. Rounded to 10 kHz when that is within 10 ppm: hosts run at round rates, so two measurements then agree.
    """
    rates = []
    for _ in range(_ROUNDS):
        first_tsc, first_ns = _pair()
        time.sleep(_MEASURE_SPAN_NS / 1e9)
        last_tsc, last_ns = _pair()
        rates.append((last_tsc - first_tsc) * 1e6 / (last_ns - first_ns))
    khz = sorted(rates)[_ROUNDS // 2]
    rounded = round(khz / 10) * 10
    return rounded if abs(rounded - khz) * 100_000 <= khz else round(khz)
