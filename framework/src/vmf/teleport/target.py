"""The target of a teleport: a machine that waits.

An acceptor thread takes connections, and shows them into the lobby (`vmf.teleport.lobby`), where they shake hands. The
first one to make an offer becomes the session, served on the caller's thread; while it lasts, others are told "busy".
Whatever happens in a session, short of the machine running here, ends in waiting
again: the arrival is discarded and the caller sees one progress event with the reason.

A session that falls silent, or only shows that it is alive, is dropped, so nobody can keep the place by doing nothing.

Who comes meanwhile may still ask what became of an earlier teleport (LOCATE). When a machine has arrived whose source
did not say good-bye, the listener stays open for that question alone, because that source may be uncertain.

What is done with the machine, and in which order, `vmf.teleport.protocol.handover` decides; this module does the deeds.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from attrs import frozen

from vmf.errors import (
    RemoteProtocolError,
    TeleportCancelled,
    TeleportError,
    TransportClosed,
    TransportError,
    TransportRefused,
    TransportTimeout,
    VmfError,
)
from vmf.memory.guest import MIB, PAGE_SIZE
from vmf.teleport.authentication import Verifier
from vmf.teleport.check import Blocker, compare_payloads
from vmf.teleport.custodian import TargetCustodian
from vmf.teleport.journal import Entry, Journal, MemoryJournal, Testimony
from vmf.teleport.lanes import Joiners
from vmf.teleport.link import Canceller, explain, farewell, remote_end
from vmf.teleport.lobby import Lobby, Visitor
from vmf.teleport.progress import ProgressListener, Reporter, TeleportSummary
from vmf.teleport.protocol import Phase, Role, SourceOutcome
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import Deed, Note, TargetCustody, TargetEvent
from vmf.teleport.ram import RamReceiver
from vmf.teleport.seam import (
    KeepsJournal,
    KeepsLeases,
    StatesCapability,
    TakesNotes,
    TeleportableMachine,
    payload_kinds,
)
from vmf.transport.base import Listener

log = logging.getLogger(__name__)

WAITING = "waiting"
"""`ProgressEvent.phase` of a target without a session."""
_M = TypeVar("_M", bound=m.Message)
_POLL_S = 0.1
_LINES = 32
"""About who was turned away, that wait to be told."""
_PATIENCE_S = 0.5
"""For the session to end, before a second connection is told "busy"; longer when it is being cleaned up already."""
_ENDING_S = 10.0
SETTLE_S = 0.01
"""A guest that has arrived finds the caches of its CPU backend empty. What has time waits so long, so that the
interpreter and the processor are the guest's meanwhile."""


@frozen
class TargetOptions:
    """Settings of a waiting target, seconds.

    Attributes:
        handshake_timeout_s: for each step from the connection to the source's OFFER: HELLO, AUTHENTICATE, OFFER.
        idle_timeout_s: longest silence of the source.
        keepalive_s: how often the target shows that it is alive.
        done_timeout_s: how long to wait for the source's good-bye; the machine runs already.
        verifier: of the password that a source has to know; None for none.
    """

    handshake_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    keepalive_s: float = 5.0
    done_timeout_s: float = 2.0
    verifier: Verifier | None = None


def wait_for_teleport(
    machine: TeleportableMachine,
    listener: Listener,
    progress: ProgressListener | None = None,
    cancel: threading.Event | None = None,
    options: TargetOptions | None = None,
) -> TeleportSummary:
    """Wait until a machine has arrived and runs here. Failed sessions are reported as events and leave it waiting.

    The listener is shut down at the end and the caller closes it; except when the summary is not `confirmed`: then it
    goes on answering questions about this teleport, until the caller shuts it down.

    Raises:
        TeleportCancelled: `cancel` was set (any thread) before a handover.
        TransportClosed: somebody else shut the listener down.
    """
    return _Target(machine, listener, progress, cancel, options or TargetOptions()).run()


