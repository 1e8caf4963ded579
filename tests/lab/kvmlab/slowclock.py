"""Time in the lab goes slower than outside, so that its emulated processors look faster.

An exit of a guest in the lab costs as much as a thousand on hardware, for QEMU forgets its TLBs and its shortcuts
between translated blocks at each. A Linux guest's 250 ticks a second, at six exits each, then leave it little time for
anything else, and none on a busy machine: booting took minutes. No option of QEMU's helps: `-icount` makes it
single-threaded and many times slower.

So QEMU's clocks are slowed down for all of the lab: a small library in LD_PRELOAD divides what `clock_gettime` says
and multiplies how long `ppoll` waits. Everything inside counts by clocks that QEMU makes from these, and it fits
together: the lab's kernel finds a time stamp counter of five times the rate, since that one is the host's own, and
everything is measured by it. Five seconds outside are one inside.

The factor grows with the load on this machine, as what matters is how much gets done between two ticks.
`VMF_LAB_SLOWDOWN` overrides it; 1 is the world's time. Without a C compiler there is no slowdown.
"""

from __future__ import annotations

import os
from pathlib import Path

from attrs import frozen

from kvmlab import needs
from kvmlab.cache import cached, digest

SOURCE = Path(__file__).resolve().with_name("slowclock.c")
FLAGS = ("-O2", "-shared", "-fPIC", "-Wall", "-Wextra")
VARIABLE = "VMF_LAB_SLOWDOWN"
LEAST, MOST = 5, 12
"""On an idle machine, and on however busy a one: what sleeps in the lab takes that much longer, too."""


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
    factor = int(configured) if configured.isdigit() else for_load(os.getloadavg()[0], os.cpu_count() or 1)
    return SlowClock(max(1, factor), library)


def for_load(load: float, processors: int) -> int:
    """The factor for a machine with that load average."""
    return round(min(MOST, LEAST * max(1.0, load / processors)))


def _compile(directory: Path) -> None:
    needs.call(["gcc", *FLAGS, "-o", directory / "slowclock.so", SOURCE, "-ldl"], what="compile the slow clock")
