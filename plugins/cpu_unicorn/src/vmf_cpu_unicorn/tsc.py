"""The host's time-stamp counter, which is what the engine's RDTSC counts (plus an offset of the guest's)."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile

from vmf.directories import optional_cache_directory

# RDTSC; SHL RDX,32; OR RAX,RDX; RET
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

_MEASURE_SPAN_NS = 20_000_000
_ROUNDS = 5
_GLANCE_NS = 1_000_000
_GLANCES = 10
_GLANCE_TOLERANCE = 50
"""A kept rate must agree with a measurement of a millisecond within 2 %; else the file is not ours to trust."""


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
    """Rate of the counter in kHz: measured once after the host has booted, then kept in the user's cache directory.

    So all processes of a host agree, and only the first one waits 100 ms for the measurement.
    """
    place = _cache_file()
    if place is not None:
        try:
            kept = int(place.read_text())
            # One glance in agreement is enough: the scheduler tears some of them apart on a busy host.
            if any(abs(_rate(_GLANCE_NS) - kept) * _GLANCE_TOLERANCE <= kept for _ in range(_GLANCES)):
                return kept
        except (OSError, ValueError):
            pass  # not kept yet, or not by us: measure
    khz = _measured()
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
                file.write(str(khz))
            os.replace(file.name, place)
        except OSError:
            pass  # a home that cannot be written to costs 100 ms each time, no more
    return khz


def _cache_file() -> Path | None:
    """Where the rate is kept until the host boots again."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    directory = optional_cache_directory()
    return None if directory is None else directory / f"tsc-khz-{boot}"


def _rate(span_ns: int) -> float:
    first_tsc, first_ns = _pair()
    time.sleep(span_ns / 1e9)
    last_tsc, last_ns = _pair()
    return (last_tsc - first_tsc) * 1e6 / (last_ns - first_ns)


def _measured() -> int:
    """Measured against CLOCK_MONOTONIC; takes about 100 ms.

    Five spans of 20 ms, the median counts: a span that the scheduler tore apart is then no harm. Agreement is some
    5 ppm. Rounded to 10 kHz when that is within 10 ppm: hosts run at round rates, so two measurements then agree.
    """
    khz = sorted(_rate(_MEASURE_SPAN_NS) for _ in range(_ROUNDS))[_ROUNDS // 2]
    rounded = round(khz / 10) * 10
    return rounded if abs(rounded - khz) * 100_000 <= khz else round(khz)
