"""The target of a teleport: a machine that waits.

An acceptor thread takes connections. The first one becomes the session, served on the caller's thread; while it
lasts, others are told "busy". Whatever happens in a session, short of the machine running here, ends in waiting
again: the arrival is discarded and the caller sees one progress event with the reason.

A session that does not get to its offer within `handshake_timeout_s`, or falls silent, is dropped, so nobody can keep
the place by doing nothing.

Who comes meanwhile may still ask what became of an earlier teleport (LOCATE). When a machine has arrived whose source
did not say good-bye, the listener stays open for that question alone, because that source may be uncertain.

What is done with the machine, and in which order, `vmf.teleport.protocol.handover` decides; this module does the deeds.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from vmf.machine.memory import MIB, PAGE_SIZE
from vmf.teleport.authentication import Attempts, Verifier, demand, methods_of
from vmf.teleport.check import Blocker, compare_payloads
from vmf.teleport.custodian import TargetCustodian
from vmf.teleport.journal import Entry, Journal, MemoryJournal, Testimony
from vmf.teleport.lanes import Joiners
from vmf.teleport.link import Canceller, Link, explain, farewell, remote_end
from vmf.teleport.progress import ProgressListener, Reporter, TeleportSummary
from vmf.teleport.protocol import Connection, Phase, Role, SourceOutcome
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import Deed, Note, TargetCustody, TargetEvent
from vmf.teleport.ram import RamReceiver
from vmf.teleport.seam import KeepsJournal, KeepsLeases, StatesCapability, TeleportableMachine, payload_kinds
from vmf.teleport.source import software
from vmf.transport.base import Channel, Listener

log = logging.getLogger(__name__)

WAITING = "waiting"
"""`ProgressEvent.phase` of a target without a session."""
_M = TypeVar("_M", bound=m.Message)
_POLL_S = 0.1
_REFUSALS = 8
"""Connections that are told "busy" at the same time; more are just closed."""
_PATIENCE_S = 0.5
"""For the session to end, before a second connection is told "busy"; longer when it is being cleaned up already."""
_ENDING_S = 10.0


@frozen
class TargetOptions:
    """Settings of a waiting target, seconds.

    Attributes:
        handshake_timeout_s: from the connection to the source's OFFER.
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
        self._attempts = Attempts()
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
        self._arrivals: queue.SimpleQueue[Channel | TransportRefused | None] = queue.SimpleQueue()
        self._refusals = threading.Semaphore(_REFUSALS)

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
                    channel = self._arrivals.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if channel is None:
                    if self._cancel is not None and self._cancel.is_set():
                        continue
                    raise TransportClosed(f"{self._listener.address} does not listen any more.")
                if isinstance(channel, TransportRefused):
                    self._report.restart()
                    self._report.phase(WAITING, message=m.clean_text(str(channel)))
                    continue
                summary = self._serve(channel)
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

    def _serve(self, channel: Channel) -> TeleportSummary | None:
        """One session; None when the machine does not run here after it."""
        message = ""
        self._report.restart()
        self._session = session = self._new_session(channel, self._report, self._cancel)
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

    def _new_session(self, channel: Channel, report: Reporter, cancel: threading.Event | None) -> _Session:
        return _Session(
            self._machine, channel, report, cancel, self._options, self._attempts, self._journal, self.testify
        )

    def _accept(self) -> None:
        """The acceptor thread."""
        while True:
            try:
                channel = self._listener.accept(None)
            except TransportTimeout:
                continue
            except TransportClosed:
                self._arrivals.put(None)
                return
            except TransportRefused as error:
                log.info("turned away: %s", error)
                if self._arrivals.qsize() < _REFUSALS:  # of a flood only some are told
                    self._arrivals.put(error)
                continue
            except TransportError as error:
                log.warning("accepting a teleport failed: %s", error)
                time.sleep(_POLL_S)  # out of descriptors, say: do not spin
                continue
            if self._take_place(0.0):
                self._arrivals.put(channel)
            elif self._refusals.acquire(blocking=False):
                threading.Thread(target=self._refuse, args=(channel,), name="vmf-teleport-busy", daemon=True).start()
            else:
                channel.close()

    def _take_place(self, patience_s: float) -> bool:
        with self._place:
            if not self._place.wait_for(lambda: not self._busy, patience_s):
                return False
            self._busy = True
            return True

    def _refuse(self, channel: Channel) -> None:
        """A thread, for who comes while a session lasts."""
        try:
            # A source that tries again right after a failure must not be told "busy" by the leftovers of itself.
            session = self._session
            ending = session is None or session.over
            expected = session is not None and session.joiners.expecting
            if not expected and self._take_place(_ENDING_S if ending else _PATIENCE_S):
                self._arrivals.put(channel)
                self._refusals.release()
                return
        except BaseException:
            channel.close()
            raise
        joined = False
        try:
            bystander = self._new_session(channel, Reporter("target", None), None)
            joined = bystander.bystand(session, arrived=self._arrived is not None)
        finally:
            if not joined:
                channel.close()
            self._refusals.release()


