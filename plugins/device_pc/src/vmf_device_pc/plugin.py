"""The plugin object: what the entry point `vmf.device: pc` names."""

from __future__ import annotations

from collections.abc import Sequence

from vmf.device.base import Device, DeviceEnvironment
from vmf.plugins import hookimpl
from vmf_device_pc.cmos import CmosRtc
from vmf_device_pc.control import SystemControl
from vmf_device_pc.pic import Pic8259
from vmf_device_pc.pit import Pit8254
from vmf_device_pc.uart import Uart16550

vmf_api_version = 1


@hookimpl
def vmf_create_device(environment: DeviceEnvironment) -> Sequence[Device]:
    """The devices of a PC, interrupt controller first."""
    pic = Pic8259(environment)
    pit = Pit8254(environment)
    uart = Uart16550(environment)
    cmos = CmosRtc(environment)
    control = SystemControl(environment, before_end=uart.flush)
    return [pic, pit, uart, cmos, control]
