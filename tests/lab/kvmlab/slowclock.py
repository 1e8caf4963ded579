"""Time in the lab goes slower than outside, so that its emulated processors look faster.

An exit of a guest in the lab costs as much as a thousand on hardware, for QEMU forgets its TLBs and its shortcuts
between translated blocks at each. A Linux guest's 250 ticks a second, at six exits each, then leave it little time for
anything else, and none on a busy machine: booting took minutes. No option of QEMU's helps: `-icount` makes it
single-threaded and many times slower.

So QEMU's clocks are slowed down for all of the lab: a small library in LD_PRELOAD divides what `clock_gettime` says
and multiplies how long `ppoll` waits. Everything inside counts by clocks that QEMU makes from these, and it fits
together: the lab's kernel finds a time stamp counter of three times the rate, since that one is the host's own, and
everything is measured by it. Three seconds outside are one inside.

The factor is as high as the rate of the counter allows: a rate past 8.3 GHz cannot be told in CPUID (leaf 0x15).
`VMF_LAB_SLOWDOWN` overrides it; 1 is the world's time. Without a C compiler there is no slowdown.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from attrs import frozen

from kvmlab import needs
from kvmlab.cache import cached, digest

SOURCE = Path(__file__).resolve().with_name("slowclock.c")
FLAGS = ("-O2", "-shared", "-fPIC", "-Wall", "-Wextra")
VARIABLE = "VMF_LAB_SLOWDOWN"
WANTED = 4
MOST_KHZ = 8_300_000


@frozen
class SlowClock:
    """How much slower time goes in the lab: `factor` seconds outside are one inside; the library that does it."""

    factor: int = 1
    library: Path | None = None

    def environment(self) -> dict[str, str]:
        """More variables for QEMU."""
        if self.library is None or self.factor <= 1:
            return {}
        return {"LD_PRELOAD": str(self.library), VARIABLE: str(self.factor)}


def slow_clock() -> SlowClock:
    """The slow clock for this machine; none when there is no C compiler. Raises LabError when it does not compile."""
    if needs.which("gcc") is None:
        return SlowClock()
    library = cached("slowclock", digest(FLAGS, SOURCE.read_text()), _compile) / "slowclock.so"
    configured = os.environ.get(VARIABLE, "")
    factor = int(configured) if configured.isdigit() else min(WANTED, MOST_KHZ // tsc_khz(library))
    return SlowClock(max(1, factor), library)


def tsc_khz(library: Path) -> int:
    """Rate of this machine's time stamp counter, to a per mille or so."""
    read = ctypes.CDLL(str(library)).vmf_lab_tsc
    read.restype = ctypes.c_uint64
    began, first = time.perf_counter_ns(), read()
    time.sleep(0.05)
    ended, last = time.perf_counter_ns(), read()
    return max(1, int(last - first) * 1_000_000 // (ended - began))


def _compile(directory: Path) -> None:
    needs.call(["gcc", *FLAGS, "-o", directory / "slowclock.so", SOURCE, "-ldl"], what="compile the slow clock")
