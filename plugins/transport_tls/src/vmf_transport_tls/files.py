"""The certificates of one host, in a directory laid out as QEMU has it:

    ca-cert.pem                        who is trusted: certificates of the authorities
    server-cert.pem, server-key.pem    shown by a target
    client-cert.pem, client-key.pem    shown by a source
    ca-key.pem                         only where certificates are issued

Only what is in this directory is trusted, never the system's list of authorities: a teleport partner is one for whom
somebody issued a certificate for this purpose.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from vmf import directories
from vmf.errors import TransportError
from vmf.reading import open_regular
from vmf_transport_tls import sealed
from vmf_transport_tls.ciphers import prefer_fast

Role = Literal["server", "client"]

CA_CERT, CA_KEY = "ca-cert.pem", "ca-key.pem"
WARN_DAYS = 30
"""A certificate that expires within so many days is told of."""


@frozen
class Credentials:
    """What one side needs for a handshake.

    Attributes:
        context: TLS 1.3 only, certificates required of the other side.
        names: in the own certificate.
        notices: warnings, one line each.
        end_point: hash of the own certificate, see `end_point_of`.
    """

    context: ssl.SSLContext
    names: tuple[str, ...]
    notices: tuple[str, ...]
    end_point: bytes = b""


def cert_file(role: Role) -> str:
    return f"{role}-cert.pem"


def key_file(role: Role) -> str:
    return f"{role}-key.pem"


def default_directory() -> Path:
    """`VMF_HOME/tls`, else `tls` in the user's configuration directory of vmf."""
    return (directories.chosen_home() or directories.config_directory()) / "tls"


def directory_of(options: Mapping[str, Any]) -> Path:
    """The directory that an address's options name, or the default one."""
    chosen = options.get("tls_dir")
    return Path(str(chosen)) if chosen else default_directory()