class _Target:
    def __init__(
        self,
        machine: TeleportableMachine,
        listener: Listener,
        progress: ProgressListener | None,
        cancel: threading.Event | None,
        options: TargetOptions,
    ) -> None:
        self._machine = machine
        self._listener = listener
        self._cancel = cancel
        self._options = options
        self._report = Reporter("target", progress)
        self._place = threading.Condition()
        self._busy = False
        self._session: _Session | None = None
        self._arrived: TargetCustodian | None = None
        self._journal = machine.journal if isinstance(machine, KeepsJournal) else MemoryJournal(machine.name)
        self._arrivals: queue.SimpleQueue[Visitor | str | None] = queue.SimpleQueue()
        """Who has the place, lines about who was turned away; None: the listener does not listen any more."""
        can = isinstance(machine, StatesCapability)
        features = tuple(feature for feature in m.FEATURES if can or feature != m.CAPABILITIES)
        self._lobby = Lobby(
            options.handshake_timeout_s, options.verifier, features, admit=self._admit, join=self._join, tell=self._tell
        )

    def run(self) -> TeleportSummary:
        acceptor = threading.Thread(target=self._accept, name="vmf-teleport-accept", daemon=True)
        acceptor.start()
        summary: TeleportSummary | None = None
        self._report.phase(WAITING)
        try:
            while True:
                if self._cancel is not None and self._cancel.is_set():
                    raise TeleportCancelled(f"machine {self._machine.name} does not wait for a teleport any more.")
                try:
                    arrival = self._arrivals.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if arrival is None:
                    if self._cancel is not None and self._cancel.is_set():
                        continue
                    raise TransportClosed(f"{self._listener.address} does not listen any more.")
                if isinstance(arrival, str):
                    self._report.restart()
                    self._report.phase(WAITING, message=arrival)
                    continue
                summary = self._serve(arrival)
                if summary is not None:
                    return summary
        finally:
            if summary is None or summary.confirmed:
                self._listener.shutdown()
                acceptor.join(2.0)

    def testify(self, teleport_id: bytes) -> Testimony:
        """What is known here of a teleport; on any thread."""
        session = self._session
        custodian = session.custodian if session is not None else self._arrived
        if custodian is None or custodian.teleport_id != teleport_id:
            return self._journal.testify(teleport_id)
        return Testimony(custodian.ask(self._journal.note(teleport_id)), self._machine.name)

    def _serve(self, visitor: Visitor) -> TeleportSummary | None:
        """One session; None when the machine does not run here after it."""
        message, channel = "", visitor.channel
        self._report.restart()
        self._session = session = _Session(
            self._machine, visitor, self._report, self._cancel, self._options, self._journal
        )
        try:
            summary = session.run()
            if summary is not None:
                self._arrived = session.custodian
                return summary
        except VmfError as error:
            if session.owns:
                raise
            message = m.clean_text(f"{channel.remote}: {error}")
            log.info("teleport session with %s", message)
        except Exception as error:
            if session.owns:
                raise
            # A bug, maybe provoked by the other side: waiting goes on all the same.
            message = m.clean_text(f"{channel.remote}: internal error: {type(error).__name__}: {error}")
            log.exception("teleport session with %s failed", channel.remote)
        finally:
            channel.close()
            with self._place:
                self._busy, self._session = self._arrived is not None, None
                self._place.notify()
        self._report.restart()
        self._report.phase(WAITING, message=message)
        return None

    def _accept(self) -> None:
        """The acceptor thread."""
        while True:
            try:
                channel = self._listener.accept(None)
            except TransportTimeout:
                continue
            except TransportClosed:
                self._arrivals.put(None)
                self._lobby.close()
                return
            except TransportRefused as error:
                self._lobby.turned_away(str(error))
                continue
            except TransportError as error:
                log.warning("accepting a teleport failed: %s", error)
                time.sleep(_POLL_S)  # out of descriptors, say: do not spin
                continue
            self._lobby.enter(channel)

    def _tell(self, line: str) -> None:
        """On any thread. While a session lasts it is told afterwards."""
        if self._arrivals.qsize() < _LINES:
            self._arrivals.put(line)
        else:
            log.info("turned away: %s", line)

    def _take_place(self, patience_s: float) -> bool:
        with self._place:
            if not self._place.wait_for(lambda: not self._busy, patience_s):
                return False
            self._busy = True
            return True

    def _join(self, visitor: Visitor, message: m.Join) -> bool:
        """On the thread of somebody who says that it is an additional channel of the teleport under way."""
        session = self._session
        if session is None or not session.joiners.admit(visitor.link, message):
            return False
        self._lobby.release(visitor)  # had it to make room in this very moment, the session hears that it is broken
        return True

    def _admit(self, visitor: Visitor) -> bool:
        """On the thread of somebody who has authenticated: give him the place, or an answer."""
        if isinstance(visitor.request, m.Locate):
            self._answer_whereabouts(visitor, visitor.request)
            return False
        # A source that tries again right after a failure must not be told "busy" by the leftovers of itself.
        deadline = time.monotonic() + _ENDING_S
        while not self._take_place(_PATIENCE_S):
            session = self._session
            going_on = session is not None and not session.over
            if self._arrived is not None or going_on or time.monotonic() > deadline:
                name, arrived = self._machine.name, self._arrived is not None
                error = TeleportError(
                    f"machine {name} {'has arrived already' if arrived else 'is receiving another teleport'}.",
                    "" if arrived else "Wait until that one has ended, or cancel it, and try again.",
                )
                error.code = "busy"
                raise error
        if not self._lobby.release(visitor):
            with self._place:
                self._busy = False
                self._place.notify()
            return False
        self._arrivals.put(visitor)
        return True

    def _answer_whereabouts(self, visitor: Visitor, asked: m.Locate) -> None:
        """Say what became of an earlier teleport. If it is under way, it is not any more."""
        said, link = self.testify(asked.teleport_id), visitor.link
        link.send(m.Located(said.answer.value, m.clean_text(said.machine, 255), m.clean_text(said.detail)))
        if not isinstance(message := link.receive(), m.Bye):
            raise RemoteProtocolError(f"the source sent {message.word()} where BYE was due.")
        link.finish(said=False)


