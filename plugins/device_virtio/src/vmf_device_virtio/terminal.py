"""virtio-console (virtio 1.2, section 5.3): one port, which Linux calls hvc0.

It is on the machine's console, beside the serial port: what the guest writes to either appears there. What is typed
goes to hvc0 once the guest's driver waits for it, and to the serial port otherwise.
"""

from __future__ import annotations

from typing import Any

from vmf.device import fields
from vmf.device.base import DeviceEnvironment
from vmf_device_virtio.pci import HostBridge
from vmf_device_virtio.queue import QueueError
from vmf_device_virtio.transport import VirtioDevice

RECEIVE, TRANSMIT = 0, 1
INPUT_LIMIT = 4096
"""Bytes kept for the driver."""
OUTPUT_LIMIT = 65536
"""Of one request; a driver that writes more in one piece breaks the rules of no specification, but our patience."""


class VirtioConsole(VirtioDevice):
    """The console."""

    kind = "virtio.console"
    TYPE = 3
    PCI_CLASS = 0x0780
    QUEUES = (64, 64)
    SCHEMA: fields.Schema = {"input": fields.octets(0, INPUT_LIMIT)}

    def __init__(self, environment: DeviceEnvironment, bridge: HostBridge, slot: int) -> None:
        super().__init__(environment, bridge, slot, 0)
        self._emit = environment.serial_output
        self._input = bytearray()

    def notified(self, number: int) -> None:
        if number == RECEIVE:
            self._deliver()
            return
        queue = self.queues[TRANSMIT]
        while (chain := queue.pop()) is not None:
            if sum(map(len, chain.readable)) > OUTPUT_LIMIT:
                raise QueueError("too much console output at once")
            self._emit(b"".join(chain.readable))
            queue.push(chain.head, 0)
        self.completed(queue)

    def serial_input(self, data: bytes) -> int:
        if not self.ready or not self.queues[RECEIVE].active:
            return 0
        accepted = data[: INPUT_LIMIT - len(self._input)]
        self._input += accepted
        self._notify(RECEIVE)
        return len(accepted)

    def _deliver(self) -> None:
        queue = self.queues[RECEIVE]
        while self._input and (chain := queue.pop()) is not None:
            written = 0
            for view in chain.writable:
                part = self._input[: len(view)]
                view[: len(part)] = part
                del self._input[: len(part)]
                written += len(part)
            self.wrote(chain)
            queue.push(chain.head, written)
        self.completed(queue)

    def stop_work(self) -> None:
        self._input.clear()

    def save_own(self) -> dict[str, Any]:
        return {"input": bytes(self._input)}

    def restore_own(self, values: dict[str, Any]) -> None:
        self._input[:] = values["input"]
