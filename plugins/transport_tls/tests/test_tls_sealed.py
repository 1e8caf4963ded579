"""RAM sealed beside TLS: what is sealed opens, and nothing else does; whatever is done to the wire."""

from __future__ import annotations

import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.errors import TransportError
from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import Address
from vmf_transport_tls import files, handshake, issue, sealed
from vmf_transport_tls.channel import TlsChannel

ONE, TWO = bytes(range(32)), bytes(range(32, 64))
WAY = sealed.SOURCE_TO_TARGET
ADDRESS = Address("tls", "localhost", 1)
SIZES = st.integers(1, 3 * PAGE_SIZE) | st.sampled_from([sealed.MOST, sealed.MOST - 1])

pytestmark = pytest.mark.skipif(not sealed.available(), reason="cryptography is older than 47")


def seal(sealer: sealed.Sealer, plain: bytes, position: int = 0) -> bytes:
    out = memoryview(bytearray(len(plain) + 21))
    assert sealer.seal(memoryview(plain), position, out) == len(out)
    return bytes(out)


def opened(opener: sealed.Opener, frame: bytes, position: int = 0) -> bytes:
    into = bytearray(max(0, len(frame) - 21))
    opener.open(memoryview(frame), position, memoryview(into))
    return bytes(into)


def expand(secret: bytes, info: bytes, size: int) -> bytes:
    """HKDF-Expand (RFC 5869) up to one hash, written anew."""
    return hmac.digest(secret, info + b"\1", hashlib.sha256)[:size]


def test_the_format_is_what_the_documentation_says() -> None:
    """Made anew from RFC 5869 and AES-GCM, so that another implementation can."""
    pseudorandom = hmac.digest(bytes(32), ONE + TWO, hashlib.sha256)
    secret = expand(pseudorandom, b"vmf-sealed-1 source to target", 32)
    key = expand(secret, b"vmf-sealed-1 key", 16)
    header = b"\x56" + (5 + 16).to_bytes(4, "big")
    nonce = bytes(4) + (1).to_bytes(8, "big")
    expected = header + AESGCM(key).encrypt(nonce, b"hello", header + (77).to_bytes(8, "big"))
    sealer = sealed.Sealer(ONE, TWO, WAY)
    seal(sealer, b"the frame before")
    assert seal(sealer, b"hello", 77) == expected


@given(st.lists(st.tuples(SIZES, st.integers(0, 1 << 63)), max_size=6))
@settings(max_examples=30)
def test_what_is_sealed_opens(frames: list[tuple[int, int]]) -> None:
    sealer, opener = sealed.Sealer(ONE, TWO, WAY), sealed.Opener(ONE, TWO, WAY)
    for size, position in frames:
        plain = np.random.default_rng(size).bytes(size)
        frame = seal(sealer, plain, position)
        assert sealed.frame_length(frame) == len(frame) - sealed.HEADER.size
        assert plain[:32] not in frame or size < 8
        assert opened(opener, frame, position) == plain


@given(st.integers(1, 200), st.data())
@settings(max_examples=200)
def test_a_changed_bit_does_not_open(size: int, data: st.DataObject) -> None:
    frame = bytearray(seal(sealed.Sealer(ONE, TWO, WAY), bytes(size)))
    at = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[at // 8] ^= 1 << at % 8
    with pytest.raises(sealed.Forged):
        opened(sealed.Opener(ONE, TWO, WAY), bytes(frame))


def test_neither_repeated_nor_left_out_nor_elsewhere() -> None:
    sealer = sealed.Sealer(ONE, TWO, WAY)
    first, second = seal(sealer, b"page"), seal(sealer, b"page")
    assert first[5:] != second[5:]
    for frames, position in (((first, first), 0), ((second,), 0), ((first,), 1)):
        opener = sealed.Opener(ONE, TWO, WAY)
        for frame in frames[:-1]:
            opened(opener, frame, position)
        with pytest.raises(sealed.Forged):
            opened(opener, frames[-1], position)


@pytest.mark.parametrize(
    "other",
    [(ONE, TWO, sealed.TARGET_TO_SOURCE), (TWO, ONE, WAY), (ONE, ONE, WAY)],
    ids=["other way", "shares exchanged", "other share"],
)
def test_other_keys_do_not_open(other: tuple[bytes, bytes, str]) -> None:
    """A frame that is reflected to its sender, among others."""
    with pytest.raises(sealed.Forged):
        opened(sealed.Opener(*other), seal(sealed.Sealer(ONE, TWO, WAY), b"page"))


def test_keys_change_and_no_nonce_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "FRAMES_PER_KEY", 3)
    sealer, opener = sealed.Sealer(ONE, TWO, WAY), sealed.Opener(ONE, TWO, WAY)
    frames = [seal(sealer, bytes(64)) for _ in range(20)]
    assert len({frame[5:] for frame in frames}) == 20, "the same plaintext was encrypted twice in the same way"
    assert [opened(opener, frame) for frame in frames] == [bytes(64)] * 20
    keys = sealed._Keys(ONE, TWO, WAY)
    used = []
    for _ in range(20):
        _, nonce = keys.next()
        used.append((keys._secret, nonce))
    assert len(set(used)) == 20
    assert len({secret for secret, _ in used}) == 7