class _Session:
    """One source's connection."""

    def __init__(
        self,
        machine: TeleportableMachine,
        channel: Channel,
        report: Reporter,
        cancel: threading.Event | None,
        options: TargetOptions,
        attempts: Attempts,
        journal: Journal,
        witness: Callable[[bytes], Testimony],
    ) -> None:
        self._attempts = attempts
        self._journal = journal
        self._witness = witness
        self._machine = machine
        self._channel = channel
        self._report = report
        self._options = options
        self.custodian = TargetCustodian(self._deeds(), on_void=channel.shutdown)
        self._link = Link(channel, Connection(Role.TARGET, self.custodian.may_send))
        self._ram = RamReceiver(machine.memory)
        self.joiners = Joiners(self._ram, machine.memory.pages)
        self._began = time.monotonic_ns()
        self._over = threading.Event()
        self._handshake_late = False
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
        if isinstance(error, TransportError):
            if (own := self._canceller.error()) is not None:
                error = own
            elif self._handshake_late:
                error = TeleportError(
                    f"the source did not make its offer within {self._options.handshake_timeout_s:g} s."
                )
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

    def bystand(self, session: _Session | None, *, arrived: bool) -> bool:
        """For who comes while a session lasts or when the machine has arrived: answer questions, take no machine.

        True when it was an additional channel of that session, which has it now.
        """
        try:
            self._channel.set_timeout(self._options.handshake_timeout_s)
            with self._handshake_limit():
                message = self._receive()
                if isinstance(message, m.Join):
                    if session is not None and session.joiners.admit(self._link, message):
                        return True
                    raise RemoteProtocolError("an additional channel does not belong to the teleport under way.")
                self._shake_hands(message)
                asked = self._receive()
                if isinstance(asked, m.Locate):
                    self._testify(asked)
                    return False
            name = self._machine.name
            error = TeleportError(
                f"machine {name} has arrived already." if arrived else f"machine {name} is receiving another teleport.",
                "" if arrived else "Wait until that one has ended, or cancel it, and try again.",
            )
            error.code = "busy"
            raise error
        except VmfError as error:
            self._link.finish(said=self._link.try_send(farewell(error)))
            return False
        finally:
            self._over.set()
            self._canceller.close()

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
        running = self._state.running
        self._machine.resume(self._received_at - self._stopped_at if running else 0, running)
        self._resumed_at = time.monotonic_ns()

    # The conversation

    def _receive(self) -> m.Message:
        while True:
            message = self._link.receive()
            if isinstance(message, m.Ping):
                self._link.send(m.Pong(message.sent_at, time.monotonic_ns()))
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
        with self._handshake_limit():
            self._report.phase(Phase.HELLO)
            hello = self._shake_hands(self._receive())
            self._report.phase(Phase.OFFER, teleport_id=hello.teleport_id.hex())
            offer = self._receive()
            if isinstance(offer, m.Inquire):
                self._answer()
                return None
            if isinstance(offer, m.Locate):
                self._testify(offer)
                return None
            if not isinstance(offer, m.Offer):
                raise RemoteProtocolError(f"the source sent {offer.word()} where OFFER was due.")
        if self._journal.note(hello.teleport_id) is not Note.NONE:
            raise RemoteProtocolError("the source repeats a teleport that was here before.")
        threading.Thread(target=self._keep_alive, name="vmf-teleport-alive", daemon=True).start()
        blockers = self._check(offer)
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

    @contextmanager
    def _handshake_limit(self) -> Iterator[None]:
        watchdog = threading.Timer(self._options.handshake_timeout_s, self._drop_late_handshake)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def _drop_late_handshake(self) -> None:
        self._handshake_late = True
        self._channel.shutdown()

    def _keep_alive(self) -> None:
        """A thread: the source must not take a long check or a long round for a dead host."""
        interval = self._options.keepalive_s
        while not self._over.wait(interval):
            if time.monotonic_ns() - self._link.last_sent_ns >= interval * 0.5e9:
                self._link.try_send(m.Ping(time.monotonic_ns()))

    def _shake_hands(self, hello: m.Message) -> m.Hello:
        if not isinstance(hello, m.Hello):
            raise RemoteProtocolError(f"the source sent {hello.word()} where HELLO was due.")
        common = [version for version in m.PROTOCOL_VERSIONS if version in hello.versions]
        if not common:
            error = TeleportError(
                f"the source ({hello.software}) speaks protocol versions {list(hello.versions)}, "
                f"this side ({software()}) {list(m.PROTOCOL_VERSIONS)}.",
                "Bring both hosts to the same release of vmf.",
            )
            error.code = "version"
            raise error
        can = isinstance(self._machine, StatesCapability)
        own = [feature for feature in m.FEATURES if can or feature != m.CAPABILITIES]
        features = tuple(feature for feature in own if feature in hello.features)
        verifier, binding = self._options.verifier, self._channel.channel_binding()
        methods = methods_of(verifier, binding)
        self._link.send(m.Welcome(hello.teleport_id, max(common), features, methods, software()))
        demand(verifier, binding, self._attempts, self._channel.remote.host, self._link.send, self._expect)
        self.custodian.teleport_id = hello.teleport_id
        return hello

    def _testify(self, asked: m.Locate) -> None:
        """Say what became of an earlier teleport. If it is under way, it is not any more."""
        said = self._witness(asked.teleport_id)
        self._link.send(m.Located(said.answer.value, m.clean_text(said.machine, 255), m.clean_text(said.detail)))
        self._expect(m.Bye)
        self._link.finish(said=False)

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
        blockers += compare_payloads(offer.payloads, payload_kinds(machine))
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
        try:
            self._ram.arrival.wait(sent, self._options.idle_timeout_s)
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
        try:
            for phase in (Phase.PAUSE, Phase.HANDOVER, Phase.RUNNING):  # told late, see above
                report.phase(phase)
            self._channel.set_timeout(self._options.done_timeout_s)
            self._expect(m.Done)
            custodian.do(TargetEvent.CONFIRMED)
            confirmed = True
        except VmfError as lost:
            log.info("the machine runs here; the source's good-bye did not come: %s", lost)
        self._link.finish(said=False)
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
