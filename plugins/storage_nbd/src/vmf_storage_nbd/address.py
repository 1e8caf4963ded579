"""`nbd://host:port/export?lease=other-export`, `nbds://...` over TLS, `nbd+unix:///export?socket=/path`."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from urllib.parse import unquote, urlsplit

from attrs import frozen

from vmf import directories
from vmf.errors import ConfigError, StorageError
from vmf.storage.uri import split_options
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.stream import CONNECT_TIMEOUT_S

OPTIONS = ("lease", "socket", "tls-dir", "tls-hostname")


@frozen
class NbdAddress:
    """Where an export is.

    Attributes:
        uri: as it was written.
        host, port: of the server; "" for a Unix socket.
        export: its name.
        lease: name of the export that keeps the lease; None for the usual one.
        socket: path of a Unix socket.
        tls: it must be encrypted.
        tls_dir, tls_hostname: certificates, and the name that the server's must bear.
    """

    uri: str
    host: str
    port: int
    export: str
    lease: str | None
    socket: str
    tls: bool
    tls_dir: str
    tls_hostname: str

    @property
    def server(self) -> str:
        return self.socket or f"{self.host}:{self.port}"


def parse(uri: str) -> NbdAddress:
    """Raises ConfigError."""
    base, options = split_options(uri, OPTIONS)
    parts = urlsplit(base)
    try:
        port = parts.port or p.PORT
    except ValueError:
        raise ConfigError(f"medium {uri}: that is no TCP port.", "Write nbd://HOST:PORT/EXPORT.") from None
    over_unix = parts.scheme == "nbd+unix"
    if over_unix and not os.path.isabs(options.get("socket", "")):
        raise ConfigError(f"medium {uri}: there is no socket.", "Write nbd+unix:///EXPORT?socket=/absolute/path.")
    if not over_unix and (not parts.hostname or not base.startswith(f"{parts.scheme}://")):
        raise ConfigError(f"medium {uri}: there is no host.", f"Write {parts.scheme}://HOST:PORT/EXPORT.")
    return NbdAddress(
        uri=uri,
        host=parts.hostname or "",
        port=port,
        export=unquote(parts.path.removeprefix("/")),
        lease=options.get("lease"),
        socket=options.get("socket", "") if over_unix else "",
        tls=parts.scheme == "nbds",
        tls_dir=options.get("tls-dir", ""),
        tls_hostname=options.get("tls-hostname", ""),
    )


def connect(address: NbdAddress) -> socket.socket:
    """A connection to the server. Raises StorageError."""
    try:
        if address.socket:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.settimeout(CONNECT_TIMEOUT_S)
            try:
                made.connect(address.socket)
            except BaseException:
                made.close()
                raise
            return made
        return socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S)
    except OSError as error:
        raise StorageError(
            f"the NBD server {address.server} cannot be reached: {error.strerror or error}.",
            "Look whether it runs there, and whether the network lets us through.",
        ) from error


def tls_context(address: NbdAddress) -> tuple[ssl.SSLContext, str]:
    """What encrypts, and the name that the server's certificate must bear. Raises StorageError."""
    directory = Path(address.tls_dir) if address.tls_dir else _default_directory()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # servers on GnuTLS may not have 1.3
    ca, cert, key = (directory / name for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"))
    try:
        context.load_verify_locations(cafile=ca)
        if cert.exists():
            context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise StorageError(
            f"the certificates in {directory} cannot be used for {address.uri}: {error}.",
            "It needs ca-cert.pem, and, if the server asks for it, client-cert.pem and client-key.pem; "
            "`vmf tls --help` says how to make them, the option tls-dir= names another directory.",
        ) from error
    return context, address.tls_hostname or address.host


def _default_directory() -> Path:
    """Where `vmf tls` puts them."""
    return (directories.chosen_home() or directories.config_directory()) / "tls"
