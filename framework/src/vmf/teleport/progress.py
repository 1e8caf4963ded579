"""What a teleport tells while it goes on, and when it is over: typed records for the CLI, the control socket, anyone.

Numbers are plain: bytes, pages, nanoseconds, bytes per second. `attrs.asdict(event)` is ready for JSON.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import attrs
from attrs import frozen

from vmf.teleport.protocol.states import Phase, SourceOutcome

log = logging.getLogger(__name__)

EVENT_INTERVAL_NS = 100_000_000
"""Between two events of the same phase and round."""


@frozen
class ProgressEvent:
    """One moment of a teleport.

    Attributes:
        role: "source" or "target".
        phase: a `vmf.teleport.protocol.Phase` value ("precopy"), or at the target "waiting".
        teleport_id: hexadecimal, "" before it is known.
        round: number of the pre-copy round, from 1; 0 before.
        ram_bytes: size of guest RAM.
        sent_bytes: raw page data that reached the other side so far (at the target: that arrived).
        remaining_bytes: still to be sent in this round.
        pages: pages sent so far; zero_pages: pages found zero, which need no data.
        dirty_rate: bytes per second that the guest dirties, None when not measured yet.
        bandwidth: bytes per second, None when not measured yet.
        expected_downtime_ns: if the guest were stopped now; None when unknown.
        eta_ns: until the teleport is done, None when it does not converge or is unknown.
        throttle: fraction of time the guest is kept from running.
        converging: whether it is getting there; None when it is too early to say.
        elapsed_ns: since the teleport began.
        message: one line for people: why a session at the target failed, or a notice of the transport.
    """

    role: str
    phase: str
    teleport_id: str = ""
    round: int = 0
    ram_bytes: int = 0
    sent_bytes: int = 0
    remaining_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    dirty_rate: float | None = None
    bandwidth: float | None = None
    expected_downtime_ns: int | None = None
    eta_ns: int | None = None
    throttle: float = 0.0
    converging: bool | None = None
    elapsed_ns: int = 0
    message: str = ""


@frozen
class Downtime:
    """Where the downtime went, ns each, in this order. They add up to `TeleportSummary.downtime_ns`.

    Attributes:
        stop: stopping the vCPU.
        scan: the last look at the dirty pages.
        send: handing the last pages to the transport.
        save: saving vCPU, clock and devices.
        ready: until READY came: the last pages' and the state's way over the network, restoring it.
        handover: HANDOVER's way to the target.
        resume: starting the vCPU there.
    """

    stop: int = 0
    scan: int = 0
    send: int = 0
    save: int = 0
    ready: int = 0
    handover: int = 0
    resume: int = 0


@frozen
class TeleportSummary:
    """How a teleport went.

    Attributes:
        teleport_id: hexadecimal.
        role: which side tells.
        outcome: who has the machine, as the source knows it.
        rounds: of pre-copy, without the last one with the guest stopped.
        bytes: raw page data moved.
        pages: pages moved; zero_pages: pages that were zero and cost nothing.
        last_pages: of them, while the guest stood still.
        downtime_ns: from the source's vCPU stop to the target's vCPU start, between two hosts' clocks; 0 if the
            machine had been paused by its user (and at a `check_only`).
        clock_error_ns: most by which the comparison of both hosts' clocks is wrong, and with it the downtime and, from
            now on, the guest's clocks; 0 on one host.
        downtime: where it went (source only).
        total_ns: the whole teleport.
        throttle: the highest that was needed.
        tracker: name of the dirty tracker (source only).
        confirmed: the source knows that the machine runs at the target (target only).
        notes: what the target says that the user should know, though it speaks against nothing (source only).
    """

    teleport_id: str
    role: str
    outcome: SourceOutcome
    rounds: int = 0
    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    last_pages: int = 0
    downtime_ns: int = 0
    clock_error_ns: int = 0
    downtime: Downtime = attrs.field(factory=Downtime)
    total_ns: int = 0
    throttle: float = 0.0
    tracker: str = ""
    confirmed: bool = True
    notes: tuple[str, ...] = ()


ProgressListener = Callable[[ProgressEvent], None]


class Reporter:
    """Builds events from what changed, and passes on not too many of them. A listener's failure is its own."""

    def __init__(self, role: str, listener: ProgressListener | None) -> None:
        self._listener = listener
        self._event = ProgressEvent(role, Phase.HELLO.value)
        self._began = time.monotonic_ns()
        self._last = 0

    @property
    def event(self) -> ProgressEvent:
        return self._event

    @property
    def elapsed_ns(self) -> int:
        return time.monotonic_ns() - self._began

    def restart(self) -> None:
        """A new session begins."""
        self._event = ProgressEvent(self._event.role, Phase.HELLO.value)
        self._began = time.monotonic_ns()

    def phase(self, phase: Phase | str, **changes: Any) -> None:
        """The phase changed: always told."""
        self.update(phase=phase.value if isinstance(phase, Phase) else phase, force=True, **changes)

    def update(self, *, force: bool = False, **changes: Any) -> None:
        """Something changed; told at once when `force`, else if the last event is old enough."""
        now = time.monotonic_ns()
        if not force and now - self._last < EVENT_INTERVAL_NS:
            # Not told now, but part of the next event.
            self._event = attrs.evolve(self._event, **changes)
            return
        event = attrs.evolve(self._event, elapsed_ns=now - self._began, **changes)
        self._event = attrs.evolve(event, message="")  # a message is told once
        self._last = now
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:
            # Whoever watches must not be able to break what it watches.
            log.exception("a progress listener failed; it is not called again")
            self._listener = None
