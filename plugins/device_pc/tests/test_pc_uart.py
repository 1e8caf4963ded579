"""The 16550A."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from vmf_device_pc.uart import BURST_SIZE, FIFO_SIZE, OPENING_NS, PAUSE_MAX_NS, QUEUE_SIZE, STALL_NS

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(0x3F8, 0x400)


def test_output_comes_in_lines_and_a_prompt_comes_soon(pc: Any) -> None:
    for byte in b"hello\nprompt# ":
        assert pc.inb(LSR) & 0x60 == 0x60
        pc.outb(RBR, byte)
    assert pc.output == [b"hello\n"]
    pc.run_for(500_000)
    assert pc.output == [b"hello\n", b"prompt# "]


def test_output_is_out_before_a_pause_a_save_a_reset_and_a_power_off(pc: Any) -> None:
    for number, end in enumerate((pc.uart.quiesce, pc.uart.save, pc.uart.reset, pc.uart.close)):
        pc.outb(RBR, 0x41 + number)
        end()
    pc.outb(RBR, 0x45)
    pc.outb(0xF4, 0)
    assert b"".join(pc.output) == b"ABCDE"
    assert pc.requests == ["power off"]


@given(st.binary(max_size=3000), st.booleans())
def test_every_byte_goes_out_once_and_in_order(make_pc: Any, data: bytes, interrupts: bool) -> None:
    pc = make_pc()
    pc.outb(IER, 2 if interrupts else 0)
    for byte in data:
        pc.outb(RBR, byte)
    pc.uart.flush()
    assert b"".join(pc.output) == data


@given(st.binary(max_size=9000), st.booleans())
def test_every_byte_comes_in_once_and_in_order(make_pc: Any, data: bytes, fifo: bool) -> None:
    pc = make_pc()
    pc.outb(IIR, 0x01 if fifo else 0)
    waiting, received = data, bytearray()
    while len(received) < len(data):
        waiting = waiting[pc.uart.serial_input(waiting) :]
        for _ in range(50):
            if pc.inb(LSR) & 1:
                received.append(pc.inb(RBR))
        pc.run_for(OPENING_NS)
    assert received == data


def test_back_pressure(pc: Any) -> None:
    taken = pc.uart.serial_input(bytes(10_000))
    assert taken == QUEUE_SIZE
    assert pc.uart.serial_input(b"x") == 0
    pc.inb(RBR)
    assert pc.uart.serial_input(b"xy") == 1


def handler(pc: Any, received: bytearray, most: int = 512 * 256) -> int:
    """Linux's interrupt handler: reads while IIR names a cause, but so much at most; how many interrupts came."""
    count = 0
    while pc.interrupts():
        count += 1
        for _ in range(most):
            if pc.inb(IIR) & 1:
                break
            if pc.inb(LSR) & 1:
                received.append(pc.inb(RBR))
    return count


@pytest.mark.parametrize("fcr", [0x00, 0x01, 0x81, 0xC1])
@pytest.mark.parametrize("most", [1, 20, 512 * 256])
def test_input_without_end_lets_the_line_fall_and_never_kills_the_port(pc: Any, fcr: int, most: int) -> None:
    """However few bytes the handler takes before it leaves: an edge follows as long as there is something to read."""
    pc.init_pics()
    pc.outb(IIR, fcr)
    pc.outb(MCR, 0x0B)
    pc.outb(IER, 1)
    data = bytes(range(256)) * (4 if most == 1 else 40)
    waiting, received, interrupts = data, bytearray(), 0
    for _ in range(len(data) * 4):
        waiting = waiting[pc.uart.serial_input(waiting) :]
        interrupts += handler(pc, received, most)
        if len(received) == len(data):
            break
        pc.run_for(STALL_NS)
    assert received == data
    assert interrupts >= len(data) // BURST_SIZE, "the line falls between bursts"
    assert pc.inb(IIR) & 1
    pc.outb(IER, 2)
    assert pc.interrupts() == [0x34], "the other direction lives"


