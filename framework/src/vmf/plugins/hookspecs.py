"""What a plugin may do: vmf's hook specifications.

A plugin is a module (or object) named by an entry point in one of the groups of `GROUPS`, with functions marked
`@vmf.plugins.hookimpl`, and an attribute `vmf_api_version` that equals `API_VERSION`. The groups `vmf.cpu`,
`vmf.device`, `vmf.storage` and `vmf.transport` are loaded by name, only when that one is used; plugins in
`vmf.hooks` are observers and policies, loaded whenever a machine's process starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend
    from vmf.cpuid.table import CpuidTable
    from vmf.device.base import Device, DeviceEnvironment
    from vmf.storage.base import StorageDriver
    from vmf.teleport.check import Blocker
    from vmf.transport.base import Transport

PROJECT = "vmf"
API_VERSION = 1
"""Version of this file's contract and of the seams it names. A plugin of another version is set aside."""

GROUPS = {
    "cpu": "vmf.cpu",
    "device": "vmf.device",
    "storage": "vmf.storage",
    "transport": "vmf.transport",
    "hooks": "vmf.hooks",
}
"""Plugin kind to entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def vmf_cpu_backend() -> CpuBackend:
    """Group `vmf.cpu`: the backend.

    Example::

        @vmf.plugins.hookimpl
        def vmf_cpu_backend():
            return UnicornBackend()
    """
    raise AssertionError("a specification, never called")


@hookspec(firstresult=True)
def vmf_create_device(environment: DeviceEnvironment) -> Sequence[Device]:
    """Group `vmf.device`: make the devices of this plugin for one machine, interrupt controller first.

    Example::

        @vmf.plugins.hookimpl
        def vmf_create_device(environment):
            return [Thermometer(environment)]
    """
    raise AssertionError("a specification, never called")


@hookspec(firstresult=True)
def vmf_storage_driver() -> StorageDriver:
    """Group `vmf.storage`: the driver.

    Example::

        @vmf.plugins.hookimpl
        def vmf_storage_driver():
            return FileDriver()
    """
    raise AssertionError("a specification, never called")


@hookspec(firstresult=True)
def vmf_transport() -> Transport:
    """Group `vmf.transport`: the transport.

    Example::

        @vmf.plugins.hookimpl
        def vmf_transport():
            return TcpTransport()
    """
    raise AssertionError("a specification, never called")


@hookspec
def vmf_machine_state_changed(name: str, old: str, new: str) -> None:
    """Group `vmf.hooks`: the machine changed its state. An exception sets the observer aside.

    Example::

        @vmf.plugins.hookimpl
        def vmf_machine_state_changed(name, old, new):
            log.info("%s: %s -> %s", name, old, new)
    """


@hookspec
def vmf_teleport_phase(name: str, role: str, phase: str) -> None:
    """Group `vmf.hooks`: a teleport of this machine entered `phase`; `role` is "source" or "target".

    Example::

        @vmf.plugins.hookimpl
        def vmf_teleport_phase(name, role, phase):
            metrics.count(f"teleport.{role}.{phase}")
    """


@hookspec
def vmf_preflight_check(name: str, role: str, description: Mapping[str, object]) -> Sequence[Blocker]:
    """Group `vmf.hooks`: reasons why this machine must not teleport now. An exception is itself a blocker.

    Example::

        @vmf.plugins.hookimpl
        def vmf_preflight_check(name, role, description):
            if in_backup_window():
                return [Blocker("backup", "running", "idle", "Wait until the backup has finished.")]
            return []
    """
    raise AssertionError("a specification, never called")


@hookspec
def vmf_cpuid_policy(name: str, contract: CpuidTable) -> CpuidTable | None:
    """Group `vmf.hooks`: restrict what the guest sees. Results are intersected; None leaves it alone.

    Example::

        @vmf.plugins.hookimpl
        def vmf_cpuid_policy(name, contract):
            return without(contract, "rdrand")
    """