class _Session:
    """One source's connection."""

    def __init__(
        self,
        machine: TeleportableMachine,
        visitor: Visitor,
        report: Reporter,
        cancel: threading.Event | None,
        options: TargetOptions,
        journal: Journal,
    ) -> None:
        """`visitor`: who has said HELLO, has authenticated, and has said what it wants."""
        self._journal = journal
        self._machine = machine
        self._visitor = visitor
        self._channel = channel = visitor.channel
        self._report = report
        self._options = options
        self.custodian = TargetCustodian(self._deeds(), on_void=channel.shutdown)
        visitor.may_send = self.custodian.may_send
        self._link = visitor.link
        self._ram = RamReceiver(machine.memory)
        self.joiners = Joiners(self._ram, machine.memory.pages)
        self._began = time.monotonic_ns()
        self._over = threading.Event()
        self._said_cancel = False
        self._offered = False
        self._state: m.State | None = None
        self._received_at = self._resumed_at = self._stopped_at = 0
        self._canceller = Canceller(cancel, None, now=self._say_cancelled, late=channel.shutdown)

    @property
    def owns(self) -> bool:
        """HANDOVER came: the machine is this one, and waiting for another would lose it."""
        return self.custodian.owns

    @property
    def over(self) -> bool:
        """The conversation has ended; at most cleaning up is left."""
        return self._link.connection.closed

    def _say_cancelled(self) -> None:
        """On the watcher's thread: the source hears it at once and breaks the channel, which wakes our own thread."""
        self._said_cancel = self._link.try_send(m.Cancel("cancelled at the target"))

    def run(self) -> TeleportSummary | None:
        try:
            self._channel.set_timeout(self._options.idle_timeout_s)
            return self._run()
        except BaseException as error:
            if self.owns:
                raise  # not a failed session: only a bug in `resume` comes this way
            raise self._failed(error) from (None if isinstance(error, TeleportError) else error)
        finally:
            self._over.set()
            self._canceller.close()
            self.joiners.close()

    def _failed(self, error: BaseException) -> BaseException:
        phase = self._link.phase
        if isinstance(error, TransportError) and (own := self._canceller.error()) is not None:
            error = own
        if self.custodian.state is TargetCustody.VOID:
            error = TeleportError("the source asked what became of this teleport, so it must not arrive any more.")
        said = self._link.try_send(farewell(error)) or self._said_cancel
        self.joiners.close()
        if (undone := self.custodian.feed(TargetEvent.LOST)) is not None:
            log.error("a failed arrival could not be discarded", exc_info=undone)
        if self._offered:
            self._machine.discard_arrival()
        self._link.finish(said=said)
        return explain(error, "source", phase) if isinstance(error, Exception) else error

    # The deeds

    def _deeds(self) -> dict[Deed, Callable[[], None]]:
        return {
            Deed.NOTE_PROMISED: self._note_promised,
            Deed.RESTORE: self._restore,
            Deed.SEND_READY: self._send_ready,
            Deed.TAKE_LEASE: self._take_lease,
            Deed.NOTE_TAKEN: lambda: self._journal.mark(self.custodian.teleport_id, Note.TAKEN),
            Deed.RUN_GUEST: self._run_guest,
            Deed.SEND_RUNNING: lambda: self._link.send(m.Running(self._received_at, self._resumed_at)),
            Deed.DISCARD: lambda: None,  # `_failed` does it, also for what arrives before there is a promise
        }

    def _note_promised(self) -> None:
        self._journal.begin(Entry(self.custodian.teleport_id, Role.TARGET, Note.PROMISED, self._channel.remote))

    def _restore(self) -> None:
        assert self._state is not None
        self._machine.restore(self._state.payloads)

    def _send_ready(self) -> None:
        # From READY on only the source decides. A cancel that came before is honoured, a later one is not.
        self._canceller.commit()
        self._link.send(m.Ready())

    def _take_lease(self) -> None:
        if isinstance(self._machine, KeepsLeases):
            self._machine.take_leases(self.custodian.teleport_id)

    def _run_guest(self) -> None:
        assert self._state is not None
        self._resumed_at = self._machine.resume(self._stopped_at, self._state.running)

    # The conversation

    def _receive(self) -> m.Message:
        """The next message that is not about being alive. Who is only alive for too long is dropped, too."""
        began, moved = time.monotonic(), self._ram.counters.sent_bytes
        while True:
            message = self._link.receive()
            if isinstance(message, m.Ping):
                self._link.send(m.Pong(message.sent_at, time.monotonic_ns()))
                now, before, moved = time.monotonic(), moved, self._ram.counters.sent_bytes
                if moved != before:
                    began = now
                elif now - began > self._options.idle_timeout_s:
                    raise TransportTimeout(f"the source has only shown that it is alive for {now - began:.0f} s.")
            elif isinstance(message, m.Cancel | m.Error):
                raise remote_end(message, "source")
            elif not isinstance(message, m.Pong):
                return message

    def _expect(self, kind: type[_M]) -> _M:
        message = self._receive()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"the source sent {message.word()} where {kind.word()} was due.")
        return message

    def _run(self) -> TeleportSummary | None:
        hello, offer = self._visitor.hello, self._visitor.request
        assert hello is not None
        self._report.phase(Phase.OFFER, teleport_id=hello.teleport_id.hex())
        self.custodian.teleport_id = hello.teleport_id
        if isinstance(offer, m.Inquire):
            self._answer()
            return None
        if not isinstance(offer, m.Offer):
            raise RemoteProtocolError("the source did not make an offer.")
        if self._journal.note(hello.teleport_id) is not Note.NONE:
            raise RemoteProtocolError("the source repeats a teleport that was here before.")
        threading.Thread(target=self._keep_alive, name="vmf-teleport-alive", daemon=True).start()
        blockers = self._check(offer)
        if not blockers and (notes := self._notes(hello, offer)):
            self._link.send(m.Notes(notes))
        if blockers or offer.check_only:
            self._link.send(m.Checked(tuple(blockers[: m.MAX_BLOCKERS])))
        else:
            self._link.send(self.joiners.open(hello.teleport_id, offer.links))
        message = self._receive()
        self.joiners.shut()
        if isinstance(message, m.Bye):
            self._link.finish(said=False)
            self._machine.discard_arrival()
            if blockers:
                raise TeleportError(
                    f"the machine did not fit: {' '.join(str(blocker) for blocker in blockers)}",
                )
            return None
        if blockers or offer.check_only:
            raise RemoteProtocolError("the source went on although the check had not passed.")
        self.custodian.do(TargetEvent.BEGIN)
        state, paused_at = self._receive_machine(offer)
        return self._take_over(hello, state, paused_at)

    def _keep_alive(self) -> None:
        """A thread: the source must not take a long check or a long round for a dead host."""
        interval = self._options.keepalive_s
        while not self._over.wait(interval):
            if time.monotonic_ns() - self._link.last_sent_ns >= interval * 0.5e9:
                self._link.try_send(m.Ping(time.monotonic_ns()))

    def _answer(self) -> None:
        """Say what this machine's CPU backend can present. Nothing of the machine is touched."""
        assert isinstance(self._machine, StatesCapability)  # else WELCOME did not name the feature
        own = self._machine.cpuid_capability()
        self._link.send(
            m.Capabilities(
                machine=m.clean_text(self._machine.name, 255),
                backend=m.clean_text(own.name, 64),
                cpuid=tuple(tuple(row) for row in own.table.to_wire()),
                tsc_khz=own.tsc_khz,
                tsc_scaling=own.tsc_scaling,
            )
        )
        self._expect(m.Bye)
        self._link.finish(said=False)

    def _check(self, offer: m.Offer) -> list[Blocker]:
        """Everything that speaks against this machine."""
        machine = self._machine
        self._offered = True
        self._report.phase(Phase.CHECK, ram_bytes=machine.memory.size)
        if len(machine.memory.touched_ranges()):
            machine.discard_arrival()  # of a session before: pages that are not sent must be zero here
        blockers = list(machine.check(offer.description))
        missing = {blocker.field.removeprefix("device ") for blocker in blockers}
        states = compare_payloads(offer.payloads, payload_kinds(machine))
        blockers += [blocker for blocker in states if blocker.field.removeprefix("state of ") not in missing]
        blockers += machine.local_blockers("target")
        if offer.ram_pages != machine.memory.pages and not any(b.field.startswith("memory") for b in blockers):
            blockers.append(
                Blocker(
                    "memory",
                    f"{offer.ram_pages * PAGE_SIZE // MIB} MiB",
                    f"{machine.memory.size // MIB} MiB",
                    f"Set the target's memory with `vmf modifyvm {machine.name} --memory "
                    f"{offer.ram_pages * PAGE_SIZE // MIB}`.",
                )
            )
        return blockers

    def _notes(self, hello: m.Hello, offer: m.Offer) -> tuple[str, ...]:
        """For the user at the source, if it wants to know."""
        if m.NOTES not in hello.features or not isinstance(self._machine, TakesNotes):
            return ()
        return tuple(m.clean_text(note) for note in self._machine.notes(offer.description)[: m.MAX_NOTES])

    def _receive_machine(self, offer: m.Offer) -> tuple[m.State, int]:
        """RAM and state; also when PAUSED came (ns)."""
        report, ram = self._report, self._ram
        round_, paused_at = 1, 0
        report.phase(Phase.PRECOPY, round=1)
        while True:
            message = self._receive()
            if isinstance(message, m.Pages):
                ram.place(message, self._link)
            elif isinstance(message, m.Zeros):
                ram.clear(message)
            elif isinstance(message, m.RoundEnd):
                if message.round != round_:
                    raise RemoteProtocolError(f"the source ended round {message.round} in round {round_}.")
                self._await_pages(message.sent)
                round_ += 1
                ram.round = round_
                self._link.send(m.RoundAck(round_ - 1, message.sent))
                report.update(force=True, round=round_)
            elif isinstance(message, m.Paused):
                paused_at = time.monotonic_ns()
            elif isinstance(message, m.State):
                self._rounds = round_ - 1
                self._await_pages(message.sent)
                return message, paused_at
            else:
                raise RemoteProtocolError(f"the source sent {message.word()} in the middle of RAM.")
            if not paused_at:  # from then on nobody's curiosity may delay the guest
                counters = ram.counters
                report.update(sent_bytes=counters.sent_bytes, pages=counters.pages, zero_pages=counters.zero_pages)

    def _await_pages(self, sent: int) -> None:
        """All pages that the source has sent, over all channels, are in RAM."""
        # What came over the first channel is here: without another one there is nothing to wait for.
        patience = self._options.idle_timeout_s if self.joiners.any_joined else 0.0
        try:
            self._ram.arrival.wait(sent, patience)
        except VmfError:
            # A source that gives up closes its additional channels first: its reason may be waiting for us.
            self._channel.set_timeout(0.5)
            with suppress(TransportError):
                self._receive()
            raise

    def _take_over(self, hello: m.Hello, state: m.State, paused_at: int) -> TeleportSummary:
        report, custodian = self._report, self.custodian
        self._state = state
        custodian.do(TargetEvent.STATE)
        self._expect(m.Handover)
        self._received_at = time.monotonic_ns()
        # Never less than what we saw ourselves, never more than the whole session: guest time must not jump.
        stopped_at = min(max(state.stopped_at, self._began), paused_at) if state.stopped_at else paused_at
        self._stopped_at = stopped_at
        error = custodian.feed(TargetEvent.HANDOVER)
        if custodian.state is not TargetCustody.TAKEN:
            raise error or TeleportError("the source had given up this teleport.")
        if error is not None:
            log.error("the machine runs here; but: %s", error)
        confirmed = False
        time.sleep(SETTLE_S)
        try:
            self._channel.set_timeout(self._options.done_timeout_s)
            self._expect(m.Done)
            custodian.do(TargetEvent.CONFIRMED)
            confirmed = True
        except VmfError as lost:
            log.info("the machine runs here; the source's good-bye did not come: %s", lost)
        self._link.finish(said=False)
        for phase in (Phase.PAUSE, Phase.HANDOVER, Phase.RUNNING):  # told late, see above
            report.phase(phase)
        try:
            self._journal.flush(hello.teleport_id)
        except VmfError as unwritten:
            log.warning("%s", unwritten)
        counters = self._ram.counters
        report.phase(Phase.DONE, sent_bytes=counters.sent_bytes, pages=counters.pages)
        return TeleportSummary(
            teleport_id=hello.teleport_id.hex(),
            role="target",
            outcome=SourceOutcome.RUNS_THERE,
            rounds=self._rounds,
            bytes=counters.sent_bytes,
            pages=counters.pages,
            zero_pages=counters.zero_pages,
            downtime_ns=self._resumed_at - stopped_at if state.running else 0,
            total_ns=self._resumed_at - self._began,
            confirmed=confirmed,
        )
