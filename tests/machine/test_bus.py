"""Port and MMIO dispatch."""

from __future__ import annotations

import pytest

from vmf.errors import ConfigError
from vmf.machine.bus import Bus


class Recorder:
    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def io_read(self, offset: int, size: int) -> int:
        return offset * 16 + size

    def io_write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_accesses_reach_the_owner_with_their_offset() -> None:
    bus, device = Bus(), Recorder()
    bus.claim_ports("dev", 0x3F8, 8, device)
    bus.claim_mmio("dev", 0xFED0_0000, 0x1000, device)
    assert bus.port_read(0x3FA, 1) == 0x21
    assert bus.mmio_read(0xFED0_0010, 4) == 0x104
    bus.port_write(0x3FF, 1, 9)
    bus.mmio_write(0xFED0_0FF8, 8, 7)
    assert device.writes == [(7, 1, 9), (0xFF8, 8, 7)]


def test_what_nobody_claims_reads_all_ones_and_swallows_writes() -> None:
    bus = Bus()
    bus.claim_mmio("dev", 0x1000, 0x1000, Recorder())
    assert [bus.port_read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    assert bus.mmio_read(0x2000, 8) == 0xFFFF_FFFF_FFFF_FFFF
    assert bus.mmio_read(0xFFF, 1) == 0xFF
    bus.port_write(0x80, 1, 1)
    bus.mmio_write(0x2000, 4, 1)


@pytest.mark.parametrize(("base", "size"), [(0x3F8, 1), (0x3F0, 9), (0x3FF, 8), (0x300, 0x200)])
def test_overlaps_name_both_owners(base: int, size: int) -> None:
    bus = Bus()
    bus.claim_ports("first", 0x3F8, 8, Recorder())
    bus.claim_mmio("first", 0x3F8, 8, Recorder())
    for claim in (bus.claim_ports, bus.claim_mmio):
        with pytest.raises(ConfigError, match="second and first"):
            claim("second", base, size, Recorder())


@pytest.mark.parametrize(("base", "size"), [(-1, 1), (0xFFFF, 2), (0, 0)])
def test_impossible_ports_are_refused(base: int, size: int) -> None:
    with pytest.raises(ConfigError):
        Bus().claim_ports("dev", base, size, Recorder())


def test_ranges_can_be_given_up_and_claimed_elsewhere() -> None:
    bus, device = Bus(), Recorder()
    bus.claim_ports("pci", 0xC000, 4, device)
    bus.claim_mmio("pci", 0xE000_0000, 0x1000, device)
    bus.claim_mmio("other", 0xE000_1000, 0x1000, device)
    bus.release_ports(0xC000)
    bus.release_mmio(0xE000_0000)
    bus.release_mmio(0xE000_0000)
    assert bus.port_read(0xC001, 1) == 0xFF
    assert bus.mmio_read(0xE000_0004, 4) == 0xFFFF_FFFF
    assert bus.mmio_read(0xE000_1000, 4) == 4
    bus.claim_ports("pci", 0xC002, 4, device)
    bus.claim_mmio("pci", 0xE000_0800, 0x800, device)
    assert bus.port_read(0xC003, 1) == 0x11
    assert bus.mmio_read(0xE000_0810, 4) == 0x104
