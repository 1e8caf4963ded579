"""Can this KVM keep a machine's contract? Not asked, but tried, with a guest of 200 bytes (selftest.S).

Not every /dev/kvm has virtualisation hardware behind it. The pagetable KVM (PVM), for one, runs guests' user mode
natively in its own address space and emulates their kernel mode: every ioctl works, yet CPUID in user mode is the
host's whatever was set, so is the TSC, SYSCALL does not arrive, and SSE in kernel mode is an internal error. A Linux
guest would fail there in strange ways. So these things are executed:

1. SSE in ring 0 gives the right result;
2. CPUID, in ring 0 and in ring 3, gives exactly a contract from which everything possible was masked;
3. RDTSC, in ring 0 and in ring 3, counts from the value that was set;
4. SYSRET reaches ring 3, SYSCALL comes back from there, with RCX, R11 and CS right.

It takes some milliseconds, and the result is kept for as long as the kernel and its modules stay (a file in the
user's cache directory), as `vmf list plugins` asks in a process of its own.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmf.cpu.backend import ExitReason, VcpuEnvironment
from vmf.cpu.state import (
    GENERAL_REGISTERS,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    DescriptorTable,
    Segment,
    VcpuState,
)
from vmf.cpuid.contract import make_contract
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.directories import optional_cache_directory
from vmf.errors import VmfError
from vmf.machine.bus import Bus
from vmf.memory.guest import MIB, GuestMemory
from vmf_cpu_kvm import cpuid
from vmf_cpu_kvm.host import HostKvm, boot_identity
from vmf_cpu_kvm.vcpu import KvmVcpu, reset_state

VERSION: Final = 2
"""Of the test: raise it when the test changes, so that kept results are not believed any more."""

CODE: Final = bytes.fromhex(
    "eb18000000000000eb31000000000000eb44000000000000eb7348b8efcdab89674523016648"
    "0f6ec0660f6cc0660ffcc0f30f7f042500400100f40f318904253040010089142534400100bf"
    "00200100e85b000000f4b96400010041bb02000000480f07bf00300100bc00600100e83d0000"
    "000f31890425384001008914253c40010041be5a5a00000f05ebfe8cc8488904251040010048"
    "890c25184001004c891c25204001004c89342528400100f4be001001008b068b4e040fa28907"
    "895f04894f0889570c83c60883c710ffcd75e4c3"
)
_CODE_AT, _LIST_AT, _RING0_AT, _RING3_AT, _MARKS_AT = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000
_STACK_TOP = 0x16000
_ENTRY_SSE, _ENTRY_RING0, _ENTRY_RING3, _ENTRY_SYSCALL = (_CODE_AT + 8 * i for i in range(4))
_SSE_RESULT = bytes((2 * byte) & 0xFF for byte in (0x0123456789ABCDEF).to_bytes(8, "little")) * 2
_AFTER_SYSCALL = _CODE_AT + 0x8B
_TSC = 1 << 50
"""What the guest's TSC is set to; no host has been up for that long."""
_SLICE_NS = 250_000_000
"""Far more than the test takes anywhere, even where everything is emulated."""

_DATA = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
_CODE64 = Segment(0x08, 0, 0xFFFF_FFFF, 0xA09B)
_UNUSABLE = Segment(0, 0, 0, 1 << 16)
_TSS = Segment(0x40, 0, 0x67, 0x8B)


class _NoInterrupts:
    """An interrupt controller that has none."""

    def pending(self) -> bool:
        return False

    def acknowledge(self) -> int:
        return 0xFF


def masked_contract(capability: CpuidTable) -> CpuidTable:
    """As little as a 64-bit guest can live with, and a brand that no CPU has."""
    return make_contract(capability, 4)


def _load(memory: GuestMemory, leaves: list[tuple[int, int]]) -> None:
    present_writable_user = 7
    memory.write(0x1000, struct.pack("<Q", 0x2000 | present_writable_user))
    memory.write(0x2000, struct.pack("<Q", 0x3000 | present_writable_user))
    memory.write(0x3000, struct.pack("<Q", 0x80 | present_writable_user))
    gdt = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
    memory.write(0x500, struct.pack("<6Q", *gdt))
    memory.write(_CODE_AT, CODE)
    memory.write(_LIST_AT, b"".join(struct.pack("<II", *leaf) for leaf in leaves))


def _entry_state(rip: int, count: int, tsc_khz: int) -> VcpuState:
    registers = dict.fromkeys(GENERAL_REGISTERS, 0)
    registers["rsp"], registers["rbp"] = _STACK_TOP, count
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _DATA)
    segments["cs"] = _CODE64
    return VcpuState(
        registers=registers,
        rip=rip,
        segments=segments,
        ldtr=_UNUSABLE,
        tr=_TSS,
        gdtr=DescriptorTable(0x500, 47),
        cr0=0x80050033,
        cr3=0x1000,
        cr4=0x620,  # OSXMMEXCPT OSFXSR PAE
        efer=0xD01,  # NXE LMA LME SCE
        msrs={
            **reset_state(0).msrs,
            # SYSCALL: CS 8, SS 0x10; SYSRET: CS 0x18 + 16, SS 0x18 + 8.
            MSR_STAR: 0x18 << 48 | 0x08 << 32,
            MSR_LSTAR: _ENTRY_SYSCALL,
            MSR_FMASK: 0x200,
        },
        tsc=_TSC,
        tsc_khz=tsc_khz,
    )