def load(directory: Path, role: Role) -> Credentials:
    """Read and check a host's own certificate for `role`. Raises TransportError naming file, reason and remedy."""
    cert, key, ca = directory / cert_file(role), directory / key_file(role), directory / CA_CERT
    for path in (ca, cert, key):
        _check_readable(path, directory, role)
    for path in (directory, ca, cert):
        _check_unchangeable(path)
    _check_private(key)
    certificate = read_certificate(cert)
    notices = check_validity(certificate, str(cert))
    authority = read_certificate(ca)
    notices += check_validity(authority, str(ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if role == "server":
        context.num_tickets = 0  # no session is ever resumed, so none can be replayed
    else:
        context.hostname_checks_common_name = False
    context.verify_mode = ssl.CERT_REQUIRED
    prefer_fast(context)
    if sealed.available():
        context.set_alpn_protocols([sealed.ALPN])
    try:
        context.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        raise TransportError(
            f"{ca} holds no certificate that can be used.", "Copy it anew from where the CA is."
        ) from error
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise _key_error(error, cert, key) from error
    return Credentials(context, certificate_names(certificate), notices, end_point_of(certificate))


def end_point_of(certificate: Any) -> bytes:
    """The data of the channel binding `tls-server-end-point` (RFC 5929, section 4): the certificate's hash.

    Where the RFC leaves it open (a signature without a hash function of its own, like Ed25519) it is SHA-256.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        algorithm = None
    if algorithm is None or algorithm.name in ("md5", "sha1"):
        algorithm = hashes.SHA256()
    digest = hashes.Hash(algorithm)
    digest.update(certificate.public_bytes(Encoding.DER))
    return digest.finalize()


class _Encrypted(ValueError):
    pass


def _no_passphrase() -> str:
    raise _Encrypted


def _key_error(error: Exception, cert: Path, key: Path) -> TransportError:
    if isinstance(error, _Encrypted):
        return TransportError(
            f"{key} is protected by a passphrase.",
            "vmf reads keys unattended: store it without one (openssl pkey -in FILE -out FILE), mode 0600.",
        )
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return TransportError(f"{key} is not the key of {cert}.", "Copy both files from the same place.")
    return TransportError(
        f"{cert} and {key} cannot be used as a certificate and its key.",
        "Both must be complete PEM files; make them with `vmf tls issue`.",
    )


def _check_readable(path: Path, directory: Path, role: Role) -> None:
    reason = ""
    if not directory.is_dir():
        reason = f"there is no directory {directory}"
    elif not path.is_file():
        reason = f"{path} is missing"
    elif not os.access(path, os.R_OK):
        reason = f"you may not read {path}"
    if reason:
        where = "--tls-dir" if role == "client" else "`vmf modifyvm NAME --teleporter-tls-dir DIR`"
        raise TransportError(
            f"this host has no usable certificates for teleports over TLS: {reason}.",
            "Make them with `vmf tls init` here, or with `vmf tls issue` where the CA is, "
            f"or name their directory ({where}).",
        )


def _check_unchangeable(path: Path) -> None:
    """Whoever can replace the CA's certificate decides who is trusted."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise TransportError(
            f"{path} can be changed by every user of this host (mode {mode:04o}).",
            f"Do `chmod o-w {path}`, and see that what is in it is still what you put there (`vmf tls show`).",
        )


def _check_private(key: Path) -> None:
    status = key.stat()
    if not stat.S_ISREG(status.st_mode):  # OpenSSL would wait for the other end of a pipe
        raise TransportError(f"{key} is not a file.", "Put the key's PEM file there, mode 0600.")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise TransportError(
            f"{key} can be read or changed by other users (mode {stat.S_IMODE(status.st_mode):04o}).",
            f"Do `chmod 600 {key}`, and if somebody else could have read it, issue a new certificate.",
        )
    if status.st_uid not in (0, os.geteuid()):
        raise TransportError(f"{key} belongs to user {status.st_uid}.", "Make a copy of your own, mode 0600.")


def read_certificate(path: Path) -> Any:
    """The (first) certificate of a PEM file, a `cryptography.x509.Certificate`. Raises TransportError."""
    from cryptography import x509

    try:
        with open_regular(path) as file:
            return _looked_through(x509.load_pem_x509_certificate(file.read()))
    except (OSError, ValueError) as error:
        raise TransportError(
            f"{path} cannot be read as a certificate.", "It must be a PEM file; make it with `vmf tls issue`."
        ) from error


def _looked_through(certificate: Any) -> Any:
    """The certificate, whose parts are decoded only when somebody looks. Raises ValueError when one cannot be."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        for name in ("version", "subject", "issuer", "extensions", "not_valid_before_utc", "not_valid_after_utc"):
            getattr(certificate, name)
        certificate.public_key()
    except (
        UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType, TypeError,
    ) as error:  # fmt: skip
        raise ValueError(str(error)) from error
    return certificate


def parse_certificate(der: bytes) -> Any:
    """The certificate that the other side showed, and that the TLS library has accepted. Raises TransportError."""
    from cryptography import x509

    try:
        return _looked_through(x509.load_der_x509_certificate(der))
    except ValueError as error:
        raise TransportError(
            "the target's certificate cannot be read.", "Issue it a new one (`vmf tls issue HOST --force`)."
        ) from error


def days_left(certificate: Any) -> int:
    """Whole days until it expires; negative afterwards."""
    left: datetime.timedelta = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days


def check_validity(certificate: Any, what: str) -> tuple[str, ...]:
    """Warnings about the own certificate. Raises TransportError when it is expired or not yet valid."""
    now = datetime.datetime.now(datetime.UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        raise TransportError(
            f"the certificate {what} is not valid before {start:%Y-%m-%d %H:%M} UTC.",
            "Check this host's clock, or issue a new certificate.",
        )
    if now > end:
        raise TransportError(
            f"the certificate {what} expired on {end:%Y-%m-%d}.",
            "Issue a new one where the CA is (`vmf tls issue HOST --force`).",
        )
    days = days_left(certificate)
    if days >= WARN_DAYS:
        return ()
    in_days = "today" if days == 0 else f"in {days} day{'s' if days != 1 else ''}"
    return (
        f"the certificate {what} expires {in_days} ({end:%Y-%m-%d}): issue a new one (`vmf tls issue HOST --force`).",
    )


def certificate_names(certificate: Any) -> tuple[str, ...]:
    """The names in a certificate: DNS names and addresses, and the common name."""
    from cryptography import x509

    names: list[str] = []
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += extension.get_values_for_type(x509.DNSName)
        names += [str(each) for each in extension.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        pass
    names += [str(each.value) for each in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    return tuple(dict.fromkeys(names))


def peer_names(peer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The same of `SSLObject.getpeercert()`."""
    if not peer:
        return ()
    names = [
        _plain(value) if kind == "IP Address" else value
        for kind, value in peer.get("subjectAltName", ())
        if kind in ("DNS", "IP Address")
    ]
    names += [value for part in peer.get("subject", ()) for key, value in part if key == "commonName"]
    return tuple(dict.fromkeys(str(name) for name in names))


def is_allowed(names: tuple[str, ...], allow: tuple[str, ...]) -> bool:
    """Whether one of the names is in the list (an empty one allows everybody whom the CA knows)."""
    return not allow or bool({_plain(name) for name in names} & {_plain(name) for name in allow})


def _plain(name: str) -> str:
    """A name or an address in the one form in which they are compared (::1 has several)."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")
