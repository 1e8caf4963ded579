"""How often a machine was reset and why: for its log, for people, and to end one that resets without getting anywhere.

A triple fault resets a PC. Linux even uses it, as its last way to reboot. But a guest that triple-faults right after
every reset would burn a processor for ever with nothing to see. So `LIMIT` of them in a row, each within `FAST_S` of
the reset before, end the machine with state "failed"; `vmf controlvm NAME reset` tries again. (QEMU resets for ever
unless told `-no-reboot`; VirtualBox stops at the first triple fault.)
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

FAST_S = 2.0
"""Seconds between two resets that are taken for one loop."""
LOOP = 3
"""So many in a row are a problem to show."""
LIMIT = 10
"""So many triple faults in a row end the machine."""
LOG_S = 10.0
"""Seconds between two lines in the log about a loop."""


class ResetReason(enum.Enum):
    GUEST = "guest reset"
    """It asked for it: the keyboard controller, port 0xCF9, a device."""
    TRIPLE_FAULT = "triple fault"
    USER = "user"


class Resets:
    """The resets of one run. Any thread.

    Attributes:
        count: all of them.
        reason: of the last one; None before the first.
    """

    def __init__(self, machine: str, now: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self.reason: ResetReason | None = None
        self._machine = machine
        self._now = now
        self._lock = threading.Lock()
        self._last = self._logged = float("-inf")
        self._unlogged = 0
        self._fast = 0
        self._fast_faults = 0

    def note(self, reason: ResetReason) -> str:
        """One more; what to fail the machine with, "" when it may go on."""
        with self._lock:
            now = self._now()
            quick = now - self._last < FAST_S and reason is not ResetReason.USER
            self._fast = self._fast + 1 if quick else 1
            fault = reason is ResetReason.TRIPLE_FAULT
            self._fast_faults = (self._fast_faults + 1 if quick else 1) if fault else 0
            self.count, self.reason, self._last = self.count + 1, reason, now
            if self._fast <= LOOP or now - self._logged >= LOG_S or self._fast_faults >= LIMIT:
                more = f", and {self._unlogged} more since the last line" if self._unlogged else ""
                log.info("machine %s was reset: %s (%d in all%s)", self._machine, reason.value, self.count, more)
                self._logged, self._unlogged = now, 0
            else:
                self._unlogged += 1
            if self._fast_faults < LIMIT:
                return ""
            self._fast_faults = 0
            return (
                f"the guest ended in a triple fault {LIMIT} times in a row, each within {FAST_S:g} s of the reset"
                " before: it does not get anywhere. Check its kernel or image; "
                f"`vmf controlvm {self._machine} reset` tries again."
            )

    def problem(self) -> str:
        """One line while it resets again and again, else ""."""
        with self._lock:
            if self.reason is None or self._fast < LOOP or self._now() - self._last > FAST_S:
                return ""
            return f"resets again and again ({self._fast} times in a row, last: {self.reason.value})"

    def info(self) -> dict[str, Any]:
        """For `Machine.info`: plain data."""
        with self._lock:
            ago = None if self.reason is None else round(self._now() - self._last, 3)
            return {
                "count": self.count,
                "last_reason": "" if self.reason is None else self.reason.value,
                "seconds_since_last": ago,
            }