def _dumped(memory: GuestMemory, at: int, leaves: list[tuple[int, int]]) -> CpuidTable:
    raw = memory.read(at, 16 * len(leaves))
    answers = struct.iter_unpack("<4I", raw)
    return CpuidTable({leaf: CpuidRegisters(*answer) for leaf, answer in zip(leaves, answers, strict=True)})


def _override(contract: CpuidTable, seen: CpuidTable, where: str) -> str:
    changed = cpuid.overridden(contract, seen)
    if not changed:
        return ""
    names = [item.feature.name if item.feature is not None else item.field for item in changed]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"CPUID in {where} is not what was set ({', '.join(names[:4])}{more} differ)"


def run_selftest(device: int, host: HostKvm) -> list[str]:
    """What this KVM does wrong, one phrase each; empty when it can be trusted."""
    contract = masked_contract(cpuid.capability(host.supported_cpuid, host.tsc_khz))
    leaves = list(contract.entries)
    memory = GuestMemory(MIB)
    found: list[str] = []
    try:
        _load(memory, leaves)
        environment = VcpuEnvironment(memory, Bus(), _NoInterrupts(), contract, host.tsc_khz)
        vcpu = KvmVcpu(device, host, environment, strict=False)
        try:

            def passes(what: str, entry: int, verdict: Callable[[], str]) -> None:
                vcpu.restore(_entry_state(entry, len(leaves), host.tsc_khz))
                exit_ = vcpu.run(time.monotonic_ns() + _SLICE_NS)
                if exit_.reason is ExitReason.HALTED:
                    problem = verdict()
                elif exit_.reason is ExitReason.KICKED:
                    problem = f"{what} does not come to an end"
                else:
                    detail = exit_.detail.split(" at RIP")[0].split(" (bytes")[0]
                    problem = f"{what} fails ({detail})"
                if problem:
                    found.append(problem)

            passes(
                "SSE in ring 0", _ENTRY_SSE,
                lambda: "" if memory.read(_MARKS_AT, 16) == _SSE_RESULT else "SSE in ring 0 gives wrong results",
            )  # fmt: skip
            passes(
                "CPUID in ring 0", _ENTRY_RING0,
                lambda: _override(contract, _dumped(memory, _RING0_AT, leaves), "ring 0"),
            )  # fmt: skip
            passes(
                "a SYSRET and SYSCALL round trip", _ENTRY_RING3,
                lambda: _override(contract, _dumped(memory, _RING3_AT, leaves), "ring 3") or _syscall_verdict(memory),
            )  # fmt: skip
            khz = host.tsc_khz
            tsc0, tsc3 = struct.unpack("<QQ", memory.read(_MARKS_AT + 48, 16))
            rings = [str(ring) for ring, tsc in ((0, tsc0), (3, tsc3)) if tsc and not 0 <= tsc - _TSC < khz * 10_000]
            if rings:
                found.append(f"the TSC in ring {' and '.join(rings)} is not the one that was set")
            if not any("CPUID in ring 3" in problem for problem in found):
                # The round trip failed; what ring 3 saw before that still counts.
                seen = _dumped(memory, _RING3_AT, leaves)
                if any(any(registers) for registers in seen.entries.values()) and (
                    problem := _override(contract, seen, "ring 3")
                ):
                    found.append(problem)
        finally:
            vcpu.close()
    finally:
        memory.close()
    return found


def _syscall_verdict(memory: GuestMemory) -> str:
    cs, rcx, r11, r14 = struct.unpack("<4Q", memory.read(_MARKS_AT + 16, 32))
    if (cs, rcx, r11 & ~0x8D5, r14) != (0x08, _AFTER_SYSCALL, 2, 0x5A5A):
        return f"SYSCALL arrives with CS {cs:#x}, RCX {rcx:#x}, R11 {r11:#x}"
    return ""


# -- keeping the result


def _cache_file() -> Path | None:
    directory = optional_cache_directory()
    return None if directory is None else directory / "kvm-selftest.json"


def verdict(device: int, host: HostKvm) -> list[str]:
    """`run_selftest`, from the cache when it has been run since the kernel started. Never raises."""
    identity = f"{VERSION} {boot_identity()}"
    path = _cache_file()
    try:
        kept = json.loads(path.read_text()) if path is not None else {}
        if kept["identity"] == identity and all(isinstance(item, str) for item in kept["problems"]):
            return list(kept["problems"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none kept, or not by us: run it
    try:
        problems = run_selftest(device, host)
    except VmfError as error:
        return [f"the self-test cannot run: {error}"]
    if path is None:
        return problems
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"identity": identity, "problems": problems}))
        temporary.replace(path)
    except OSError:
        pass  # the cache is a convenience
    return problems


__all__ = ["CODE", "run_selftest", "verdict"]
