"""The 16550A."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

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
    while waiting or pc.inb(LSR) & 1:
        waiting = waiting[pc.uart.serial_input(waiting) :]
        for _ in range(5):
            if pc.inb(LSR) & 1:
                received.append(pc.inb(RBR))
    assert received == data


def test_back_pressure(pc: Any) -> None:
    pc.outb(IIR, 0x01)
    taken = pc.uart.serial_input(bytes(10_000))
    assert 4000 < taken < 5000
    taken += pc.uart.serial_input(bytes(16))
    assert pc.uart.serial_input(b"x") == 0
    pc.inb(RBR)
    assert pc.uart.serial_input(b"xy") == 1


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
    pc.uart.serial_input(b"x" * 10)
    pc.outb(IIR, 0x03)
    assert not pc.inb(LSR) & 1
