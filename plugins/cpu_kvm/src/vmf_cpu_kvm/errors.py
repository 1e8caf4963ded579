"""What KVM's exits mean when they are the end, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmf_cpu_kvm import abi

if TYPE_CHECKING:
    from vmf.cpu.state import VcpuState

_CR0_PG, _CR0_PE, _CR4_PAE, _EFER_LME, _EFER_LMA = 1 << 31, 1, 1 << 5, 1 << 8, 1 << 10


def describe_exit(run: memoryview, reason: int) -> str:
    """One line for an exit that this backend does not handle."""
    name = abi.EXIT_NAMES.get(reason)
    if reason == abi.EXIT_INTERNAL_ERROR:
        return _internal(run)
    first, second = _words(run)
    if reason == abi.EXIT_FAIL_ENTRY:
        return f"KVM could not enter the guest: hardware entry failure reason {first:#x}{_entry_hint(first)}"
    if reason == abi.EXIT_UNKNOWN:
        return f"the CPU left the guest for a reason KVM does not know: hardware exit reason {first:#x}"
    if reason == abi.EXIT_SYSTEM_EVENT:
        return f"KVM reports system event {first & 0xFFFFFFFF}"
    return f"KVM exit {reason} ({name or 'unknown to this backend'}), data {first:#x} {second:#x}"


def _words(run: memoryview) -> tuple[int, int]:
    at = abi.RUN_UNION_AT
    return int.from_bytes(run[at : at + 8], "little"), int.from_bytes(run[at + 8 : at + 16], "little")


def _internal(run: memoryview) -> str:
    suberror, count, *data = abi.RUN_INTERNAL.unpack_from(run, abi.RUN_UNION_AT)
    what = abi.INTERNAL_ERRORS.get(suberror, "of a kind this backend does not know")
    text = f"KVM internal error {suberror}: {what}"
    if suberror == abi.INTERNAL_EMULATION and count >= 3 and data[0] & 1:
        # struct kvm_run.emulation_failure: flags, then the size and up to 15 bytes of the instruction.
        at = abi.RUN_UNION_AT + 16
        size = min(run[at], 15)
        return f"{text} (bytes {bytes(run[at + 1 : at + 1 + size]).hex(' ')})"
    if count:
        text += f" (data {', '.join(f'{value:#x}' for value in data[: min(count, 16)])})"
    return text


def _entry_hint(reason: int) -> str:
    if reason & 0x8000_0000 and reason & 0xFFFF == 33:
        return " (VMX: invalid guest state)"
    if reason == 0xFFFF_FFFF_FFFF_FFFF or reason == 0xFFFF_FFFF:
        return " (SVM: invalid guest state)"
    return ""


def explain_sregs(state: VcpuState) -> str:
    """Why KVM may refuse these control registers, as far as one can see."""
    found = []
    if state.cr0 & _CR0_PG and not state.cr0 & _CR0_PE:
        found.append("CR0 has paging without protection")
    long_mode = bool(state.efer & _EFER_LME and state.cr0 & _CR0_PG)
    if long_mode != bool(state.efer & _EFER_LMA):
        found.append("EFER.LMA disagrees with EFER.LME and CR0.PG")
    if long_mode and not state.cr4 & _CR4_PAE:
        found.append("long mode without CR4.PAE")
    if not found:
        found.append("bits that the machine's CPUID does not allow")
    values = f"CR0 {state.cr0:#x}, CR3 {state.cr3:#x}, CR4 {state.cr4:#x}, EFER {state.efer:#x}"
    return f"{values}: {', '.join(found)}"
