"""The disk: requests, refusals, and what happens to requests under way."""

from __future__ import annotations

import random
import struct
import threading
from typing import Any

import pytest

from vmf.device.base import Payload
from vmf.errors import StateError
from vmf.storage import DriveType
from vmf_device_virtio.block import COLD_READS

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPPORTED = 0, 1, 2
HEAD, DATA, STATUS = 0x20_0000, 0x20_1000, 0x2F_0000
F_FLUSH = 1 << 9


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def status(driver: Any) -> int:
    return driver.pc.memory.read(STATUS, 1)[0]


def ask(driver: Any, kind: int, sector: int = 0, *parts: tuple[int, Any]) -> int:
    """One request to its end; its status."""
    driver.pc.memory.write(STATUS, b"\xee")
    driver.send((HEAD, header(kind, sector)), *parts, (STATUS, 1))
    driver.wait()
    return status(driver)


@pytest.mark.parametrize("at_once", [False, True])
def test_read_and_write(bench: Any, at_once: bool) -> None:
    image = bench.image()
    image.at_once = at_once
    driver = bench.disk(image)
    data = random.Random(1).randbytes(4096)
    assert ask(driver, OUT, 8, (DATA, data[:1024]), (DATA + 0x2000, data[1024:])) == OK
    assert image.content[4096:8192] == data
    driver.pc.written.clear()
    driver.send((HEAD, header(IN, 9)), (DATA + 0x4000, 512), (DATA + 0x8000, 1536), (STATUS, 1))
    assert driver.wait() == [(0, 2049)]
    read = driver.pc.memory.read(DATA + 0x4000, 512) + driver.pc.memory.read(DATA + 0x8000, 1536)
    assert read == data[512:2560]
    assert {(DATA + 0x4000, 512), (DATA + 0x8000, 1536)} <= set(driver.pc.written), "the engine is told"
    assert driver.pc.interrupted()
    assert driver.read(3, 0, 1) == 1
    assert not driver.pc.interrupted()
    assert driver.read(3, 0, 1) == 0


def test_buffers_may_be_cut_anywhere(bench: Any) -> None:
    """Section 2.7.4: a driver divides header, data and status into buffers as it likes."""
    image = bench.image()
    driver = bench.disk(image)
    data, head = bytes(range(256)) * 4, header(OUT, 2)
    driver.send((HEAD, head[:5]), (HEAD + 16, head[5:] + data[:100]), (DATA, data[100:]), (STATUS, 1))
    driver.wait()
    assert status(driver) == OK
    assert image.content[1024:2048] == data
    driver.send((HEAD, header(IN, 2)), (DATA + 0x1000, 1025))
    assert driver.wait() == [(0, 1025)]
    assert driver.pc.memory.read(DATA + 0x1000, 1025) == data + b"\0"


def test_flush_and_the_identity(bench: Any) -> None:
    image = bench.image()
    driver = bench.disk(image, port=3)
    assert ask(driver, FLUSH) == OK
    assert image.log == [("flush",)]
    assert ask(driver, GET_ID, 0, (DATA, 20)) == OK
    assert driver.pc.memory.read(DATA, 20).rstrip(b"\0") == b"vmf-hdd-3"


def test_a_driver_without_flushes_gets_one_after_each_write(bench: Any) -> None:
    image = bench.image()
    driver = bench.disk(image, features=0)
    assert ask(driver, OUT, 0, (DATA, bytes(512))) == OK
    assert ask(driver, ZEROES, 0, (DATA, struct.pack("<QII", 0, 1, 0))) == OK
    assert [entry[0] for entry in image.log] == ["write", "flush", "zeroes", "flush"]


