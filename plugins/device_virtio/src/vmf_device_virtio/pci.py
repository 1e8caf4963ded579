"""A PCI bus behind a host bridge with configuration mechanism 1 (PCI Local Bus Specification 3.0).

Theory of operation
    There is no firmware, so the host bridge does what one would have done before the guest starts: every function
    gets addresses in its base address registers and an interrupt line, its decoders are switched on, and the
    interrupt lines in use are made level-triggered in the chipset's ELCR, by port writes as a BIOS does it.
    A guest without ACPI finds the bridge (class 0600 at 0:0.0), scans the bus, and takes all that as it is.

    All functions use INTA, and share the lines 11, 10, 9 and 5 in the order of their slots. The wires are ORed by the
    interrupt controller.

    Guests find out the size of a base address register by writing ones, and may move it. So a function's registers are
    claimed on the machine's bus only while its decoder is on, and wherever the register points. A place outside of
    the hole for MMIO, or where another device is, cannot be decoded: accesses go on to whoever is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.errors import ConfigError, StateError
from vmf.memory.guest import LOW_RAM_LIMIT

if TYPE_CHECKING:
    from vmf.machine.bus import Bus, IoHandler

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
ADDRESS_ENABLE = 0x8000_0000
_ADDRESS_WRITABLE = 0x80FF_FFFC

# Configuration header, type 0.
VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS_PROGRAMMING, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09, 0x0A
CACHE_LINE, LATENCY, BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM = 0x0C, 0x0D, 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 0x0001, 0x0002, 0x0004, 0x0400
_COMMAND_WRITABLE = 0x0547  # I/O, memory, master, parity, SERR, INTx disable
STATUS_INTERRUPT, STATUS_CAPABILITIES = 0x0008, 0x0010
BAR_IO = 0x1
CONFIG_SIZE = 256
SLOTS = 32

MMIO_BASE, MMIO_LIMIT = LOW_RAM_LIMIT, 0xFEC0_0000
"""Where memory registers may lie: up to where a PC has its interrupt controllers."""
PORT_BASE, PORT_LIMIT = 0xC000, 0x1_0000
INTERRUPT_LINES = (11, 10, 9, 5)
ELCR_MASTER, ELCR_SLAVE = 0x4D0, 0x4D1

HOST_VENDOR, HOST_DEVICE, HOST_CLASS = 0x8086, 0x1237, 0x0600
"""A 440FX, what guests know best."""


@frozen
class Region:
    """A part of what a base address register decodes: [offset, offset+size) of it goes to `handler`."""

    offset: int
    size: int
    handler: IoHandler


@frozen
class Bar:
    """A base address register. `size` is a power of two: at least 16 for memory, 4 for ports."""

    size: int
    regions: Sequence[Region]
    io: bool = False


class PciFunction:
    """The configuration space of one function.

    Attributes:
        slot: its device number on bus 0; 0 is the host bridge.
        config: its 256 bytes as they are read; capabilities are written there by the owner.
        interrupt_line: as assigned at power-on.
    """

    SCHEMA: fields.Schema = {
        "slot": fields.integer(0, SLOTS - 1),
        "command": fields.integer(0, 0xFFFF),
        "cache_line": fields.BYTE,
        "latency": fields.BYTE,
        "interrupt_line": fields.BYTE,
        "bars": fields.listing(6, fields.integer(0, 0xFFFF_FFFF)),
    }

    def __init__(
        self, vendor: int, device: int, class_code: int, *, bars: Mapping[int, Bar] | None = None, name: str = "pci"
    ) -> None:
        self.name = name
        self.slot = -1
        self.interrupt_line = 0
        self._bars = dict(bars or {})
        self._assigned: dict[int, int] = {}
        self._claimed: dict[int, int] = {}
        self._bus: Bus | None = None
        self.config = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._put(VENDOR_ID, 2, vendor)
        self._put(DEVICE_ID, 2, device)
        self._put(CLASS, 2, class_code)
        self._writable[COMMAND : COMMAND + 2] = _COMMAND_WRITABLE.to_bytes(2, "little")
        self._writable[CACHE_LINE] = self._writable[LATENCY] = self._writable[INTERRUPT_LINE] = 0xFF
        for number, bar in self._bars.items():
            mask = ~(bar.size - 1) & 0xFFFF_FFFF
            self._writable[BAR0 + 4 * number : BAR0 + 4 * number + 4] = mask.to_bytes(4, "little")

    def make_writable(self, offset: int, mask: bytes) -> None:
        """Let the guest change these bits; for owners with registers of their own."""
        self._writable[offset : offset + len(mask)] = mask

    def _put(self, offset: int, size: int, value: int) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def _get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    @property
    def command(self) -> int:
        return self._get(COMMAND, 2)

    @property
    def bars(self) -> Mapping[int, Bar]:
        return self._bars

    def plugged(self, bus: Bus, slot: int, addresses: Mapping[int, int], interrupt_line: int) -> None:
        """The host bridge has given it a place; everything is as after firmware from `power_on` on."""
        self._bus, self.slot, self._assigned, self.interrupt_line = bus, slot, dict(addresses), interrupt_line

    def power_on(self) -> None:
        """As firmware leaves it."""
        command = COMMAND_IO | COMMAND_MEMORY if self._bars else 0
        self._put(COMMAND, 2, command)
        self._put(CACHE_LINE, 1, 0)
        self._put(LATENCY, 1, 0)
        if self.config[INTERRUPT_PIN]:
            self._put(INTERRUPT_LINE, 1, self.interrupt_line)
        for number, bar in self._bars.items():
            self._put(BAR0 + 4 * number, 4, self._assigned.get(number, 0) | (BAR_IO if bar.io else 0))
        self._decode()

    def read_config(self, offset: int, size: int) -> int:
        return self._get(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        for at, new in enumerate(value.to_bytes(size, "little"), offset):
            mask = self._writable[at]
            self.config[at] = self.config[at] & ~mask | new & mask
        if offset < COMMAND + 2 and offset + size > COMMAND:
            self._decode()
            self.command_changed()
        elif BAR0 <= offset < BAR0 + 24:
            self._decode()

    def command_changed(self) -> None:
        """For the owner."""

    def _decode(self) -> None:
        """Claim on the machine's bus what the registers say, and nothing else."""
        bus = self._bus
        if bus is None:
            return
        command = self.command
        wanted = {}
        for number, bar in self._bars.items():
            base = self._get(BAR0 + 4 * number, 4) & ~(3 if bar.io else 15)
            low, high = (0x400, PORT_LIMIT) if bar.io else (MMIO_BASE, MMIO_LIMIT)
            if command & (COMMAND_IO if bar.io else COMMAND_MEMORY) and low <= base and base + bar.size <= high:
                wanted[number] = base
        for number, base in [item for item in self._claimed.items() if wanted.get(item[0]) != item[1]]:
            self._release(number, base)
        for number, base in wanted.items():
            if number not in self._claimed:
                self._claim(number, base)

    def _claim(self, number: int, base: int) -> None:
        assert self._bus is not None
        bar = self._bars[number]
        claim = self._bus.claim_ports if bar.io else self._bus.claim_mmio
        self._claimed[number] = base
        try:
            for region in bar.regions:
                claim(self.name, base + region.offset, region.size, region.handler)
        except ConfigError:
            self._release(number, base)  # another device is there, and was first

    def _release(self, number: int, base: int) -> None:
        assert self._bus is not None
        bar = self._bars[number]
        handlers = {id(region.handler) for region in bar.regions}
        ranges = self._bus.port_ranges if bar.io else self._bus.mmio_ranges
        for claimed in ranges:
            if base <= claimed.base < base + bar.size and id(claimed.handler) in handlers:
                (self._bus.release_ports if bar.io else self._bus.release_mmio)(claimed.base)
        del self._claimed[number]

    # -- state

    def save_function(self) -> dict[str, Any]:
        return {
            "slot": self.slot,
            "command": self.command,
            "cache_line": self.config[CACHE_LINE],
            "latency": self.config[LATENCY],
            "interrupt_line": self.config[INTERRUPT_LINE],
            "bars": [self._get(BAR0 + 4 * number, 4) for number in range(6)],
        }

    def check_function(self, values: Mapping[str, Any]) -> None:
        """What the schema cannot say. Raises StateError."""
        if values["slot"] != self.slot:
            raise StateError(
                f"{self.name}: it is in PCI slot {values['slot']} at the source and in slot {self.slot} here.",
                "Give both machines the same devices and drives, in the same order.",
            )
        wrong = values["command"] & ~_COMMAND_WRITABLE
        for number, value in enumerate(values["bars"]):
            bar = self._bars.get(number)
            kind = BAR_IO if bar is not None and bar.io else 0
            writable = int.from_bytes(self._writable[BAR0 + 4 * number : BAR0 + 4 * number + 4], "little")
            wrong |= value & ~writable ^ kind
        if wrong:
            raise StateError(f"{self.name}: its saved state is wrong: a PCI register has bits that it cannot have.")

    def restore_function(self, values: Mapping[str, Any]) -> None:
        self._put(COMMAND, 2, values["command"])
        self._put(CACHE_LINE, 1, values["cache_line"])
        self._put(LATENCY, 1, values["latency"])
        self._put(INTERRUPT_LINE, 1, values["interrupt_line"])
        for number, value in enumerate(values["bars"]):
            self._put(BAR0 + 4 * number, 4, value)
        self._decode()


