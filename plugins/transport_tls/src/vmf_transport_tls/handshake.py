"""Shaking hands, with a time limit for the whole of it, and saying clearly on both sides why it failed.

In TLS 1.3 a client has finished before the server has judged its certificate. So the server's first encrypted bytes
are a verdict: one byte (0 welcome, 1 refused), two bytes of length, and a reason in UTF-8. Only after that is a
connection made for its caller; and a refused source learns both names.

Where both ends can seal RAM beside TLS (`vmf_transport_tls.sealed`; agreed by ALPN), the source's first encrypted bytes
are its share of the keys, and a welcome has the target's behind it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable

from attrs import evolve

from vmf.errors import TransportClosed, TransportError, TransportRefused, TransportTimeout
from vmf.transport.base import Address
from vmf_transport_tls import sealed
from vmf_transport_tls.channel import Stream, undecipherable
from vmf_transport_tls.files import Credentials, is_allowed, peer_names

_VERDICT = struct.Struct("!BH")
_WELCOME, _REFUSED = 0, 1
MAX_REASON = 1000
_READ = 65536
_LINGER_S = 0.5
_RECORD_HEADER = 5
"""Bytes. A client says its first record at once; who says less so far is slow, or no client."""
_HANDSHAKE_RECORD = 0x16
"""First byte of whatever a TLS client says first (RFC 8446, 5.1)."""
_NOT_TLS = b"\x15\x03\x03\x00\x02\x02\x46" + b"This port speaks TLS; vmf: controlvm NAME teleport --transport tls\r\n"
"""The alert "protocol version", and the same for people; long enough for vmf over plain TCP to recognise it."""

# Codes of X509_verify_cert(3) -> what is wrong, and what to do. {whose} is "the source's" or "the target's".
_UNTRUSTED = ("was not issued by an authority that is trusted here", "Both hosts need certificates of the same CA.")
_VERIFY: dict[int, tuple[str, str]] = {
    9: ("is not valid yet", "Compare the clocks of both hosts."),
    10: ("has expired", "Issue that host a new one (`vmf tls issue HOST --force`)."),
    18: _UNTRUSTED,
    19: _UNTRUSTED,
    20: _UNTRUSTED,
    21: _UNTRUSTED,
    7: _UNTRUSTED,
    26: ("was issued for another purpose", "A target shows a server certificate, a source a client certificate."),
}
_ANEW = "Issue this host a new one (`vmf tls issue HOST --force`)."
# Words in an alert that the other side sent -> the same, of our own certificate.
_ALERTS: tuple[tuple[str, str, str], ...] = (
    ("UNKNOWN_CA", "it was not issued by an authority that is trusted there", _UNTRUSTED[1]),
    ("CERTIFICATE_EXPIRED", "it has expired, or is not valid yet, there", "Compare the clocks; issue a new one."),
    ("CERTIFICATE_REQUIRED", "there was none", "Make one (`vmf tls issue HOST`)."),
    ("HANDSHAKE_FAILURE", "there was none, or none of a kind that it accepts", "Make one (`vmf tls issue HOST`)."),
    ("BAD_CERTIFICATE", "it is damaged, or of a kind that is refused there", _ANEW),
    ("CERTIFICATE_UNKNOWN", "it is damaged, or of a kind that is refused there", _ANEW),
    ("UNSUPPORTED_CERTIFICATE", "it was issued for another purpose", _VERIFY[26][1]),
)


class _Conversation:
    """A TLS connection over a socket until a deadline (time.monotonic)."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        deadline: float,
        server_hostname: str | None,
        greeted: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = connection
        self._deadline = deadline
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server_hostname is None, server_hostname=server_hostname)
        self.stream = Stream(tls, incoming, outgoing)
        self._greeted = greeted
        self.first = b""
        """The first bytes that came."""

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def flush(self) -> None:
        if data := self.stream.outgoing.read():
            self._limit()
            self._socket.sendall(data)

    def run(self, step: Callable[[], None]) -> None:
        """Repeat a step of TLS until it needs nothing more from the other side; alerts are sent, too."""
        while True:
            try:
                step()
            except ssl.SSLWantReadError:
                self.flush()
            except ssl.SSLError:
                self.try_flush()
                raise
            else:
                self.flush()
                return
            self._limit()
            data = self._socket.recv(_READ)
            if not data:
                raise EOFError
            if not self.first and len(data) > _RECORD_HEADER:
                self._greeted()
            self.first = self.first or data[:8]
            if self.stream.tls.server_side and self.first[0] != _HANDSHAKE_RECORD:
                self._socket.sendall(_NOT_TLS)
                raise _Plaintext
            self.stream.incoming.write(data)

    def try_flush(self) -> None:
        try:
            self.flush()
        except OSError:
            pass  # gone already

    def read(self, size: int) -> bytes:
        data = bytearray()

        def step() -> None:
            while len(data) < size:
                data.extend(self.stream.tls.read(size - len(data)))

        self.run(step)
        return bytes(data)

    def write(self, data: bytes) -> None:
        def step() -> None:
            self.stream.tls.write(data)

        self.run(step)


