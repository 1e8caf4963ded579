"""Dirty tracking: which pages of guest RAM were written since the last look.

Tracking sits below the CPU backends: the trackers watch the RAM mapping itself, so that a write counts whoever made
it, the engine, KVM, an emulated device or a system call that fills guest RAM. Three are built in:

- ``uffd`` (`vmf.memory.dirty_uffd`): the kernel notes the first write to each page. Linux 6.7 and later.
- ``log`` (`vmf.memory.dirty_log`): the engine's own log, for machines whose devices do not write RAM.
- ``hash`` (`vmf.memory.dirty_hash`): works everywhere, compares checksums of pages.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vmf.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from vmf.cpu.backend import WriteLog
    from vmf.memory.guest import GuestMemory

PageRuns = npt.NDArray[np.uint64]
"""Shape (n, 2): rows [first page, end page), ascending and disjoint, in pages of the RAM mapping."""

ENVIRONMENT_VARIABLE = "VMF_DIRTY_TRACKER"
"""Names the tracker to use, against `open_tracker`'s own choice."""


class DirtyTracker(ABC):
    """Sees every write to guest RAM by engine, devices and host alike.

    Attributes:
        name: "uffd", "hash" ...
        needs_staging: whether a page that is sent while the guest runs must be sent as a copy that `stage` made.
            A tracker that compares contents must know which content was sent: a page that changes, is sent and
            changes back looks untouched otherwise. Trackers that see the writes themselves need no copy, and then
            `stage` is not called. With such a tracker, pages that were reported and sent without `stage` are
            reported again and again: correct, but a teleport then never converges.
        passed_over: (name, reason) of the better trackers that cannot work here.
    """

    name: str
    needs_staging: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()

    @abstractmethod
    def start(self) -> None:
        """Begin: from now on every written page is reported by the next `collect`."""

    @abstractmethod
    def collect(self) -> PageRuns:
        """Pages written since `start` or the last `collect`; atomically begins to watch them anew. May run while
        the vCPU runs: a write during the call is reported by this or by the next one. Pages that were not written
        may be reported too, but never pages that no one ever touched. `GuestMemory.clear` counts as a write to all
        pages that had been touched; they may be holes again."""

    def stage(self, runs: PageRuns, into: memoryview) -> int:
        """Copy the pages of `runs` back to back to the start of `into`, as what is about to be sent; gives the
        number of bytes. Only where `needs_staging`."""
        raise MachineError(f"the dirty tracker {self.name} needs no staging.")

    @abstractmethod
    def stop(self) -> None:
        """End tracking and free its resources; idempotent."""


@frozen
class TrackerKind:
    """One built-in tracker: its name, why it cannot work here (None when it can), and how to make one."""

    name: str
    unusable: Callable[[], str | None]
    make: Callable[[GuestMemory], DirtyTracker]


def tracker_kinds(log: WriteLog | str | None = None) -> tuple[TrackerKind, ...]:
    """The built-in trackers, best first.

    Args:
        log: the engine's log of the guest's writes, or why there is none of use; None leaves that kind out.
    """
    from vmf.memory.dirty_hash import HashTracker
    from vmf.memory.dirty_log import LogTracker
    from vmf.memory.dirty_uffd import UffdTracker, uffd_unusable

    def log_tracker(memory: GuestMemory) -> DirtyTracker:
        if log is None or isinstance(log, str):
            raise MachineError(f"the engine's log cannot be used: {log}.")
        return LogTracker(memory, log)

    kinds = [TrackerKind("uffd", uffd_unusable, UffdTracker), TrackerKind("hash", lambda: None, HashTracker)]
    if log is not None:
        kinds.insert(1, TrackerKind("log", lambda: log if isinstance(log, str) else None, log_tracker))
    return tuple(kinds)


def open_tracker(memory: GuestMemory, log: WriteLog | str | None = None) -> DirtyTracker:
    """The best tracker that works here, not started; `passed_over` of it says why not a better one.

    The environment variable VMF_DIRTY_TRACKER forces one by name: ConfigError when there is none of that name,
    MachineError when it cannot work here. `log` as for `tracker_kinds`.
    """
    kinds = tracker_kinds(log)
    forced = os.environ.get(ENVIRONMENT_VARIABLE, "")
    names = ", ".join(kind.name for kind in kinds)
    if forced and forced not in {kind.name for kind in kinds}:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}={forced} names no dirty tracker.", f"Use one of: {names}.")
    passed_over: list[tuple[str, str]] = []
    for kind in kinds:
        if forced and kind.name != forced:
            continue
        reason = kind.unusable()
        if reason is None:
            tracker = kind.make(memory)
            tracker.passed_over = tuple(passed_over)
            return tracker
        passed_over.append((kind.name, reason))
    why = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise MachineError(f"no dirty tracker can work here ({why}).", f"Unset {ENVIRONMENT_VARIABLE}.")
