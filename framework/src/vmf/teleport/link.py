"""A `Connection` on a `Channel`: blocking, for one receiving thread and any number of sending ones.

Frames are read exactly, so that raw page data goes from the socket straight into guest RAM and from guest RAM
straight into the socket. Two locks: `_state` guards the connection and is never held while anything waits; `_sending`
keeps one message and its raw data together on the wire.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vmf.errors import AuthenticationError, TeleportCancelled, TeleportError, TransportClosed, TransportError, VmfError
from vmf.memory import pages
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.connection import CLOSED, NEED_DATA, Connection
from vmf.teleport.protocol.runs import PageRuns, pack_runs
from vmf.teleport.protocol.states import Phase
from vmf.transport.base import Channel

DRAIN_S = 1.0
"""How long to go on reading after the last word, so that the other side gets to read it."""
CANCEL_POLL_S = 0.05
GRACE_S = 2.0
"""For a session to end by itself after a cancel, before its channel is broken."""


class Link:
    """One session's conversation."""

    def __init__(self, channel: Channel, connection: Connection) -> None:
        self.channel = channel
        self.connection = connection
        self._state = threading.Lock()
        self._sending = threading.Lock()
        self.last_sent_ns = time.monotonic_ns()

    @property
    def phase(self) -> Phase:
        return self.connection.phase

    def send(self, message: m.Message) -> None:
        """Raises LocalProtocolError, TransportError."""
        with self._sending:
            with self._state:
                data = self.connection.send(message)
            self.channel.send(data)
            self.last_sent_ns = time.monotonic_ns()

    def send_pages(self, round_: int, runs: PageRuns, base: memoryview, ranges: pages.ByteRanges) -> int:
        """Send the pages `runs`, whose contents lie at the byte `ranges` of `base`; returns the raw bytes."""
        message = m.Pages(round_, pack_runs(runs))
        with self._sending:
            with self._state:
                data = self.connection.send(message)
                owed = self.connection.bulk_owed
            self.channel.send(data)
            self.channel.send_ranges(base, ranges)
            with self._state:
                self.connection.bulk_sent(owed)
            self.last_sent_ns = time.monotonic_ns()
        return owed

    def try_send(self, message: m.Message) -> bool:
        """Send if the protocol allows it now and the channel takes it; never raises, waits for nobody."""
        if not self._sending.acquire(timeout=DRAIN_S):
            return False
        try:
            with self._state:
                if not self.connection.can_send(type(message)):
                    return False
                data = self.connection.send(message)
            self.channel.send(data)
        except VmfError:
            return False
        finally:
            self._sending.release()
        return True

    def receive(self) -> m.Message:
        """The next message. Raises RemoteProtocolError, TransportError (TransportClosed also when it is over)."""
        while True:
            with self._state:
                event = self.connection.next_event()
                wanted = self.connection.bytes_wanted()
            if event is CLOSED:
                raise TransportClosed("the teleport session is over.")
            if event is not NEED_DATA:
                assert isinstance(event, m.Message)
                return event
            data = bytearray(wanted)
            self.channel.recv_into(memoryview(data))
            with self._state:
                self.connection.receive_data(data)

    def bulk_received(self, count: int) -> None:
        """The raw data of a PAGES message was taken from the channel by the caller."""
        with self._state:
            self.connection.bulk_received(count)

    def lost(self) -> Phase:
        """Nothing more comes of this session."""
        with self._state:
            return self.connection.lost()

    def finish(self, reader: threading.Thread | None = None, *, said: bool) -> Phase:
        """End the session and break the channel; `said`: a last word was sent, so let the other side read it first.

        `reader` is the thread that receives on this link, if that is not the caller.
        """
        phase = self.lost()
        try:
            self.channel.set_timeout(DRAIN_S)
        except VmfError:
            pass  # it is broken already
        if said:
            if reader is not None:
                reader.join(DRAIN_S)
            if reader is None or not reader.is_alive():
                self.drain()
        self.channel.shutdown()
        return phase

    def drain(self) -> None:
        """Read and drop what is under way: closing a TCP socket with unread data would destroy our last word."""
        scratch = memoryview(bytearray(1 << 16))
        # Not by the channel's time-out, which a byte now and then would satisfy for as long as it likes.
        end = threading.Timer(DRAIN_S, self.channel.shutdown)
        end.daemon = True
        end.start()
        try:
            while True:
                self.channel.recv_into(scratch)
        except VmfError:
            pass  # closed by the other side, silent, or we have waited long enough: all are what we wait for
        finally:
            end.cancel()