def test_discard_and_write_zeroes(bench: Any) -> None:
    image = bench.image()
    image.content[:] = b"\xff" * len(image.content)
    driver = bench.disk(image)
    segments = struct.pack("<QIIQII", 1, 2, 0, 100, 8, 0)
    assert ask(driver, DISCARD, 0, (DATA, segments)) == OK
    assert ask(driver, ZEROES, 0, (DATA, struct.pack("<QII", 4, 4, 1))) == OK
    assert ask(driver, ZEROES, 0, (DATA, struct.pack("<QII", 8, 1, 0))) == OK
    assert image.log == [
        ("discard", 512, 1024), ("discard", 51200, 4096), ("zeroes", 2048, 2048, True), ("zeroes", 4096, 512, False)
    ]  # fmt: skip
    assert image.content[2048:4608] == bytes(2560)
    assert image.content[4608] == 0xFF


SECTORS = (1 << 20) // 512
REFUSED = {
    "read beyond the end": (IN, SECTORS, ((DATA, 512),), IOERR),
    "write over the end": (OUT, SECTORS - 1, ((DATA, bytes(1024)),), IOERR),
    "sector that overflows": (IN, (1 << 64) - 1, ((DATA, 512),), IOERR),
    "not whole sectors": (IN, 0, ((DATA, 500),), IOERR),
    "unknown type": (77, 0, ((DATA, 512),), UNSUPPORTED),
    "discard with a flag": (DISCARD, 0, ((DATA, struct.pack("<QII", 0, 1, 1)),), UNSUPPORTED),
    "zeroes with an unknown flag": (ZEROES, 0, ((DATA, struct.pack("<QII", 0, 1, 2)),), UNSUPPORTED),
    "discard over the end": (DISCARD, 0, ((DATA, struct.pack("<QII", SECTORS, 1, 0)),), IOERR),
    "zeroes of too much": (ZEROES, 0, ((DATA, struct.pack("<QII", 0, 1 << 31, 0)),), IOERR),
    "half a segment": (DISCARD, 0, ((DATA, bytes(8)),), IOERR),
    "no segment": (DISCARD, 0, (), IOERR),
    "too many segments": (DISCARD, 0, ((DATA, bytes(16 * 17)),), IOERR),
    "no room for the identity": (GET_ID, 0, ((DATA, 19),), IOERR),
}


@pytest.mark.parametrize(("kind", "sector", "parts", "expected"), REFUSED.values(), ids=REFUSED)
def test_refusals(bench: Any, kind: int, sector: int, parts: Any, expected: int) -> None:
    image = bench.image()
    driver = bench.disk(image)
    assert ask(driver, kind, sector, *parts) == expected
    assert image.log == []
    assert ask(driver, FLUSH) == OK, "the disk works on"


def test_storage_errors_reach_the_guest(bench: Any) -> None:
    image = bench.image()
    driver = bench.disk(image)
    image.broken = True
    for kind, part in ((IN, (DATA, 512)), (OUT, (DATA, bytes(512)))):
        assert ask(driver, kind, 0, part) == IOERR
    assert ask(driver, FLUSH) == IOERR
    image.broken = False
    assert ask(driver, FLUSH) == OK


@pytest.mark.parametrize("kind", [DriveType.DVD, DriveType.FLOPPY])
def test_read_only_media(bench: Any, kind: DriveType) -> None:
    image = bench.image()
    driver = bench.disk(image, kind=kind, read_only=True)
    assert driver.offered() & 1 << 5
    assert not driver.offered() & (1 << 13 | 1 << 14)
    assert ask(driver, IN, 0, (DATA, 512)) == OK
    assert ask(driver, OUT, 0, (DATA, bytes(512))) == IOERR
    assert ask(driver, ZEROES, 0, (DATA, struct.pack("<QII", 0, 1, 0))) == IOERR
    assert [entry[0] for entry in image.log] == ["read"]


def test_a_medium_comes_and_goes(bench: Any) -> None:
    drive = bench.drive(None, kind=DriveType.DVD, read_only=True)
    pc = bench.pc(drive)
    driver = bench.driver(pc, 4)
    driver.start()
    assert driver.read(4, 0, 4) == 0, "no sectors"
    assert ask(driver, IN, 0, (DATA, 512)) == IOERR
    generation = driver.read(1, 0x15, 1)
    drive.attach(bench.image())
    drive.size = 1 << 20
    pc.device("virtio.blk").medium_changed(drive)
    assert driver.read(3, 0, 1) & 2, "a configuration change"
    assert driver.read(1, 0x15, 1) == (generation + 1) & 0xFF
    assert driver.read(4, 0, 4) == SECTORS
    assert ask(driver, IN, 0, (DATA, 512)) == OK


