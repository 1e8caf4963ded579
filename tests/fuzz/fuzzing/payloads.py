"""Saved states: vCPU, devices, CPUID tables. Refused with StateError and nothing changed, or taken as they are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs

from fuzzing import Choices, Finding, Target
from fuzzing.edits import edited
from vmf.cpu import codec as cpu_codec
from vmf.cpu.state import GENERAL_REGISTERS, VcpuState
from vmf.cpuid.table import CpuidTable
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.errors import StateError
from vmf.machine.bus import Bus
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.memory.guest import MIB, GuestMemory
from vmf.teleport.protocol import codec
from vmf.testing.cpuid_tables import HOSTS
from vmf_device_pc.cmos import CmosRtc
from vmf_device_pc.plugin import vmf_create_device

_PORTS = (
    0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, *range(0x3F8, 0x400), 0x60, 0x64,
    0x92, 0xCF9,
)  # fmt: skip
_NOW = 1_700_000_000 * 10**9


class Pc:
    """The devices of a PC without a CPU."""

    def __init__(self) -> None:
        self.bus, self.clock = Bus(), MachineClock()
        self.timers = TimerQueue(self.clock)
        provided: list[Any] = []
        self.devices: tuple[Device, ...] = tuple(
            vmf_create_device(
                DeviceEnvironment(
                    bus=self.bus,
                    memory=GuestMemory(MIB),
                    clock=self.clock,
                    timers=self.timers,
                    irq_line=lambda number: provided[1](number),
                    provide_interrupts=lambda controller, lines: provided.extend((controller, lines)),
                    post=lambda function: function(),
                    request_power_off=lambda: None,
                    request_reset=lambda: None,
                    serial_output=lambda data: None,
                )
            )
        )
        self.interrupts = provided[0]
        for device in self.devices:
            if isinstance(device, CmosRtc):
                device._wall_clock = lambda: _NOW  # else what was saved twice would differ
        self.fresh = [device.save() for device in self.devices]

    def used(self, choices: Choices) -> None:
        """A guest goes on with it for a while: no state that was taken may trip the device later."""
        for _ in range(min(choices.number() % 32, 24)):
            number = choices.number()
            port = _PORTS[number % len(_PORTS)]
            if number & 0x80:
                self.bus.port_write(port, 1, choices.number())
            else:
                self.bus.port_read(port, 1)
            if self.interrupts.pending():
                self.interrupts.acknowledge()
        self.clock.set(self.clock.now() + choices.number(4))
        self.timers.run_due()

    def back(self) -> None:
        """As it was made."""
        self.clock.set(0)
        for device, payload in zip(self.devices, self.fresh, strict=True):
            device.restore(payload)


@functools.cache
def pc() -> Pc:
    return Pc()


def decoded(choices: Choices) -> Any:
    """Plain data in CBOR, as it comes off the wire; None for what does not get that far."""
    try:
        return codec.decode(choices.rest())
    except ValueError:
        return None


def device(data: bytes) -> None:
    """A device's state, edited or any plain data at all."""
    choices = Choices(data)
    machine = pc()
    how = choices.number()
    number = how % len(machine.devices)
    one, fresh = machine.devices[number], machine.fresh[number]
    before = one.save()
    if how & 0x80:
        body: Any = decoded(choices)
        payload = attrs.evolve(fresh, body=body) if isinstance(body, dict) else fresh
    else:
        body = edited(dict(fresh.body), choices)
        if not isinstance(body, dict):
            return
        payload = attrs.evolve(fresh, body=body)
    try:
        one.restore(payload)
    except StateError:
        if one.save() != before:
            raise Finding(f"{one.kind}: a state that was refused changed it") from None
        return
    try:
        # What follows from the rest, like the line between the two interrupt controllers, may be put right on the way.
        taken = one.save()
        one.restore(taken)
        if _timeless(one.save()) != _timeless(taken) or taken.body.keys() != payload.body.keys():
            raise Finding(f"{one.kind}: it gives back another state than it took: {one.save()} for {taken}")
        machine.used(choices)
        one.restore(one.save())
    finally:
        machine.back()


def _timeless(payload: Payload) -> Payload:
    """The clock finds out anew when it has to act, as its seconds are those of its host."""
    if payload.kind != CmosRtc.kind:
        return payload
    return attrs.evolve(payload, body={**payload.body, "deadline": None})


def device_seeds() -> Iterator[bytes]:
    for number, fresh in enumerate(pc().fresh):
        yield bytes([number])
        yield bytes([number + 5 * 26]) + codec.encode(dict(fresh.body))  # >= 0x80, and number modulo 5
        for edit in range(1, 24):
            yield bytes([number, 1 + edit % 3, 1, edit, 0, 2, edit % 12, edit * 7 % 256, 3, 1, 2, 3, 0x85, edit])


def vcpu(data: bytes) -> None:
    """A vCPU's state, edited or any plain data at all."""
    choices = Choices(data)
    body = decoded(choices) if choices.number() & 0x80 else edited(_vcpu_body(), choices)
    try:
        state = cpu_codec.from_plain(body)
    except StateError as error:
        if len(str(error)) > 2000:
            raise Finding("an error repeats what came") from None
        return
    again = cpu_codec.to_plain(state)
    if cpu_codec.from_plain(again) != state:
        raise Finding("a vCPU's state changes on the way")
    codec.encode(again)


@functools.cache
def _vcpu_body() -> dict[str, Any]:
    return cpu_codec.to_plain(VcpuState(registers=dict.fromkeys(GENERAL_REGISTERS, 7)))


def vcpu_seeds() -> Iterator[bytes]:
    yield b"\0"
    yield b"\x80" + codec.encode(_vcpu_body())
    for edit in range(1, 60):
        yield bytes([0, 1 + edit % 3, 1, edit % 23, 0, 1, edit, 0, 2, edit % 12, edit * 5 % 256, 1, 2, 3, 4])


def cpuid(data: bytes) -> None:
    """A CPUID table."""
    choices = Choices(data)
    how = choices.number()
    tables = tuple(HOSTS.values())
    rows: Any = decoded(choices) if how & 0x80 else edited(tables[how % len(tables)].to_wire(), choices)
    try:
        table = CpuidTable.from_wire(rows)
    except StateError:
        return
    if sorted(rows) != table.to_wire() or CpuidTable.from_wire(table.to_wire()) != table:
        raise Finding("a CPUID table changes on the way")
    if not isinstance(table.vendor, str):
        raise Finding("a CPUID table without a vendor")


def cpuid_seeds() -> Iterator[bytes]:
    for number, table in enumerate(HOSTS.values()):
        yield bytes([number])
        yield b"\x80" + codec.encode(table.to_wire())[:3000]
        yield bytes([number, 2, 1, 3, 0, 1, 2, 0, 2, 0, 9, 1, 1, 0, 0])


TARGETS = (
    Target("device", device, device_seeds, 1024, 1.5),
    Target("vcpu", vcpu, vcpu_seeds, 4096, 1.0),
    Target("cpuid", cpuid, cpuid_seeds, 4096, 0.5),
)
