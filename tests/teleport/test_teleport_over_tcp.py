"""Teleports of fake machines with the real dirty trackers over the real TCP transport."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from vmf.errors import TeleportError
from vmf.memory.dirty import DirtyTracker, tracker_kinds
from vmf.memory.guest import HUGE_PAGE_SIZE, PAGE_SIZE, GuestMemory
from vmf.teleport.progress import TeleportSummary
from vmf.teleport.source import SourceOptions, teleport_source
from vmf.teleport.target import wait_for_teleport
from vmf.transport.base import Address

MIB = 1 << 20


def tracker_of(name: str):
    kind = next(kind for kind in tracker_kinds() if kind.name == name)
    if reason := kind.unusable():
        pytest.skip(f"the {name} tracker cannot work here: {reason}")

    def make(memory: GuestMemory) -> DirtyTracker:
        return kind.make(memory)

    return make


def tcp_teleport(source, target, **options) -> tuple[TeleportSummary, TeleportSummary]:
    transport = pytest.importorskip("vmf_transport_tcp.transport").TcpTransport()
    listener = transport.listen(Address("tcp", "127.0.0.1", 0))
    arrived: list[TeleportSummary] = []
    thread = threading.Thread(target=lambda: arrived.append(wait_for_teleport(target, listener)))
    thread.start()
    channel = transport.connect(listener.address, 10)
    try:
        summary = teleport_source(source, channel, SourceOptions(**options))
    finally:
        channel.close()
    thread.join(20)
    listener.close()
    return summary, arrived[0]


@pytest.mark.parametrize("tracker", [kind.name for kind in tracker_kinds()])
def test_a_writing_guest_arrives_byte_for_byte(pair, tracker):
    source = pair.machine("a", 32 * MIB, rate=4000, tracker=tracker_of(tracker))
    target = pair.machine("a2", 32 * MIB)
    source.memory.buffer[: 24 * MIB] = np.random.default_rng(5).bytes(24 * MIB)
    source.memory.buffer[8 * MIB : 12 * MIB] = bytes(4 * MIB)
    source.start()
    seen: dict[str, bytes] = {}
    save, resume = source.save, target.resume

    def saving():
        seen["left"] = bytes(source.memory.buffer)
        return save()

    def resuming(stopped_at_ns: int, running: bool) -> int:
        seen["arrived"] = bytes(target.memory.buffer)
        return resume(stopped_at_ns, running)

    source.save, target.resume = saving, resuming
    summary, arrived = tcp_teleport(source, target)
    assert seen["arrived"] == seen["left"]
    assert summary.tracker == tracker
    assert summary.bytes == arrived.bytes
    assert summary.zero_pages > 0
    assert target.runs
    assert not source.runs


def test_sixteen_gibibytes_almost_untouched_stay_untouched(pair):
    size = 16 << 30
    source = pair.machine("a", size, tracker=tracker_of(tracker_kinds()[0].name))
    target = pair.machine("a2", size)
    for page in (0, 1, 100_000, 4_000_000):
        source.memory.buffer[page * PAGE_SIZE : page * PAGE_SIZE + 8] = page.to_bytes(8, "little")
    source.start()
    summary, _ = tcp_teleport(source, target)
    assert summary.pages == 3
    touched = target.memory.touched_ranges()
    assert int((touched[:, 1] - touched[:, 0]).sum()) <= 3 * HUGE_PAGE_SIZE // PAGE_SIZE  # a huge page for each


def test_a_cut_in_the_middle_of_ram(pair):
    transport = pytest.importorskip("vmf_transport_tcp.transport").TcpTransport()
    listener = transport.listen(Address("tcp", "127.0.0.1", 0))
    source, target = pair.machine("a", 32 * MIB), pair.machine("a2", 32 * MIB)
    source.memory.buffer[:] = np.random.default_rng(5).bytes(32 * MIB)
    source.start()
    cancel = threading.Event()
    messages: list[str] = []
    failed = threading.Event()

    def watch(event) -> None:
        if event.message:
            messages.append(event.message)
            failed.set()

    ended: list[BaseException] = []

    def wait() -> None:
        try:
            wait_for_teleport(target, listener, watch, cancel)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    channel = transport.connect(listener.address, 10)
    send_ranges, batches = channel.send_ranges, 0

    def cutting(base, ranges) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            channel.shutdown()
        send_ranges(base, ranges)

    channel.send_ranges = cutting
    with pytest.raises(TeleportError, match="connection to the target was lost in phase precopy"):
        teleport_source(source, channel)
    channel.close()
    assert source.runs
    assert failed.wait(60)
    assert "connection to the source was lost in phase precopy" in messages[0]
    assert not target.memory.touched_ranges().size
    cancel.set()
    thread.join(60)
    assert not thread.is_alive()
    listener.close()
