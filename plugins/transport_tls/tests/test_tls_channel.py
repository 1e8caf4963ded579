"""The TLS channel: bytes arrive as they were sent, both ways at once; time-outs, shutdown, damage."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import Address, Channel
from vmf_transport_tls.channel import TlsChannel
from vmf_transport_tls.pieces import GATHER_PAGES, LONG_BYTES, pieces
from vmf_transport_tls.transport import TlsListener, TlsTransport

Listening = Callable[..., TlsListener]


@pytest.fixture
def pair(listening: Listening, certs: Path) -> Iterator[tuple[TlsChannel, TlsChannel]]:
    """(source's end, target's end)."""
    listener = listening()
    source = TlsTransport().connect(Address("tls", "localhost", listener.address.port, {"tls_dir": str(certs)}), 10)
    target = listener.accept(10)
    assert isinstance(source, TlsChannel)
    assert isinstance(target, TlsChannel)
    yield source, target
    source.close()
    target.close()


def in_thread(action: Callable[[], None]) -> Callable[[], BaseException | None]:
    """Run it; the answer waits for its end and gives what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> BaseException | None:
        thread.join(20)
        assert not thread.is_alive()
        return raised[0] if raised else None

    return wait


def random_ranges(size: int, seed: int) -> np.ndarray:
    """Page runs of every length, in order, and some that are not aligned."""
    rng = np.random.default_rng(seed)
    rows, at = [], 0
    while at < size:
        length = int(rng.choice([1, 1, 1, 2, 3, 20, 200])) * PAGE_SIZE
        if rng.random() < 0.1:
            length = int(rng.integers(0, 100_000))
        length = min(length, size - at)
        rows.append((at, length))
        at += length + int(rng.choice([0, PAGE_SIZE, 5 * PAGE_SIZE, 37]))
        if rng.random() < 0.5:
            at = -(-at // PAGE_SIZE) * PAGE_SIZE
    return np.array(rows, dtype=np.uint64)


def test_it_is_tls_1_3_and_knows_the_peer(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, target = pair
    assert source._tls.version() == "TLSv1.3"
    assert "localhost" in source.peer
    assert "localhost" in target.peer
    assert source.remote.port == target.local.port
    assert source.unsent_bytes() >= 0


@pytest.mark.parametrize("seed", range(5))
def test_ranges_arrive(pair: tuple[TlsChannel, TlsChannel], seed: int) -> None:
    source, target = pair
    size = 8 << 20
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    arrived = np.zeros(size, dtype=np.uint8)
    ranges = random_ranges(size, seed)
    wait = in_thread(lambda: target.recv_ranges(memoryview(arrived.data), ranges))
    source.send_ranges(memoryview(data.data).toreadonly(), ranges)
    assert wait() is None
    expected = np.zeros(size, dtype=np.uint8)
    for offset, length in ranges.tolist():
        expected[offset : offset + length] = data[offset : offset + length]
    assert (arrived == expected).all()


def test_both_directions_at_once(pair: tuple[TlsChannel, TlsChannel]) -> None:
    """The case in which an OpenSSL connection would break when two threads used it without a lock."""
    source, target = pair
    data = np.random.default_rng(1).bytes(1 << 20)
    rounds = 24

    def send(channel: Channel) -> None:
        for number in range(rounds):
            channel.send(data[number:], b"", data[:number])

    def receive(channel: Channel) -> None:
        buffer = memoryview(bytearray(len(data)))
        for number in range(rounds):
            channel.recv_into(buffer)
            assert buffer == data[number:] + data[:number]

    waits = [
        in_thread(lambda: send(source)),
        in_thread(lambda: send(target)),
        in_thread(lambda: receive(source)),
        in_thread(lambda: receive(target)),
    ]
    assert [wait() for wait in waits] == [None] * 4


@given(st.lists(st.binary(max_size=40_000), max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_buffers(shared_pair: tuple[TlsChannel, TlsChannel], buffers: list[bytes]) -> None:
    source, target = shared_pair
    whole = b"".join(buffers)
    arrived = bytearray(len(whole))
    wait = in_thread(lambda: target.recv_into(memoryview(arrived)))
    source.send(*buffers)
    assert wait() is None
    assert arrived == whole


@pytest.fixture(scope="module")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TlsChannel, TlsChannel]]:
    from vmf_transport_tls import issue

    directory = tmp_path_factory.mktemp("tls")
    issue.make_ca(directory)
    issue.issue(directory, directory, ["localhost"])
    listener = TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_dir": str(directory)}))
    source = TlsTransport().connect(Address("tls", "localhost", listener.address.port, {"tls_dir": str(directory)}), 10)
    target = listener.accept(10)
    assert isinstance(source, TlsChannel)
    assert isinstance(target, TlsChannel)
    yield source, target
    source.close()
    target.close()
    listener.close()


def test_receiving_times_out(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, target = pair
    target.set_timeout(0.1)
    source.send(b"abc")
    began = time.monotonic()
    with pytest.raises(TransportTimeout, match=r"no progress for 0\.1 s"):
        target.recv_into(memoryview(bytearray(4)))
    assert 0.05 < time.monotonic() - began < 5


def test_sending_times_out(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, _ = pair
    source.set_timeout(0.2)
    with pytest.raises(TransportTimeout):
        source.send(bytes(64 << 20))


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_shutdown_wakes(pair: tuple[TlsChannel, TlsChannel], direction: str) -> None:
    source, _ = pair
    if direction == "send":
        wait = in_thread(lambda: source.send(bytes(256 << 20)))
    else:
        wait = in_thread(lambda: source.recv_into(memoryview(bytearray(1))))
    time.sleep(0.3)
    source.shutdown()
    error = wait()
    assert isinstance(error, TransportClosed)
    assert "this side" in str(error)
    with pytest.raises(TransportClosed):
        source.send(b"x")
    source.close()
    source.close()


def test_a_sender_that_waits_does_not_stop_receiving(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, target = pair
    wait = in_thread(lambda: source.send(bytes(64 << 20)))
    time.sleep(0.2)
    target.send(b"hello")  # nobody reads at the target, so the source's sender is stuck now
    buffer = bytearray(5)
    source.recv_into(memoryview(buffer))
    assert buffer == b"hello"
    source.shutdown()
    assert isinstance(wait(), TransportClosed)


def test_the_other_side_closes(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, target = pair
    source.send(b"last")
    source.close()
    buffer = bytearray(4)
    target.recv_into(memoryview(buffer))
    assert buffer == b"last"
    with pytest.raises(TransportClosed, match="closed the connection"):
        target.recv_into(memoryview(buffer))


def test_altered_bytes_are_noticed(pair: tuple[TlsChannel, TlsChannel]) -> None:
    """What a forger on the way could insert."""
    source, target = pair
    record = b"\x17\x03\x03" + (64).to_bytes(2, "big") + bytes(64)
    source._socket.sendall(record)
    with pytest.raises(TransportError, match=r"encrypted connection to .* broke") as caught:
        target.recv_into(memoryview(bytearray(4)))
    assert not isinstance(caught.value, TransportClosed)
    assert "\n" not in str(caught.value)
    assert "what came had been altered on the way" in str(caught.value)
    with pytest.raises(TransportError, match="what came there had been altered on the way"):
        source.recv_into(memoryview(bytearray(4)))


def test_replayed_bytes_are_noticed(listening: Listening, certs: Path) -> None:
    """A whole recorded session, sent again to the same listener."""
    listener = listening()
    recorded = bytearray()
    relay = socket.create_server(("127.0.0.1", 0))

    def forward() -> None:
        one, _ = relay.accept()
        two = socket.create_connection(("127.0.0.1", listener.address.port))
        back = threading.Thread(target=lambda: [one.sendall(each) for each in iter(lambda: two.recv(65536), b"")])
        back.start()
        for data in iter(lambda: one.recv(65536), b""):
            recorded.extend(data)
            two.sendall(data)
        two.shutdown(socket.SHUT_WR)
        back.join()
        one.close()
        two.close()

    wait = in_thread(forward)
    options = {"tls_dir": str(certs)}
    source = TlsTransport().connect(Address("tls", "localhost", relay.getsockname()[1], options), 10)
    target = listener.accept(10)
    source.send(b"move this machine")
    target.recv_into(memoryview(bytearray(17)))
    source.close()
    target.close()
    assert wait() is None
    relay.close()
    with socket.create_connection(("127.0.0.1", listener.address.port)) as replay:
        replay.sendall(recorded)
        with pytest.raises(TransportError, match="was refused: what the source sent was not made for"):
            listener.accept(10)


def test_a_range_outside_is_refused(pair: tuple[TlsChannel, TlsChannel]) -> None:
    source, target = pair
    base = memoryview(bytearray(2 * PAGE_SIZE))
    for rows in ([(PAGE_SIZE, 2 * PAGE_SIZE)], [(3 * PAGE_SIZE, 0)], [(2**63, 2**63)]):
        with pytest.raises(ValueError, match="leaves the buffer"):
            source.send_ranges(base, np.array(rows, dtype=np.uint64))
    with pytest.raises(ValueError, match="read-only"):
        target.recv_ranges(base.toreadonly(), np.array([(0, 1)], dtype=np.uint64))


def test_pieces_keep_the_order_and_gather() -> None:
    size = 4096 * PAGE_SIZE
    for seed in range(20):
        ranges = random_ranges(size, seed)
        moved = []
        for piece in pieces(size, ranges):
            if isinstance(piece, tuple):
                moved.append(np.arange(piece[0], piece[0] + piece[1]))
                aligned = piece[0] % PAGE_SIZE == 0 and piece[1] % PAGE_SIZE == 0
                assert piece[1] >= LONG_BYTES or not aligned
            else:
                assert 0 < len(piece) <= GATHER_PAGES
                moved.append((piece[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).ravel())
        expected = np.concatenate([np.arange(offset, offset + length) for offset, length in ranges.tolist()])
        assert (np.concatenate(moved) == expected).all()
    assert list(pieces(size, np.empty((0, 2), dtype=np.uint64))) == []


def test_no_session_ticket_is_given(listening: Listening, certs: Path) -> None:
    listener = listening()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certs / "ca-cert.pem")
    context.load_cert_chain(certs / "client-cert.pem", certs / "client-key.pem")
    with socket.create_connection(("127.0.0.1", listener.address.port)) as raw:
        client = context.wrap_socket(raw, server_hostname="localhost")
        assert client.recv(3) == b"\0\0\0"
        assert client.session is None or not client.session.has_ticket
