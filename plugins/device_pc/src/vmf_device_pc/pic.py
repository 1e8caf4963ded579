"""The pair of 8259A interrupt controllers (Intel 8259A data sheet; PIIX for ELCR).

Theory of operation
    Each chip latches requests in IRR, masks them with IMR and tracks what is in service in ISR. Edge inputs set their
    IRR bit on a rising edge, and keep it until acknowledged, as the level before the next edge does not matter to any
    software; level inputs (ELCR bit set) mirror their wire. The slave's output is wired to the master's input 2.

    A request is presented when its priority is above everything in service. Priorities rotate: `_lowest` is the
    number of the lowest-priority input (7 after reset, so that 0 is highest).

    `pending()` is asked at every slice and port access of the guest: it returns a boolean that is computed when
    something changes, never when it is asked.
"""

from __future__ import annotations

from typing import Any

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.errors import ConfigError, StateError
from vmf_device_pc.ports import Port

MASTER_COMMAND, MASTER_DATA = 0x20, 0x21
SLAVE_COMMAND, SLAVE_DATA = 0xA0, 0xA1
ELCR_MASTER, ELCR_SLAVE = 0x4D0, 0x4D1
CASCADE = 2
"""The master's input that the slave drives."""
SPURIOUS = 7
LINES = 16

ICW1_ICW4_NEEDED, ICW1_SINGLE, ICW1_LEVEL, ICW1 = 0x01, 0x02, 0x08, 0x10
ICW4_AUTO_EOI, ICW4_SPECIAL_FULLY_NESTED = 0x02, 0x10
OCW3 = 0x08
_ELCR_WRITABLE = (0xF8, 0xDE)  # IRQ 0-2, 8 and 13 are always edge-triggered

_LOWEST_BIT = [next((bit for bit in range(8) if value >> bit & 1), 8) for value in range(256)]


