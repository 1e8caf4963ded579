"""vmf: run, move and take apart virtual machines.

The names here are the public Python API; each is imported when it is first used, so that `import vmf` is quick.

    import vmf

    with vmf.Machine(vmf.MachineConfig(name="web", memory_mib=256, kernel=kernel, initrd=initrd)) as machine:
        machine.start()
        machine.teleport("otherhost", 6000)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmf.cpu import CpuBackend, Vcpu, VcpuState
    from vmf.device import Device, DeviceEnvironment, Payload
    from vmf.errors import (
        ConfigError,
        ImageError,
        InvalidStateError,
        MachineError,
        PluginError,
        TeleportBlocked,
        TeleportCancelled,
        TeleportError,
        TeleportUncertain,
        VmfError,
    )
    from vmf.machine.config import MachineConfig, TeleporterConfig
    from vmf.machine.home import Home
    from vmf.machine.machine import Machine
    from vmf.machine.states import MachineState
    from vmf.plugins.bridge import PluginRegistry
    from vmf.plugins.hookspecs import API_VERSION, hookimpl
    from vmf.teleport.progress import ProgressEvent, TeleportSummary

__version__ = "0.1.0"

_WHERE = {
    "CpuBackend": "vmf.cpu",
    "Vcpu": "vmf.cpu",
    "VcpuState": "vmf.cpu",
    "Device": "vmf.device",
    "DeviceEnvironment": "vmf.device",
    "Payload": "vmf.device",
    "ConfigError": "vmf.errors",
    "ImageError": "vmf.errors",
    "InvalidStateError": "vmf.errors",
    "MachineError": "vmf.errors",
    "PluginError": "vmf.errors",
    "TeleportBlocked": "vmf.errors",
    "TeleportCancelled": "vmf.errors",
    "TeleportError": "vmf.errors",
    "TeleportUncertain": "vmf.errors",
    "VmfError": "vmf.errors",
    "MachineConfig": "vmf.machine.config",
    "TeleporterConfig": "vmf.machine.config",
    "Home": "vmf.machine.home",
    "Machine": "vmf.machine.machine",
    "MachineState": "vmf.machine.states",
    "PluginRegistry": "vmf.plugins.bridge",
    "API_VERSION": "vmf.plugins.hookspecs",
    "hookimpl": "vmf.plugins.hookspecs",
    "ProgressEvent": "vmf.teleport.progress",
    "TeleportSummary": "vmf.teleport.progress",
}

__all__ = [
    "API_VERSION",
    "ConfigError",
    "CpuBackend",
    "Device",
    "DeviceEnvironment",
    "Home",
    "ImageError",
    "InvalidStateError",
    "Machine",
    "MachineConfig",
    "MachineError",
    "MachineState",
    "Payload",
    "PluginError",
    "PluginRegistry",
    "ProgressEvent",
    "TeleportBlocked",
    "TeleportCancelled",
    "TeleportError",
    "TeleportSummary",
    "TeleportUncertain",
    "TeleporterConfig",
    "Vcpu",
    "VcpuState",
    "VmfError",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'vmf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
