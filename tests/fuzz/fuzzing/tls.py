"""TLS: a directory of certificates with anything in its files, peers that say anything in a handshake, and a wire on
which anything is done to what they say afterwards.
"""

from __future__ import annotations

import base64
import functools
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fuzzing import Choices, Finding, Target
from vmf.errors import TransportError, TransportRefused
from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import Address
from vmf_transport_tls import files, handshake, issue
from vmf_transport_tls.channel import Stream, TlsChannel

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


_RAM = np.random.default_rng(3).integers(0, 256, 3 * PAGE_SIZE, dtype=np.uint8)
_RUNS = np.array([[0, PAGE_SIZE], [2 * PAGE_SIZE, PAGE_SIZE], [7, 30]], dtype=np.uint64)
_SAID = b"PAGES"
_TURNS = 2
_AT_ONCE = 1 << 20


def _shaken() -> tuple[Stream, Stream]:
    """A source's and a target's ends, with keys for RAM."""
    streams = []
    for role, name in (("client", "localhost"), ("server", None)):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = _credentials("client" if role == "client" else "server").context
        tls = context.wrap_bio(incoming, outgoing, server_side=name is None, server_hostname=name)
        streams.append(Stream(tls, incoming, outgoing, (bytes(32), bytes(range(32)))))
    for _ in range(3):
        for here, there in (streams, streams[::-1]):
            try:
                here.tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            there.incoming.write(here.outgoing.read())
    return streams[0], streams[1]


def _channel(stream: Stream) -> tuple[TlsChannel, socket.socket]:
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _AT_ONCE)
    return TlsChannel(theirs, _PEER, _PEER, stream, ()), ours


def sealed_ram(data: bytes) -> None:
    """What a source says and its RAM, changed on the way: what arrives is what was sent, up to an error."""
    choices = Choices(data)
    (source, wire), (target, back) = map(_channel, _shaken())
    try:
        parts = []
        for _ in range(_TURNS):
            source.send(_SAID)
            parts.append(wire.recv(_AT_ONCE))
            source.send_ranges(memoryview(_RAM.data), _RUNS)
            parts.append(wire.recv(_AT_ONCE))
        sent = b"".join(parts)
        for _ in range(choices.number() % 4):
            how, at = choices.number(), choices.number() % len(parts)
            if how % 4 == 0:
                parts[at] = b""
            elif how % 4 == 1:
                parts.insert(at, parts[how // 4 % len(parts)])
            elif how % 4 == 2:
                cut = choices.number(2) % (len(parts[at]) + 1)
                parts[at] = parts[at][:cut] + choices.take(how // 4) + parts[at][cut + how // 4 :]
            else:
                cut = choices.number(2) % (len(parts[at]) + 1)
                parts[at] = parts[at][:cut] + choices.take(how // 4) + parts[at][cut:]
        changed = b"".join(parts) + choices.rest()
        back.sendall(changed[: _AT_ONCE // 2])
        back.shutdown(socket.SHUT_WR)
        _hear(target, whole=changed.startswith(sent))
    finally:
        for each in (source, target):
            each.close()
        for end in (wire, back):
            end.close()


def _hear(target: TlsChannel, *, whole: bool) -> None:
    try:
        for _ in range(_TURNS):
            said, ram = bytearray(len(_SAID)), np.zeros(_RAM.size, dtype=np.uint8)
            target.recv_into(memoryview(said))
            target.recv_ranges(memoryview(ram.data), _RUNS)
            same = all((ram[at : at + n] == _RAM[at : at + n]).all() for at, n in _RUNS.tolist())
            if said != _SAID or not same:
                raise Finding("something else arrived than was sent")
    except TransportError as error:
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
        if whole:
            raise Finding(f"what was sent did not arrive: {error}") from None
    else:
        if not whole:
            raise Finding("a change was not noticed")


def sealed_seeds() -> Iterator[bytes]:
    yield b""
    yield bytes([0]) + b"\x56\0\0\0\x11" + bytes(17)
    for how in range(4):
        for at in range(2 * _TURNS):
            yield bytes([1, how + 4 * 3, at, 9, 0]) + b"\x56\xff\xff"
            yield bytes([2, how + 4 * 7, at, 0, 0, how, at + 1]) + b"\x17\x03\x03\x40\x11\x99\x99"


TARGETS = (
    Target("certificates", certificates, certificate_seeds, 1024, 0.5),
    Target("hello", hello, hello_seeds, 1024, 0.5),
    Target("sealed", sealed_ram, sealed_seeds, 512, 1.0),
    Target("server-hello", server_hello, server_hello_seeds, 2048, 0.5),
)
