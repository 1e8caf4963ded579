"""Connections of the fault proxy: plain ones, and ones inside TLS.

A proxy that does harm at a message must see messages, and TLS hides them. So for `tls` the proxy ends both connections
itself, with certificates that both sides trust, and what it passes on is encrypted anew. The harm is then done to the
encrypted bytes: `encode` makes the records of a message, and whoever calls it may send them, or half of them, or twice,
or none. The two `vmf` processes talk to nothing but live TLS, and see what an attacker or a broken line can do to it.
"""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

CHUNK = 1 << 18
_VERDICT_SIZE = 3
"""Bytes. A target says that first, inside TLS (`vmf_transport_tls.handshake`); in a welcome no reason follows."""


class PlainWire:
    """A TCP connection as it is."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the socket over."""
        self.socket = connection

    def recv(self, count: int) -> bytes:
        """At most `count` bytes; none at the end. Raises OSError."""
        return self.socket.recv(count)

    def wait(self, seconds: float) -> bool:
        """Whether something comes within that time, or the end."""
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        finally:
            self.socket.settimeout(None)
        return True

    def encode(self, data: bytes) -> bytes:
        """What goes to the socket for `data`; to be asked for in the order of the stream."""
        return data

    def send(self, data: bytes) -> None:
        self.socket.sendall(self.encode(data))


class TlsWire(PlainWire):
    """TLS 1.3 on it, as either side; one thread receives, another sends."""

    def __init__(self, connection: socket.socket, directory: Path, *, server: bool) -> None:
        """Shakes hands with the certificates in `directory`. Raises OSError (ssl.SSLError)."""
        super().__init__(connection)
        role = "server" if server else "client"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if server:
            context.num_tickets = 0
        else:
            context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(directory / f"{role}-cert.pem", directory / f"{role}-key.pem")
        context.load_verify_locations(directory / "ca-cert.pem")
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._lock = threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._push()
                self._pull()
            else:
                self._push()
                break

    def _push(self) -> None:
        if data := self._outgoing.read():
            self.socket.sendall(data)

    def _pull(self) -> None:
        """Raises EOFError at the end."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise EOFError
        with self._lock:
            self._incoming.write(data)

    def recv(self, count: int) -> bytes:
        while True:
            with self._lock:
                try:
                    return self._tls.read(count)
                except ssl.SSLWantReadError:
                    pass
            try:
                self._pull()
            except EOFError:
                return b""

    def wait(self, seconds: float) -> bool:
        with self._lock:
            there = self._incoming.pending or self._tls.pending()
        return bool(there) or super().wait(seconds)

    def encode(self, data: bytes) -> bytes:
        view = memoryview(data)
        with self._lock:
            while view:
                view = view[self._tls.write(view) :]
            return self._outgoing.read()


Wire = PlainWire


def wires(near: socket.socket, far: socket.socket, tls: Path | None) -> tuple[Wire, Wire]:
    """Both connections of a proxy, to the source and to the target; `tls`: a directory of certificates, see above."""
    if tls is None:
        return PlainWire(near), PlainWire(far)
    inner, outer = TlsWire(near, tls, server=True), TlsWire(far, tls, server=False)
    verdict = b""
    while len(verdict) < _VERDICT_SIZE:
        more = outer.recv(_VERDICT_SIZE - len(verdict))
        if not more:
            raise EOFError
        verdict += more
    inner.send(verdict)
    return inner, outer
