"""Listening and connecting: `tcp:host:port` with names, IPv4 and IPv6 addresses."""

from __future__ import annotations

from vmf.errors import TransportError
from vmf.transport import sockets
from vmf.transport.base import Address, Channel, Listener, Transport
from vmf_transport_tcp.channel import TcpChannel

SCHEME = "tcp"


def _check_options(address: Address) -> None:
    """Settings that promise protection must not be ignored."""
    if address.options:
        names = ", ".join(sorted(address.options))
        raise TransportError(
            f"the tcp transport neither encrypts nor knows who is there; it has no {names}.",
            "Choose the tls transport, or drop the setting.",
        )


class TcpListener(Listener):
    """Waits for connections."""

    def __init__(self, acceptor: sockets.Acceptor) -> None:
        """Takes it over."""
        self._acceptor = acceptor
        self.address = acceptor.address

    @property
    def addresses(self) -> tuple[Address, ...]:
        return self._acceptor.addresses

    def accept(self, timeout: float | None) -> Channel:
        while True:
            connection, peer = self._acceptor.accept(timeout)
            try:
                local = sockets.address_of(SCHEME, connection.getsockname())
                return TcpChannel(connection, local, sockets.address_of(SCHEME, peer))
            except OSError:
                connection.close()  # the peer is gone already

    def shutdown(self) -> None:
        self._acceptor.shutdown()

    def close(self) -> None:
        self._acceptor.close()


class TcpTransport(Transport):
    """Plain TCP: not encrypted, not authenticated."""

    scheme = SCHEME

    def listen(self, address: Address) -> Listener:
        _check_options(address)
        return TcpListener(sockets.listen(address))

    def connect(self, address: Address, timeout: float) -> Channel:
        _check_options(address)
        connection = sockets.connect(address, timeout)
        try:
            local = sockets.address_of(SCHEME, connection.getsockname())
            return TcpChannel(connection, local, sockets.address_of(SCHEME, connection.getpeername()))
        except BaseException:
            connection.close()
            raise
