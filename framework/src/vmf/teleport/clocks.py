"""How far the other host's monotonic clock is from ours, from the round trips of PING and PONG.

The target answers a ping at once with its own time; that time lies somewhere between sending and receiving, so half
the round trip bounds the error. The best sample is the one with the shortest round trip, but two hosts' clocks drift
apart (each is disciplined by up to 500 ppm), so that the bound of an old sample grows with its age.

Two processes of one host read one clock, and then nothing has to be estimated. They find out by a name for the clock
that each makes on its own (`clock_name`), offered and answered among the features of HELLO and WELCOME. Hosts that were
cloned while they ran give their different clocks the same name; there the round trips show that it is not so.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from pathlib import Path

from attrs import frozen

DRIFT_PPM = 1000
"""Most by which two disciplined clocks part."""


def clock_name(teleport_id: bytes) -> str:
    """Names this process's CLOCK_MONOTONIC for one teleport, telling nothing else about the host; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        namespace = os.readlink("/proc/self/ns/time") if os.path.lexists("/proc/self/ns/time") else ""
    except OSError:
        return ""
    digest = hashlib.sha256(b"\0".join((teleport_id, boot, namespace.encode()))).hexdigest()
    return f"clock-{digest[:32]}"


@frozen
class _Sample:
    sent_at: int
    offset: int
    error: int

    def error_at(self, now: int) -> int:
        return self.error + (now - self.sent_at) * DRIFT_PPM // 1_000_000


class ClockOffset:
    """All times in ns of CLOCK_MONOTONIC, here or there."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=64)
        self.shared = False
        """Both sides say that it is one clock."""

    def add(self, sent_at: int, at: int, received_at: int) -> None:
        """One round trip: sent here, answered there, received here."""
        half = max(0, received_at - sent_at) // 2
        self._samples.append(_Sample(sent_at, at - sent_at - half, half))

    @property
    def known(self) -> bool:
        return bool(self._samples)

    def best(self, now: int) -> tuple[int, int]:
        """(offset, error): their clock is ours + offset, ± error. (0, 0) before the first sample, and for a shared
        clock, unless an answer was of a time outside its round trip."""
        if not self._samples:
            return 0, 0
        if self.shared and all(abs(sample.offset) <= sample.error + 1 for sample in self._samples):
            return 0, 0
        sample = min(self._samples, key=lambda s: s.error_at(now))
        return sample.offset, sample.error_at(now)
