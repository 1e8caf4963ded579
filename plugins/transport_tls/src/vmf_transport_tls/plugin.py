"""Entry point `tls` of the group `vmf.transport`."""

from __future__ import annotations

from vmf.plugins import hookimpl
from vmf.transport.base import Transport
from vmf_transport_tls.transport import TlsTransport

vmf_api_version = 1


@hookimpl
def vmf_transport() -> Transport:
    """The TLS transport."""
    return TlsTransport()