def test_a_broken_ring_asks_for_a_reset(bench: Any) -> None:
    driver = bench.disk(bench.image())
    driver.descriptors(0, [(1 << 40, 16, 0, 0)])
    driver.make_available(0, 0)
    assert driver.read(1, 0x14, 1) & 64
    assert driver.read(3, 0, 1) & 2
    driver.notify(0)
    driver.start()
    assert ask(driver, FLUSH) == OK


def test_features_that_are_not_offered_are_refused(bench: Any) -> None:
    driver = bench.driver(bench.pc(bench.drive(bench.image())), 4)
    driver.write(1, 0x14, 1, 3)
    driver.write(1, 8, 4, 0)
    driver.write(1, 0xC, 4, 1 << 12)
    driver.write(1, 0x14, 1, 11)
    assert not driver.read(1, 0x14, 1) & 8


# -- requests under way


def test_quiesce_waits_for_requests_and_tells_the_guest(bench: Any) -> None:
    image = bench.image()
    image.go.clear()
    driver = bench.disk(image)
    driver.size = 8
    for number in range(2):
        base = DATA + number * 0x1000
        driver.send(
            (base, header(OUT, number)), (base + 64, bytes([number + 1]) * 512), (base + 1024, 1), head=3 * number
        )
    assert driver.used() == []
    device = driver.pc.device("virtio.blk")
    release(image)
    device.quiesce()
    assert sorted(driver.used()) == [(0, 1), (3, 1)]
    assert image.content[:1024] == b"\1" * 512 + b"\2" * 512
    assert driver.pc.interrupted()
    payload = device.save()
    other = bench.driver(bench.pc(bench.drive(image)), 4)
    target = other.pc.device("virtio.blk")
    target.restore(Payload(payload.kind, payload.version, payload.body))
    assert other.pc.interrupted(), "the interrupt travels"
    other.tails, other.seen = driver.tails, driver.seen
    assert other.read(3, 0, 1) == 1
    assert ask(other, IN, 1, (DATA, 512)) == OK
    assert other.pc.memory.read(DATA, 512) == b"\2" * 512
    assert target.save().body["queues"][0]["last_avail"] == 3


def release(image: Any) -> None:
    """Let storage answer, a moment later."""
    threading.Timer(0.05, image.go.set).start()


@pytest.mark.parametrize("waits", [False, True])
def test_writes_that_come_together(bench: Any, waits: bool) -> None:
    """Small and large ones: into the page cache by one thread, in their order; to storage that waits, by several."""
    image = bench.image(8 << 20)
    image.writes_wait = waits
    by: dict[int, set[str]] = {}
    write = image.writev

    def writev(offset: int, buffers: Any) -> None:
        write(offset, buffers)
        by.setdefault(sum(map(len, buffers)), set()).add(threading.current_thread().name)

    image.writev = writev
    image.go.clear()
    driver = bench.disk(image)
    sizes = [512, 32768, 4096, 2048]
    data = [random.Random(size).randbytes(size) for size in sizes]
    for number, content in enumerate(data):
        at = HEAD + number * 0x1_8000
        driver.send((at, header(OUT, number * 256) + content), (at + 0x1_7000, 1), head=2 * number, notify=False)
    driver.notify(0)
    image.go.set()
    heads = [head for head, _ in driver.wait(count=len(sizes))]
    assert sorted(heads) == [0, 2, 4, 6]
    for number, content in enumerate(data):
        assert image.content[number * 131072 :][: len(content)] == content
        assert driver.pc.memory.read(HEAD + number * 0x1_8000 + 0x1_7000, 1) == bytes([OK])
    threads = set().union(*by.values())
    if waits:
        assert not any("cached" in name for name in threads)
    else:
        assert len(threads) == 1
        small = [length for _, _, length in image.log if length <= 16384]
        assert small == [512, 4096, 2048], "in the order in which the guest made them"


