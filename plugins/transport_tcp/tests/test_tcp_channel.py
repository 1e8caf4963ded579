"""TcpChannel: every byte in its place whatever the kernel cuts, and every way a stream can break."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmf.transport.sockets as channel_module
import vmf_transport_tcp.vectors as vectors
from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport.base import Address
from vmf_transport_tcp.channel import TcpChannel
from vmf_transport_tcp.transport import TcpTransport

LOOPBACK = Address("tcp", "127.0.0.1", 0)


@pytest.fixture
def pair() -> Iterator[tuple[TcpChannel, TcpChannel]]:
    listener = TcpTransport().listen(LOOPBACK)
    one = TcpTransport().connect(listener.address, 5)
    two = listener.accept(5)
    assert isinstance(one, TcpChannel)
    assert isinstance(two, TcpChannel)
    yield one, two
    one.close()
    two.close()
    listener.close()


def small_pair() -> tuple[TcpChannel, TcpChannel]:
    """Two ends with tiny kernel buffers, so that nearly every call moves a part only."""
    here, there = socket.socketpair()
    for end in (here, there):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    name = Address("tcp", "127.0.0.1", 1)
    return TcpChannel(here, name, name), TcpChannel(there, name, name)


def in_thread(function: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failures


def blocked(function: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    thread, failures = in_thread(function)
    time.sleep(0.15)
    assert thread.is_alive(), f"it did not block: {failures}"
    return thread, failures


def send_for_ever(channel: TcpChannel, size: int, sent: list[int] | None = None) -> None:
    while True:
        channel.send(bytes(size))
        if sent is not None:
            sent.append(size)


RANGES = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 5000)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(RANGES, st.integers(0, 2**32))
def test_ranges_arrive_in_order_and_in_place(pairs: list[tuple[int, int]], seed: int) -> None:
    """Overlapping, empty and unordered ranges at the sender; back to back at the receiver, in other cuts."""
    source = np.random.default_rng(seed).integers(0, 256, 65_536, dtype=np.uint8)
    ranges = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    expected = b"".join(source[offset : offset + length].tobytes() for offset, length in pairs)
    target = bytearray(len(expected))
    cuts = sorted({0, len(expected), *np.random.default_rng(seed).integers(0, len(expected) + 1, 20).tolist()})
    spans = np.array([(a, b - a) for a, b in pairwise(cuts)], dtype=np.uint64).reshape(-1, 2)
    sender, receiver = small_pair()
    thread, failures = in_thread(lambda: sender.send_ranges(memoryview(source), ranges))
    receiver.set_timeout(10)
    receiver.recv_ranges(memoryview(target), spans)
    thread.join(60)
    sender.close()
    receiver.close()
    assert not failures
    assert bytes(target) == expected


@settings(max_examples=60, deadline=None)
@given(RANGES, st.integers(1, 7), st.integers(0, 2**32))
def test_any_partial_transfer_is_resumed(pairs: list[tuple[int, int]], iov_max: int, seed: int) -> None:
    """The kernel replaced by one that moves an arbitrary part of what it is given, in both directions."""
    import ctypes

    random = np.random.default_rng(seed)
    source = random.integers(0, 256, 65_536, dtype=np.uint8)
    ranges = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    moved = bytearray()
    old = vectors.IOV_MAX
    vectors.IOV_MAX = iov_max
    try:
        vector = vectors.Vector(memoryview(source), ranges)
        while vector.moved < vector.total:
            header = vectors._Msghdr.from_address(vector.window())
            assert 0 < header.iovlen <= iov_max
            entries = (ctypes.c_uint64 * (2 * header.iovlen)).from_address(header.iov)
            offered = b"".join(ctypes.string_at(entries[i], entries[i + 1]) for i in range(0, len(entries), 2))
            if not offered:  # a window of empty ranges: a kernel would move nothing for ever
                pytest.fail("an empty window")
            part = int(random.integers(1, len(offered) + 1))
            moved += offered[:part]
            vector.advance(part)
    finally:
        vectors.IOV_MAX = old
    assert bytes(moved) == b"".join(source[a : a + n].tobytes() for a, n in pairs)


def test_more_ranges_than_one_call_takes(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    pages = 5000
    source = np.random.default_rng(1).integers(0, 256, 2 * pages * 4096, dtype=np.uint8)
    target = np.zeros_like(source)
    ranges = np.stack((np.arange(pages) * 8192, np.full(pages, 4096)), axis=1).astype(np.uint64)
    thread, failures = in_thread(lambda: one.send_ranges(memoryview(source), ranges))
    two.recv_ranges(memoryview(target), ranges)
    thread.join(60)
    assert not failures
    cut = source.reshape(-1, 2, 4096)
    assert np.array_equal(target.reshape(-1, 2, 4096)[:, 0], cut[:, 0])
    assert not target.reshape(-1, 2, 4096)[:, 1].any()


def test_ranges_outside_are_refused(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, _ = pair
    buffer = memoryview(bytearray(100))
    for offset, length in ((0, 101), (101, 0), (100, 1), (2**64 - 1, 2), (50, 2**64 - 1)):
        with pytest.raises(ValueError, match="leaves the buffer"):
            one.send_ranges(buffer, np.array([[offset, length]], dtype=np.uint64))
    with pytest.raises(ValueError, match="read-only"):
        one.recv_ranges(memoryview(bytes(9)), np.array([[0, 9]], dtype=np.uint64))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=9000), max_size=8))
def test_send_gathers_and_recv_fills(parts: list[bytes]) -> None:
    sender, receiver = small_pair()
    thread, failures = in_thread(lambda: sender.send(*parts))
    target = bytearray(sum(map(len, parts)))
    receiver.set_timeout(10)
    receiver.recv_into(memoryview(target))
    thread.join(60)
    sender.close()
    receiver.close()
    assert not failures
    assert bytes(target) == b"".join(parts)


def test_timeouts_name_the_peer(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    for end in pair:
        end.set_timeout(0.1)
    began = time.monotonic()
    with pytest.raises(TransportTimeout, match=r"tcp:127\.0\.0\.1:\d+ made no progress for 0\.1 s"):
        one.recv_into(memoryview(bytearray(1)))
    with pytest.raises(TransportTimeout):
        one.recv_ranges(memoryview(bytearray(8)), np.array([[0, 8]], dtype=np.uint64))
    with pytest.raises(TransportTimeout):
        send_for_ever(two, 1 << 20)
    big = memoryview(bytearray(64 << 20))
    with pytest.raises(TransportTimeout):
        one.send_ranges(big, np.array([[0, len(big)]], dtype=np.uint64))
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="not positive"):
        one.set_timeout(0)


def test_progress_restarts_the_timeout(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    two.set_timeout(0.3)

    def drip() -> None:
        for _ in range(8):
            time.sleep(0.1)
            one.send(b"x")

    thread, failures = in_thread(drip)
    two.recv_into(memoryview(bytearray(8)))
    thread.join()
    assert not failures


@pytest.mark.parametrize("how", ["recv_into", "recv_ranges", "send", "send_ranges"])
@pytest.mark.parametrize("end", ["shutdown", "close", "peer"])
def test_whoever_waits_is_woken(pair: tuple[TcpChannel, TcpChannel], how: str, end: str) -> None:
    one, two = pair
    big = memoryview(bytearray(64 << 20))
    whole = np.array([[0, len(big)]], dtype=np.uint64)
    call: Callable[[], None] = {
        "recv_into": lambda: one.recv_into(big),
        "recv_ranges": lambda: one.recv_ranges(big, whole),
        "send": lambda: one.send(big),
        "send_ranges": lambda: one.send_ranges(big, whole),
    }[how]
    thread, failures = blocked(call)
    {"shutdown": one.shutdown, "close": one.close, "peer": two.close}[end]()
    thread.join(2)
    assert not thread.is_alive()
    assert len(failures) == 1
    assert isinstance(failures[0], TransportClosed)
    if end != "peer":
        with pytest.raises(TransportClosed, match="shut down on this side"):
            one.send(b"x")
        with pytest.raises(TransportClosed, match="shut down on this side"):
            one.recv_into(memoryview(bytearray(1)))
    one.shutdown()
    one.close()
    one.close()
    assert one.unsent_bytes() == 0


def test_an_end_in_the_middle_is_an_error_not_a_short_read(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    one.send(b"abc")
    one.close()
    with pytest.raises(TransportClosed, match="closed the connection"):
        two.recv_into(memoryview(bytearray(4)))


def test_a_reset_is_a_transport_closed(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    two._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    two.close()
    with pytest.raises(TransportClosed) as caught:
        one.recv_into(memoryview(bytearray(1)))
    assert caught.value.remedy
    with pytest.raises(TransportError):
        one.send_ranges(memoryview(bytes(9)), np.array([[0, 9]], dtype=np.uint64))


def test_unsent_bytes_counts_down(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    assert one.unsent_bytes() == 0
    one.set_timeout(0.1)
    sent: list[int] = []
    with pytest.raises(TransportTimeout):
        send_for_ever(one, 65_536, sent)
    assert one.unsent_bytes() > 0
    two.recv_into(memoryview(bytearray(sum(sent))))
    deadline = time.monotonic() + 60
    # what the interrupted last call had already given to the kernel may still be in flight
    while one.unsent_bytes() > 65_536 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.unsent_bytes() <= 65_536


def test_waiting_does_not_hold_the_gil(pair: tuple[TcpChannel, TcpChannel]) -> None:
    one, two = pair
    whole = np.array([[0, 8]], dtype=np.uint64)
    thread, failures = in_thread(lambda: one.recv_ranges(memoryview(bytearray(8)), whole))
    began = time.monotonic()
    time.sleep(0.05)
    assert time.monotonic() - began < 2
    two.send(b"12345678")
    thread.join(60)
    assert not failures


def test_socket_options(pair: tuple[TcpChannel, TcpChannel]) -> None:
    for end in pair:
        raw = end._socket
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == channel_module.USER_TIMEOUT_MS


def test_more_empty_ranges_than_one_call_takes() -> None:
    ranges = np.array([(0, 0)] * (vectors.IOV_MAX + 1) + [(0, 1)], dtype=np.uint64)
    vector = vectors.Vector(memoryview(bytearray(1)), ranges)
    assert vector.total == 1
    assert vectors._Msghdr.from_address(vector.window()).iovlen == 1