class HostBridge(Device):
    """The bridge, the bus behind it, and the firmware that there is not."""

    kind = "pci.host"
    writes_ram = False
    VERSION = 1
    SCHEMA: fields.Schema = {
        "address": fields.integer(0, 0xFFFF_FFFF),
        "function": fields.record(PciFunction.SCHEMA),
    }

    def __init__(self, environment: DeviceEnvironment) -> None:
        self._bus = environment.bus
        self._address = 0
        self._functions: dict[int, PciFunction] = {}
        self._next_mmio, self._next_port = MMIO_BASE, PORT_BASE
        self._function = PciFunction(HOST_VENDOR, HOST_DEVICE, HOST_CLASS, name=self.kind)
        self.plug(self._function, 0)
        # Port 0xCF9 is another device's (reset control): the address register is reached at 0xCF8 only.
        self._bus.claim_ports(self.kind, CONFIG_ADDRESS, 1, _Address(self))
        self._bus.claim_ports(self.kind, CONFIG_DATA, 4, _Data(self))

    def plug(self, function: PciFunction, slot: int) -> None:
        """Put a function into a slot and assign its resources. Raises ConfigError when there is no room."""
        if not 0 <= slot < SLOTS or slot in self._functions:
            raise ConfigError(f"{function.name}: PCI slot {slot} cannot be had.", "Use fewer virtio devices or drives.")
        addresses = {}
        for number, bar in function.bars.items():
            if bar.io:
                addresses[number] = -(-self._next_port // bar.size) * bar.size
                self._next_port = addresses[number] + bar.size
            else:
                addresses[number] = -(-self._next_mmio // bar.size) * bar.size
                self._next_mmio = addresses[number] + bar.size
        if self._next_mmio > MMIO_LIMIT or self._next_port > PORT_LIMIT:
            raise ConfigError(f"{function.name}: the PCI address space is full.", "Use fewer devices.")
        self._functions[slot] = function
        function.plugged(self._bus, slot, addresses, INTERRUPT_LINES[slot % len(INTERRUPT_LINES)])

    # -- configuration mechanism 1

    def read_address(self) -> int:
        return self._address

    def write_address(self, value: int) -> None:
        self._address = value & _ADDRESS_WRITABLE

    def _target(self) -> PciFunction | None:
        address = self._address
        if not address & ADDRESS_ENABLE or address & 0x00FF_0700:  # only function 0 of devices on bus 0
            return None
        return self._functions.get(address >> 11 & 31)

    def read_data(self, offset: int, size: int) -> int:
        function = self._target()
        if function is None or offset + size > 4:
            return (1 << 8 * size) - 1
        return function.read_config((self._address & 0xFC) + offset, size)

    def write_data(self, offset: int, size: int, value: int) -> None:
        function = self._target()
        if function is not None and offset + size <= 4:
            function.write_config((self._address & 0xFC) + offset, size, value & (1 << 8 * size) - 1)

    # -- life

    def settings(self) -> Mapping[str, Any]:
        """The options say which devices there are; where each is on the bus is what the guest sees of it."""
        return {"slots": [f"{slot}: {function.name}" for slot, function in sorted(self._functions.items())]}

    def reset(self) -> None:
        self._address = 0
        self._function.power_on()
        lines = 0
        for function in self._functions.values():
            if function.config[INTERRUPT_PIN]:
                lines |= 1 << function.interrupt_line
        # As firmware does it; the controller, made first, has been reset before.
        self._bus.port_write(ELCR_MASTER, 1, lines & 0xFF)
        self._bus.port_write(ELCR_SLAVE, 1, lines >> 8)

    def save(self) -> Payload:
        return Payload(self.kind, self.VERSION, {"address": self._address, "function": self._function.save_function()})

    def restore(self, payload: Payload) -> None:
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        self._function.check_function(values["function"])
        self._address = values["address"] & _ADDRESS_WRITABLE
        self._function.restore_function(values["function"])


class _Address:
    """Port 0xCF8: 32-bit accesses only; others belong to whatever ISA device is there, and there is none."""

    def __init__(self, bridge: HostBridge) -> None:
        self._bridge = bridge

    def io_read(self, _offset: int, size: int) -> int:
        return self._bridge.read_address() if size == 4 else (1 << 8 * size) - 1

    def io_write(self, _offset: int, size: int, value: int) -> None:
        if size == 4:
            self._bridge.write_address(value)


class _Data:
    """Ports 0xCFC-0xCFF."""

    def __init__(self, bridge: HostBridge) -> None:
        self.io_read = bridge.read_data
        self.io_write = bridge.write_data