@pytest.mark.parametrize("waits", [False, True])
def test_large_reads(bench: Any, waits: bool) -> None:
    """What is in the page cache is read by the one thread; what is not goes to the others, as does what follows."""
    image = bench.image(8 << 20)
    image.writes_wait = waits
    image.content[:] = random.Random(3).randbytes(len(image.content))
    by: list[str] = []
    read = image.readv

    def readv(offset: int, buffers: Any) -> None:
        by.append("cached" if "cached" in threading.current_thread().name else "others")
        read(offset, buffers)

    image.readv = readv
    driver = bench.disk(image)
    size = 256 << 10
    for number, cached in enumerate([True, True, False, True, False]):
        image.at_once = cached
        assert ask(driver, IN, 512 * number, (0x40_0000, size)) == OK
        assert driver.pc.memory.read(0x40_0000, size) == image.content[size * number :][:size]
    if waits:
        assert by == ["others"] * 5
    else:
        assert by == ["cached", "cached", "others", "others", "others"]
        image.at_once = True
        for _ in range(COLD_READS):
            assert ask(driver, IN, 0, (0x40_0000, size)) == OK
        assert by[-1] == "cached", "it is looked for again after a while"


def test_quiesce_waits_for_a_read_that_is_handed_on(bench: Any) -> None:
    image = bench.image(8 << 20)
    image.content[:512] = b"\7" * 512
    driver = bench.disk(image)
    driver.send((HEAD, header(IN, 0)), (0x40_0000, 256 << 10), (STATUS, 1))
    driver.pc.device("virtio.blk").quiesce()
    assert driver.used() == [(0, (256 << 10) + 1)]
    assert status(driver) == OK
    assert driver.pc.memory.read(0x40_0000, 512) == b"\7" * 512


def test_requests_in_many_buffers(bench: Any) -> None:
    """By an indirect table, as Linux does; the engine is told of all that was written."""
    image = bench.image(8 << 20)
    driver = bench.disk(image)
    data = random.Random(4).randbytes(64 * 4096)
    places = [0x40_0000 + 0x2000 * n for n in range(64)]
    for kind in (OUT, IN):
        rows = [(HEAD, 16, 0)] + [(place, 4096, 0 if kind == OUT else 2) for place in places] + [(STATUS, 1, 2)]
        table = b"".join(
            struct.pack("<QIHH", gpa, size, flags | (n < 65), n + 1) for n, (gpa, size, flags) in enumerate(rows)
        )
        driver.pc.memory.write(HEAD, header(kind, 8))
        driver.pc.memory.write(STATUS, b"\xee")
        for n, place in enumerate(places):
            driver.pc.memory.write(place, data[4096 * n :][:4096] if kind == OUT else bytes(4096))
        driver.pc.memory.write(0x60_0000, table)
        driver.descriptors(0, [(0x60_0000, len(table), 4, 0)])
        driver.pc.written.clear()
        driver.make_available(0, 0)
        assert driver.wait() == [(0, len(data) + 1 if kind == IN else 1)]
        assert status(driver) == OK
        assert image.content[4096 : 4096 + len(data)] == data
        for n, place in enumerate(places):
            assert driver.pc.memory.read(place, 4096) == data[4096 * n :][:4096]
        if kind == IN:
            assert {(place, 4096) for place in places} <= set(driver.pc.written)


def test_a_reset_waits_too(bench: Any) -> None:
    image = bench.image()
    image.go.clear()
    driver = bench.disk(image)
    driver.send((HEAD, header(IN)), (DATA, 512), (STATUS, 1))
    release(image)
    driver.write(1, 0x14, 1, 0)
    assert image.log == [("read", 0, 512)], "it was finished before the rings were forgotten"
    driver.start()
    assert ask(driver, FLUSH) == OK


