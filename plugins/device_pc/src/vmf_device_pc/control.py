"""Reset and power-off: the few ports with which a PC without ACPI is told to restart or to end.

There is no keyboard controller; its two ports answer so that drivers give up quickly: the status says "output full,
input empty", so that nobody waits for it to take a command, and the data that is read forever ends every probe. The
reset command is honoured, as it is what Linux uses without ACPI.
"""

from __future__ import annotations

from collections.abc import Callable

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf_device_pc.ports import Port, read_ones

KEYBOARD_DATA, KEYBOARD_COMMAND = 0x60, 0x64
KEYBOARD_PULSE_RESET = 0xFE
KEYBOARD_STATUS = 0xFD
FAST_A20 = 0x92
RESET_CONTROL = 0xCF9
DEBUG_EXIT = 0xF4
PM1A_CONTROL = 0x604
SLEEP_ENABLE = 0x2000


class SystemControl(Device):
    """The ports; `before_end` is called before the machine is asked to reset or power off."""

    kind = "pc.control"
    writes_ram = False
    VERSION = 1
    SCHEMA: fields.Schema = {"a20": fields.boolean, "reset_control": fields.BYTE}

    def __init__(self, environment: DeviceEnvironment, before_end: Callable[[], None]) -> None:
        self._environment = environment
        self._before_end = before_end
        self._a20 = True
        self._reset_control = 0
        for port, handler in (
            (KEYBOARD_DATA, Port(read_ones)),
            (KEYBOARD_COMMAND, Port(self._read_keyboard_status, self._write_keyboard_command)),
            (FAST_A20, Port(self._read_fast_a20, self._write_fast_a20)),
            (RESET_CONTROL, Port(self._read_reset_control, self._write_reset_control)),
            (DEBUG_EXIT, Port(read_ones, self._write_debug_exit)),
            (PM1A_CONTROL, Port(self._read_pm1a, self._write_pm1a)),
            (PM1A_CONTROL + 1, Port(self._read_pm1a, self._write_pm1a_high)),
        ):
            environment.bus.claim_ports(self.kind, port, 1, handler)

    def _reset_machine(self) -> None:
        self._before_end()
        self._environment.request_reset()

    def _power_off(self) -> None:
        self._before_end()
        self._environment.request_power_off()

    def _read_keyboard_status(self, _offset: int, _size: int) -> int:
        return KEYBOARD_STATUS

    def _write_keyboard_command(self, _offset: int, _size: int, value: int) -> None:
        # Commands 0xF0-0xFF pulse output lines; the reset line is bit 0, active low.
        if value & 0xF1 == 0xF0:
            self._reset_machine()

    def _read_fast_a20(self, _offset: int, _size: int) -> int:
        return 0x02 if self._a20 else 0

    def _write_fast_a20(self, _offset: int, _size: int, value: int) -> None:
        self._a20 = bool(value & 0x02)  # remembered only: 64-bit guests have no use for a masked address line
        if value & 0x01:
            self._reset_machine()

    def _read_reset_control(self, _offset: int, _size: int) -> int:
        return self._reset_control

    def _write_reset_control(self, _offset: int, _size: int, value: int) -> None:
        rising = value & ~self._reset_control & 0x04
        self._reset_control = value & 0x0E
        if rising:
            self._reset_machine()

    def _write_debug_exit(self, _offset: int, _size: int, _value: int) -> None:
        self._power_off()

    def _read_pm1a(self, _offset: int, _size: int) -> int:
        return 0

    def _write_pm1a(self, _offset: int, _size: int, value: int) -> None:
        if value & SLEEP_ENABLE:
            self._power_off()

    def _write_pm1a_high(self, _offset: int, _size: int, value: int) -> None:
        if value & SLEEP_ENABLE >> 8:
            self._power_off()

    def reset(self) -> None:
        self._a20 = True
        self._reset_control = 0

    def save(self) -> Payload:
        return Payload(self.kind, self.VERSION, {"a20": self._a20, "reset_control": self._reset_control})

    def restore(self, payload: Payload) -> None:
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        self._a20 = values["a20"]
        self._reset_control = values["reset_control"]
