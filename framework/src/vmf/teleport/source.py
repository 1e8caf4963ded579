"""The source of a teleport.

Two threads: the caller's does everything, a reader hears the target at any time, so that its CANCEL interrupts a
round. The order that correctness hangs on:

1. the dirty tracker starts before the touched ranges are read, so no write falls between the two;
2. the guest is stopped before the last look at the dirty pages;
3. the note "handed over" is written before HANDOVER is on the wire: whatever breaks from there, the source does not
   run the machine again by itself. Until then everything is undone on any failure.

What is done with the machine, and in which order, `vmf.teleport.protocol.handover` decides; this module does the deeds.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import field, frozen

import vmf
from vmf.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    TeleportBlocked,
    TeleportError,
    TeleportUncertain,
    TransportError,
    VmfError,
)
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import PAGE_SIZE
from vmf.teleport.authentication import prove
from vmf.teleport.check import Blocker
from vmf.teleport.clocks import ClockOffset, clock_name
from vmf.teleport.converge import Convergence, Decision, RoundStats
from vmf.teleport.custodian import SourceCustodian
from vmf.teleport.journal import Entry, MemoryJournal
from vmf.teleport.lanes import Lanes, join, links_for
from vmf.teleport.link import Canceller, Link, explain, farewell, remote_end
from vmf.teleport.progress import Downtime, ProgressListener, Reporter, TeleportSummary
from vmf.teleport.protocol import Connection, Phase, Role, SourceOutcome
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import SOURCE_OWNS, Deed, Note, SourceEvent
from vmf.teleport.ram import RamSender
from vmf.teleport.seam import (
    Interruptible,
    KeepsJournal,
    KeepsLeases,
    Stopped,
    TeleportableMachine,
    payload_kinds,
)
from vmf.transport.base import Address, Channel

log = logging.getLogger(__name__)

CLOCK_SAMPLES = 5

_M = TypeVar("_M", bound=m.Message)


@frozen
class SourceOptions:
    """Settings of one teleport.

    Attributes:
        max_downtime_ms: goal for the time in which the guest runs nowhere.
        timeout_s: give up, with the machine going on here, after so many seconds; None for never.
        check_only: ask the target whether it would take the machine, and move nothing.
        idle_timeout_s: longest silence of the target (which sends keep-alives) or stall of the connection.
        answer_timeout_s: longest wait for a certain answer of a target that shows that it lives: a long check, the end
            of a round that sits in buffers. For READY, with the guest stopped, it is `idle_timeout_s` and the downtime.
        handover_timeout_s: longest wait for RUNNING after HANDOVER; after that the outcome is uncertain.
        links: additional channels that carry RAM; None for as many as are worth it, on this host and for this machine.
        password: that was set at the target, which then has to show that it knows it; None for none.
        peer: the target's address as the user gave it, to be asked later; None: what the channel says.
    """

    max_downtime_ms: int = 250
    timeout_s: float | None = None
    check_only: bool = False
    idle_timeout_s: float = 30.0
    answer_timeout_s: float = 120.0
    handover_timeout_s: float = 10.0
    links: int | None = None
    password: str | None = field(default=None, repr=False)
    peer: Address | None = None


def teleport_source(
    machine: TeleportableMachine,
    channel: Channel,
    options: SourceOptions | None = None,
    progress: ProgressListener | None = None,
    cancel: threading.Event | None = None,
    connect: Callable[[], Channel] | None = None,
) -> TeleportSummary:
    """Teleport `machine` over a fresh `channel`; returns once it runs at the other side.

    With `check_only` it returns when there is no blocker, `outcome` RUNS_HERE. The channel is broken afterwards; the
    caller closes it. Set `cancel` from any thread to cancel; after the handover that has no effect. `connect` makes
    another channel to the same target; without it only the one is used.

    Raises:
        TeleportBlocked: the target (or this side) speaks against it; `blockers` has every reason.
        TeleportCancelled: cancelled here or at the target.
        TeleportUncertain: HANDOVER was sent, but no answer came. The machine stays stopped here, in the hands of the
            error's `custodian`.
        TeleportError: anything else. In all cases but TeleportUncertain the machine goes on here.
    """
    return _Source(machine, channel, options or SourceOptions(), progress, cancel, connect).run()


class _Source:
    def __init__(
        self,
        machine: TeleportableMachine,
        channel: Channel,
        options: SourceOptions,
        progress: ProgressListener | None,
        cancel: threading.Event | None,
        connect: Callable[[], Channel] | None,
    ) -> None:
        self._machine = machine
        self._channel = channel
        self._options = options
        self._connect = connect
        self._lanes: Lanes | None = None
        self._custodian = SourceCustodian(self._deeds())
        self._journal = machine.journal if isinstance(machine, KeepsJournal) else MemoryJournal(machine.name)
        self._link = Link(channel, Connection(Role.SOURCE, self._custodian.may_send))
        self._report = Reporter("source", progress)
        self._clocks = ClockOffset()
        self._teleport_id = secrets.token_bytes(m.ID_SIZE)
        self._inbox: queue.SimpleQueue[tuple[m.Message, int] | None] = queue.SimpleQueue()
        self._remote_error: BaseException | None = None
        self._reader = threading.Thread(target=self._read, name="vmf-teleport-reader", daemon=True)
        self._canceller = Canceller(cancel, options.timeout_s, now=lambda: self._inbox.put(None), late=self._break)
        if isinstance(machine, Interruptible):
            machine.interrupted_by(self._canceller.check)
        self._tracker: DirtyTracker | None = None
        self._stopped = Stopped(running=False, at_ns=0)
        self._t_start = self._t_stopped = 0
        self._throttle = self._highest_throttle = 0.0
        self._notes: tuple[str, ...] = ()

    def _break(self) -> None:
        self._channel.shutdown()
        if self._lanes is not None:
            self._lanes.abort()

    # The deeds

    def _deeds(self) -> dict[Deed, Callable[[], None]]:
        return {
            Deed.NOTE_OFFERED: self._note_offered,
            Deed.STOP_GUEST: self._stop_guest,
            Deed.NOTE_HANDED_OVER: lambda: self._journal.mark(self._teleport_id, Note.HANDED_OVER),
            Deed.PASS_LEASE: self._pass_lease,
            Deed.SEND_HANDOVER: self._send_handover,
            Deed.TAKE_LEASE: self._take_lease,
            Deed.RUN_GUEST: self._machine.undo_stop,
            Deed.ERASE_NOTE: lambda: self._journal.erase(self._teleport_id),
            Deed.NOTE_GONE: lambda: self._journal.mark(self._teleport_id, Note.GONE),
        }

    def _note_offered(self) -> None:
        peer = self._options.peer or self._channel.remote
        self._journal.begin(Entry(self._teleport_id, Role.SOURCE, Note.OFFERED, peer))

    def _stop_guest(self) -> None:
        self._t_start = time.monotonic_ns()
        self._stopped = self._machine.stop()
        self._t_stopped = time.monotonic_ns()

    def _pass_lease(self) -> None:
        if isinstance(self._machine, KeepsLeases):
            self._machine.pass_leases(self._teleport_id)

    def _take_lease(self) -> None:
        if isinstance(self._machine, KeepsLeases):
            self._machine.take_leases(self._teleport_id)

    def _send_handover(self) -> None:
        self._machine.mark_handed_over()
        self._link.send(m.Handover())

    # The conversation

    def _read(self) -> None:
        """The reader thread: sorts what the target says."""
        try:
            while True:
                message = self._link.receive()
                now = time.monotonic_ns()
                if isinstance(message, m.Ping):
                    self._link.send(m.Pong(message.sent_at, now))
                elif isinstance(message, m.Cancel | m.Error):
                    self._remote_error = remote_end(message, "target")
                    self._inbox.put(None)
                    self._channel.shutdown()  # wakes a sender in the middle of a batch
                    return
                else:
                    self._inbox.put((message, now))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            if self._remote_error is None:
                self._remote_error = error
            self._inbox.put(None)

    def _look_around(self) -> None:
        """Raises what the reader or the canceller found."""
        self._canceller.check()
        if self._remote_error is not None:
            raise self._remote_error

    def _expect(self, kind: type[_M], timeout_s: float | None = None) -> tuple[_M, int]:
        """The next message, which must be of that kind, and when it came (ns)."""
        try:
            item = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise TeleportError(f"the target did not answer within {timeout_s:g} s.") from None
        if item is None:
            self._look_around()
            raise TeleportError("the teleport ended for an unknown reason.")
        message, at = item
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"the target sent {message.word()} where {kind.word()} was due.")
        return message, at

    def run(self) -> TeleportSummary:
        try:
            self._channel.set_timeout(self._options.idle_timeout_s)
            self._reader.start()
            summary = self._teleport()
        except BaseException as error:  # noqa: BLE001 - Ctrl-C too must leave the guest running
            raise self._failed(error) from (None if isinstance(error, TeleportError) else error)
        finally:
            self._canceller.close()
            self._close_lanes()
            self._stop_tracker()
        self._link.finish(self._reader, said=True)
        return summary

    def _teleport(self) -> TeleportSummary:
        self._shake_hands()
        checked = self._agree()
        if checked is None:
            return self._summary(SourceOutcome.RUNS_HERE)
        for _ in range(CLOCK_SAMPLES):
            self._ping()
        if self._connect is not None and checked.links:
            links = join(self._connect, self._machine.memory.pages, self._teleport_id, checked)
            if links:
                self._lanes = Lanes(self._link, links)
                self._lanes.set_timeout(self._options.idle_timeout_s)
        self._custodian.do(SourceEvent.BEGIN)
        self._link.send(m.Begin())
        sender, rounds, rest = self._precopy()
        return self._stop_and_copy(sender, rounds, rest)

    def _shake_hands(self) -> None:
        self._report.phase(
            Phase.HELLO,
            teleport_id=self._teleport_id.hex(),
            ram_bytes=self._machine.memory.size,
            message=m.clean_text(" ".join(self._link.channel.notices)),
        )
        name, clock = m.clean_text(self._machine.name, 255), clock_name(self._teleport_id)
        offered = (*m.FEATURES, clock) if clock else m.FEATURES
        self._link.send(m.Hello(self._teleport_id, m.PROTOCOL_VERSIONS, offered, software(), name))
        welcome, _ = self._expect(m.Welcome)
        if welcome.teleport_id != self._teleport_id:
            raise RemoteProtocolError("the target answered for another teleport.")
        if welcome.version not in m.PROTOCOL_VERSIONS or not set(welcome.features) <= set(offered):
            raise RemoteProtocolError("the target chose a protocol version or feature that was not offered.")
        self._clocks.shared = clock in welcome.features
        self._report.phase(Phase.AUTHENTICATE)
        prove(
            welcome.methods,
            self._options.password,
            self._channel.channel_binding(),
            self._link.send,
            lambda kind: self._expect(kind)[0],
        )

    def _links_wanted(self) -> int:
        if self._connect is None or self._options.check_only:
            return 0
        if self._options.links is not None:
            return min(self._options.links, m.MAX_LINKS)
        return links_for(pages.count(self._machine.memory.touched_ranges()) * PAGE_SIZE, self._channel)

    def _agree(self) -> m.Checked | None:
        """OFFER and CHECK; None when only the check was wanted. Raises TeleportBlocked."""
        machine, options = self._machine, self._options
        self._report.phase(Phase.CHECK)
        own = list(machine.local_blockers("source"))
        wanted = self._links_wanted()
        self._link.send(
            m.Offer(
                description=machine.describe(),
                ram_pages=machine.memory.pages,
                page_size=PAGE_SIZE,
                payloads=payload_kinds(machine),
                links=wanted,
                check_only=options.check_only,
            )
        )
        checked, _ = self._expect(m.Message, options.answer_timeout_s)
        if isinstance(checked, m.Notes):
            self._notes = checked.notes
            checked, _ = self._expect(m.Message, options.answer_timeout_s)
        if not isinstance(checked, m.Checked):
            raise RemoteProtocolError(f"the target sent {checked.word()} where CHECKED was due.")
        if checked.links > wanted or bool(checked.links) != bool(checked.token):
            raise RemoteProtocolError("the target grants other channels than it was asked for.")
        blockers = (*own, *checked.blockers)
        if blockers or options.check_only:
            self._link.send(m.Bye())
        if blockers:
            raise TeleportBlocked(*describe_blockers(machine.name, str(self._channel.remote), blockers), blockers)
        return None if options.check_only else checked

    def _ping(self) -> None:
        self._link.send(m.Ping(time.monotonic_ns()))
        pong, at = self._expect(m.Pong, self._options.idle_timeout_s)
        self._clocks.add(pong.sent_at, pong.at, at)

    def _precopy(self) -> tuple[RamSender, int, PageRuns]:
        """Rounds until the rest is small enough: the sender, the number of rounds, the pages still to send."""
        machine, report, link = self._machine, self._report, self._link
        convergence = Convergence(self._options.max_downtime_ms * 1_000_000)
        self._tracker = tracker = machine.open_dirty_tracker()
        tracker.start()
        looked = time.monotonic_ns()
        runs = machine.memory.touched_ranges()
        sender = RamSender(machine.memory, link, tracker, self._lanes)
        counters = sender.counters
        number = 0
        while True:
            number += 1
            began, before = time.monotonic_ns(), counters.sent_bytes
            report.phase(Phase.PRECOPY, round=number, remaining_bytes=pages.count(runs) * PAGE_SIZE)

            def after_batch(remaining: int, began: int = began, before: int = before) -> None:
                self._look_around()
                # What the peer's host has not acknowledged may still sit in a buffer here: it did not move yet.
                moved = counters.sent_bytes - min(counters.sent_bytes, self._unsent_bytes())
                rate = max(0, moved - before) / max(1, time.monotonic_ns() - began) * 1e9
                bandwidth = convergence.bandwidth or rate or None
                report.update(
                    sent_bytes=moved,
                    remaining_bytes=remaining,
                    pages=counters.pages,
                    zero_pages=counters.zero_pages,
                    bandwidth=rate or bandwidth,
                    eta_ns=int(remaining / bandwidth * 1e9) if bandwidth and convergence.dirty_rate is None
                    else convergence.eta_ns(remaining),
                )  # fmt: skip

            sender.send_round(number, runs, stopped=False, after_batch=after_batch)
            link.send(m.RoundEnd(number, counters.sent_bytes))
            ack, at = self._expect(m.RoundAck, self._options.answer_timeout_s)
            if ack.round != number or ack.received != counters.sent_bytes:
                raise RemoteProtocolError("the target did not receive what was sent in this round.")
            self._ping()
            previous, looked = looked, time.monotonic_ns()
            runs = tracker.collect()
            left = pages.count(runs) * PAGE_SIZE
            stats = RoundStats(counters.sent_bytes - before, at - began, left, looked - previous)
            decision = convergence.judge(stats)
            report.update(
                force=True,
                sent_bytes=counters.sent_bytes,
                remaining_bytes=left,
                pages=counters.pages,
                zero_pages=counters.zero_pages,
                dirty_rate=convergence.dirty_rate,
                bandwidth=convergence.bandwidth,
                expected_downtime_ns=convergence.expected_downtime_ns,
                eta_ns=convergence.eta_ns(left),
                throttle=convergence.throttle,
                converging=convergence.converging,
            )
            self._look_around()
            if decision is Decision.STOP:
                return sender, number, runs
            if convergence.throttle != self._throttle:
                self._throttle = self._highest_throttle = convergence.throttle
                machine.set_throttle(self._throttle)

    def _stop_and_copy(self, sender: RamSender, rounds: int, rest: PageRuns) -> TeleportSummary:
        """The guest stands still from here on: nothing that can wait is done in between."""
        machine, link, counters = self._machine, self._link, sender.counters
        tracker = self._tracker
        assert tracker is not None
        self._report.phase(Phase.PAUSE)
        pages_before = counters.pages
        self._custodian.do(SourceEvent.PAUSE)
        t_start, t_stopped, stopped = self._t_start, self._t_stopped, self._stopped
        link.send(m.Paused())
        rest = pages.union(rest, tracker.collect())
        t_scanned = time.monotonic_ns()
        sender.send_round(rounds + 1, rest, stopped=True, after_batch=lambda _: self._look_around())
        t_sent = time.monotonic_ns()
        payloads = tuple(machine.save())
        t_saved = time.monotonic_ns()
        offset, error = self._clocks.best(t_saved)
        link.send(m.State(payloads, max(0, stopped.at_ns + offset), stopped.running, counters.sent_bytes))
        # Keep-alives alone would hold the guest for ever.
        patience = self._options.idle_timeout_s + self._options.max_downtime_ms / 1000
        _, t_ready = self._expect(m.Ready, patience)
        if self._remote_error is not None:
            raise self._remote_error
        self._canceller.commit()
        self._custodian.do(SourceEvent.READY)
        answer, _ = self._expect(m.Running, self._options.handover_timeout_s)
        noted = self._custodian.feed(SourceEvent.RUNNING)
        # It runs there. What follows has time, and cannot fail the teleport any more.
        try:
            machine.mark_teleported()
        except Exception:
            log.exception("machine %s runs at the target, but could not be marked so here", machine.name)
        link.try_send(m.Done())
        if noted is not None:
            log.error("machine %s runs at the target, but that could not be noted here: %s", machine.name, noted)
        received, resumed = answer.received_at - offset, answer.resumed_at - offset
        handover = max(0, received - t_ready)
        downtime = Downtime(
            stop=t_stopped - t_start,
            scan=t_scanned - t_stopped,
            send=t_sent - t_scanned,
            save=t_saved - t_sent,
            ready=t_ready - t_saved,
            handover=handover,
            resume=max(0, resumed - t_ready - handover),
        )
        summary = self._summary(
            SourceOutcome.RUNS_THERE,
            rounds=rounds,
            bytes=counters.sent_bytes,
            pages=counters.pages,
            zero_pages=counters.zero_pages,
            last_pages=counters.pages - pages_before,
            downtime_ns=max(0, resumed - t_start) if stopped.running else 0,
            clock_error_ns=error,
            downtime=downtime,
            tracker=tracker.name,
        )
        self._report.phase(
            Phase.DONE, sent_bytes=counters.sent_bytes, pages=counters.pages, remaining_bytes=0, eta_ns=0
        )
        return summary

    def _summary(self, outcome: SourceOutcome, **values: Any) -> TeleportSummary:
        return TeleportSummary(
            teleport_id=self._teleport_id.hex(),
            role="source",
            outcome=outcome,
            total_ns=self._report.elapsed_ns,
            throttle=self._highest_throttle,
            notes=self._notes,
            **values,
        )

    def _unsent_bytes(self) -> int:
        return self._channel.unsent_bytes() if self._lanes is None else self._lanes.unsent_bytes()

    # Failure

    def _close_lanes(self) -> None:
        lanes, self._lanes = self._lanes, None
        if lanes is not None:
            lanes.close()

    def _stop_tracker(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.stop()

    def _root_cause(self, error: BaseException) -> BaseException:
        """A broken channel (or a session closed under us) is often the consequence of what the other side said."""
        if not isinstance(error, TransportError | LocalProtocolError):
            return error
        if (own := self._canceller.error()) is not None:
            return own
        if self._reader.is_alive():
            self._reader.join(1.0)
        remote = self._remote_error
        return error if remote is None or isinstance(remote, TransportError) else remote

    def _undo(self) -> None:
        """The machine goes on here. Each step is tried, whatever became of the others."""
        steps: list[tuple[str, Callable[[], None]]] = []
        if self._throttle:
            steps.append(("end the throttling", lambda: self._machine.set_throttle(0.0)))
        for what, step in (*steps, ("end dirty tracking", self._stop_tracker)):
            try:
                step()
            except Exception:
                log.exception("after a failed teleport of machine %s: cannot %s", self._machine.name, what)

    def _failed(self, error: BaseException) -> BaseException:
        """Undo everything, or, after the handover, say that it cannot be undone. Returns what to raise."""
        phase = self._link.phase
        undone = self._custodian.feed(SourceEvent.LOST)  # the guest first; the other side can wait
        if undone is not None:
            log.error("after a failed teleport of machine %s", self._machine.name, exc_info=undone)
        self._close_lanes()
        if self._custodian.state in SOURCE_OWNS:
            self._undo()
            error = self._root_cause(error)
            said = self._link.phase is Phase.CHECK_DONE or self._link.try_send(farewell(error))
            self._link.finish(self._reader if self._reader.ident else None, said=said)
            self._report.phase(Phase.FAILED, message=m.clean_text(error))
            if not isinstance(error, Exception):
                return error
            return explain(error, "target", phase)
        error = self._root_cause(error)
        self._link.finish(self._reader, said=False)
        self._report.phase(Phase.UNCERTAIN, message=m.clean_text(error))
        name, remote = self._machine.name, self._channel.remote
        # Without the remedy: "try again" is just what nobody should do now.
        why = m.clean_text(error.message if isinstance(error, VmfError) else error).rstrip(".")
        return TeleportUncertain(
            f"machine {name} was handed over to {remote}, but the target did not confirm that it runs ({why}). "
            f"It stays stopped here, as it may run there.",
            f"Ask the target with `vmf controlvm {name} teleport --status`, then decide with "
            f"`vmf controlvm {name} teleport --resolve resume|discard`.",
            self._teleport_id.hex(),
            self._custodian,
        )


def software() -> str:
    """This program, for the other side's log."""
    return f"vmf {vmf.__version__}"


def describe_blockers(name: str, target: str, blockers: Sequence[Blocker]) -> tuple[str, str]:
    """(message, remedy) of a TeleportBlocked: everything at once, in one line."""
    if len(blockers) == 1:
        return f"machine {name} cannot teleport to {target}: {blockers[0]}", ""
    reasons = " ".join(f"({number}) {blocker}" for number, blocker in enumerate(blockers, 1))
    return f"machine {name} cannot teleport to {target} for {len(blockers)} reasons: {reasons}", ""