def test_storage_that_does_not_answer_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bench.image()
    image.go.clear()
    driver = bench.disk(image, port=5)
    driver.send((HEAD, header(FLUSH)), (STATUS, 1))
    threads = driver.pc.device("virtio.blk")._threads
    with pytest.raises(StateError, match="disk at port 5: 1 requests"):
        threads.drain(0.05)
    image.go.set()
    driver.wait()
    assert status(driver) == OK


def test_indices_wrap(bench: Any) -> None:
    """More requests than 16 bits count."""
    image = bench.image()
    image.at_once = True
    driver = bench.disk(image)
    driver.descriptors(0, [(HEAD, 16, 1, 1), (DATA, 512, 3, 2), (STATUS, 1, 2, 0)])
    driver.pc.memory.write(HEAD, header(IN))
    for _ in range(0x10002):
        driver.make_available(0, 0)
    assert driver.used() == [(0, 513)] * 2
    assert driver.pc.device("virtio.blk").queues[0].used_index == 2


def test_another_disk_is_refused(bench: Any) -> None:
    payload = bench.disk(bench.image()).pc.device("virtio.blk").save()
    smaller = bench.disk(bench.image(4096)).pc.device("virtio.blk")
    with pytest.raises(StateError, match="has 1048576 bytes at the source and 4096 here"):
        smaller.restore(payload)
    read_only = bench.disk(bench.image(), read_only=True).pc.device("virtio.blk")
    with pytest.raises(StateError):
        read_only.restore(payload)


@pytest.mark.parametrize("waits", [False, True])
def test_a_full_disk_is_no_broken_one(bench: Any, waits: bool) -> None:
    """The guest hears nothing, the machine pauses, and what there was no room for is written at the next try."""
    image = bench.image()
    image.writes_wait = waits
    driver = bench.disk(image, port=3)
    device, pc = driver.pc.device("virtio.blk"), driver.pc
    image.full = True
    pc.memory.write(STATUS, b"\xee\xee")
    driver.send((HEAD, header(OUT, 2)), (DATA, b"a" * 512), (STATUS, 1))
    segment = struct.pack("<QII", 9, 1, 0)
    driver.send((HEAD + 0x100, header(ZEROES)), (DATA + 0x1000, segment), (STATUS + 1, 1), head=4)
    pc.run_posts(lambda: len(pc.pauses) == 2)
    assert driver.used() == []
    assert pc.memory.read(STATUS, 2) == b"\xee\xee"
    assert "port 3" in pc.pauses[0]
    assert "full" in pc.pauses[0]
    device.quiesce()  # a pause: there is nothing under way
    assert "room" in device.migration_blocker()
    with pytest.raises(StateError, match="wait for room"):
        device.save()
    device.resumed()  # too early
    pc.run_posts(lambda: len(pc.pauses) == 4)
    assert driver.used() == []
    image.full = False
    image.content[9 * 512 : 10 * 512] = b"x" * 512
    device.resumed()
    assert sorted(driver.wait(count=2)) == [(0, 1), (4, 1)]
    assert pc.memory.read(STATUS, 2) == b"\0\0"
    assert image.content[1024:1536] == b"a" * 512
    assert image.content[9 * 512 : 10 * 512] == bytes(512)
    assert device.migration_blocker() == ""
    device.save()


def test_a_reset_forgets_what_waits_for_room(bench: Any) -> None:
    image = bench.image()
    image.full = True
    driver = bench.disk(image)
    driver.send((HEAD, header(OUT)), (DATA, bytes(512)), (STATUS, 1))
    driver.pc.run_posts(lambda: bool(driver.pc.pauses))
    device = driver.pc.device("virtio.blk")
    device.reset()
    image.full = False
    device.resumed()
    device.quiesce()
    assert not image.log
    assert device.migration_blocker() == ""


def test_the_end_waits_for_no_storage(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmf_device_virtio import block

    monkeypatch.setattr(block, "END_SECONDS", 0.05)
    image = bench.image()
    image.go.clear()
    driver = bench.disk(image)
    driver.send((HEAD, header(OUT)), (DATA, bytes(512)), (STATUS, 1))
    driver.pc.device("virtio.blk").close()
    assert image.aborted
