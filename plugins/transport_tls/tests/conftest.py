"""Certificates for the tests, issued by trustme (not by the code under test)."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from vmf.transport.base import Address
from vmf_transport_tls.transport import TlsListener, TlsTransport

Maker = Callable[..., Path]


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def make(tmp_path: Path, authority: trustme.CA) -> Maker:
    """make(directory, names...) writes a directory of certificates in QEMU's layout."""

    def write(
        name: str,
        *names: str,
        ca: trustme.CA = authority,
        trusted: trustme.CA | None = None,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(mode=0o700)
        for role in ("server", "client"):
            issued = ca.issue_cert(*(names or ("localhost", "127.0.0.1")), not_before=not_before, not_after=not_after)
            issued.private_key_pem.write_to_path(directory / f"{role}-key.pem")
            os.chmod(directory / f"{role}-key.pem", 0o600)
            issued.cert_chain_pems[0].write_to_path(directory / f"{role}-cert.pem")
        (trusted or ca).cert_pem.write_to_path(directory / "ca-cert.pem")
        return directory

    return write


@pytest.fixture
def certs(make: Maker) -> Path:
    """A good directory for localhost."""
    return make("good")


@pytest.fixture
def listening(certs: Path) -> Iterator[Callable[..., TlsListener]]:
    """listening(**options) starts a target's listener on loopback."""
    made: list[Any] = []

    def start(**options: Any) -> TlsListener:
        listener = TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_dir": str(certs)} | options))
        made.append(listener)
        assert isinstance(listener, TlsListener)
        return listener

    yield start
    for listener in made:
        listener.close()
