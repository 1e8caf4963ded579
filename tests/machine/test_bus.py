"""Port and MMIO dispatch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmf.errors import ConfigError
from vmf.machine.bus import Bus
from vmf.plugins.containment import Culprit

CULPRIT = Culprit("device plugin 'bad' (of culprit 1.0)", "culprit")


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


@pytest.mark.parametrize(
    ("base", "size"),
    [(-1, 1), (0xFFFF, 2), (0, 0), (1, -1), (0x10000, 1), (0.5, 1), (None, 1), (True, 1), (1 << 80, 1)],
)
def test_impossible_ports_are_refused(base: Any, size: Any) -> None:
    bus = Bus().of_plugin(CULPRIT)
    with pytest.raises(ConfigError, match=r"dev of the device plugin 'bad'.* impossible ports"):
        bus.claim_ports("dev", base, size, Recorder())
    assert bus.port_ranges == ()


@pytest.mark.parametrize(
    ("base", "size"), [(-1, 1), (1 << 52, 1), (0, 1 << 53), (0x1000, 0), (0x1000, -4), (1.0, 4), ("a", 4), (4, None)]
)
def test_impossible_addresses_are_refused(base: Any, size: Any) -> None:
    bus = Bus().of_plugin(CULPRIT)
    with pytest.raises(ConfigError, match=r"dev of the device plugin 'bad'.* impossible addresses"):
        bus.claim_mmio("dev", base, size, Recorder())
    assert bus.mmio_ranges == ()


@pytest.mark.parametrize(
    ("base", "size", "over_ram"),
    [
        (0, 0x1000, True),
        (0x7F_F000, 0x2000, True),
        (0x80_0000, 0x1000, False),
        (0xFFFF_F000, 0x2000, True),
        (0xE000_0000, 1 << 40, True),
        (0x1_0040_0000, 0x1000, False),
    ],
)
def test_no_device_is_put_over_ram(base: int, size: int, over_ram: bool) -> None:
    bus = Bus([(0, 8 << 20), (1 << 32, 4 << 20)]).of_plugin(CULPRIT)
    if not over_ram:
        bus.claim_mmio("dev", base, size, Recorder())
        return
    with pytest.raises(ConfigError, match=r"dev of the device plugin 'bad' .* where the machine has RAM"):
        bus.claim_mmio("dev", base, size, Recorder())
    assert bus.mmio_read(base, 4) == 0xFFFF_FFFF


def test_an_overlap_names_both_plugins() -> None:
    bus = Bus()
    bus.of_plugin(CULPRIT).claim_ports("one", 0x100, 4, Recorder())
    with pytest.raises(ConfigError, match=r"two of the device plugin 'other'.* and one of the device plugin 'bad'"):
        bus.of_plugin(Culprit("device plugin 'other' (of x 1)")).claim_ports("two", 0x102, 4, Recorder())


def test_what_handles_no_accesses_is_refused() -> None:
    with pytest.raises(ConfigError, match="without io_write"):
        Bus().claim_ports("dev", 0x80, 1, SimpleNamespace(io_read=lambda _o, _s: 0))  # type: ignore[arg-type]


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
