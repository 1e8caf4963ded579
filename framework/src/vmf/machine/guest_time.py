"""Stopping and starting guest time: the machine's clock and the guest's TSC as one.

Theory of operation
    A guest has two clocks: the machine's, from which its timer devices count (`vmf.machine.clock`), and the TSC, which
    the vCPU counts by itself as long as it exists. Both stop at one instant, when the vCPU does, and the host's clock
    is read at the same instant (`Instant`). What is saved of the machine is of that instant, however long it takes to
    save. Both start at one instant again. What becomes of the time in between is decided then: after a pause by the
    user it is left out; after a teleport, or one that failed, it is added, so that the guest's wall clock is as right
    as it was.

    Two clocks cannot be read or set at once, so a reading of one is put between two readings of the other, and
    repeated when the scheduler came in between. What was set is read back, and set again until it is right to some
    microseconds. The next stop reads what there is, so these errors do not add up in one direction: no number of stops
    makes the two clocks part.

    While the host is suspended the machine's clock stands still, as CLOCK_MONOTONIC does. The TSC of a backend is the
    host's with an offset, and that one counts on, or begins anew, as the hardware likes. So before each run of the vCPU
    `keep` looks whether CLOCK_BOOTTIME, which counts a suspend, has got ahead of CLOCK_MONOTONIC, and puts the TSC
    where the machine's clock is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from attrs import frozen

from vmf.cpu.backend import Vcpu
from vmf.machine.clock import HostNs, MachineClock

log = logging.getLogger(__name__)

_NARROW_NS = 2_000
"""A pair of readings that took no longer counts as one instant."""
_READINGS = 4
_SETTINGS = 8
_SYSTEMATIC_NS = 100_000
"""By what setting is always late, at most; more than that was the scheduler."""
_BAD_LUCK = 4
"""So often at most does the scheduler come in between."""

_SUSPEND_NS = 10_000_000
"""CLOCK_BOOTTIME has got ahead by more than this: the host was suspended."""
_REFERENCE_NS = 1_000_000_000
"""How old the pair of readings may be from which the TSC is put right after a suspend. The two clocks drift apart by
some ppm, as the host's do."""


def _boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@frozen
class Instant:
    """The same instant by three clocks.

    Attributes:
        host_ns: of the host, CLOCK_MONOTONIC.
        guest_ns: of the machine.
        tsc: of the vCPU.
    """

    host_ns: int
    guest_ns: int
    tsc: int