class _Plaintext(Exception):
    pass


def clean(text: str, limit: int = MAX_REASON) -> str:
    """What came from the other side, made harmless: one printable line."""
    return "".join(char if char.isprintable() else "?" for char in text)[:limit]


def quoted(names: tuple[str, ...]) -> str:
    """Names of a certificate for a message."""
    return clean(", ".join(names[:8]) or "(no name)", 300)


def serve(
    connection: socket.socket,
    remote: Address,
    credentials: Credentials,
    allow: tuple[str, ...],
    timeout: float,
    greeted: Callable[[], None] = lambda: None,
) -> tuple[Stream, tuple[str, ...]]:
    """The target's side: the stream and the source's names; `greeted` is called when the source has begun to speak TLS.

    Raises TransportRefused with the reason, one line.
    """
    talk = _Conversation(connection, credentials.context, time.monotonic() + timeout, None, greeted)
    try:
        talk.run(talk.stream.tls.do_handshake)
        names = peer_names(talk.stream.tls.getpeercert())
        if not is_allowed(names, allow):
            own = quoted(credentials.names)
            reason = f"the target ({own}) does not allow teleports from {quoted(names)}"
            body = reason.encode()[:MAX_REASON]
            talk.write(_VERDICT.pack(_REFUSED, len(body)) + body)
            _linger(connection)
            raise TransportRefused(
                f"{remote} was refused: the source's certificate is for {quoted(names)}, "
                f"and this target ({own}) allows only {quoted(allow)}.",
                "Add the name to the machine's allow list (`vmf modifyvm NAME --teleporter-allow`), if it may.",
            )
        shares = None
        body = b""
        if talk.stream.tls.selected_alpn_protocol() == sealed.ALPN:
            body = sealed.new_share()
            shares = (talk.read(sealed.SHARE_SIZE), body)
        talk.write(_VERDICT.pack(_WELCOME, len(body)) + body)
        return evolve(talk.stream, shares=shares), names
    except _Plaintext:
        _linger(connection)
        raise TransportRefused(
            f"{remote} was refused: it does not speak TLS.", "The source must use --transport tls."
        ) from None
    except TimeoutError:
        raise TransportRefused(f"{remote} was dropped: it did not shake hands within {timeout:g} s.") from None
    except ssl.SSLError as error:
        _linger(connection)
        reason, remedy = _explain(error, "source")
        raise TransportRefused(f"{remote} was refused: {reason}.", remedy) from error
    except (EOFError, OSError):
        raise TransportRefused(f"{remote} broke the connection before it had shaken hands.") from None