@pytest.mark.parametrize("length", [0, 1, 16, sealed.MOST + 17, 2**32 - 1])
def test_no_such_length_is_waited_for(length: int) -> None:
    with pytest.raises(sealed.Forged):
        sealed.frame_length(sealed.HEADER.pack(sealed.KIND, length))


def test_a_tls_record_is_no_frame() -> None:
    for kind in range(20, 25):  # RFC 8446, section 5.1
        assert sealed.frame_length(bytes([kind, 3, 3, 0, 1])) is None


# -- on a wire


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sealed")
    issue.make_ca(made)
    issue.issue(made, made, ["localhost"])
    return made


class Wire:
    """A source and a target that have shaken hands, and whose sockets are ours to read and to write."""

    def __init__(self, directory: Path) -> None:
        here, there = socket.socketpair()
        served: list[TlsChannel] = []

        def serve() -> None:
            stream, names = handshake.serve(there, ADDRESS, files.load(directory, "server"), (), 10)
            served.append(TlsChannel(self._end("to_target"), ADDRESS, ADDRESS, stream, names))

        thread = threading.Thread(target=serve)
        thread.start()
        stream, names = handshake.call(here, ADDRESS, files.load(directory, "client"), "localhost", 10)
        thread.join()
        self.source = TlsChannel(self._end("from_source"), ADDRESS, ADDRESS, stream, names)
        (self.target,) = served
        here.close()
        there.close()

    def _end(self, name: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        setattr(self, name, ours)
        return theirs

    from_source: socket.socket
    to_target: socket.socket

    def said(self) -> bytes:
        """What the source has put on the wire since the last call."""
        self.from_source.setblocking(False)
        found = bytearray()
        try:
            while data := self.from_source.recv(1 << 20):
                found += data
        except BlockingIOError:
            pass
        return bytes(found)

    def deliver(self, data: bytes) -> None:
        """To the target, and then nothing more."""

        def send() -> None:
            try:
                self.to_target.sendall(data)
                self.to_target.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the target has had enough

        threading.Thread(target=send, daemon=True).start()

    def close(self) -> None:
        self.source.close()
        self.target.close()
        self.from_source.close()
        self.to_target.close()


@pytest.fixture
def wire(directory: Path) -> Iterator[Wire]:
    made = Wire(directory)
    yield made
    made.close()


RAM = np.random.default_rng(7).integers(0, 256, 24 * PAGE_SIZE, dtype=np.uint8)
RUNS = np.array([[0, PAGE_SIZE], [3 * PAGE_SIZE, 20 * PAGE_SIZE], [23 * PAGE_SIZE + 5, 37]], dtype=np.uint64)


def play(wire: Wire) -> list[bytes]:
    """A conversation, with RAM between what is said; its pieces on the wire, in order."""
    wire.said()
    parts = []
    for number in range(3):
        wire.source.send(b"message %d" % number)
        parts.append(wire.said())
        wire.source.send_ranges(memoryview(RAM.data), RUNS)
        whole = wire.said()
        while whole:
            size = sealed.HEADER.size + (sealed.frame_length(whole) or 0)
            parts.append(whole[:size])
            whole = whole[size:]
    return parts


def listen(wire: Wire) -> None:
    """The target's side of `play`. Raises unless every byte is as it was sent."""
    for number in range(3):
        said = bytearray(9)
        wire.target.recv_into(memoryview(said))
        assert said == b"message %d" % number
        ram = np.zeros(RAM.size, dtype=np.uint8)
        wire.target.recv_ranges(memoryview(ram.data), RUNS)
        for offset, length in RUNS.tolist():
            assert (ram[offset : offset + length] == RAM[offset : offset + length]).all()


def test_ram_goes_between_what_is_said(wire: Wire) -> None:
    parts = play(wire)
    kinds = [part[0] for part in parts]
    assert kinds.count(0x17) == 3
    assert kinds.count(sealed.KIND) >= 6
    wire.deliver(b"".join(parts))
    listen(wire)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_in_pieces_of_any_size(wire: Wire, size: int) -> None:
    data = b"".join(play(wire))
    if size == 1:
        data = data[: len(data) // 8]

    def dribble() -> None:
        for start in range(0, len(data), size):
            wire.to_target.sendall(data[start : start + size])
        wire.to_target.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=dribble)
    thread.start()
    if size == 1:
        with pytest.raises(TransportError, match="closed the connection"):
            listen(wire)
    else:
        listen(wire)
    thread.join()


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_done_to_the_wire_nothing_wrong_arrives(directory: Path, data: st.DataObject) -> None:
    """Records and frames left out, repeated, exchanged, cut, changed, or followed by anything."""
    wire = Wire(directory)
    try:
        parts = play(wire)
        before = b"".join(parts)
        how = data.draw(st.sampled_from(["drop", "repeat", "exchange", "flip", "insert", "cut"]))
        at = data.draw(st.integers(0, len(parts) - 1))
        if how == "drop":
            del parts[at]
        elif how == "repeat":
            parts.insert(data.draw(st.integers(at + 1, len(parts))), parts[at])
        elif how == "exchange":
            other = data.draw(st.integers(0, len(parts) - 1))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == "insert":
            parts.insert(at, data.draw(st.binary(min_size=1, max_size=40)))
        whole = bytearray(b"".join(parts))
        if how == "flip":
            bit = data.draw(st.integers(0, len(whole) * 8 - 1))
            whole[bit // 8] ^= 1 << bit % 8
        elif how == "cut":
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        wire.deliver(bytes(whole))
        if whole.startswith(before):  # what follows is nobody's business any more
            listen(wire)
            return
        with pytest.raises(TransportError) as caught:
            listen(wire)
        assert str(caught.value).isprintable()
    finally:
        wire.close()


def test_what_is_said_where_ram_is_due(wire: Wire) -> None:
    wire.source.send(b"message 0")
    wire.source.send(b"and more")
    wire.deliver(wire.said())
    wire.target.recv_into(memoryview(bytearray(9)))
    with pytest.raises(TransportError, match="altered on the way"):
        wire.target.recv_ranges(memoryview(bytearray(PAGE_SIZE)), np.array([[0, PAGE_SIZE]], dtype=np.uint64))


def test_a_record_that_is_too_long_is_not_waited_for(wire: Wire) -> None:
    wire.target.set_timeout(20)
    wire.to_target.sendall(b"\x17\x03\x03\xff\xff")
    began = time.monotonic()
    with pytest.raises(TransportError, match="broke"):
        wire.target.recv_into(memoryview(bytearray(1)))
    assert time.monotonic() - began < 10


def test_what_came_with_the_welcome_is_not_lost(directory: Path) -> None:
    """A target that sends RAM at once: the source reads some of it while it still shakes hands."""
    here, there = socket.socketpair()
    made: list[TlsChannel] = []

    def serve() -> None:
        stream, names = handshake.serve(there, ADDRESS, files.load(directory, "server"), (), 10)
        made.append(TlsChannel(there, ADDRESS, ADDRESS, stream, names))
        made[0].send(b"well")
        made[0].send_ranges(memoryview(RAM.data), RUNS)

    thread = threading.Thread(target=serve)
    thread.start()
    here.settimeout(10)
    held: list[bytes] = []

    class Late:
        """A socket on which the welcome is heard late, with everything after it."""

        def __getattr__(self, name: str) -> object:
            return getattr(here, name)

        def recv(self, size: int) -> bytes:
            data = here.recv(size)
            if held:
                thread.join(10)
                here.settimeout(0.2)
                try:
                    data += here.recv(size)
                except TimeoutError:
                    pass
            held.append(data)
            return data

    stream, names = handshake.call(Late(), ADDRESS, files.load(directory, "client"), "localhost", 10)  # type: ignore[arg-type]
    source = TlsChannel(here, ADDRESS, ADDRESS, stream, names)
    said = bytearray(4)
    source.recv_into(memoryview(said))
    assert said == b"well"
    ram = np.zeros(RAM.size, dtype=np.uint8)
    source.recv_ranges(memoryview(ram.data), RUNS)
    assert (ram[:PAGE_SIZE] == RAM[:PAGE_SIZE]).all()
    source.close()
    made[0].close()


@pytest.mark.parametrize("old", ["source", "target", "both"])
def test_an_end_that_cannot_seal_is_served_through_tls(
    directory: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    main = threading.current_thread()  # the source's here
    young = {"source": False, "target": True}
    monkeypatch.setattr(
        sealed, "available", lambda: old != "both" and (threading.current_thread() is main) == young[old]
    )
    wire = Wire(directory)
    try:
        assert wire.source._sealer is None
        assert wire.target._opener is None
        wire.source.send(b"message 0")
        wire.source.send_ranges(memoryview(RAM.data), RUNS)
        data = wire.said()
        assert data[0] == 0x17
        wire.deliver(data)
        wire.target.recv_into(memoryview(bytearray(9)))
        ram = np.zeros(RAM.size, dtype=np.uint8)
        wire.target.recv_ranges(memoryview(ram.data), RUNS)
        assert (ram[3 * PAGE_SIZE : 23 * PAGE_SIZE] == RAM[3 * PAGE_SIZE : 23 * PAGE_SIZE]).all()
    finally:
        wire.close()