class _Chip:
    """One 8259A, without its place in the cascade."""

    __slots__ = (
        "auto_eoi", "elcr", "elcr_mask", "icw3", "icw4_needed", "imr", "init_step", "irr", "isr", "level_mode",
        "lines", "lowest", "poll", "read_isr", "rotate_on_auto_eoi", "single", "special_fully_nested", "special_mask",
        "vector_base",
    )  # fmt: skip

    SCHEMA: fields.Schema = {
        "irr": fields.BYTE,
        "imr": fields.BYTE,
        "isr": fields.BYTE,
        "lines": fields.BYTE,
        "elcr": fields.BYTE,
        "lowest": fields.integer(0, 7),
        "vector_base": fields.BYTE,
        "icw3": fields.BYTE,
        "init_step": fields.integer(0, 4),
        "icw4_needed": fields.boolean,
        "single": fields.boolean,
        "level_mode": fields.boolean,
        "auto_eoi": fields.boolean,
        "rotate_on_auto_eoi": fields.boolean,
        "special_fully_nested": fields.boolean,
        "special_mask": fields.boolean,
        "read_isr": fields.boolean,
        "poll": fields.boolean,
    }

    def __init__(self, elcr_mask: int) -> None:
        self.elcr_mask = elcr_mask
        self.lines = 0
        self.power_on()

    def power_on(self) -> None:
        """Everything but the wires, which others drive."""
        self.elcr = 0
        self.vector_base = 0
        self.icw3 = 0
        self.imr = 0
        self.init_step = 0
        self.level_mode = False
        self.initialise(icw4_needed=False, single=False)
        self.icw4_defaults()

    def initialise(self, *, icw4_needed: bool, single: bool) -> None:
        """What ICW1 clears."""
        self.irr = self.lines & self.level_inputs
        self.imr = 0
        self.isr = 0
        self.lowest = 7
        self.special_mask = False
        self.read_isr = False
        self.poll = False
        self.icw4_needed = icw4_needed
        self.single = single
        self.rotate_on_auto_eoi = False

    def icw4_defaults(self) -> None:
        self.auto_eoi = False
        self.special_fully_nested = False

    @property
    def level_inputs(self) -> int:
        return 0xFF if self.level_mode else self.elcr

    def set_line(self, number: int, level: bool) -> None:
        bit = 1 << number
        if level:
            if not self.lines & bit:
                self.lines |= bit
                self.irr |= bit
        else:
            self.lines &= ~bit
            if self.level_inputs & bit:
                self.irr &= ~bit

    def _rank(self, bits: int) -> int:
        """Priority of the highest-priority of `bits`: 0 is highest, 8 when there are none."""
        shift = (self.lowest + 1) & 7
        return _LOWEST_BIT[(bits >> shift | bits << (8 - shift)) & 0xFF]

    def request(self, master: bool) -> int:
        """Number of the input to present, or -1."""
        wanted = self.irr & ~self.imr
        if not wanted:
            return -1
        rank = self._rank(wanted)
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if master and self.special_fully_nested:
            in_service &= ~(1 << CASCADE)  # the slave may have something more urgent than what it has in service
        if in_service and rank >= self._rank(in_service):
            return -1
        return (rank + self.lowest + 1) & 7

    def take(self, number: int) -> None:
        """The INTA cycle for an input."""
        bit = 1 << number
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.lowest = number
        else:
            self.isr |= bit
        if not self.level_inputs & bit:
            self.irr &= ~bit

    def write_command(self, value: int) -> None:
        if value & ICW1:
            self.level_mode = bool(value & ICW1_LEVEL)
            self.initialise(icw4_needed=bool(value & ICW1_ICW4_NEEDED), single=bool(value & ICW1_SINGLE))
            if not self.icw4_needed:
                self.icw4_defaults()
            self.init_step = 2
        elif value & OCW3:
            if value & 0x04:
                self.poll = True
            if value & 0x02:
                self.read_isr = bool(value & 0x01)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._end_of_interrupt(value >> 5, value & 7)

    def _end_of_interrupt(self, command: int, number: int) -> None:
        if command in (0, 4):  # rotate in automatic EOI mode: clear, set
            self.rotate_on_auto_eoi = command == 4
        elif command in (1, 5):  # non-specific EOI, with rotation for 5
            in_service = self.isr & ~self.imr if self.special_mask else self.isr
            rank = self._rank(in_service)
            if rank < 8:
                number = (rank + self.lowest + 1) & 7
                self.isr &= ~(1 << number)
                if command == 5:
                    self.lowest = number
        elif command in (3, 7):  # specific EOI, with rotation for 7
            self.isr &= ~(1 << number)
            if command == 7:
                self.lowest = number
        elif command == 6:  # set priority
            self.lowest = number

    def write_data(self, value: int) -> None:
        if self.init_step == 0:
            self.imr = value
        elif self.init_step == 2:
            self.vector_base = value & 0xF8
            self.init_step = 3 if not self.single else (4 if self.icw4_needed else 0)
        elif self.init_step == 3:
            self.icw3 = value
            self.init_step = 4 if self.icw4_needed else 0
        else:
            self.auto_eoi = bool(value & ICW4_AUTO_EOI)
            self.special_fully_nested = bool(value & ICW4_SPECIAL_FULLY_NESTED)
            self.init_step = 0

    def write_elcr(self, value: int) -> None:
        self.elcr = value & self.elcr_mask
        # An input that became level-triggered shows its wire.
        self.irr = self.irr & ~self.elcr | self.lines & self.elcr

    def save(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SCHEMA}

    def load(self, values: dict[str, Any]) -> None:
        for name in self.SCHEMA:
            setattr(self, name, values[name])


class Wire:
    """One device's connection to an interrupt input; several on one input are ORed."""

    __slots__ = ("_number", "_pic", "level")

    def __init__(self, pic: Pic8259, number: int) -> None:
        self._pic = pic
        self._number = number
        self.level = False

    def set_level(self, level: bool) -> None:
        """Drive the wire."""
        self.level = level
        self._pic.wire_changed(self._number, level)

    @property
    def latched(self) -> bool:
        """An edge waits to be acknowledged."""
        return self._pic.latched(self._number)

    @property
    def masked(self) -> bool:
        """The input's mask bit, or that of the cascade, is set."""
        return self._pic.masked(self._number)