class GuestTime:
    """Of one machine; touched on its vCPU thread, with the vCPU between two runs. Begins stopped at zero."""

    def __init__(self, clock: MachineClock, boottime: HostNs = _boottime_ns) -> None:
        """`boottime` reads a host clock like the machine's that also counts while the host is suspended."""
        self.clock = clock
        self._boottime = boottime
        self._ahead = 0
        """By how much it was ahead of the host's other clock when last looked at, ns."""
        self._reference = Instant(0, 0, 0)
        """An instant not long ago, while time runs."""
        self.tsc_khz = 0
        """Rate of the guest's TSC."""
        self._stopped: Instant | None = None
        self._catch_up = False
        self.hold(0, 0)

    @property
    def stopped(self) -> Instant | None:
        """The instant at which time stands still; None while it runs."""
        return self._stopped

    def hold(self, guest_ns: int, tsc: int) -> None:
        """Stand still at these values: those of a reset or of a restored state."""
        self.clock.stop()
        self.clock.set(guest_ns)
        self._stopped, self._catch_up = Instant(self.clock.host_now(), guest_ns, tsc), False

    def stop(self, vcpu: Vcpu) -> None:
        """Stand still from now on, to be caught up with at the next start unless `leave_out` is called. Does nothing
        when it stands still already."""
        if self._stopped is None:
            self.keep(vcpu)
            host_ns, tsc, _ = read_tsc(vcpu.read_tsc, self.clock.host_now)
            self.clock.stop(host_ns)
            self._stopped, self._catch_up = Instant(host_ns, self.clock.now(), tsc), True

    def leave_out(self) -> None:
        """The guest does not see the time that passes between the stop and the next start."""
        self._catch_up = False

    def start(self, vcpu: Vcpu, since_ns: int | None = None) -> int:
        """Go on; returns the host time at which it does. Does nothing when it runs already.

        Args:
            since_ns: the time since then, by the host's clock, is added: since when it was stopped on another host. By
                default since the stop, or nothing after `leave_out` and `hold`.
        """
        now, stopped = self.clock.host_now(), self._stopped
        if stopped is None:
            return now
        if since_ns is None:
            since_ns = stopped.host_ns if self._catch_up else now
        self.clock.set(stopped.guest_ns + max(0, now - since_ns))
        self.clock.start(now)
        self._reference = stopped
        self._put(vcpu)
        self._ahead = self._lead()
        self._stopped = None
        return now

    def keep(self, vcpu: Vcpu) -> None:
        """Before each run of the vCPU: see that the host's suspend has not moved the TSC."""
        now = self.clock.host_now()
        if self._boottime() - now - self._ahead > _SUSPEND_NS:
            ahead = self._lead()
            if ahead - self._ahead > _SUSPEND_NS:
                log.info("the host was suspended for %.1f s; guest time stood still", (ahead - self._ahead) / 1e9)
                self._ahead = ahead
                self._put(vcpu)
        elif now - self._reference.host_ns > _REFERENCE_NS:
            host_ns, tsc, _ = read_tsc(vcpu.read_tsc, self.clock.host_now)
            self._reference = Instant(host_ns, self.clock.at(host_ns), tsc)

    def hand_over(self, old: Vcpu, new: Vcpu) -> None:
        """While time runs: `new` counts from where `old` is at the moment."""
        if self._stopped is None:
            self.keep(old)
            host_ns, tsc, _ = read_tsc(old.read_tsc, self.clock.host_now)
            self._set(new, lambda at: tsc + self._ticks(at - host_ns))

    def _lead(self) -> int:
        """By how much CLOCK_BOOTTIME is ahead, even when the scheduler comes between two readings."""
        return min(-self.clock.host_now() + self._boottime() for _ in range(_READINGS))

    def _ticks(self, ns: int) -> int:
        return ns * self.tsc_khz // 1_000_000

    def _put(self, vcpu: Vcpu) -> None:
        """Set the TSC to where the running clock is, as seen from the reference."""
        known = self._reference
        self._set(vcpu, lambda at: known.tsc + self._ticks(self.clock.at(at) - known.guest_ns))

    def _set(self, vcpu: Vcpu, tsc_at: Callable[[int], int]) -> None:
        set_tsc(vcpu.write_tsc, vcpu.read_tsc, tsc_at, self.tsc_khz, self.clock.host_now)


def read_tsc(read: Callable[[], int], host_now: HostNs) -> tuple[int, int, int]:
    """(host time in ns, TSC, how long both readings took in ns) of one instant: the tightest of a few attempts, as the
    scheduler may come in between."""
    best: tuple[int, int, int] | None = None
    for _ in range(_READINGS):
        before = host_now()
        tsc = read()
        width = host_now() - before
        if best is None or width < best[2]:
            best = (before + width // 2, tsc, width)
        if width <= _NARROW_NS:
            break
    assert best is not None
    return best


def set_tsc(
    write: Callable[[int], None], read: Callable[[], int], tsc_at: Callable[[int], int], khz: int, host_now: HostNs
) -> None:
    """Make a TSC that counts `khz` show `tsc_at(host_ns)` from now on.

    A written value counts from an unknown instant within the write; so what came of it is read, and written again
    until it is right. What is wrong by a little is wrong each time, and made up for: what is left then, below the time
    that a reading takes, is chance. What is wrong by much was bad luck, or it is a TSC that cannot be set.
    """
    correction = bad = 0
    for _ in range(_SETTINGS):
        write(tsc_at(host_now()) + correction)
        host_ns, tsc, width = read_tsc(read, host_now)
        behind = tsc_at(host_ns) - tsc
        behind_ns = abs(behind) * 1_000_000 // khz
        if behind_ns <= _NARROW_NS or (correction and behind_ns <= width):
            return
        if behind_ns <= _SYSTEMATIC_NS:
            correction += behind
        elif (bad := bad + 1) == _BAD_LUCK:
            return
