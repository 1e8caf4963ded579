"""The 8259 pair."""

from __future__ import annotations

from typing import Any

import pytest

from vmf.errors import ConfigError


def test_priorities_nesting_and_the_cascade(pc: Any) -> None:
    pc.init_pics()
    lines = {number: pc.pic.line(number) for number in (1, 5, 9, 12)}
    for line in lines.values():
        line.set_level(True)
    assert pc.interrupts() == [0x31, 0x39, 0x3C, 0x35]  # the slave stands at input 2: before 5
    assert not pc.pic.pending()


def test_a_request_in_service_blocks_lower_ones_only(pc: Any) -> None:
    pc.init_pics()
    pc.pic.line(5).set_level(True)
    assert pc.pic.acknowledge() == 0x35
    pc.pic.line(6).set_level(True)
    assert not pc.pic.pending()
    pc.pic.line(3).set_level(True)
    assert pc.pic.pending()
    assert pc.pic.acknowledge() == 0x33
    pc.outb(0x20, 0x20)  # ends 3
    assert not pc.pic.pending()
    pc.outb(0x20, 0x65)  # specific: ends 5
    assert pc.pic.acknowledge() == 0x36


def test_edges_latch_once_and_masked_requests_wait(pc: Any) -> None:
    pc.init_pics(mask=0x10)
    line = pc.pic.line(4)
    line.set_level(True)
    assert not pc.pic.pending()
    pc.outb(0x21, 0)
    assert pc.interrupts() == [0x34]
    assert not pc.pic.pending(), "a level that stays high is no new edge"
    line.set_level(False)
    line.set_level(True)
    assert pc.interrupts() == [0x34]


def test_level_triggered_inputs_ask_until_the_wire_falls(pc: Any) -> None:
    pc.init_pics()
    pc.outb(0x4D1, 0x08)
    pc.outb(0x4D0, 0xFF)
    assert (pc.inb(0x4D0), pc.inb(0x4D1)) == (0xF8, 0x08)
    line = pc.pic.line(11)
    line.set_level(True)
    assert pc.interrupts(limit=3) == [0x3B] * 3
    line.set_level(False)
    assert not pc.pic.pending()


def test_wires_on_one_input_are_ored(pc: Any) -> None:
    pc.init_pics()
    pc.outb(0x4D1, 0x08)
    first, second = pc.pic.line(11), pc.pic.line(11)
    first.set_level(True)
    second.set_level(True)
    first.set_level(False)
    assert pc.pic.pending()
    second.set_level(False)
    assert not pc.pic.pending()


def test_a_request_that_has_gone_gives_the_spurious_vector(pc: Any) -> None:
    pc.init_pics()
    pc.outb(0x4D0, 0x20)
    line = pc.pic.line(5)
    line.set_level(True)
    assert pc.pic.pending()
    line.set_level(False)
    assert pc.pic.acknowledge() == 0x37
    pc.outb(0x20, 0x0B)
    assert pc.inb(0x20) == 0, "a spurious interrupt is not in service"


def test_automatic_eoi_and_rotation(pc: Any) -> None:
    pc.outb(0x20, 0x13)  # single
    pc.outb(0x21, 0x40, 0x03)
    pc.outb(0x20, 0x80)  # rotate in automatic EOI mode
    lines = [pc.pic.line(number) for number in (0, 1)]
    seen = []
    for _ in range(4):
        for line in lines:
            line.set_level(False)
            line.set_level(True)
        seen.append(pc.pic.acknowledge())
    assert seen == [0x40, 0x41, 0x40, 0x41]


def test_rotation_by_command(pc: Any) -> None:
    pc.init_pics()
    pc.outb(0x20, 0xC3)  # input 3 lowest, so 4 is highest
    for number in (1, 3, 4):
        pc.pic.line(number).set_level(True)
    vectors = []
    for _ in range(3):
        vectors.append(pc.pic.acknowledge())
        pc.outb(0x20, 0x20)
    assert vectors == [0x34, 0x31, 0x33]


def test_special_mask_mode_lets_lower_requests_through(pc: Any) -> None:
    pc.init_pics()
    pc.pic.line(3).set_level(True)
    assert pc.pic.acknowledge() == 0x33
    pc.outb(0x21, 0x08)
    pc.outb(0x20, 0x68)
    pc.pic.line(6).set_level(True)
    assert pc.pic.acknowledge() == 0x36


def test_special_fully_nested_mode_nests_within_the_slave(pc: Any) -> None:
    pc.outb(0x20, 0x11)
    pc.outb(0x21, 0x30, 0x04, 0x11)
    pc.outb(0xA0, 0x11)
    pc.outb(0xA1, 0x38, 0x02, 0x01)
    pc.pic.line(12).set_level(True)
    assert pc.pic.acknowledge() == 0x3C
    pc.pic.line(9).set_level(True)
    assert pc.pic.acknowledge() == 0x39


def test_polling_is_an_acknowledge(pc: Any) -> None:
    pc.init_pics()
    pc.pic.line(6).set_level(True)
    pc.outb(0x20, 0x0C)
    assert pc.inb(0x20) == 0x86
    assert not pc.pic.pending()
    pc.outb(0x20, 0x0C)
    assert pc.inb(0x20) == 0
    pc.outb(0x20, 0x0B)
    assert pc.inb(0x20) == 0x40


def test_mask_register_reads_back_as_linux_probes_it(pc: Any) -> None:
    pc.outb(0xA1, 0xFF)
    pc.outb(0x21, 0xFB)
    assert pc.inb(0x21) == 0xFB


@pytest.mark.parametrize("number", [-1, 2, 16])
def test_there_is_no_line_to_the_cascade_or_beyond(pc: Any, number: int) -> None:
    with pytest.raises(ConfigError, match="no ISA interrupt line"):
        pc.pic.line(number)
