"""How far the other host's monotonic clock is from ours, from the round trips of PING and PONG.

The target answers a ping at once with its own time; that time lies somewhere between sending and receiving, so half
the round trip bounds the error. The best sample is the one with the shortest round trip, but two hosts' clocks drift
apart (each is disciplined by up to 500 ppm), so that the bound of an old sample grows with its age.
"""

from __future__ import annotations

from collections import deque

from attrs import frozen

DRIFT_PPM = 1000
"""Most by which two disciplined clocks part."""


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

    def add(self, sent_at: int, at: int, received_at: int) -> None:
        """One round trip: sent here, answered there, received here."""
        half = max(0, received_at - sent_at) // 2
        self._samples.append(_Sample(sent_at, at - sent_at - half, half))

    @property
    def known(self) -> bool:
        return bool(self._samples)

    def best(self, now: int) -> tuple[int, int]:
        """(offset, error): their clock is ours + offset, ± error. (0, 0) before the first sample."""
        if not self._samples:
            return 0, 0
        sample = min(self._samples, key=lambda s: s.error_at(now))
        return sample.offset, sample.error_at(now)
