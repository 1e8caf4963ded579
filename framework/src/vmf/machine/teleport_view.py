"""A machine as a teleport sees it: the implementation of `vmf.teleport.seam.TeleportableMachine`.

The description is what must agree at both ends; nothing descriptive (the name, say) is in it. The order of the calls
at the target is check (which makes the vCPU for the source's contract, while nobody waits for it), RAM, restore,
resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve

from vmf.cpuid.negotiate import Capability
from vmf.device.base import Payload
from vmf.errors import LocalProtocolError, TeleportError
from vmf.machine.contract import capability_of
from vmf.machine.cpu_check import CpuCheck, describe_cpu
from vmf.machine.device_check import check_devices, check_ranges, check_settings
from vmf.machine.states import MachineState
from vmf.machine.switch import note_of
from vmf.memory.dirty import DirtyTracker
from vmf.memory.guest import GuestMemory
from vmf.teleport.check import Blocker, Hook, compare_descriptions, show
from vmf.teleport.seam import Stopped

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.teleport.journal import Journal

DESCRIPTION_VERSION = 1
DEVICE_HOOKS: dict[str, Hook] = {
    "devices": check_devices,
    "device_settings": check_settings,
    "device_ranges": check_ranges,
}


class TeleportView:
    """One machine's side of one teleport."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._was_running = False
        self._handed_over = False
        self._drives: list[dict[str, Any]] | None = None
        self._look: Callable[[], None] | None = None
        self._prepared: list[Blocker] | None = None

    @property
    def name(self) -> str:
        return self._machine.name

    @property
    def memory(self) -> GuestMemory:
        return self._machine.hardware.memory

    @property
    def journal(self) -> Journal:
        return self._machine.journal

    def interrupted_by(self, look: Callable[[], None]) -> None:
        """What waits for storage calls `look` now and then, which raises when the teleport shall end."""
        self._look = look

    # -- what both sides are

    def describe(self) -> Mapping[str, Any]:
        return {**self.describe_hardware(), "drives": self._describe_drives()}

    def describe_hardware(self) -> dict[str, Any]:
        """All but the drives."""
        machine, hardware = self._machine, self._machine.hardware
        return {
            "version": DESCRIPTION_VERSION,
            "memory_mib": machine.config.memory_mib,
            "cpu": describe_cpu(machine, with_state=machine.state is not MachineState.TELEPORTING_IN),
            "devices": [[kind, instance] for kind, instance in hardware.device_keys()],
            "device_settings": hardware.device_settings(),
            "device_ranges": hardware.device_ranges,
            "boot": machine.boot_digest(),
        }

    def check(self, source: Mapping[str, Any]) -> Sequence[Blocker]:
        if source.get("version") != DESCRIPTION_VERSION:
            remedy = "Bring both hosts to the same release of vmf."
            return [Blocker("description", f"version {show(source.get('version'))}", f"{DESCRIPTION_VERSION}", remedy)]
        cpu = CpuCheck(self._machine)
        hooks: dict[str, Hook] = {
            **DEVICE_HOOKS,
            "boot": self._check_boot,
            "cpu": lambda there, _here: cpu.compare(there),
            "drives": lambda there, _here: self._machine.storage.check(there),
        }
        found = compare_descriptions(self.name, source, self.describe(), hooks)
        if not found:
            found = cpu.plug(source["cpu"])
        return found

    def notes(self, source: Mapping[str, Any]) -> Sequence[str]:
        note = note_of(self._machine.hardware.backend, source["cpu"].get("backend"))
        return [note] if note else []

    def check_saved(self, saved: Mapping[str, Any]) -> Sequence[Blocker]:
        """At the start from a snapshot: `check`, for a description that this machine wrote itself."""
        cpu = CpuCheck(self._machine)
        hooks: dict[str, Hook] = {
            **DEVICE_HOOKS,
            "boot": lambda _then, _now: [],  # what a reset starts may be another one
            "cpu": lambda then, _now: cpu.compare(then),
        }
        found = compare_descriptions(self.name, saved, self.describe_hardware(), hooks)
        return found or cpu.plug(saved["cpu"])

    def _describe_drives(self) -> list[dict[str, Any]]:
        if self._drives is None:  # once: each time the images would get another mark to be recognised by
            arriving = self._machine.state is MachineState.TELEPORTING_IN
            self._drives = self._machine.storage.describe(publish=not arriving, look=self._look)
        return self._drives

    def _check_boot(self, source: Any, target: Any) -> list[Blocker]:
        """Kernel, initrd and command line: what a reset after the teleport would start."""
        there = source if isinstance(source, Mapping) else {}
        found = []
        for key in ("kernel", "initrd", "cmdline", "image"):
            if there.get(key) != target.get(key):
                remedy = (
                    "A reset would start another guest there: give the target machine the same one with "
                    f"`vmf modifyvm {self.name} --{key} ...`."
                )
                values = [show(side.get(key, "none")) for side in (there, target)]
                found.append(Blocker(key, values[0], values[1], remedy))
        return found

    def payload_kinds(self) -> Sequence[tuple[str, int, int]]:
        return self._machine.hardware.payload_kinds()

    def cpuid_capability(self) -> Capability:
        """What this machine's backend can present; the name is the backend's."""
        backend = self._machine.hardware.backend
        return evolve(capability_of(backend), name=backend.name)

    def local_blockers(self, role: str) -> Sequence[Blocker]:
        if self._prepared is not None and role == "source":
            found, self._prepared = self._prepared, None
            return found
        return self._find_local_blockers(role, self._look)

    def prepare(self, look_around: Callable[[], None], slow: Callable[[str], None] | None = None) -> None:
        """At the source, before anybody at the other side waits: what may take long because plugins do.

        Args:
            look_around: called several times a second meanwhile; what it raises ends the wait.
            slow: called for each plugin whose check takes longer than a second, with the plugin in words.
        """
        self.interrupted_by(look_around)
        self._prepared = self._find_local_blockers("source", look_around, slow)

    def _find_local_blockers(
        self, role: str, look_around: Callable[[], None] | None, slow: Callable[[str], None] | None = None
    ) -> list[Blocker]:
        machine, hardware = self._machine, self._machine.hardware

        def here(reason: str) -> tuple[str, str]:
            return (reason, "-") if role == "source" else ("-", reason)

        found = [
            Blocker(f"device {kind}", *here(reason), remedy) for kind, reason, remedy in hardware.migration_blockers()
        ]
        if role == "source":
            for what, refused in hardware.rehearse_save():
                found.append(Blocker(f"state of {what}", *here(refused.message.rstrip(".")), refused.remedy))
            found += machine.storage.local_blockers()
            if (refusal := hardware.state_refusal()) is not None:
                why = refusal.message.removeprefix("vCPU state: ").rstrip(".")
                found.append(Blocker("vCPU state", why, "-", refusal.remedy or "Try again later."))
        found += self._snapshot_blockers(role)
        found += machine.registry.hooks.preflight_check(self.name, role, self.describe(), look_around, slow)
        return found

    def _snapshot_blockers(self, role: str) -> list[Blocker]:
        """Snapshots stay on their host, so a machine that has some stays there, too."""
        names = self._machine.snapshots.names() if self._machine.snapshots is not None else []
        if not names:
            return []
        text = f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        values = (text, "-") if role == "source" else ("-", text)
        remedy = f"Delete them: `vmf snapshot {self.name} delete {names[0]}`."
        return [Blocker("snapshots", *values, remedy)]

    def open_dirty_tracker(self) -> DirtyTracker:
        from vmf.memory.dirty import open_tracker

        return open_tracker(self.memory, self._machine.hardware.write_log())

    # -- the source

    def set_throttle(self, fraction: float) -> None:
        self._machine.hardware.thread.set_throttle(fraction)

    def stop(self) -> Stopped:
        machine = self._machine
        if machine.state not in (MachineState.TELEPORTING, MachineState.TELEPORTING_PAUSED):
            raise TeleportError(f"machine {self.name} became {machine.state.value} during the teleport.")
        self._was_running = machine.state is MachineState.TELEPORTING
        machine.storage.flush(self._look)  # most of it now, so that little is left when the guest stands still
        machine.hardware.halt(freeze_time=False)
        machine.hardware.thread.call(lambda: None)  # what the last slice posted (a reset) has happened before the scan
        if machine.powering_off:
            raise TeleportError(f"the guest of machine {self.name} switched itself off during the teleport.")
        stopped_at = machine.hardware.stopped_at_ns
        assert stopped_at is not None
        return Stopped(self._was_running, stopped_at)

    def save(self) -> Sequence[Payload]:
        self._machine.console.hold_input()  # before the pending input is saved: nothing may be taken after that
        return self._machine.hardware.save()

    def undo_stop(self) -> None:
        if self._handed_over:
            raise LocalProtocolError("a machine that was handed over must not go on at the source.")
        self._machine.console.accept_input()
        if self._was_running and self._machine.state in (MachineState.TELEPORTING, MachineState.UNCERTAIN):
            self._machine.hardware.run()

    def mark_handed_over(self) -> None:
        self._handed_over = self._machine.handed_over = True

    def take_back(self) -> None:
        self._handed_over = self._machine.handed_over = False

    def mark_teleported(self) -> None:
        self._machine.set_state(MachineState.TELEPORTED)

    # -- both: the leases of the disks (`vmf.teleport.seam.KeepsLeases`)

    @property
    def leased(self) -> bool:
        return self._machine.storage.leased

    def pass_leases(self, teleport_id: bytes) -> None:
        self._machine.storage.pass_leases(teleport_id.hex())

    def take_leases(self, teleport_id: bytes) -> None:
        self._machine.storage.take_leases(teleport_id.hex())

    # -- the target

    def restore(self, payloads: Sequence[Payload]) -> None:
        self._machine.hardware.restore(payloads)

    def resume(self, stopped_at_ns: int, running: bool) -> int:
        resumed_at = self._machine.hardware.catch_up_and_run(stopped_at_ns, running=running)
        self._machine.console.accept_input()  # behind what came with the guest
        self._machine.set_state(MachineState.RUNNING if running else MachineState.PAUSED)
        return resumed_at

    def discard_arrival(self) -> None:
        self._machine.hardware.discard()