def test_receiving_takes_a_bounded_share_of_the_guests_time(pc: Any) -> None:
    pc.outb(IIR, 0x81)
    pc.outb(MCR, 0x0B)
    pc.outb(IER, 1)
    pc.uart.serial_input(bytes(QUEUE_SIZE))
    busy, left = 0, QUEUE_SIZE
    began = pc.clock.now()
    while left:
        if pc.inb(LSR) & 1:
            pc.inb(RBR)
            left -= 1
            pc.run_for(10_000)
            busy += 10_000
        else:
            pc.run_for(1_000)
    assert busy < 0.3 * (pc.clock.now() - began)


def test_rts_holds_the_sender_off(pc: Any) -> None:
    pc.outb(IIR, 0x81)
    pc.outb(IER, 1)
    pc.outb(MCR, 0x0B)
    pc.uart.serial_input(b"x" * 200)
    pc.inb(RBR)
    pc.outb(MCR, 0x09)
    read = 1
    for _ in range(100):
        pc.run_for(OPENING_NS)
        while pc.inb(LSR) & 1:
            pc.inb(RBR)
            read += 1
    assert read <= 1 + FIFO_SIZE, "no more than was in the FIFO when RTS fell"
    pc.outb(MCR, 0x0B)
    for _ in range(100):
        pc.run_for(OPENING_NS)
        while pc.inb(LSR) & 1:
            pc.inb(RBR)
            read += 1
    assert read == 200


def open_as_linux_does(pc: Any, *, console: bool) -> bytes:
    """serial8250_do_startup and what follows: clear the FIFO, empty the registers, only then listen."""
    read = bytearray()

    def empty() -> None:
        if pc.inb(LSR) & 1:
            read.append(pc.inb(RBR))
        else:
            pc.inb(RBR)
        pc.inb(IIR)
        pc.inb(MSR)

    pc.outb(IIR, 0x01, 0x07, 0x00)
    empty()
    pc.run_for(1_000_000)
    pc.outb(MCR, 0x09 if console else 0x08)
    empty()
    pc.run_for(1_000_000)
    pc.outb(IER, 0x05)
    pc.outb(IIR, 0x81)
    pc.outb(MCR, 0x0B)
    return bytes(read)


@pytest.mark.parametrize("mcr", [0x00, 0x01, 0x03])
def test_what_was_typed_before_the_port_was_opened_is_not_lost(pc: Any, mcr: int) -> None:
    """0x01: Linux's console before the port is opened; 0x03: its early console."""
    pc.init_pics()
    pc.outb(MCR, mcr)
    for number in range(10):
        pc.uart.serial_input(b"typed early %d\n" % number)
        pc.run_for(2 * OPENING_NS)
    assert open_as_linux_does(pc, console=mcr == 1) == b"", "nothing is there to be thrown away"
    received = bytearray()
    for _ in range(1000):
        handler(pc, received)
        pc.run_for(STALL_NS)
    assert received == b"".join(b"typed early %d\n" % number for number in range(10))


def test_a_guest_that_polls_and_never_raises_rts_hears(pc: Any) -> None:
    pc.outb(IIR, 0x07)
    pc.outb(MCR, 0)
    pc.uart.serial_input(b"edk2")
    pc.run_for(2 * OPENING_NS)
    heard = bytearray()
    while pc.inb(LSR) & 1:
        heard.append(pc.inb(RBR))
    assert heard == b"edk2"


def test_the_state_of_the_release_before_bursts_is_read(pc: Any) -> None:
    pc.outb(MCR, 0x0B)
    pc.outb(IER, 1)
    saved = pc.uart.save()
    added = ("burst", "burst_began", "silent_until", "opening_until", "receive_deadline", "read_lately", "looped")
    body = {name: value for name, value in saved.body.items() if name not in added}
    pc.uart.restore(evolve(saved, version=1, body={**body, "fifo": b"a", "queue": b"bc"}))
    received = bytearray()
    for _ in range(10):
        pc.run_for(STALL_NS)
        while pc.inb(LSR) & 1:
            received.append(pc.inb(RBR))
    assert received == b"abc"


