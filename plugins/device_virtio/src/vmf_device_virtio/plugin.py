"""The plugin object: what the entry point `vmf.device: virtio` names."""

from __future__ import annotations

from collections.abc import Sequence

from vmf.device.base import Device, DeviceEnvironment
from vmf.errors import ConfigError
from vmf.plugins import hookimpl
from vmf_device_virtio.block import VirtioBlock
from vmf_device_virtio.entropy import VirtioEntropy
from vmf_device_virtio.pci import SLOTS, HostBridge
from vmf_device_virtio.terminal import VirtioConsole

vmf_api_version = 1

OPTIONS = {"rng": True, "console": False}
"""Settings in `device_options.virtio`, and what they are when they are not given."""
RNG_SLOT, CONSOLE_SLOT, FIRST_DRIVE_SLOT = 1, 2, 4


@hookimpl
def vmf_create_device(environment: DeviceEnvironment) -> Sequence[Device]:
    """The PCI bus, its devices, and a disk for each drive that nobody has claimed before."""
    options = {**OPTIONS, **environment.options}
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(
                f"device_options.virtio.{name} is not a setting.", f"Known are {', '.join(sorted(OPTIONS))}."
            )
        if type(value) is not bool:
            raise ConfigError(f"device_options.virtio.{name} is {value!r}.", "Write true or false.")
    drives = [drive for drive in environment.drives if not drive.claimed_by]
    if len(drives) > SLOTS - FIRST_DRIVE_SLOT:
        raise ConfigError(
            f"{len(drives)} drives are more than the PCI bus has slots for ({SLOTS - FIRST_DRIVE_SLOT}).",
            "Detach some with `vmf storageattach NAME --port N --medium none`.",
        )
    bridge = HostBridge(environment)
    made: list[Device] = [bridge]
    if options["rng"]:
        made.append(VirtioEntropy(environment, bridge, RNG_SLOT, 0))
    if options["console"]:
        made.append(VirtioConsole(environment, bridge, CONSOLE_SLOT))
    for slot, drive in enumerate(drives, FIRST_DRIVE_SLOT):
        made.append(VirtioBlock(environment, bridge, slot, drive))
    return made
