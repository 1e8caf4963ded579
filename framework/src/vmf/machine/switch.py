"""Live switch of the CPU backend: a teleport to oneself, without copying RAM.

Theory of operation
    RAM, devices, interrupt controller and clock belong to the machine, not to the vCPU; so a switch moves the vCPU's
    state alone. Everything that can be refused is refused before the guest is touched: the backend's availability,
    the machine's CPUID contract and TSC rate, and making the new vCPU (which takes most of the time). Then, on the
    vCPU thread between two instructions: save, restore into the new vCPU, save that one and compare, hand over the
    TSC, swap. The old vCPU is not changed by being saved and still counts time; until the swap it can go on as if
    nothing had happened, and it does after any error. It is closed once the new one runs.

    A state may be one that the new backend cannot take up at this very instant (an INT n that is half delivered): the
    guest then goes on for some milliseconds before the next attempt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attrs import frozen

from vmf.cpu.backend import CpuBackend, Vcpu
from vmf.cpu.state import VcpuState
from vmf.cpuid.compare import blockers as cpuid_blockers
from vmf.cpuid.compare import compare
from vmf.errors import StateError, TeleportBlocked

if TYPE_CHECKING:
    from vmf.machine.hardware import Hardware
    from vmf.teleport.check import Blocker

ATTEMPTS = 20
RETRY_SECONDS = 0.005

_XMM = slice(160, 416)
"""XMM0-15 in the XSAVE area (SDM vol. 1 table 13-1)."""


@frozen
class SwitchSummary:
    """A switch that was done.

    Attributes:
        before, after: names of the backends.
        stopped_ns: how long the guest stood still.
        total_ns: the whole operation.
    """

    before: str
    after: str
    stopped_ns: int
    total_ns: int


def find_blockers(name: str, hardware: Hardware, backend: CpuBackend, level: int) -> list[Blocker]:
    """Everything in the running machine's contract that `backend` could not honour here.

    Args:
        level: the portability level the contract was made with, for the remedies.
    """
    khz = hardware.tsc_khz
    found = compare(
        hardware.cpuid,
        backend.cpuid_capability(),
        machine=name,
        level=level,
        tsc_khz=khz,
        capability_tsc_khz=backend.tsc_khz(),
        tsc_scaling=backend.tsc_khz_supported(khz),
    )
    return cpuid_blockers(found)


def check(name: str, hardware: Hardware, backend: CpuBackend, level: int) -> None:
    """Raise TeleportBlocked with every blocker, if there are any."""
    found = tuple(find_blockers(name, hardware, backend, level))
    if not found:
        return
    intro = f"machine {name} cannot switch from the CPU backend {hardware.backend.name} to {backend.name}"
    if len(found) == 1:
        raise TeleportBlocked(f"{intro}: {found[0]}", "", found)
    reasons = " ".join(f"({number}) {blocker}" for number, blocker in enumerate(found, 1))
    raise TeleportBlocked(f"{intro} for {len(found)} reasons: {reasons}", "", found)


def switch(name: str, hardware: Hardware, backend: CpuBackend, level: int) -> SwitchSummary:
    """Go on with another backend, or with a fresh vCPU of the same one. Raises VmfError; then nothing has changed."""
    begun = time.monotonic_ns()
    before = hardware.backend.name
    check(name, hardware, backend, level)
    new = backend.create_vcpu(hardware.vcpu_environment())
    try:
        old, stopped_ns = exchange(hardware, backend, new)
    except BaseException:
        new.close()
        raise
    old.close()
    return SwitchSummary(before, backend.name, stopped_ns, time.monotonic_ns() - begun)


def exchange(hardware: Hardware, backend: CpuBackend, new: Vcpu) -> tuple[Vcpu, int]:
    """Put `new` in the place of the machine's vCPU: (the old one, not closed; ns that the guest stood still)."""
    for attempt in range(ATTEMPTS):
        try:
            return hardware.exchange_vcpu(backend, new)
        except StateError:
            if attempt + 1 == ATTEMPTS or not hardware.thread.running:
                raise
        time.sleep(RETRY_SECONDS)
    raise AssertionError


def verify(wanted: VcpuState, got: VcpuState, backend: str) -> None:
    """Raise StateError unless the essence of a state arrived: what any two backends hold in the same form."""
    for field in (
        "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "xcr0", "efer", "gdtr", "idtr", "halted",
    ):  # fmt: skip
        _same(field, getattr(wanted, field), getattr(got, field), backend)
    for register, value in wanted.registers.items():
        _same(register, value, got.registers[register], backend)
    for segment, descriptor in wanted.segments.items():
        _same(f"{segment}.selector", descriptor.selector, got.segments[segment].selector, backend)
        _same(f"{segment}.base", descriptor.base, got.segments[segment].base, backend)
    _same("exception in flight", wanted.events.exception, got.events.exception, backend)
    _same("interrupt in flight", wanted.events.interrupt, got.events.interrupt, backend)
    _same("XMM registers", wanted.xsave[_XMM], got.xsave[_XMM], backend)


def _same(what: str, wanted: object, got: object, backend: str) -> None:
    if wanted != got:
        show = [f"{value:#x}" if type(value) is int else repr(value) for value in (wanted, got)]
        raise StateError(
            f"vCPU state: the CPU backend {backend} took up {what} as {show[1]} instead of {show[0]}.",
            "This is a bug of that backend, or of its host; the machine goes on with the other one.",
        )
