"""`nbd://host:port/export?lease=other-export`, `nbds://...` over TLS, `nbd+unix:///export?socket=/path`."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from vmf import directories
from vmf import unix_sockets as unix
from vmf.errors import ConfigError, StorageError
from vmf.storage.uri import decode, split_options
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.stream import CONNECT_TIMEOUT_S

OPTIONS = {
    "nbd": ("lease", "format"),
    "nbds": ("lease", "format", "tls-dir", "tls-hostname"),
    "nbd+unix": ("lease", "format", "socket"),
}
"""By scheme."""
MAX_NAME = 4096
"""Bytes of an export's name, in the protocol."""


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
        declared_raw: that the content looks like an image of another format is meant so.
        tls_dir, tls_hostname: certificates, and the name that the server's must bear.
    """

    uri: str
    host: str
    port: int
    export: str
    lease: str | None
    socket: str
    tls: bool
    declared_raw: bool
    tls_dir: str
    tls_hostname: str

    @property
    def server(self) -> str:
        if self.socket:
            return self.socket
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(uri: str) -> NbdAddress:
    """Raises ConfigError."""
    scheme = uri.partition(":")[0]
    over_unix = scheme == "nbd+unix"
    base, options = split_options(uri, OPTIONS.get(scheme, ()))
    where = "nbd+unix:///EXPORT?socket=/absolute/path" if over_unix else f"{scheme}://HOST:PORT/EXPORT"

    def wrong(what: str, remedy: str = f"Write {where}.") -> ConfigError:
        return ConfigError(f"medium {uri}: {what}.", remedy)

    if not base.startswith(f"{scheme}://"):
        raise wrong(f"there is no // behind {scheme}:")
    authority, _, path = base[len(scheme) + 3 :].partition("/")
    host, port = ("", p.PORT) if over_unix else _server(uri, authority, wrong)
    export = decode(uri, path)
    for name in (host, export, options.get("lease", "")):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise wrong("its names are not UTF-8, and NBD knows no others") from None
    if over_unix and authority:
        raise wrong(f"{authority} stands where a host would, and a Unix socket has none")
    if over_unix and not os.path.isabs(options.get("socket", "")):
        raise wrong("there is no socket")
    if len(export.encode()) > MAX_NAME or len(options.get("lease", "").encode()) > MAX_NAME:
        raise wrong(f"an export's name has at most {MAX_NAME} bytes")
    if options.get("format", "raw") != "raw":
        raise wrong("what the server exports is a raw disk", "Leave format= out; the server knows the image's format.")
    if options.get("lease") == export:
        raise wrong(
            "the lease would overwrite the beginning of the disk, as both are the same export",
            "Name an export for the lease that nothing else uses.",
        )
    return NbdAddress(
        uri=uri,
        host=host,
        port=port,
        export=export,
        lease=options.get("lease"),
        socket=options.get("socket", ""),
        tls=scheme == "nbds",
        declared_raw="format" in options,
        tls_dir=options.get("tls-dir", ""),
        tls_hostname=options.get("tls-hostname", ""),
    )


def _server(uri: str, authority: str, wrong: Callable[..., ConfigError]) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT`, `[ADDRESS]` and `[ADDRESS]:PORT`. Raises ConfigError."""
    found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([^:]*))?", authority)
    if found is None:
        raise wrong(f"{authority} is no host and port", "Write an IPv6 address in brackets: nbd://[::1]:10809/EXPORT.")
    host = decode(uri, found[1] or found[2] or "")
    if not host:
        raise wrong("there is no host")
    if "@" in host:
        raise wrong(f"{host} names a user, and NBD knows none")
    if found[1] is not None and not _is_ipv6(host):
        raise wrong(f"[{host}] is no IPv6 address")
    text = found[3]
    if text is None:
        return host, p.PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 1 << 16:
        raise wrong(f"{text!r} is no TCP port")
    return host, int(text)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def connect(address: NbdAddress) -> socket.socket:
    """A connection to the server. Raises StorageError."""
    remedy = "Look whether it runs there, and whether the network lets us through."
    try:
        if address.socket:
            remedy = "Look whether the server runs on this host, with its socket at that path, and who may use it."
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.settimeout(CONNECT_TIMEOUT_S)
            try:
                with unix.to_connect(address.socket) as path:
                    made.connect(path)
            except BaseException:
                made.close()
                raise
            return made
        return socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S)
    except UnicodeError:
        raise ConfigError(f"medium {address.uri}: {address.host} is no host name.", "Check its spelling.") from None
    except OSError as error:
        raise StorageError(
            f"the NBD server {address.server} cannot be reached: {error.strerror or error}.", remedy
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
