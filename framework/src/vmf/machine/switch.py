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
from vmf.cpu.state import MSR_IA32_SYSENTER_EIP, MSR_IA32_SYSENTER_ESP, VcpuState, msr_reset_value
from vmf.cpuid.compare import blockers as cpuid_blockers
from vmf.cpuid.compare import compare
from vmf.errors import StateError, TeleportBlocked

if TYPE_CHECKING:
    from vmf.machine.hardware import Hardware
    from vmf.teleport.check import Blocker

ATTEMPTS = 20
RETRY_SECONDS = 0.005

_X87_CONTROL, _MXCSR, _XMM = slice(0, 5), slice(24, 28), slice(160, 416)
"""FCW, FSW and FTW; MXCSR; XMM0-15 in the XSAVE area (SDM vol. 1 table 13-1). Not FOP, FIP and FDP: an AMD processor
keeps them only while an exception is unmasked."""
_STATE_BITS = slice(512, 520)
_WIDTHS = {MSR_IA32_SYSENTER_ESP: 0xFFFF_FFFF, MSR_IA32_SYSENTER_EIP: 0xFFFF_FFFF}
"""An AMD processor has 32 bits there."""


@frozen
class SwitchSummary:
    """A switch that was done.

    Attributes:
        before, after: names of the backends.
        stopped_ns: how long the guest stood still.
        total_ns: the whole operation.
        notes: what the user should know of the new backend.
    """

    before: str
    after: str
    stopped_ns: int
    total_ns: int
    notes: tuple[str, ...] = ()


def note_of(backend: CpuBackend, before: object) -> str:
    """What a user should know when a guest moves to `backend` from the one named `before`; "" when nothing."""
    if not backend.caveat or before == backend.name:
        return ""
    return f"The CPU backend {backend.name} is not a processor: {backend.caveat}"


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
    note = note_of(backend, before)
    return SwitchSummary(before, backend.name, stopped_ns, time.monotonic_ns() - begun, (note,) if note else ())


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
    """Raise StateError unless a state arrived, all that any two backends hold in the same form."""
    for field in (
        "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "xcr0", "efer", "gdtr", "idtr", "dr", "halted",
    ):  # fmt: skip
        _same(field, getattr(wanted, field), getattr(got, field), backend)
    for register, value in wanted.registers.items():
        _same(register, value, got.registers[register], backend)
    system = (("ldtr", wanted.ldtr, got.ldtr), ("tr", wanted.tr, got.tr))
    for name, descriptor, other in (
        *((name, descriptor, got.segments[name]) for name, descriptor in wanted.segments.items()), *system
    ):  # fmt: skip
        for part in ("selector", "base", "limit", "dpl"):
            _same(f"{name}.{part}", getattr(descriptor, part), getattr(other, part), backend)
    for index in sorted({*wanted.msrs, *got.msrs}):
        ours, theirs = (side.msrs.get(index, msr_reset_value(index)) & _WIDTHS.get(index, -1) for side in (wanted, got))
        _same(f"MSR {index:#x}", ours, theirs, backend)
    for event in ("exception", "exception_error_code", "interrupt", "nmi_pending", "nmi_masked"):
        _same(f"{event} in flight", getattr(wanted.events, event), getattr(got.events, event), backend)
    _same("interrupt shadow", bool(wanted.events.interrupt_shadow), bool(got.events.interrupt_shadow), backend)
    _same_extended(wanted.xsave, got.xsave, backend)


def _same_extended(wanted: bytes, got: bytes, backend: str) -> None:
    """x87, SSE and whatever else is written out, where both sides have it in the area."""
    held = [int.from_bytes(area[_STATE_BITS], "little") for area in (wanted, got)]
    if held[0] & held[1] & 1:
        _same("x87 control", wanted[_X87_CONTROL], got[_X87_CONTROL], backend)
        for number in range(8):
            place = slice(32 + 16 * number, 42 + 16 * number)
            _same(f"st{number}", wanted[place], got[place], backend)
    if held[0] & held[1] & 2:
        _same("MXCSR", wanted[_MXCSR], got[_MXCSR], backend)
        _same("XMM registers", wanted[_XMM], got[_XMM], backend)
    # Of the components beyond SSE a side may write out fewer: those at rest, which are all zeros.
    _same("XSAVE components beyond SSE", wanted[576:].rstrip(b"\0"), got[576:].rstrip(b"\0"), backend)


def _same(what: str, wanted: object, got: object, backend: str) -> None:
    if wanted != got:
        show = [f"{value:#x}" if type(value) is int else repr(value) for value in (wanted, got)]
        raise StateError(
            f"vCPU state: the CPU backend {backend} took up {what} as {show[1]} instead of {show[0]}.",
            "This is a bug of that backend, or of its host; the machine goes on with the other one.",
        )