def call(
    connection: socket.socket, address: Address, credentials: Credentials, hostname: str, timeout: float
) -> tuple[Stream, tuple[str, ...]]:
    """The source's side: the stream and the target's names. Raises TransportError and its subclasses."""
    talk = _Conversation(connection, credentials.context, time.monotonic() + timeout, hostname)
    try:
        talk.run(talk.stream.tls.do_handshake)
        names = peer_names(talk.stream.tls.getpeercert())
        share = sealed.new_share() if talk.stream.tls.selected_alpn_protocol() == sealed.ALPN else b""
        if share:
            talk.write(share)
        verdict, length = _VERDICT.unpack(talk.read(_VERDICT.size))
        if verdict == _WELCOME and length == len(share):
            return evolve(talk.stream, shares=(share, talk.read(length)) if share else None), names
        if verdict != _REFUSED or length > MAX_REASON:
            raise TransportError(
                f"{address} speaks TLS, but is no vmf machine.", "Check that host and port are those of the target."
            )
        reason = clean(talk.read(length).decode("utf-8", "replace"))
    except TimeoutError:
        raise TransportTimeout(
            f"{address} accepted the connection, but did not shake hands within {timeout:g} s.",
            "Check that the target's teleporter uses the tls transport, and that it is not overloaded.",
        ) from None
    except ssl.SSLError as error:
        reason, remedy = _explain(error, "target", hostname)
        raise TransportError(f"no encrypted connection to {address}: {reason}.", remedy) from error
    except (EOFError, OSError) as error:
        detail = getattr(error, "strerror", None) or "it closed the connection"
        raise TransportClosed(
            f"{address} broke the connection before it had shaken hands: {detail}.",
            "Check that the target's teleporter uses the tls transport (its messages may say more).",
        ) from error
    raise TransportRefused(
        f"{address} refused: {reason}.",
        "Let the target's owner allow this name (`vmf modifyvm NAME --teleporter-allow`), or use another one.",
    )


def _explain(error: ssl.SSLError, who: str, hostname: str = "") -> tuple[str, str]:
    """(reason, remedy) of a failed handshake with the `who` (source or target)."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return (
                f"the target's certificate is not for {clean(hostname, 255)!r}",
                "Use a name that is in it (`vmf tls show` there lists them), or give that name with --tls-hostname.",
            )
        what, remedy = _VERIFY.get(
            error.verify_code, (f"is refused ({error.verify_message})", "Issue a new certificate.")
        )
        return f"the {who}'s certificate {what}", remedy
    reason = error.reason or ""
    if "NO_SHARED" in reason or reason == "UNSUPPORTED_PROTOCOL" or "PROTOCOL_VERSION" in reason:
        return (
            f"the {who} does not speak TLS 1.3 (or wants no cipher that we have)",
            "Nothing older is accepted; update its TLS library.",
        )
    if reason in ("PEER_DID_NOT_RETURN_A_CERTIFICATE",):
        return f"the {who} showed no certificate", "Make it one (`vmf tls issue HOST`)."
    if undecipherable(reason):
        return (
            f"what the {who} sent was not made for this connection, but altered on the way, or recorded and said again",
            "If that was your own teleport, try it again, and see what lies between the two hosts.",
        )
    if who == "source" and "ALERT" in reason and ("BAD_CERTIFICATE" in reason or "CERTIFICATE_UNKNOWN" in reason):
        return (
            "the source does not accept our certificate: it is not for the name to which the source connects",
            "`vmf tls show` lists the names in it; the source gives one of them, with --host or --tls-hostname.",
        )
    for word, what, remedy in _ALERTS:
        if "ALERT" in reason and word in reason:
            return f"the {who} does not accept our certificate: {what}", remedy
    if who == "target" and reason in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "UNEXPECTED_MESSAGE"):
        return (
            "the target does not speak TLS",
            "Let it wait with `vmf modifyvm NAME --teleporter-transport tls`, or use --transport tcp.",
        )
    return (
        f"the TLS handshake with the {who} failed ({clean(reason.replace('_', ' ').lower() or str(error), 200)})",
        "",
    )


def _linger(connection: socket.socket) -> None:
    """Let the other side read our last word: closing a socket with unread data would destroy it."""
    deadline = time.monotonic() + _LINGER_S
    try:
        connection.shutdown(socket.SHUT_WR)
        for _ in range(64):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            connection.settimeout(left)
            if not connection.recv(_READ):
                return
    except OSError:
        pass  # gone, or silent
