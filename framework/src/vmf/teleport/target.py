"""The target of a teleport: a machine that waits.

An acceptor thread takes connections. The first one becomes the session, served on the caller's thread; while it
lasts, others are told "busy". Whatever happens in a session, short of the machine running here, ends in waiting
again: the arrival is discarded and the caller sees one progress event with the reason.

A session that does not get to its offer within `handshake_timeout_s`, or falls silent, is dropped, so nobody can keep
the place by doing nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
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
from vmf.teleport.link import Canceller, Link, explain, farewell, remote_end
from vmf.teleport.progress import ProgressListener, Reporter, TeleportSummary
from vmf.teleport.protocol import Connection, Phase, Role, SourceOutcome
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.states import TARGET_RUNS
from vmf.teleport.ram import RamReceiver
from vmf.teleport.seam import StatesCapability, TeleportableMachine, payload_kinds
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

    The listener is shut down at the end; the caller closes it.

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
        self._arrivals: queue.SimpleQueue[Channel | TransportRefused | None] = queue.SimpleQueue()
        self._refusals = threading.Semaphore(_REFUSALS)

    def run(self) -> TeleportSummary:
        acceptor = threading.Thread(target=self._accept, name="vmf-teleport-accept", daemon=True)
        acceptor.start()
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
            self._listener.shutdown()
            acceptor.join(2.0)

    def _serve(self, channel: Channel) -> TeleportSummary | None:
        """One session; None when the machine does not run here after it."""
        message = ""
        self._report.restart()
        self._session = session = _Session(
            self._machine, channel, self._report, self._cancel, self._options, self._attempts
        )
        try:
            summary = session.run()
            if summary is not None:
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
                self._busy, self._session = False, None
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
            if self._take_place(_ENDING_S if ending else _PATIENCE_S):
                self._arrivals.put(channel)
                self._refusals.release()
                return
        except BaseException:
            channel.close()
            raise
        try:
            channel.set_timeout(1.0)
            link = Link(channel, Connection(Role.TARGET))
            busy = m.Error(
                "busy",
                m.clean_text(f"machine {self._machine.name} is receiving another teleport.", 500),
                "Wait until that one has ended, or cancel it, and try again.",
            )
            link.finish(said=link.try_send(busy))
        except VmfError:
            pass  # gone already
        finally:
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
    ) -> None:
        self._attempts = attempts
        self._machine = machine
        self._channel = channel
        self._report = report
        self._options = options
        self._link = Link(channel, Connection(Role.TARGET))
        self._ram = RamReceiver(machine.memory, self._link)
        self._began = time.monotonic_ns()
        self._over = threading.Event()
        self._handshake_late = False
        self._said_cancel = False
        self._offered = False
        self._canceller = Canceller(cancel, None, now=self._say_cancelled, late=channel.shutdown)

    @property
    def owns(self) -> bool:
        """HANDOVER came: the machine is this one, and waiting for another would lose it."""
        return self._link.connection.phase in TARGET_RUNS

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

    def _failed(self, error: BaseException) -> BaseException:
        phase = self._link.phase
        if isinstance(error, TransportError):
            if (own := self._canceller.error()) is not None:
                error = own
            elif self._handshake_late:
                error = TeleportError(
                    f"the source did not make its offer within {self._options.handshake_timeout_s:g} s."
                )
        said = self._link.try_send(farewell(error)) or self._said_cancel
        if self._offered:
            self._machine.discard_arrival()
        self._link.finish(said=said)
        return explain(error, "source", phase) if isinstance(error, Exception) else error

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
        watchdog = threading.Timer(self._options.handshake_timeout_s, self._drop_late_handshake)
        watchdog.daemon = True
        watchdog.start()
        try:
            hello = self._shake_hands()
            self._report.phase(Phase.OFFER, teleport_id=hello.teleport_id.hex())
            offer = self._receive()
            if isinstance(offer, m.Inquire):
                self._answer()
                return None
            if not isinstance(offer, m.Offer):
                raise RemoteProtocolError(f"the source sent {offer.word()} where OFFER was due.")
        finally:
            watchdog.cancel()
        threading.Thread(target=self._keep_alive, name="vmf-teleport-alive", daemon=True).start()
        blockers = self._check(offer)
        self._link.send(m.Checked(tuple(blockers[: m.MAX_BLOCKERS])))
        message = self._receive()
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
        state, paused_at = self._receive_machine(offer)
        return self._take_over(hello, state, paused_at)

    def _drop_late_handshake(self) -> None:
        self._handshake_late = True
        self._channel.shutdown()

    def _keep_alive(self) -> None:
        """A thread: the source must not take a long check or a long round for a dead host."""
        interval = self._options.keepalive_s
        while not self._over.wait(interval):
            if time.monotonic_ns() - self._link.last_sent_ns >= interval * 0.5e9:
                self._link.try_send(m.Ping(time.monotonic_ns()))

    def _shake_hands(self) -> m.Hello:
        self._report.phase(Phase.HELLO)
        hello = self._expect(m.Hello)
        common = [version for version in m.PROTOCOL_VERSIONS if version in hello.versions]
        if not common:
            error = TeleportError(
                f"the source ({hello.software}) speaks protocol versions {list(hello.versions)}, "
                f"this side ({software()}) {list(m.PROTOCOL_VERSIONS)}.",
                "Bring both hosts to the same release of vmf.",
            )
            error.code = "version"
            raise error
        own = m.FEATURES if isinstance(self._machine, StatesCapability) else ()
        features = tuple(feature for feature in own if feature in hello.features)
        verifier, binding = self._options.verifier, self._channel.channel_binding()
        methods = methods_of(verifier, binding)
        self._link.send(m.Welcome(hello.teleport_id, max(common), features, methods, software()))
        demand(verifier, binding, self._attempts, self._channel.remote.host, self._link.send, self._expect)
        return hello

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
        counters = ram.counters
        round_, paused_at = 1, 0
        report.phase(Phase.PRECOPY, round=1)
        while True:
            message = self._receive()
            if isinstance(message, m.Pages):
                ram.place(message)
            elif isinstance(message, m.Zeros):
                ram.clear(message)
            elif isinstance(message, m.RoundEnd):
                if message.round != round_:
                    raise RemoteProtocolError(f"the source ended round {message.round} in round {round_}.")
                self._link.send(m.RoundAck(round_, counters.sent_bytes))
                round_ += 1
                report.update(force=True, round=round_)
            elif isinstance(message, m.Paused):
                paused_at = time.monotonic_ns()
            elif isinstance(message, m.State):
                self._rounds = round_ - 1
                return message, paused_at
            else:
                raise RemoteProtocolError(f"the source sent {message.word()} in the middle of RAM.")
            if not paused_at:  # from then on nobody's curiosity may delay the guest
                report.update(sent_bytes=counters.sent_bytes, pages=counters.pages, zero_pages=counters.zero_pages)

    def _take_over(self, hello: m.Hello, state: m.State, paused_at: int) -> TeleportSummary:
        machine, report = self._machine, self._report
        machine.restore(state.payloads)
        # From READY on only the source decides. A cancel that came before is honoured, a later one is not.
        self._canceller.commit()
        self._link.send(m.Ready())
        self._expect(m.Handover)
        received_at = time.monotonic_ns()
        # Never less than what we saw ourselves, never more than the whole session: guest time must not jump.
        stopped_at = min(max(state.stopped_at, self._began), paused_at) if state.stopped_at else paused_at
        machine.resume(received_at - stopped_at if state.running else 0, state.running)
        resumed_at = time.monotonic_ns()
        try:
            self._link.send(m.Running(received_at, resumed_at))
            for phase in (Phase.PAUSE, Phase.HANDOVER, Phase.RUNNING):  # told late, see above
                report.phase(phase)
            self._channel.set_timeout(self._options.done_timeout_s)
            self._expect(m.Done)
        except VmfError as error:
            log.info("the machine runs here; the source's good-bye did not come: %s", error)
        self._link.finish(said=False)
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
            downtime_ns=resumed_at - stopped_at if state.running else 0,
            total_ns=resumed_at - self._began,
        )
