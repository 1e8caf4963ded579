"""The device seam: what a device plugin implements."""

from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import InterruptController, IrqLine

__all__ = ["Device", "DeviceEnvironment", "InterruptController", "IrqLine", "Payload"]
