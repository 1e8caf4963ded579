"""Guest time.

One clock per machine, in nanoseconds since the machine's power-on, from which every device timer counts. It runs with
the host's CLOCK_MONOTONIC while the vCPU may run, and stands still otherwise. It never goes back. What stops and starts
it, together with the guest's TSC, is `vmf.machine.guest_time`.

CLOCK_MONOTONIC stands still while the host is suspended, and so does guest time: a suspend is like a pause by the user.
With CLOCK_BOOTTIME hours would pass at once instead, which a guest takes for a hang of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HostNs = Callable[[], int]
"""Reads a host clock, ns."""


class MachineClock:
    """Guest nanoseconds. Read on any thread; started, stopped and set on the vCPU thread.

    Args:
        host_now: the host's clock, ns; tests give another one.
    """

    def __init__(self, host_now: HostNs = time.monotonic_ns) -> None:
        self.host_now = host_now
        self._base: tuple[int, int | None] = (0, None)
        """Guest time, and the host's time that belongs to it while the clock runs. One object for readers elsewhere."""

    @property
    def running(self) -> bool:
        return self._base[1] is not None

    def now(self) -> int:
        """Guest time in ns."""
        guest_ns, started_at = self._base
        return guest_ns if started_at is None else guest_ns + self.host_now() - started_at

    def at(self, host_ns: int) -> int:
        """What a running clock shows at a host time; a stopped one shows one time only."""
        guest_ns, started_at = self._base
        return guest_ns if started_at is None else guest_ns + host_ns - started_at

    def host_deadline(self, guest_ns: int) -> int:
        """The host time at which a running clock will show `guest_ns`."""
        base, started_at = self._base
        if started_at is None:
            raise RuntimeError("a stopped clock has no deadlines")
        return guest_ns - base + started_at

    def start(self, host_ns: int | None = None) -> None:
        """Run, as from the host time `host_ns` on (now, if None)."""
        if not self.running:
            self._base = (self._base[0], self.host_now() if host_ns is None else host_ns)

    def stop(self, host_ns: int | None = None) -> None:
        """Stand still at what was shown at the host time `host_ns` (now, if None)."""
        self._base = (self.now() if host_ns is None else self.at(host_ns), None)

    def set(self, guest_ns: int) -> None:
        """Set the time of a stopped clock (restoring a state)."""
        if self.running:
            raise RuntimeError("a running clock cannot be set")
        self._base = (guest_ns, None)
