"""The connections of a waiting machine before they are its session.

Theory of operation. Everybody who connects gets a thread of his own and a short time for each step: to say HELLO (or
JOIN, for an additional channel of the session), to authenticate, to say what he wants (OFFER, INQUIRE, LOCATE). Only
then he asks for the one place that there is. So those who
connect and say nothing, or say it byte by byte, or cannot authenticate, take nothing from anybody; there are
`MAX_VISITORS` of them at the same time, see `vmf.transport.crowd` for who leaves when one more comes.

One thread, the usher, breaks the connections whose time is over: the time-outs of a channel are for "no progress", so
one byte every second would satisfy them for ever. What became of whom is told, but not of everybody in a flood: lines
cost disk and attention.

Until it has authenticated a stranger learns from us the version of the program, and the salt of the password. It makes
us allocate a message of 8 KiB.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from vmf.errors import RemoteProtocolError, TeleportError, TransportError, VmfError
from vmf.teleport.authentication import Attempts, Verifier, WrongPassword, demand, methods_of
from vmf.teleport.clocks import clock_name
from vmf.teleport.link import Link, farewell, remote_end
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.source import software
from vmf.transport.base import Channel
from vmf.transport.crowd import Crowd

log = logging.getLogger(__name__)

MAX_VISITORS = 32
SPOKE, AUTHENTICATED, WANTS = 1, 2, 3
"""How far a visitor is, for the crowd."""
WAIT_S = 10.0
"""Longest that `admit` may take, besides a step of the conversation."""
BURST, SECONDS_PER_LINE = 20, 2.0
"""Lines about visitors who were turned away: so many at once, then one in so many seconds."""
_M = TypeVar("_M", bound=m.Message)


class Visitor:
    """A connection that is no session yet.

    Attributes:
        hello, request: what it said, once it has.
        may_send: what its connection may send by other rules than the protocol's; set by who admits it.
        deadline: of the present step, monotonic seconds; `doing` says which.
        late, dropped, gone: why it was broken.
    """

    def __init__(self, channel: Channel, deadline: float) -> None:
        self.channel = channel
        self.hello: m.Hello | None = None
        self.request: m.Message | None = None
        self.may_send: Callable[[type[m.Message]], bool] = lambda kind: True
        self.link = Link(channel, Connection(Role.TARGET, lambda kind: self.may_send(kind)))
        self.deadline = deadline
        self.doing = "say HELLO"
        self.late = self.dropped = self.gone = False


class Lobby:
    """See the module's theory of operation."""

    def __init__(
        self,
        step_s: float,
        verifier: Verifier | None,
        features: tuple[str, ...],
        admit: Callable[[Visitor], bool],
        join: Callable[[Visitor, m.Join], bool],
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            step_s: time for each step, seconds.
            verifier: of the password, None for none.
            features: what this side offers in WELCOME, if the source knows it.
            admit: called on a visitor's thread once it has said what it wants; True when it was released (`release`),
                and its link is somebody else's now.
            join: the same for one that says that it belongs to the session; False: it does not.
            tell: called with one line about a visitor who was turned away, on any thread; must not block.
        """
        self._step_s = step_s
        self._verifier = verifier
        self._features = features
        self._admit = admit
        self._join = join
        self._tell = tell
        self._attempts = Attempts()
        self._crowd: Crowd[Visitor] = Crowd(MAX_VISITORS)
        self._changed = threading.Condition()
        self._closed = False
        self._lines, self._counted, self._untold = float(BURST), time.monotonic(), 0
        self._usher = threading.Thread(target=self._ush, name="vmf-teleport-usher", daemon=True)
        self._usher.start()

    def enter(self, channel: Channel) -> None:
        """Somebody has connected. Does not block."""
        visitor = Visitor(channel, time.monotonic() + self._step_s)
        leaves = self._crowd.enter(visitor, channel.remote.host)
        if leaves is not None:
            leaves.dropped = True
            leaves.channel.shutdown()  # its thread wakes, and closes it
        with self._changed:
            if self._closed:
                channel.close()
                return
            self._changed.notify()
        thread = threading.Thread(target=self._receive, args=(visitor,), name="vmf-teleport-visitor", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads; the acceptor must not die of it
            self._crowd.leave(visitor)
            channel.close()
            self.turned_away(f"{channel.remote} was dropped: this host allows no more threads.")

    def turned_away(self, reason: str) -> None:
        """One line about somebody who does not come in; in a flood only some are told."""
        with self._changed:
            now = time.monotonic()
            self._lines = min(float(BURST), self._lines + (now - self._counted) / SECONDS_PER_LINE)
            self._counted = now
            if self._lines < 1:
                self._untold += 1
                return
            self._lines -= 1
            more, self._untold = self._untold, 0
        self._tell(m.clean_text(f"{reason} ({more} more were turned away before.)" if more else reason))

    def close(self) -> None:
        """Nobody is waited for any more: say so to those who speak, and drop everybody."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for visitor in self._crowd.everybody():
            visitor.gone = True
            if visitor.hello is not None:
                visitor.link.try_send(m.Cancel("cancelled at the target"))
            visitor.channel.shutdown()
        self._usher.join(2.0)

    # Time

    def _ush(self) -> None:
        """The usher's thread."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                waiting = [visitor.deadline for visitor in self._crowd.everybody() if not visitor.late]
                for visitor in self._crowd.everybody():
                    if visitor.deadline <= now and not visitor.late:
                        visitor.late = True
                        visitor.channel.shutdown()
                self._changed.wait(max(0.02, min(waiting) - now) if waiting else None)

    def release(self, visitor: Visitor) -> bool:
        """The visitor is somebody else's from now on; False when it was dropped in this very moment."""
        with self._changed:
            return not visitor.late and self._crowd.leave(visitor)

    def _next(self, visitor: Visitor, doing: str, progress: int, allowed_s: float | None = None) -> None:
        """The visitor has got further, and has time for the next step."""
        self._crowd.advance(visitor, progress)
        with self._changed:
            visitor.doing, visitor.deadline = doing, time.monotonic() + (allowed_s or self._step_s)

    # Each on the thread of a visitor

    def _receive(self, visitor: Visitor) -> None:
        channel, kept = visitor.channel, False
        try:
            channel.set_timeout(2 * self._step_s)  # the usher is first
            joining = self._talk(visitor)
            if joining is None:
                kept = self._admit(visitor)
            elif not (kept := self._join(visitor, joining)):
                raise RemoteProtocolError("an additional channel does not belong to the teleport under way.")
        except Exception as error:  # noqa: BLE001 - told below
            self._part(visitor, error)
        finally:
            self._crowd.leave(visitor)
            if not kept:
                channel.close()

    def _part(self, visitor: Visitor, error: Exception) -> None:
        """Say why, to both sides."""
        remote, link = visitor.channel.remote, visitor.link
        if visitor.gone:
            return
        if visitor.late and isinstance(error, TransportError):
            self.turned_away(f"{remote} was dropped: it did not {visitor.doing} within {self._step_s:g} s.")
            return
        if visitor.dropped:
            self.turned_away(f"{remote} was dropped: there were too many connections at the same time.")
            return
        if not isinstance(error, VmfError):
            log.exception("a visitor from %s met a bug", remote)
            self.turned_away(f"{remote}: internal error: {type(error).__name__}: {error}")
        elif error.code == "busy":
            log.info("%s: %s", remote, error)  # no news for who watches the session
        elif isinstance(error, WrongPassword):
            self.turned_away(f"{remote} was refused: {error.message} The source has to give the one that was set here.")
        else:
            self.turned_away(f"{remote}: {error}")
        link.finish(said=link.try_send(farewell(error)))

    def _talk(self, visitor: Visitor) -> m.Join | None:
        """From HELLO to the request; or a JOIN."""
        link = visitor.link

        def receive() -> m.Message:
            message = link.receive()
            if isinstance(message, m.Cancel | m.Error):
                raise remote_end(message, "source")
            return message

        def expect(kind: type[_M]) -> _M:
            message = receive()
            if not isinstance(message, kind):
                raise RemoteProtocolError(f"the source sent {message.word()} where {kind.word()} was due.")
            return message

        hello = receive()
        if isinstance(hello, m.Join):
            self._next(visitor, "join", WANTS)
            return hello
        if not isinstance(hello, m.Hello):
            raise RemoteProtocolError(f"the source sent {hello.word()} where HELLO was due.")
        visitor.hello = hello
        self._next(visitor, "authenticate", SPOKE)
        common = [version for version in m.PROTOCOL_VERSIONS if version in hello.versions]
        if not common:
            error = TeleportError(
                f"the source ({hello.software}) speaks protocol versions {list(hello.versions)}, "
                f"this side ({software()}) {list(m.PROTOCOL_VERSIONS)}.",
                "Bring both hosts to the same release of vmf.",
            )
            error.code = "version"
            raise error
        known = (*self._features, clock_name(hello.teleport_id))
        features = tuple(feature for feature in known if feature and feature in hello.features)
        binding = visitor.channel.channel_binding()
        methods = methods_of(self._verifier, binding)
        link.send(m.Welcome(hello.teleport_id, max(common), features, methods, software()))
        demand(self._verifier, binding, self._attempts, visitor.channel.remote.host, link.send, expect)
        self._next(visitor, "make its offer", AUTHENTICATED)
        visitor.request = receive()
        self._next(visitor, "get its turn", WANTS, self._step_s + WAIT_S)
        return None
