"""Entry point `tcp` of the group `vmf.transport`."""

from __future__ import annotations

from vmf.plugins import hookimpl
from vmf.transport.base import Transport
from vmf_transport_tcp.transport import TcpTransport

vmf_api_version = 1


@hookimpl
def vmf_transport() -> Transport:
    """The TCP transport."""
    return TcpTransport()