def farewell(error: BaseException) -> m.Message:
    """The last word that tells the other side of a failure here."""
    if isinstance(error, TeleportCancelled):
        return m.Cancel(m.clean_text(error.message))
    if isinstance(error, KeyboardInterrupt):
        return m.Cancel("interrupted")
    if isinstance(error, VmfError):
        return m.Error(m.clean_text(error.code, 64), m.clean_text(error.message), m.clean_text(error.remedy))
    return m.Error("internal", m.clean_text(f"internal error ({type(error).__name__})."), "Look at that side's log.")


def remote_end(message: m.Message, who: str) -> TeleportError:
    """The error that a CANCEL or ERROR of the other side means here."""
    if isinstance(message, m.Cancel):
        return TeleportCancelled(f"the teleport was cancelled at the {who} ({message.reason.rstrip('.')}).")
    assert isinstance(message, m.Error)
    if message.code == AuthenticationError.code:
        return AuthenticationError(f"the {who} refused: {message.message}", message.remedy)
    error = TeleportError(f"the {who} could not go on: {message.message}", message.remedy)
    if message.code in ("busy", "version"):
        error.code = message.code
    return error


def explain(error: BaseException, who: str, phase: Phase) -> TeleportError:
    """A transport's error in terms of the teleport: what was going on, and that the machine is safe."""
    if isinstance(error, TeleportError):
        return error
    if isinstance(error, TransportError):
        return TeleportError(
            f"the connection to the {who} was lost in phase {phase.value}: {error.message}",
            error.remedy or f"Check the network and the {who}, then teleport again.",
        )
    if isinstance(error, VmfError):
        return TeleportError(f"the teleport failed in phase {phase.value}: {error.message}", error.remedy)
    return TeleportError(f"the teleport failed in phase {phase.value}: {type(error).__name__}: {error}.")


class CancelRequest(threading.Event):
    """The user's event, with a reason: set it by `ask`.

    Attributes:
        reason: a clause for people; "" for a plain request.
    """

    reason = ""

    def ask(self, reason: str = "") -> None:
        """Cancel; the first reason counts."""
        self.reason = self.reason or reason
        self.set()


class Canceller:
    """Watches the user's event, and a time limit, for one session.

    When either comes, `now` is called once on the watcher's thread, and `late` if the session has not ended
    `GRACE_S` later (it hangs in a transfer). `commit()` is the point of no return: it says whether either came
    before, and afterwards neither is acted upon.
    """

    def __init__(
        self,
        event: threading.Event | None,
        timeout_s: float | None,
        now: Callable[[], None],
        late: Callable[[], None],
    ) -> None:
        self._event = event
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._now, self._late = now, late
        self._lock = threading.Lock()
        self._committed = False
        self._closed = threading.Event()
        if event is not None or timeout_s is not None:
            threading.Thread(target=self._watch, name="vmf-teleport-cancel", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.is_set():
            wait = CANCEL_POLL_S
            if self._deadline is not None:
                wait = max(0.0, min(wait, self._deadline - time.monotonic()))
            (self._event or self._closed).wait(wait)
            with self._lock:
                if self._committed or self._closed.is_set():
                    return
                triggered = self.error() is not None
            if triggered:
                self._now()
                if not self._closed.wait(GRACE_S):
                    self._late()
                return

    def error(self) -> TeleportError | None:
        """Why the session should end, or None."""
        if self._event is not None and self._event.is_set():
            reason = str(getattr(self._event, "reason", ""))
            return TeleportCancelled(
                f"the teleport was cancelled: {reason}." if reason else "the teleport was cancelled."
            )
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return TeleportError(
                f"the teleport did not complete within the {round(self._timeout_s or 0, 1):g} s allowed.",
                "Allow more time with --timeout, or a longer downtime with --maxdowntime.",
            )
        return None

    def check(self) -> None:
        """Raises TeleportCancelled, or TeleportError after the time limit."""
        if not self._committed and (error := self.error()) is not None:
            raise error

    def commit(self) -> None:
        """The point of no return. Raises as `check`, for the last time."""
        with self._lock:
            self.check()
            self._committed = True

    def close(self) -> None:
        """The session has ended."""
        self._closed.set()
