"""What vmf wrote down and others may have changed since: leases on shared storage, the journal of teleports; and what
is said about a password before anybody has proven that he knows it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fuzzing import Choices, Finding, Target
from fuzzing.edits import edited
from vmf.errors import AuthenticationError, RemoteProtocolError, StorageError
from vmf.machine import journal
from vmf.storage import lease
from vmf.teleport import authentication as auth

# -- leases


@functools.cache
def _record() -> dict[str, Any]:
    """One in plain form, with an owner."""
    owner = lease.Owner(**{name: _sample(name) for name in lease.Owner.__annotations__})
    fields = {name: _sample(name) for name in lease.Record.__annotations__}
    record = lease.Record(**{**fields, "owner": owner, "standing": lease.Standing.HELD})
    body = lease.encode(record).partition(b"\n")[2].partition(b"\n")[0]
    made: dict[str, Any] = json.loads(body)
    return made


def _sample(name: str) -> Any:
    return 7 if name in ("sequence", "generation", "pid", "epoch", "since", "number") else "a" * 16


def _sealed(body: bytes) -> bytes:
    head = b"vmf-lease " + hashlib.sha256(body).hexdigest().encode()
    return (head + b"\n" + body + b"\n")[: lease.BLOCK].ljust(lease.BLOCK, b"\0")


def leases(data: bytes) -> None:
    """Two blocks of a lease, each anything, or a record with one wrong value and a right checksum."""
    choices = Choices(data)
    area = b""
    for _ in range(2):
        how = choices.number()
        if how & 1:
            area += _sealed(choices.take(choices.number(2) % lease.BLOCK))
        elif how & 2:
            area += choices.take(choices.number(2) % lease.BLOCK).ljust(lease.BLOCK, b"\0")
        else:
            try:
                area += _sealed(json.dumps(edited(_record(), choices)).encode())
            except TypeError:
                area += bytes(lease.BLOCK)  # bytes are nothing that JSON could hold
    try:
        record = lease.decode(area)
    except StorageError:
        return
    if record is not None:
        if not lease.describe(record).isprintable():
            raise Finding("what a lease says goes to the terminal as it is")
        lease.encode(record)


def lease_seeds() -> Iterator[bytes]:
    body = json.dumps(_record()).encode()
    plain = bytes([1]) + len(body).to_bytes(2, "little") + body
    yield plain
    yield plain + plain
    yield plain + plain.replace(b"7", b"9")
    for edit in range(40):
        yield bytes([0, 1, 1, edit, 0, 2, edit % 12, edit * 7 % 256, 1, 2, 3, 4, 0, 0])


# -- the journal


@functools.cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="vmf-fuzz-")) / "00.json"


_ENTRY = {
    "note": "offered",
    "id": "00" * 16,
    "role": "source",
    "peer": {"scheme": "tls", "host": "beta", "port": 6000, "options": {"tls_dir": "/x"}},
    "since": 1_700_000_000,
    "boot_id": "b",
}


def entries(data: bytes) -> None:
    """A file of the journal: an entry, or none."""
    choices = Choices(data)
    if choices.number() & 1:
        content = choices.rest()
    else:
        try:
            content = json.dumps(edited(_ENTRY, choices)).encode()
        except TypeError:
            return
    _file().write_bytes(content)
    journal._read(_file())


def entry_seeds() -> Iterator[bytes]:
    yield b"\1" + json.dumps(_ENTRY).encode()
    for edit in range(60):
        yield bytes([0, 1 + edit % 2, 1, edit, 0, 2, edit % 12, edit * 7 % 256, 1, 2, 3, 4])


# -- passwords

_BINDING = ("tls-server-end-point", bytes(32))


@functools.cache
def _verifier() -> auth.Verifier:
    return auth.Verifier.of("password", 4096)


def password(data: bytes) -> None:
    """The exchange about a password, with an opponent at either side, and the text of a verifier."""
    # With little hashing: what is looked for here is not in there. Other tests of this process want the real limits.
    with (
        mock.patch.object(auth, "LEAST_ITERATIONS", 1),
        mock.patch.object(auth, "MOST_ITERATIONS", 5000),
    ):
        _password(data)


def _password(data: bytes) -> None:
    choices = Choices(data)
    how = choices.number()
    verifier = _verifier()
    binding = _BINDING if how & 0x80 else None
    first, second = choices.take(choices.number()), choices.take(choices.number(2) % 1024)
    try:
        if how & 3 == 0:
            target = auth._Challenge(verifier, binding)
            target.challenge(first)
            target.verify(second)
            raise Finding("somebody who does not know the password is let in")
        if how & 3 == 1:
            target = auth._Challenge(verifier, binding)
            target.challenge(auth._Proof("password", binding).first())
            target.verify(first)
            raise Finding("somebody who does not know the password is let in")
        if how & 3 == 2:
            source = auth._Proof("password", binding)
            nonce = source.first().rpartition(b"r=")[2]
            source.answer(first.replace(b"NONCE", nonce))
            source.check(second)
            raise Finding("a target that does not know the verifier is believed")
    except (AuthenticationError, RemoteProtocolError) as error:
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
        return
    try:
        parsed = auth.Verifier.parse((first + second).decode("utf-8", "replace"))
    except ValueError:
        return
    if auth.Verifier.parse(str(parsed)) != parsed:
        raise Finding("a verifier changes when it is written and read")


def password_seeds() -> Iterator[bytes]:
    def said(how: int, first: bytes, second: bytes = b"") -> bytes:
        return bytes([how, len(first)]) + first + len(second).to_bytes(2, "little") + second

    salt = base64.b64encode(bytes(16))
    proof = base64.b64encode(bytes(32))
    for binding in (0, 0x80):
        flag = b"p=tls-server-end-point,," if binding else b"n,,"
        final = b"c=" + base64.b64encode(flag + (bytes(32) if binding else b"")) + b",r=abcdef,p=" + proof
        yield said(binding, flag + b"n=vmf,r=abcdef", final)
        yield said(binding | 1, final)
        yield said(binding | 2, b"r=NONCEabc,s=" + salt + b",i=4096", b"v=" + proof)
        yield said(binding | 2, b"r=NONCEabc,s=" + salt + b",i=4096", b"e=other-error")
    text = str(_verifier()).encode()
    yield said(3, text[:60], text[60:])


TARGETS = (
    Target("leases", leases, lease_seeds, 1024, 0.5),
    Target("journal", entries, entry_seeds, 512, 0.5),
    Target("password", password, password_seeds, 1024, 1.0),
)
