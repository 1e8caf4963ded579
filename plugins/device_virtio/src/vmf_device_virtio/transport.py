"""Virtio over PCI (virtio 1.2, section 4.1): modern devices only, interrupts by INTx.

One memory register of 16 KiB: common configuration, interrupt status, device configuration and notification, a page
each. Registers are as wide as the specification says; drivers write 64-bit ones in halves.

A driver that breaks the rules of its queues finds DEVICE_NEEDS_RESET, and nothing more happens until it resets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from struct import Struct
from typing import Any

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import IrqLine
from vmf.errors import StateError
from vmf_device_virtio import pci
from vmf_device_virtio.queue import Chain, QueueError, Virtqueue

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040
"""PCI device ID of virtio device type 0 (section 4.1.2)."""

# Device status (section 2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_STATUS_WRITABLE = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

# Reserved feature bits (section 6).
F_INDIRECT, F_EVENT_INDEX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
COMMON_FEATURES = F_INDIRECT | F_EVENT_INDEX | F_VERSION_1

ISR_QUEUE, ISR_CONFIG = 1, 2
NO_VECTOR = 0xFFFF

# Capabilities (section 4.1.4): type, place in configuration space, page of the register.
CAP_VENDOR = 0x09
CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI = 1, 2, 3, 4, 5
_CAPABILITIES = ((CAP_COMMON, 0x40, 0), (CAP_NOTIFY, 0x50, 3), (CAP_ISR, 0x64, 1), (CAP_DEVICE, 0x74, 2))
_CAP_PCI_AT = 0x84
_PAGE = 0x1000
BAR_SIZE = 4 * _PAGE
NOTIFY_MULTIPLIER = 4

_COMMON = Struct("<IIIIHHBBHHHHHQQQ")
"""virtio_pci_common_cfg (section 4.1.4.3)."""


class _Handler:
    """Two functions as a bus handler."""

    def __init__(self, read: Any, write: Any) -> None:
        self.io_read = read
        self.io_write = write


class _Function(pci.PciFunction):
    """With the capability that reaches the registers through configuration space (section 4.1.4.9)."""

    def __init__(self, owner: VirtioDevice, device: int, class_code: int, bar: pci.Bar) -> None:
        super().__init__(VENDOR, device, class_code, bars={0: bar}, name=owner.kind)
        self._owner = owner

    def command_changed(self) -> None:
        self._owner.update_line()

    def _window(self) -> tuple[int, int] | None:
        """(offset in the register, size) of the access that is set up there, when it is a valid one."""
        bar, offset, size = self.config[_CAP_PCI_AT + 4], self._get(_CAP_PCI_AT + 8, 4), self._get(_CAP_PCI_AT + 12, 4)
        if bar or size not in (1, 2, 4) or offset % size or offset + size > BAR_SIZE:
            return None
        return offset, size

    def read_config(self, offset: int, size: int) -> int:
        if offset == _CAP_PCI_AT + 16 and (window := self._window()):
            self._put(offset, 4, self._owner.read_register(*window))
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        if offset == _CAP_PCI_AT + 16 and (window := self._window()):
            self._owner.write_register(*window, self._get(offset, 4) & (1 << 8 * window[1]) - 1)


class VirtioDevice(Device):
    """What all virtio devices have in common. Everything runs on the vCPU thread.

    Subclasses set the class attributes, and say what happens in `notified` and `configuration`.
    """

    TYPE: int
    """Virtio device type (section 5)."""
    PCI_CLASS: int
    QUEUES: tuple[int, ...]
    """Largest size of each queue, powers of two."""
    VERSION = 1
    SCHEMA: fields.Schema = {}
    """Of the part of the state that is the subclass's own."""

    def __init__(self, environment: DeviceEnvironment, bridge: pci.HostBridge, slot: int, features: int) -> None:
        self._environment = environment
        self._memory = environment.memory
        self.offered = features | COMMON_FEATURES
        self.queues = [Virtqueue(environment.memory, size) for size in self.QUEUES]
        self._status = self._isr = self._config_generation = 0
        self._feature_select = self._driver_feature_select = self._queue_select = 0
        self.features = 0
        """What the driver has accepted."""
        regions = [
            pci.Region(0, _PAGE, _Handler(self._read_common, self._write_common)),
            pci.Region(_PAGE, _PAGE, _Handler(self._read_isr, lambda _offset, _size, _value: None)),
            pci.Region(2 * _PAGE, _PAGE, _Handler(self._read_device, self._write_device)),
            pci.Region(3 * _PAGE, _PAGE, _Handler(lambda _offset, _size: 0, self._write_notify)),
        ]
        self._regions = regions
        self._function = _Function(self, DEVICE_BASE + self.TYPE, self.PCI_CLASS, pci.Bar(BAR_SIZE, regions))
        self._write_capabilities()
        bridge.plug(self._function, slot)
        self._line: IrqLine = environment.irq_line(self._function.interrupt_line)

    def _write_capabilities(self) -> None:
        config = self._function.config
        config[pci.REVISION] = 1
        config[pci.SUBSYSTEM_VENDOR : pci.SUBSYSTEM_VENDOR + 4] = (VENDOR | (DEVICE_BASE + self.TYPE) << 16).to_bytes(
            4, "little"
        )
        config[pci.STATUS] = pci.STATUS_CAPABILITIES
        config[pci.INTERRUPT_PIN] = 1
        config[pci.CAPABILITIES] = _CAPABILITIES[0][1]
        places = [place for _, place, _ in _CAPABILITIES] + [_CAP_PCI_AT, 0]
        for (kind, place, page), following in zip(_CAPABILITIES, places[1:], strict=False):
            length = 20 if kind == CAP_NOTIFY else 16
            config[place : place + 4] = bytes((CAP_VENDOR, following, length, kind))
            config[place + 8 : place + 16] = (page * _PAGE).to_bytes(4, "little") + _PAGE.to_bytes(4, "little")
            if kind == CAP_NOTIFY:
                config[place + 16 : place + 20] = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        config[_CAP_PCI_AT : _CAP_PCI_AT + 4] = bytes((CAP_VENDOR, 0, 20, CAP_PCI))
        self._function.make_writable(_CAP_PCI_AT + 4, b"\xff\0\0\0" + b"\xff" * 12)

    # -- for subclasses

    @abstractmethod
    def notified(self, number: int) -> None:
        """The driver has put something into queue `number`, which is active. QueueError asks for a reset."""

    def settings(self) -> Mapping[str, Any]:
        """None of its own: the bus tells which devices there are, and the drives are compared as such."""
        return {}

    def configuration(self) -> bytes:
        """The device's configuration space, as it is now."""
        return b""

    def stop_work(self) -> None:
        """Finish everything under way: the queues go away. Completions may be pushed or dropped."""

    def started(self) -> None:
        """The driver is ready."""
        for number, queue in enumerate(self.queues):
            if queue.active:
                self._notify(number)

    def save_own(self) -> dict[str, Any]:
        """What is the subclass's, as its SCHEMA says."""
        return {}

    def check_own(self, values: dict[str, Any]) -> None:
        """Raise StateError for what the schema cannot say."""

    def restore_own(self, values: dict[str, Any]) -> None:
        """Take it over."""

    @property
    def ready(self) -> bool:
        """The driver works, and did not break anything."""
        return self._status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK

    def wrote(self, chain: Chain) -> None:
        """The device has written into the chain's writable buffers; before the push."""
        if isinstance(chain.ranges, list):
            for gpa, size in chain.ranges:
                self._environment.memory_written(gpa, size)
        else:
            self._environment.ranges_written(chain.ranges)

    def completed(self, queue: Virtqueue) -> None:
        """After pushes: interrupt the driver if it wants that."""
        if queue.wants_interrupt():
            self._interrupt(ISR_QUEUE)

    def configuration_changed(self) -> None:
        """Tell the driver to look at the configuration again."""
        self._config_generation = (self._config_generation + 1) & 0xFF
        if self._status & DRIVER_OK:
            self._interrupt(ISR_CONFIG)

    def broken(self, error: QueueError) -> None:
        """The driver has broken the rules: nothing more happens until it resets the device."""
        for queue in self.queues:
            queue.stop()
        self._status |= NEEDS_RESET
        if self._status & DRIVER_OK:
            self._interrupt(ISR_CONFIG)

    # -- interrupts

    def _interrupt(self, cause: int) -> None:
        if not self._isr & cause:
            self._isr |= cause
            self.update_line()

    def update_line(self) -> None:
        level = bool(self._isr)
        config = self._function.config
        config[pci.STATUS] = pci.STATUS_CAPABILITIES | (pci.STATUS_INTERRUPT if level else 0)
        disabled = config[pci.COMMAND + 1] << 8 & pci.COMMAND_INTX_DISABLE
        self._line.set_level(level and not disabled)

    def _read_isr(self, offset: int, _size: int) -> int:
        isr = self._isr
        if offset or not isr:
            return 0
        self._isr = 0
        self.update_line()
        return isr

    # -- registers

    def read_register(self, offset: int, size: int) -> int:
        """An access by way of configuration space."""
        page, within = divmod(offset, _PAGE)
        return self._regions[page].handler.io_read(within, size)

    def write_register(self, offset: int, size: int, value: int) -> None:
        page, within = divmod(offset, _PAGE)
        self._regions[page].handler.io_write(within, size, value)

    def _selected(self) -> Virtqueue | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def _read_common(self, offset: int, size: int) -> int:
        queue = self._selected()
        low, high = (32 * select for select in (self._feature_select, self._driver_feature_select))
        values = _COMMON.pack(
            self._feature_select,
            self.offered >> low & 0xFFFF_FFFF if low < 64 else 0,
            self._driver_feature_select,
            self.features >> high & 0xFFFF_FFFF if high < 64 else 0,
            NO_VECTOR,
            len(self.queues),
            self._status,
            self._config_generation,
            self._queue_select,
            queue.size if queue else 0,
            NO_VECTOR,
            int(queue.enabled) if queue else 0,
            self._queue_select if queue else 0,
            queue.desc if queue else 0,
            queue.driver if queue else 0,
            queue.device if queue else 0,
        )
        return int.from_bytes(values[offset : offset + size], "little")

    def _write_common(self, offset: int, size: int, value: int) -> None:
        if offset == 0x14:
            self._write_status(value & 0xFF)
        elif offset == 0x00 and size == 4:
            self._feature_select = value
        elif offset == 0x08 and size == 4:
            self._driver_feature_select = value
        elif offset == 0x0C and size == 4:
            if self._driver_feature_select < 2 and not self._status & FEATURES_OK:
                shift = 32 * self._driver_feature_select
                self.features = self.features & ~(0xFFFF_FFFF << shift) | value << shift
        elif offset == 0x16 and size == 2:
            self._queue_select = value
        elif offset >= 0x18 and (queue := self._selected()) is not None and not queue.enabled:
            self._write_queue(queue, offset, size, value)

    def _write_queue(self, queue: Virtqueue, offset: int, size: int, value: int) -> None:
        if offset == 0x18 and size == 2:
            if 0 < value <= queue.max_size and not value & (value - 1):
                queue.size = value
        elif offset == 0x1C and size == 2:
            if value == 1:
                queue.enabled = True
        elif offset >= 0x20 and size in (4, 8) and offset % size == 0 and offset + size <= 0x38:
            name = ("desc", "driver", "device")[(offset - 0x20) // 8]
            shift = offset % 8 * 8
            mask = (1 << 8 * size) - 1 << shift
            setattr(queue, name, getattr(queue, name) & ~mask | value << shift & mask)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset_device()
            return
        value &= _STATUS_WRITABLE
        if value & FEATURES_OK and (self.features & ~self.offered or not self.features & F_VERSION_1):
            value &= ~FEATURES_OK  # the driver reads it back
        before, self._status = self._status, self._status | value
        if value & DRIVER_OK and not before & DRIVER_OK and self._start_queues():
            self.started()

    def _start_queues(self) -> bool:
        try:
            for queue in self.queues:
                if queue.enabled:
                    queue.start(event_index=bool(self.features & F_EVENT_INDEX))
        except QueueError as error:
            self.broken(error)
            return False
        return True

    def _read_device(self, offset: int, size: int) -> int:
        return int.from_bytes(self.configuration()[offset : offset + size].ljust(size, b"\0"), "little")

    def _write_device(self, offset: int, size: int, value: int) -> None:
        """No device here has anything to write."""

    def _write_notify(self, offset: int, _size: int, _value: int) -> None:
        self._notify(offset // NOTIFY_MULTIPLIER)

    def _notify(self, number: int) -> None:
        if self.ready and number < len(self.queues) and self.queues[number].active:
            try:
                self.notified(number)
            except QueueError as error:
                self.broken(error)

    # -- life

    def _reset_device(self) -> None:
        """By the driver (section 2.4): everything but the PCI registers."""
        self.stop_work()
        for queue in self.queues:
            queue.reset()
        self._status = self._isr = 0
        self._feature_select = self._driver_feature_select = self._queue_select = 0
        self.features = 0
        self.update_line()

    def reset(self) -> None:
        self._function.power_on()
        self._config_generation = 0
        self._reset_device()

    def save(self) -> Payload:
        body = {
            "function": self._function.save_function(),
            "features": self.features,
            "status": self._status,
            "isr": self._isr,
            "config_generation": self._config_generation,
            "feature_select": self._feature_select,
            "driver_feature_select": self._driver_feature_select,
            "queue_select": self._queue_select,
            "queues": [queue.save() for queue in self.queues],
            "own": self.save_own(),
        }
        return Payload(self.kind, self.VERSION, body)

    def restore(self, payload: Payload) -> None:
        schema: fields.Schema = {
            "function": fields.record(pci.PciFunction.SCHEMA),
            "features": fields.integer(0, (1 << 64) - 1),
            "status": fields.BYTE,
            "isr": fields.integer(0, ISR_QUEUE | ISR_CONFIG),
            "config_generation": fields.BYTE,
            "feature_select": fields.integer(0, 0xFFFF_FFFF),
            "driver_feature_select": fields.integer(0, 0xFFFF_FFFF),
            "queue_select": fields.integer(0, 0xFFFF),
            "queues": fields.listing(len(self.queues), fields.record(Virtqueue.SCHEMA)),
            "own": fields.record(self.SCHEMA),
        }
        values = fields.read(payload, self.kind, self.VERSION, schema)
        self._function.check_function(values["function"])
        if missing := values["features"] & ~self.offered if values["status"] & FEATURES_OK else 0:
            raise StateError(
                f"{self.kind}: its driver uses virtio features ({missing:#x}) that the device here does not have.",
                "Give both machines the same drives with the same settings, and the same release of vmf.",
            )
        if values["status"] & ~(_STATUS_WRITABLE | NEEDS_RESET) or not all(
            queue.acceptable(saved) for queue, saved in zip(self.queues, values["queues"], strict=True)
        ):
            raise StateError(f"{self.kind}: its saved state is wrong: a register has a value that it cannot have.")
        self.check_own(values["own"])
        self.stop_work()
        self._function.restore_function(values["function"])
        self.features = values["features"]
        self._status, self._isr = values["status"], values["isr"]
        self._config_generation = values["config_generation"]
        self._feature_select = values["feature_select"]
        self._driver_feature_select = values["driver_feature_select"]
        self._queue_select = values["queue_select"]
        for queue, saved in zip(self.queues, values["queues"], strict=True):
            queue.restore(saved)
        self.restore_own(values["own"])
        self.update_line()
        if self.ready:
            self._start_queues()

    def close(self) -> None:
        self.stop_work()
        for queue in self.queues:
            queue.stop()
