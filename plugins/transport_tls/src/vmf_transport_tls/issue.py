"""A private certificate authority for teleports: one key that vouches for hosts, and their certificates.

Keys are on the curve P-256, which every TLS 1.3 library speaks. A server certificate cannot be shown by a source, nor
a client certificate by a target (extended key usage): who may only send machines cannot pose as a target.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmf.errors import ConfigError
from vmf.machine.home import private_directory, write_atomically
from vmf_transport_tls.files import CA_CERT, CA_KEY, Role, cert_file, key_file, read_certificate

CA_DAYS = 3650
HOST_DAYS = 825
_BACKDATE = datetime.timedelta(hours=1)
"""For hosts whose clocks are a little behind."""
_PURPOSE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
_DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")


def check_host(name: str) -> None:
    """Raise ConfigError unless it is a host name or an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is neither a host name nor an IP address.", "Give the name that sources connect to."
            ) from None


def own_names() -> list[str]:
    """What this host is called, by itself and on loopback."""
    names = [socket.gethostname(), socket.getfqdn()]
    good = [name for name in dict.fromkeys(names) if _DNS_NAME.fullmatch(name)]
    return list(dict.fromkeys([*good, "localhost", "127.0.0.1", "::1"]))


def make_ca(directory: Path, *, force: bool = False, days: int = CA_DAYS) -> None:
    """Make `ca-cert.pem` and `ca-key.pem`. Raises ConfigError when there is one already, unless `force`."""
    _refuse_existing([directory / CA_CERT, directory / CA_KEY], force)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmf teleport CA")])
    public = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(public, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    private_directory(directory)
    # The key first: a crash in between leaves a key without a certificate, which --force replaces.
    write_atomically(directory / CA_KEY, _key_text(key))
    write_atomically(directory / CA_CERT, _cert_text(certificate))


def issue(
    authority: Path,
    directory: Path,
    names: Sequence[str],
    roles: Sequence[Role] = ("server", "client"),
    *,
    force: bool = False,
    days: int = HOST_DAYS,
) -> list[Path]:
    """Issue a host's certificates into `directory`, with the CA's certificate; the files that were written.

    Args:
        authority: directory with `ca-cert.pem` and `ca-key.pem`.
        names: host names and IP addresses of the host, the first one is the common name.
        days: how long they are valid; never longer than the CA.

    Raises ConfigError: a name that cannot be one, files that exist (unless `force`), no or another CA there.
    """
    for name in names:
        check_host(name)
    wanted = [directory / file for role in roles for file in (cert_file(role), key_file(role))]
    _refuse_existing(wanted, force)
    ca, ca_key = _load_ca(authority)
    copy = directory / CA_CERT
    if copy.exists() and copy.read_bytes() != (authority / CA_CERT).read_bytes() and not force:
        raise ConfigError(f"{copy} is of another CA.", "Choose another directory (--out), or --force to replace it.")
    private_directory(directory)
    written = []
    if directory != authority:
        write_atomically(copy, (authority / CA_CERT).read_text())
        written.append(copy)
    for role in roles:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        certificate = (
            _builder(subject, ca.subject, key.public_key(), days, ca.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([_PURPOSE[role]]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        write_atomically(directory / key_file(role), _key_text(key))
        write_atomically(directory / cert_file(role), _cert_text(certificate))
        written += [directory / cert_file(role), directory / key_file(role)]
    return written


def _refuse_existing(paths: Sequence[Path], force: bool) -> None:
    if not force:
        for path in paths:
            if path.exists():
                raise ConfigError(f"{path} is there already.", "Give --force to replace it, or another directory.")


def _load_ca(directory: Path) -> tuple[Any, ec.EllipticCurvePrivateKey]:
    cert, key = directory / CA_CERT, directory / CA_KEY
    if not key.exists() or not cert.exists():
        missing = key if cert.exists() else cert
        raise ConfigError(
            f"there is no CA in {directory} ({missing.name} is missing).",
            "Make one with `vmf tls init`, or issue certificates on the host that has it.",
        )
    certificate = read_certificate(cert)
    try:
        loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key} cannot be read as a key.", "It must be a PEM file without passphrase.") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != certificate.public_key():
        raise ConfigError(f"{key} is not the key of {cert}.", "Keep the two files that `vmf tls init` made together.")
    return certificate, loaded


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: Any, days: int, latest: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _BACKDATE)
        .not_valid_after(end if latest is None else min(end, latest))
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_text(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _cert_text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
