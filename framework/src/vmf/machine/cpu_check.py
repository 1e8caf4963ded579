"""Whether a machine's CPU can go on here: the CPU's part of the check before a teleport, at the target.

Three questions, each backend by backend, the machine's own one first and, where its definition says "auto", the others
that work here in the order of preference:

1. can it present the contract and count at the TSC's rate? (`vmf.cpuid.compare`, from what it declares);
2. does it, once it has been told to? A vCPU is made for the contract, and what it shows is read back;
3. can it hold what the vCPU carries now? The source's description has the vCPU's state at the moment of the check. It
   is put into the new vCPU, read back and compared. What is in flight between two instructions is left out of that: it
   will have passed by the time the machine stops.

So nothing that the target could not hold is found out with the guest stopped, and nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from vmf.cpu import codec
from vmf.cpu.state import PendingEvents
from vmf.cpuid.compare import blockers as cpuid_blockers
from vmf.cpuid.compare import compare
from vmf.cpuid.table import CpuidTable
from vmf.errors import ContractOverridden, StateError, VmfError
from vmf.machine import switch
from vmf.machine.contract import AUTO_BACKEND, describe_choice, origin_of_arrival
from vmf.plugins.bridge import BackendRefusal
from vmf.teleport.check import Blocker, show

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend
    from vmf.machine.hardware import Hardware
    from vmf.machine.machine import Machine

OTHER_BACKEND = "Choose another CPU backend for the target machine (`--cpu-backend`)."


def describe_cpu(machine: Machine, *, with_state: bool) -> dict[str, Any]:
    """What the description of a machine says of its CPU.

    Args:
        with_state: the vCPU's present state, too; takes a millisecond of the vCPU thread's time.
    """
    hardware = machine.hardware
    described: dict[str, Any] = {
        "backend": hardware.backend.name,  # binds nothing: the target's may be another one
        "tsc_khz": hardware.tsc_khz,
        "cpuid": hardware.cpuid.to_wire(),
        "level": "" if machine.contract_origin is None else machine.contract_origin.level,
    }
    if with_state and (state := hardware.present_state()) is not None:
        described["state"] = codec.to_plain(evolve(state, events=PendingEvents(), halted=False))
    return described


class CpuCheck:
    """One check of one source; makes the target's vCPU when all is well."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._suited: list[CpuBackend] = []
        self._refusals: list[BackendRefusal] = []

    def compare(self, source: Any) -> list[Blocker]:
        """What speaks against all backends that may be used here; that of the most preferred one."""
        try:
            if not isinstance(source, Mapping) or type(khz := source.get("tsc_khz")) is not int:
                raise StateError("the source does not describe its CPU.")
            if not 0 < khz < 1 << 32:
                raise StateError("the source's TSC rate is out of range.")
            contract = CpuidTable.from_wire(source.get("cpuid"))
            if "state" in source:
                codec.from_plain(source["state"])
        except StateError as error:
            own = self._machine.hardware.backend.name
            return [Blocker("CPU", "unreadable", own, f"{error} Bring both hosts to the same release of vmf.")]
        level = origin_of_arrival(contract, source.get("level")).number if source.get("level") else 0
        self._suited, self._refusals = [], []
        first: list[Blocker] = []
        for backend in self._candidates():
            found = compare(
                contract,
                backend.cpuid_capability(),
                machine=self._machine.name,
                tsc_khz=khz,
                capability_tsc_khz=backend.tsc_khz(),
                tsc_scaling=backend.tsc_khz_supported(khz),
                level=level,
            )
            if not found:
                self._suited.append(backend)
            elif not self._suited:
                first = first or cpuid_blockers(found)
                self._refuse(backend, first)
        return [] if self._suited else first

    def _candidates(self) -> list[CpuBackend]:
        machine = self._machine
        if machine.config.cpu_backend != AUTO_BACKEND:
            return [machine.hardware.backend]
        found = []
        for backend in machine.registry.cpu_backends():
            here = backend.availability()
            if here.usable:
                found.append(backend)
            else:
                self._refusals.append(BackendRefusal(backend.name, False, here.reason, here.remedy))
        return found or [machine.hardware.backend]

    def plug(self, source: Mapping[str, Any]) -> list[Blocker]:
        """After `compare` found nothing: make the vCPU for the source's contract, and try the source's state on it."""
        machine = self._machine
        contract = CpuidTable.from_wire(source["cpuid"])
        first: list[Blocker] = []
        for backend in self._suited:
            found = self._plug(backend, contract, source)
            if found:
                first = first or found
                self._refuse(backend, found)
                continue
            machine.contract_origin = origin_of_arrival(contract, source.get("level"))
            if machine.config.cpu_backend == AUTO_BACKEND:
                machine.backend_choice = describe_choice(backend, self._refusals)
            return []
        return first

    def _refuse(self, backend: CpuBackend, found: list[Blocker]) -> None:
        reason = "; ".join(f"{item.field} {item.source}, not {item.target}" for item in found[:4])
        self._refusals.append(BackendRefusal(backend.name, True, reason))

    def _plug(self, backend: CpuBackend, contract: CpuidTable, source: Mapping[str, Any]) -> list[Blocker]:
        hardware = self._machine.hardware
        try:
            hardware.plug_vcpu(contract, source["tsc_khz"], backend)
        except ContractOverridden as error:
            return cpuid_blockers(error.differences)
        except VmfError as error:
            remedy = error.remedy or OTHER_BACKEND
            return [Blocker("CPU contract", "needed", f"{backend.name} cannot: {show(error.message)}", remedy)]
        return _try_state(hardware, backend, source["state"]) if "state" in source else []


def _try_state(hardware: Hardware, backend: CpuBackend, plain: Any) -> list[Blocker]:
    state = codec.from_plain(plain)
    try:
        switch.verify(state, hardware.try_state(state), backend.name)
    except StateError as error:
        what = error.message.removeprefix("vCPU state: ").rstrip(".")
        text = f"{backend.name} cannot hold it: {what}"
        return [Blocker("vCPU state", "in use by the guest now", text, error.remedy or OTHER_BACKEND)]
    return []
