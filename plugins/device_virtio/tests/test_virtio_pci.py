"""The PCI bus as a guest without ACPI finds it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.errors import ConfigError, StateError
from vmf_device_virtio import plugin

DISK = plugin.FIRST_DRIVE_SLOT


def test_mechanism_1_is_found_as_linux_probes_it(bench: Any) -> None:
    pc = bench.pc()
    pc.bus.port_write(0xCFB, 1, 1)
    pc.bus.port_write(0xCF8, 4, 0x8000_0000)
    assert pc.bus.port_read(0xCF8, 4) == 0x8000_0000
    assert pc.config_read(0, 0x0A, 2) == 0x0600, "a host bridge at 0:0.0"
    assert pc.config_read(9, 0, 4) == 0xFFFF_FFFF, "an empty slot"
    pc.bus.port_write(0xCF8, 4, 0x8000_0000 | 1 << 8)
    assert pc.bus.port_read(0xCFC, 4) == 0xFFFF_FFFF, "a function that is not there"
    pc.bus.port_write(0xCF8, 4, 0x8001_0000)
    assert pc.bus.port_read(0xCFC, 4) == 0xFFFF_FFFF, "a bus that is not there"


def test_firmware_has_assigned_everything(bench: Any) -> None:
    pc = bench.pc(*(bench.drive(bench.image(), port) for port in range(3)))
    seen = set()
    for slot in (plugin.RNG_SLOT, DISK, DISK + 1, DISK + 2):
        bar = pc.config_read(slot, 0x10, 4)
        assert 0xE000_0000 <= bar < 0xFEC0_0000
        assert bar & 0x3FFF == 0
        seen.add(bar)
        assert pc.config_read(slot, 4, 2) & 2
        line = pc.config_read(slot, 0x3C, 1)
        assert line in (5, 9, 10, 11)
        assert pc.config_read(slot, 0x3D, 1) == 1
        assert (pc.elcr[0x4D0] | pc.elcr[0x4D1] << 8) >> line & 1, "level-triggered"
    assert len(seen) == 4


def test_a_register_is_sized_and_moved(bench: Any) -> None:
    pc = bench.pc(bench.drive(bench.image()))
    old = pc.config_read(DISK, 0x10, 4)
    pc.config_write(DISK, 4, 2, 0)
    assert pc.bus.mmio_read(old, 4) == 0xFFFF_FFFF, "not decoded"
    pc.config_write(DISK, 0x10, 4, 0xFFFF_FFFF)
    assert pc.config_read(DISK, 0x10, 4) == 0xFFFF_C000
    new = 0xF000_4000
    pc.config_write(DISK, 0x10, 4, new)
    pc.config_write(DISK, 4, 2, 2)
    assert pc.bus.mmio_read(new + 0x12, 2) == 1, "number of queues"
    assert pc.bus.mmio_read(old, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("place", [0, 0x1000_0000, 0xDFFF_C000, 0xFEC0_0000, 0xFFFF_C000])
def test_no_register_is_decoded_outside_of_the_hole(bench: Any, place: int) -> None:
    pc = bench.pc(bench.drive(bench.image()))
    pc.config_write(DISK, 0x10, 4, place)
    assert {claimed.base >> 28 for claimed in pc.bus.mmio_ranges} == {0xE}
    assert all(claimed.owner != "virtio.blk" for claimed in pc.bus.mmio_ranges)


def test_two_registers_at_one_place_leave_the_first(bench: Any) -> None:
    pc = bench.pc(bench.drive(bench.image(), 0), bench.drive(bench.image(), 1))
    first = pc.config_read(DISK, 0x10, 4)
    pc.config_write(DISK + 1, 0x10, 4, first)
    before = len(pc.bus.mmio_ranges)
    pc.config_write(DISK, 0x10, 4, 0xF100_0000)
    pc.config_write(DISK + 1, 0x10, 4, 0xF200_0000)
    assert len(pc.bus.mmio_ranges) == before + 4
    assert pc.bus.mmio_read(0xF200_0012, 2) == 1


def test_registers_by_way_of_configuration_space(bench: Any) -> None:
    """VIRTIO_PCI_CAP_PCI_CFG, for firmware that cannot reach memory registers."""
    pc = bench.pc(bench.drive(bench.image()))
    at = pc.config_read(DISK, 0x34, 1)
    while pc.config_read(DISK, at + 3, 1) != 5:
        at = pc.config_read(DISK, at + 1, 1)
    pc.config_write(DISK, at + 8, 4, 0x14)
    pc.config_write(DISK, at + 12, 4, 1)
    pc.config_write(DISK, at + 16, 4, 3)
    assert pc.config_read(DISK, at + 16, 1) == 3
    assert pc.bus.mmio_read(pc.config_read(DISK, 0x10, 4) + 0x14, 1) == 3
    pc.config_write(DISK, at + 8, 4, 0x7FFF_FFFF)
    pc.config_write(DISK, at + 16, 4, 3)  # nowhere: ignored
    pc.config_read(DISK, at + 16, 4)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)))
)
def test_configuration_space_takes_anything(bench: Any, accesses: list[tuple[int, int, int, int]]) -> None:
    pc = bench.pc(bench.drive(bench.image()), console=True)
    for slot, offset, size, value in accesses:
        offset -= offset % size
        pc.config_write(slot, offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= pc.config_read(slot, offset, size) < 1 << 8 * size
        assert pc.config_read(DISK, 0, 4) == 0x1042_1AF4
    state = [device.save() for device in pc.devices]
    for device, payload in zip(pc.devices, state, strict=True):
        device.restore(payload)
    assert [device.save() for device in pc.devices] == state
    for device in pc.devices:
        device.close()
    bench.made.clear()


def test_the_bridge_keeps_its_address_across_a_teleport(bench: Any) -> None:
    source, target = bench.pc(), bench.pc()
    source.bus.port_write(0xCF8, 4, 0x8000_0808)
    payload = source.device("pci.host").save()
    target.device("pci.host").restore(payload)
    assert target.bus.port_read(0xCF8, 4) == 0x8000_0808


def test_another_slot_is_refused(bench: Any) -> None:
    payload = bench.pc(bench.drive(bench.image())).device("virtio.blk").save()
    body = dict(payload.body)
    body["function"] = body["function"] | {"slot": 7}
    device = bench.pc(bench.drive(bench.image())).device("virtio.blk")
    with pytest.raises(StateError, match="slot 7 at the source"):
        device.restore(type(payload)(payload.kind, payload.version, body))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rgn": True}, "rgn is not a setting"), ({"rng": 1}, "rng is 1"), ({"console": "y"}, "'y'")],
)
def test_wrong_options_are_named(bench: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.pc(**options)


def test_too_many_drives(bench: Any) -> None:
    with pytest.raises(ConfigError, match="29 drives are more"):
        bench.pc(*(bench.drive(bench.image(4096), port) for port in range(29)))


def test_a_claimed_drive_is_left_alone(bench: Any) -> None:
    drive = bench.drive(bench.image())
    drive.claim("floppy")
    assert [device.kind for device in bench.pc(drive, rng=False).devices] == ["pci.host"]