class Pic8259(Device):
    """Both chips, as the machine's interrupt controller."""

    kind = "pc.i8259"
    writes_ram = False
    VERSION = 1
    SCHEMA: fields.Schema = {"master": fields.record(_Chip.SCHEMA), "slave": fields.record(_Chip.SCHEMA)}

    def __init__(self, environment: DeviceEnvironment) -> None:
        self._master = _Chip(_ELCR_WRITABLE[0])
        self._slave = _Chip(_ELCR_WRITABLE[1])
        self._wires: list[list[Wire]] = [[] for _ in range(LINES)]
        self._pending = False
        for chip, command, data, elcr in (
            (self._master, MASTER_COMMAND, MASTER_DATA, ELCR_MASTER),
            (self._slave, SLAVE_COMMAND, SLAVE_DATA, ELCR_SLAVE),
        ):
            self._claim(environment, chip, command, data, elcr)
        environment.provide_interrupts(self, self.line)

    def _claim(self, environment: DeviceEnvironment, chip: _Chip, command: int, data: int, elcr: int) -> None:
        def read_command(_offset: int, _size: int) -> int:
            if chip.poll:
                return self._poll(chip)
            return chip.isr if chip.read_isr else chip.irr

        def write_command(_offset: int, _size: int, value: int) -> None:
            chip.write_command(value & 0xFF)
            self._update()

        def read_data(_offset: int, _size: int) -> int:
            if chip.poll:
                return self._poll(chip)
            return chip.imr

        def write_data(_offset: int, _size: int, value: int) -> None:
            chip.write_data(value & 0xFF)
            self._update()

        def read_elcr(_offset: int, _size: int) -> int:
            return chip.elcr

        def write_elcr(_offset: int, _size: int, value: int) -> None:
            chip.write_elcr(value & 0xFF)
            self._update()

        bus = environment.bus
        bus.claim_ports(self.kind, command, 1, Port(read_command, write_command))
        bus.claim_ports(self.kind, data, 1, Port(read_data, write_data))
        bus.claim_ports(self.kind, elcr, 1, Port(read_elcr, write_elcr))

    # -- wires

    def line(self, number: int) -> Wire:
        """A new wire to ISA interrupt `number`; input 2 is the cascade and cannot be had."""
        if not 0 <= number < LINES or number == CASCADE:
            raise ConfigError(f"there is no ISA interrupt line {number} to connect a device to.")
        wire = Wire(self, number)
        self._wires[number].append(wire)
        return wire

    def wire_changed(self, number: int, level: bool) -> None:
        """A wire of input `number` was driven to `level`."""
        wires = self._wires[number]
        if not level and len(wires) > 1:
            level = any(wire.level for wire in wires)
        if number < 8:
            self._master.set_line(number, level)
        else:
            self._slave.set_line(number - 8, level)
        self._update()

    def latched(self, number: int) -> bool:
        """Whether the input's request is latched and not acknowledged."""
        chip = self._master if number < 8 else self._slave
        return bool(chip.irr >> (number & 7) & 1)

    def masked(self, number: int) -> bool:
        """Whether the guest masks the input, on the way to INTR."""
        if number < 8:
            return bool(self._master.imr >> number & 1)
        return bool(self._slave.imr >> (number & 7) & 1 or self._master.imr >> CASCADE & 1)

    # -- towards the vCPU

    def pending(self) -> bool:
        """Whether INTR is asserted."""
        return self._pending

    def acknowledge(self) -> int:
        """The INTA cycle: the vector to deliver, a spurious one when the request has gone."""
        master, slave = self._master, self._slave
        number = master.request(True)
        if number < 0:
            vector = master.vector_base + SPURIOUS
        elif number != CASCADE:
            master.take(number)
            vector = master.vector_base + number
        else:
            master.take(CASCADE)
            inner = slave.request(False)
            if inner < 0:
                inner = SPURIOUS
            else:
                slave.take(inner)
            vector = slave.vector_base + inner
        self._update()
        return vector

    def _poll(self, chip: _Chip) -> int:
        """A read in poll mode is the INTA cycle of one chip: bit 7 and the input's number, or 0."""
        chip.poll = False
        number = chip.request(chip is self._master)
        if number < 0:
            return 0
        chip.take(number)
        self._update()
        return 0x80 | number

    def _update(self) -> None:
        """Recompute the slave's output and INTR; called after every change."""
        master, slave = self._master, self._slave
        if slave.irr and slave.init_step == 0 and slave.request(False) >= 0:
            # The slave drops and raises its output between two requests: each is an edge to the master.
            master.lines |= 1 << CASCADE
            master.irr |= 1 << CASCADE
        else:
            master.lines &= ~(1 << CASCADE)
            master.irr &= ~(1 << CASCADE)
        self._pending = bool(master.irr) and master.init_step == 0 and master.request(True) >= 0

    # -- life

    def reset(self) -> None:
        self._master.power_on()
        self._slave.power_on()
        self._update()

    def save(self) -> Payload:
        return Payload(self.kind, self.VERSION, {"master": self._master.save(), "slave": self._slave.save()})

    def restore(self, payload: Payload) -> None:
        """Wires keep what their devices say: a device drives its own again in its `restore`, which makes no edge."""
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        for name, chip in (("master", self._master), ("slave", self._slave)):
            if (
                values[name]["elcr"] & ~chip.elcr_mask
                or values[name]["vector_base"] & 7
                or values[name]["init_step"] == 1
            ):
                raise StateError(f"{self.kind}: its saved state is wrong: {name} is in a state the chip does not have.")
        self._master.load(values["master"])
        self._slave.load(values["slave"])
        self._update()
