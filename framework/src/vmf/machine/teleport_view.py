"""A machine as a teleport sees it: the implementation of `vmf.teleport.seam.TeleportableMachine`.

The description is what must agree at both ends; nothing descriptive (the name, say) is in it. The order of the calls
at the target is check (which makes the vCPU for the source's contract, while nobody waits for it), RAM, restore,
resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vmf.cpuid.compare import blockers as cpuid_blockers
from vmf.cpuid.table import CpuidTable
from vmf.device.base import Payload
from vmf.errors import StateError, TeleportError
from vmf.machine.dirty import DirtyTracker
from vmf.machine.memory import GuestMemory
from vmf.machine.states import MachineState
from vmf.teleport.check import Blocker

if TYPE_CHECKING:
    from vmf.machine.machine import Machine

DESCRIPTION_VERSION = 1


class TeleportView:
    """One machine's side of one teleport."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._was_running = False

    @property
    def name(self) -> str:
        return self._machine.name

    @property
    def memory(self) -> GuestMemory:
        return self._machine.hardware.memory

    # -- what both sides are

    def describe(self) -> Mapping[str, Any]:
        machine, hardware = self._machine, self._machine.hardware
        return {
            "version": DESCRIPTION_VERSION,
            "memory_mib": machine.config.memory_mib,
            "cpu": {"backend": hardware.backend.name, "tsc_khz": hardware.tsc_khz, "cpuid": hardware.cpuid.to_wire()},
            "devices": [[kind, instance] for kind, instance in hardware.device_keys()],
            "boot": machine.boot_digest(),
        }

    def check(self, source: Mapping[str, Any]) -> Sequence[Blocker]:
        machine, hardware = self._machine, self._machine.hardware
        name = machine.name
        if source.get("version") != DESCRIPTION_VERSION:
            return [
                Blocker(
                    "description", f"version {source.get('version')!r}", f"version {DESCRIPTION_VERSION}",
                    "Bring both hosts to the same release of vmf.",
                )
            ]  # fmt: skip
        found: list[Blocker] = []
        memory, own_memory = source.get("memory_mib"), machine.config.memory_mib
        if memory != own_memory:
            found.append(
                Blocker(
                    "memory", f"{memory} MiB", f"{own_memory} MiB",
                    f"Set it at the target with `vmf modifyvm {name} --memory {memory}`.",
                )
            )  # fmt: skip
        found += self._check_devices(source.get("devices"))
        found += self._check_boot(source.get("boot"))
        found += self._check_cpu(source.get("cpu"), plug=not found)
        return found

    def _check_devices(self, devices: object) -> list[Blocker]:
        own = [[kind, instance] for kind, instance in self._machine.hardware.device_keys()]
        if not isinstance(devices, list):
            devices = []
        found = [
            Blocker(
                f"device {row[0]} #{row[1]}", "present", "missing",
                "Add the device plugin that provides it to `devices` in the target machine's definition.",
            )
            for row in devices
            if row not in own and isinstance(row, list) and len(row) == 2
        ]  # fmt: skip
        found += [
            Blocker(
                f"device {kind} #{instance}", "missing", "present",
                "Remove it from `devices` in the target machine's definition.",
            )
            for kind, instance in own
            if [kind, instance] not in devices
        ]  # fmt: skip
        return found

    def _check_boot(self, boot: object) -> list[Blocker]:
        own = self._machine.boot_digest()
        if not isinstance(boot, dict):
            boot = {}
        options = {"kernel": "--kernel", "initrd": "--initrd", "cmdline": "--cmdline", "image": "--image"}
        return [
            Blocker(
                key, str(boot.get(key)), str(own.get(key)),
                f"A reset would start another guest here: give the target the same one with "
                f"`vmf modifyvm {self.name} {options.get(key, key)} ...`.",
            )
            for key in sorted(set(own) | {key for key in boot if isinstance(key, str)})
            if boot.get(key) != own.get(key)
        ]  # fmt: skip

    def _check_cpu(self, cpu: object, *, plug: bool) -> list[Blocker]:
        hardware = self._machine.hardware
        backend = hardware.backend
        try:
            if not isinstance(cpu, dict) or type(cpu.get("tsc_khz")) is not int:
                raise StateError("the source does not describe its CPU.")
            contract, khz = CpuidTable.from_wire(cpu.get("cpuid")), cpu["tsc_khz"]
        except StateError as error:
            return [Blocker("cpu", "unreadable", backend.name, f"{error} Bring both hosts to the same release of vmf.")]
        found = list(cpuid_blockers(contract, backend.cpuid_capability(), machine=self.name))
        if not 0 < khz < 1 << 32 or not backend.tsc_khz_supported(khz):
            found.append(
                Blocker(
                    "cpu TSC rate", f"{khz} kHz", f"{backend.tsc_khz()} kHz",
                    f"The target's {backend.name} backend cannot give a guest that rate: "
                    "teleport to a host whose CPU runs at the source's rate.",
                )
            )  # fmt: skip
        if plug and not found:
            hardware.plug_vcpu(contract, khz)
        return found

    def local_blockers(self, role: str) -> Sequence[Blocker]:
        found = [
            Blocker(f"device {device.kind}", reason, "-", "Detach it, or wait until it can move.")
            for device in self._machine.hardware.devices
            if (reason := device.migration_blocker())
        ]
        found += self._machine.registry.hooks.preflight_check(self.name, role, self.describe())
        return found

    def open_dirty_tracker(self) -> DirtyTracker:
        from vmf.machine.dirty import open_tracker

        return open_tracker(self.memory)

    # -- the source

    def set_throttle(self, fraction: float) -> None:
        self._machine.hardware.thread.set_throttle(fraction)

    def stop(self) -> bool:
        machine = self._machine
        if machine.state not in (MachineState.TELEPORTING, MachineState.TELEPORTING_PAUSED):
            raise TeleportError(f"machine {self.name} became {machine.state.value} during the teleport.")
        self._was_running = machine.state is MachineState.TELEPORTING
        machine.hardware.halt(freeze_time=False)
        machine.hardware.thread.call(lambda: None)  # what the last slice posted (a reset) has happened before the scan
        if machine.powering_off:
            raise TeleportError(f"the guest of machine {self.name} switched itself off during the teleport.")
        return self._was_running

    def save(self) -> Sequence[Payload]:
        return self._machine.hardware.save()

    def undo_stop(self) -> None:
        if self._was_running and self._machine.state is MachineState.TELEPORTING:
            self._machine.hardware.run()

    def mark_handed_over(self) -> None:
        self._machine.set_state(MachineState.UNCERTAIN)

    def mark_teleported(self) -> None:
        self._machine.set_state(MachineState.TELEPORTED)

    # -- the target

    def restore(self, payloads: Sequence[Payload]) -> None:
        self._machine.hardware.restore(payloads)

    def resume(self, elapsed_ns: int, running: bool) -> None:
        self._machine.hardware.advance_and_run(elapsed_ns, running=running)
        self._machine.set_state(MachineState.RUNNING if running else MachineState.PAUSED)

    def discard_arrival(self) -> None:
        self._machine.hardware.discard()
