"""Entropy and console."""

from __future__ import annotations

from typing import Any

BUFFER = 0x30_0000


def test_entropy(bench: Any) -> None:
    driver = bench.driver(bench.pc(), 1)
    driver.start()
    driver.pc.memory.write(BUFFER, bytes(4096))
    driver.send((BUFFER, 64), (BUFFER + 2048, 64))
    assert driver.wait() == [(0, 128)]
    first = driver.pc.memory.read(BUFFER, 64)
    assert first != bytes(64)
    assert first != driver.pc.memory.read(BUFFER + 2048, 64)
    assert driver.pc.memory.read(BUFFER + 64, 100) == bytes(100)
    assert (BUFFER, 64) in driver.pc.written


def test_entropy_is_bounded(bench: Any) -> None:
    driver = bench.driver(bench.pc(), 1)
    driver.start()
    driver.send((BUFFER, 1 << 20))
    assert driver.wait() == [(0, 65536)]


def test_console_output(bench: Any) -> None:
    pc = bench.pc(console=True)
    driver = bench.driver(pc, 2)
    driver.start(queues=2)
    driver.send((BUFFER, b"hello, "), (BUFFER + 64, b"world\n"), number=1)
    assert driver.wait(1) == [(0, 0)]
    assert b"".join(pc.output) == b"hello, world\n"


def test_console_input_goes_there_once_the_driver_is_ready(bench: Any) -> None:
    pc = bench.pc(console=True)
    device = pc.device("virtio.console")
    assert device.serial_input(b"early") == 0, "left for the serial port"
    driver = bench.driver(pc, 2)
    driver.start(queues=2)
    assert device.serial_input(b"typed") == 5
    driver.send((BUFFER, 3))
    assert driver.wait() == [(0, 3)]
    driver.send((BUFFER + 16, 8))
    assert driver.wait() == [(0, 2)]
    assert pc.memory.read(BUFFER, 3) + pc.memory.read(BUFFER + 16, 2) == b"typed"
    assert device.serial_input(b"x" * 5000) == 4096, "bounded"


def test_console_input_travels(bench: Any) -> None:
    pc = bench.pc(console=True)
    bench.driver(pc, 2).start(queues=2)
    pc.device("virtio.console").serial_input(b"typed")
    payload = pc.device("virtio.console").save()
    other = bench.pc(console=True)
    other.device("virtio.console").restore(payload)
    driver = bench.driver(other, 2)
    driver.tails, driver.seen = {0: 0}, {0: 0}
    driver.send((BUFFER, 8))
    assert driver.wait() == [(0, 5)]


def test_too_much_output_at_once_breaks_the_device_and_nothing_else(bench: Any) -> None:
    pc = bench.pc(console=True)
    driver = bench.driver(pc, 2)
    driver.start(queues=2)
    driver.descriptors(1, [(0, 1 << 20, 0, 0)])
    driver.make_available(1, 0)
    assert driver.read(1, 0x14, 1) & 64