def test_receive_interrupts_by_trigger_and_by_timeout(pc: Any) -> None:
    pc.init_pics()
    pc.outb(IIR, 0x41)  # trigger level 4
    pc.outb(IER, 1)
    pc.uart.serial_input(b"abc")
    assert pc.interrupts() == [0x34]
    assert pc.inb(IIR) == 0xCC
    pc.uart.serial_input(b"d")
    assert pc.inb(IIR) == 0xC4
    for byte in b"abcd":
        assert pc.inb(RBR) == byte
    assert pc.inb(IIR) == 0xC1
    pc.uart.serial_input(b"e")
    pc.run_for(PAUSE_MAX_NS)
    assert pc.interrupts() == [0x34]


def test_the_transmitter_interrupt(pc: Any) -> None:
    pc.init_pics()
    pc.outb(IER, 2)
    assert pc.interrupts() == [0x34], "it is empty, and says so when asked to"
    assert pc.inb(IIR) == 0x02
    assert pc.inb(IIR) == 0x01, "reading IIR ends it"
    pc.outb(RBR, 65)
    assert pc.interrupts() == [0x34]
    pc.outb(RBR, 66)
    assert pc.interrupts() == [0x34], "writing without reading IIR makes a new edge"
    pc.outb(IER, 0)
    assert pc.inb(IIR) == 0x01


def test_loopback_and_modem_lines_as_linux_probes_them(pc: Any) -> None:
    assert pc.inb(MSR) == 0xB0
    pc.outb(MCR, 0x1A)
    assert pc.inb(MSR) & 0xF0 == 0x90
    pc.outb(RBR, 0x5A)
    assert pc.inb(LSR) & 1
    assert pc.inb(RBR) == 0x5A
    pc.uart.serial_input(b"held")
    assert not pc.inb(LSR) & 1, "the line is disconnected"
    pc.outb(MCR, 0x0B)
    assert pc.inb(RBR) == ord("h")
    assert pc.output == []


def test_registers_as_linux_probes_them(pc: Any) -> None:
    pc.outb(IER, 0x0F)
    assert pc.inb(IER) == 0x0F
    pc.outb(IER, 0xF0)
    assert pc.inb(IER) == 0
    pc.outb(IIR, 0x01)
    assert pc.inb(IIR) & 0xC0 == 0xC0
    pc.outb(IIR, 0x00)
    assert pc.inb(IIR) & 0xC0 == 0
    pc.outb(SCR, 0xA5)
    assert pc.inb(SCR) == 0xA5
    pc.outb(LCR, 0x80)
    pc.outb(RBR, 0x01)
    pc.outb(IER, 0x02)
    assert (pc.inb(RBR), pc.inb(IER)) == (0x01, 0x02)
    pc.outb(LCR, 0x03)
    assert (pc.inb(IER), pc.inb(LCR)) == (0, 0x03)
    assert pc.output == []


def test_clearing_the_fifo_drops_what_is_in_it(pc: Any) -> None:
    pc.outb(IIR, 0x01)
    pc.outb(IER, 1)
    pc.uart.serial_input(b"x" * 10)
    pc.outb(IIR, 0x03)
    assert not pc.inb(LSR) & 1
    pc.run_for(2 * OPENING_NS)
    assert not pc.inb(LSR) & 1


def test_clearing_the_fifo_in_loopback_returns_nothing(pc: Any) -> None:
    pc.outb(IIR, 0x01)
    pc.outb(MCR, 0x10)
    pc.outb(RBR, 0x41)
    pc.outb(IIR, 0x03)
    pc.outb(MCR, 0x00)
    pc.run_for(2 * OPENING_NS)
    assert not pc.inb(LSR) & 1
