"""TLS: a directory of certificates with anything in its files, and peers that say anything in a handshake."""

from __future__ import annotations

import base64
import functools
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzzing import Choices, Finding, Target
from vmf.errors import TransportError, TransportRefused
from vmf.transport.base import Address
from vmf_transport_tls import files, handshake, issue

_NAMES = (files.CA_CERT, files.cert_file("server"), files.key_file("server"))
_PEER = Address("tls", "127.0.0.1", 1)


@functools.cache
def _directory() -> Path:
    """Good certificates."""
    made = Path(tempfile.mkdtemp(prefix="vmf-fuzz-")) / "tls"
    issue.make_ca(made)
    issue.issue(made, made, ["localhost"])
    return made


@functools.cache
def _scratch() -> Path:
    """A directory whose files a target overwrites."""
    made = Path(tempfile.mkdtemp(prefix="vmf-fuzz-"))
    for name in _NAMES:
        (made / name).touch(mode=0o600)
    return made


@functools.cache
def _good(name: str) -> bytes:
    return (_directory() / name).read_bytes()


def certificates(data: bytes) -> None:
    """One file of the directory is anything, or a good one with some bytes changed."""
    choices = Choices(data)
    how = choices.number()
    which = _NAMES[how % 3]
    if how & 0x80:
        content = choices.rest()
    else:
        # Inside of the armour, where the structure is.
        first, *lines, last = _good(which).decode().strip().split("\n")
        changed = bytearray(base64.b64decode("".join(lines)))
        for _ in range(choices.number() % 8):
            at = choices.number(2) % len(changed)
            put = choices.take(choices.number() % 5)
            changed[at : at + (choices.number() % 4 if how & 0x40 else len(put))] = put
        content = "\n".join((first, base64.encodebytes(changed).decode().strip(), last, "")).encode()
    for name in _NAMES:
        (_scratch() / name).write_bytes(content if name == which else _good(name))
    try:
        files.load(_scratch(), "server")
    except TransportError:
        pass
    if which.endswith("cert.pem"):
        try:
            certificate = files.read_certificate(_scratch() / which)
            files.certificate_names(certificate)
            files.check_validity(certificate, "x")
        except TransportError:
            pass


def certificate_seeds() -> Iterator[bytes]:
    for number in range(3):
        yield bytes([number])
        yield (
            bytes([number + 126 + 3 * (number < 2)]) + b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
        )
        for edit in range(20):
            yield bytes([number, 1 + edit % 3, edit * 40 % 256, edit % 3, edit % 4 + 1, edit, 66, 67, 68, 69])


@functools.cache
def _credentials(role: files.Role) -> files.Credentials:
    return files.load(_directory(), role)


def _say(data: bytes) -> socket.socket:
    """A connection on which the peer has said this, and no more will come."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    theirs.close()
    return ours


def hello(data: bytes) -> None:
    """What a target hears before it knows who is there: it is refused with a sentence."""
    connection = _say(data)
    try:
        handshake.serve(connection, _PEER, _credentials("server"), (), 5.0)
    except TransportRefused as error:
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
    else:
        raise Finding("somebody was let in")
    finally:
        connection.close()


def server_hello(data: bytes) -> None:
    """The same at a source."""
    connection = _say(data)
    try:
        handshake.call(connection, _PEER, _credentials("client"), "localhost", 5.0)
    except TransportError as error:
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
    else:
        raise Finding("somebody was believed")
    finally:
        connection.close()


def _first_words() -> tuple[bytes, bytes]:
    """What a client and a server say first."""
    import ssl

    incoming, outgoing, back = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _credentials("client").context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    first = outgoing.read()
    heard = ssl.MemoryBIO()
    heard.write(first)
    server = _credentials("server").context.wrap_bio(heard, back, server_side=True)
    try:
        server.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return first, back.read()


def hello_seeds() -> Iterator[bytes]:
    yield _first_words()[0]
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"VMFT\1\0\0\0"
    yield b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"


def server_hello_seeds() -> Iterator[bytes]:
    yield _first_words()[1]
    yield b"\x15\x03\x03\x00\x02\x02\x46"
    yield b"HTTP/1.1 400 Bad Request\r\n"


TARGETS = (
    Target("certificates", certificates, certificate_seeds, 1024, 0.5),
    Target("hello", hello, hello_seeds, 1024, 0.5),
    Target("server-hello", server_hello, server_hello_seeds, 2048, 0.5),
)
