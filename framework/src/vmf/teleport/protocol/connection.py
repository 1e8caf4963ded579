"""One side of a teleport's conversation, without I/O.

    connection = Connection(Role.TARGET)
    while (event := connection.next_event()) is NEED_DATA:
        connection.receive_data(read_exactly(connection.bytes_wanted()))

`next_event` gives a message, NEED_DATA, or CLOSED once the session is over. After a PAGES message `bulk_pending` raw
bytes belong to guest RAM: the I/O layer receives them straight into place and reports them with `bulk_received`;
bytes that were already fed in come out of `take_bulk`. The other way round `send` of a PAGES message owes
`bulk_owed` bytes, reported with `bulk_sent`.

The only error that received bytes can cause is RemoteProtocolError, and after it the connection reads nothing more;
`send` raises LocalProtocolError for what the protocol does not allow now. Not thread-safe: the caller locks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final, Literal

from vmf.errors import LocalProtocolError, RemoteProtocolError
from vmf.teleport.protocol import frames
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import last_page
from vmf.teleport.protocol.states import FINAL, LOST, SOURCE_OUTCOME, TABLE, Phase, Role, SourceOutcome


class Signal(enum.Enum):
    """What `next_event` says instead of a message."""

    NEED_DATA = "need-data"
    CLOSED = "closed"


NEED_DATA: Final = Signal.NEED_DATA
CLOSED: Final = Signal.CLOSED


class Connection:
    """Attributes:
    role: which side this is.
    phase: where the conversation stands, see `vmf.teleport.protocol.states`.
    bulk_pending: raw bytes that must arrive before the next frame.
    bulk_owed: raw bytes that must be sent before the next frame.
    """

    def __init__(self, role: Role, may_send: Callable[[type[m.Message]], bool] | None = None) -> None:
        """`may_send`: what this side's custody of the machine allows, see `vmf.teleport.protocol.handover`."""
        self.role = role
        self._may_send = may_send or (lambda kind: True)
        self.phase = Phase.HELLO
        self.bulk_pending = 0
        self.bulk_owed = 0
        self._buffer = bytearray()
        self._header: frames.Header | None = None
        self._ram_pages: int | None = None
        self._features: frozenset[str] = frozenset()
        self._broken: RemoteProtocolError | None = None

    @property
    def closed(self) -> bool:
        """The session is over, in one way or the other."""
        return self.phase in FINAL

    @property
    def outcome(self) -> SourceOutcome:
        """What this source knows about the machine."""
        return SOURCE_OUTCOME[self.phase]

    def join(self, ram_pages: int) -> None:
        """This is an additional channel of a teleport of so much RAM, whose OFFER was on the first one."""
        self._ram_pages = ram_pages

    # Receiving

    def bytes_wanted(self) -> int:
        """How many bytes to feed in next so as to read nothing of what comes after; 0: next_event, or read bulk."""
        if self.closed or self._broken or self.bulk_pending:
            return 0
        wanted = frames.HEADER_SIZE if self._header is None else self._header.length
        return max(0, wanted - len(self._buffer))

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the other side, however they were cut."""
        if not self.closed and self._broken is None:
            self._buffer += data

    def next_event(self) -> m.Message | Literal[Signal.NEED_DATA, Signal.CLOSED]:
        """Raises RemoteProtocolError, again each time once it did."""
        if self._broken is not None:
            raise self._broken
        if self.closed:
            return CLOSED
        try:
            return self._next_message()
        except RemoteProtocolError as error:
            self._broken = error
            self._buffer.clear()
            raise

    def _next_message(self) -> m.Message | Literal[Signal.NEED_DATA]:
        if self.bulk_pending:
            return NEED_DATA
        if self._header is None:
            if len(self._buffer) < frames.HEADER_SIZE:
                # Rubbish is refused from its first byte, not when a header's worth of it has come.
                if not frames.may_begin(bytes(self._buffer[:4])):
                    frames.decode_header(bytes(self._buffer).ljust(frames.HEADER_SIZE, b"\0"), m.LIMITS)
                return NEED_DATA
            self._header = frames.decode_header(bytes(self._buffer[: frames.HEADER_SIZE]), m.LIMITS)
            del self._buffer[: frames.HEADER_SIZE]
            self._legal(self._header.type)
        if len(self._buffer) < self._header.length:
            return NEED_DATA
        header, self._header = self._header, None
        body = bytes(self._buffer[: header.length])
        del self._buffer[: header.length]
        frames.check_body(header, body)
        message = m.decode(header.type, body)
        # Asked again: this side may have sent something since the header came.
        to = self._legal(header.type)
        self._check_context(message)
        self.phase = to
        self.bulk_pending = message.bulk
        return message

    def _legal(self, type_: int) -> Phase:
        """The phase to which a received message leads."""
        kind = m.BY_TYPE[type_]
        to = TABLE.get((self.phase, self.role.other, kind))
        if to is None or not self._exists(kind):
            raise RemoteProtocolError(
                f"the {self.role.other.value} sent {kind.word()} in phase {self.phase.name}, where it is not allowed."
            )
        return to

    def _exists(self, kind: type[m.Message]) -> bool:
        """Whether the message is one of version 1, or of a feature that WELCOME named."""
        return not kind.FEATURE or kind.FEATURE in self._features

    def _check_context(self, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            self._features = frozenset(message.features)
        elif isinstance(message, m.Offer):
            self._ram_pages = message.ram_pages
        elif isinstance(message, m.Pages | m.Zeros) and last_page(message.runs) > (self._ram_pages or 0):
            raise RemoteProtocolError("the source sent pages beyond the RAM that it offered.")

    def take_bulk(self) -> bytes:
        """Bytes fed to `receive_data` that are raw page data; they count as received."""
        data = bytes(self._buffer[: self.bulk_pending])
        del self._buffer[: len(data)]
        self.bulk_pending -= len(data)
        return data

    def bulk_received(self, count: int) -> None:
        """The I/O layer put `count` raw bytes into guest RAM."""
        if self._buffer or count > self.bulk_pending:
            raise LocalProtocolError("raw page data was read out of order.")
        self.bulk_pending -= count

    # Sending

    def can_send(self, kind: type[m.Message]) -> bool:
        """Whether `send` of such a message is legal now."""
        legal = (self.phase, self.role, kind) in TABLE and self._exists(kind)
        return legal and not self.bulk_owed and self._may_send(kind)

    def send(self, message: m.Message) -> bytes:
        """The bytes of a message; the phase moves at once, before they are on the wire."""
        kind = type(message)
        to = TABLE.get((self.phase, self.role, kind))
        if to is None:
            raise LocalProtocolError(f"the {self.role.value} cannot send {kind.word()} in phase {self.phase.name}.")
        if not self._exists(kind):
            raise LocalProtocolError(f"cannot send {kind.word()}: the target has no feature {kind.FEATURE}.")
        if not self._may_send(kind):
            raise LocalProtocolError(f"the {self.role.value} must not send {kind.word()} now.")
        if self.bulk_owed:
            raise LocalProtocolError(f"cannot send {kind.word()}: {self.bulk_owed} bytes of pages were not sent yet.")
        if isinstance(message, m.Welcome):
            self._features = frozenset(message.features)
        elif isinstance(message, m.Offer):
            self._ram_pages = message.ram_pages
        data = m.encode(message)
        self.phase = to
        self.bulk_owed = message.bulk
        return data

    def bulk_sent(self, count: int) -> None:
        """The I/O layer sent `count` raw bytes."""
        if count > self.bulk_owed:
            raise LocalProtocolError("more raw page data was sent than announced.")
        self.bulk_owed -= count

    def lost(self) -> Phase:
        """The channel is of no use any more: end the session. Returns the final phase; idempotent."""
        if not self.closed:
            self.phase = TABLE[self.phase, self.role, LOST]
        return self.phase
