"""SYSENTER and SYSCALL as Intel's and AMD's processors have them, in 64-bit, compatibility and legacy mode."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import attrs
import pytest

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import (
    AR_DB,
    AR_LONG,
    MSR_CSTAR,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
    VcpuState,
)
from vmf.errors import PluginError
from vmf_cpu_unicorn import engine
from vmf_cpu_unicorn.selftest_guest import CODE, KERNEL_CS, KERNEL_SS, SYSCALL_ENTRY, USER_CS, Bench

STACK_OF_MSR = 0x12340
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
# sub eax,eax; stc: ZF, PF and CF, which the engine has not computed yet at the instruction that follows.
FLAGS_FIRST = bytes.fromhex("29c0 f9")
SYSENTER, SYSCALL, HLT = bytes.fromhex("0f34"), bytes.fromhex("0f05"), b"\xf4"


def with_msrs(state: VcpuState, cs: int = KERNEL_CS, high: int = 0) -> VcpuState:
    """SYSENTER leads to the HLT at SYSCALL_ENTRY, CSTAR to the one after it."""
    msrs = {
        **state.msrs,
        MSR_IA32_SYSENTER_CS: cs,
        MSR_IA32_SYSENTER_ESP: high | STACK_OF_MSR,
        MSR_IA32_SYSENTER_EIP: high | SYSCALL_ENTRY,
        MSR_CSTAR: SYSCALL_ENTRY,
    }
    return attrs.evolve(state, msrs=msrs)


def compatibility(state: VcpuState) -> VcpuState:
    """The same state with a 32-bit code segment."""
    cs = state.segments["cs"]
    cs = attrs.evolve(cs, access=cs.access & ~AR_LONG | AR_DB)
    return attrs.evolve(state, segments={**state.segments, "cs": cs})


def legacy(state: VcpuState) -> VcpuState:
    """32-bit protected mode without paging."""
    return attrs.evolve(compatibility(state), efer=0x1, cr0=0x33, cr4=0x600)


@pytest.mark.parametrize("mode", ["64-bit", "compatibility", "legacy"])
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("prefix", [b"", b"\x2e\x66"])
def test_sysenter_of_intel(bench: Bench, mode: str, user: bool, prefix: bytes) -> None:
    state = with_msrs(bench.state(user=user, rflags=0x202, rax=0x1234, rcx=7))
    if mode == "legacy":
        state = legacy(state)
    elif mode == "compatibility":
        state = compatibility(state)
    result = bench.execute(FLAGS_FIRST + prefix + SYSENTER, state)
    assert result.reason is ExitReason.HALTED
    assert bench.records() == []
    after = bench.vcpu.save()
    assert after.rip == SYSCALL_ENTRY + 1
    assert after.registers["rsp"] == STACK_OF_MSR
    assert (after.registers["rcx"], after.registers["rax"]) == (7, 0)
    assert after.rflags == 0x47, "IF is off, the arithmetic flags are those of the code before"
    cs, ss = after.segments["cs"], after.segments["ss"]
    assert (cs.selector, ss.selector) == (KERNEL_CS, KERNEL_SS)
    assert (cs.base, cs.limit, ss.base, ss.limit) == (0, 0xFFFF_FFFF, 0, 0xFFFF_FFFF)
    assert cs.access >> 5 & 3 == 0, "CPL 0"
    assert bool(cs.access & AR_LONG) == (mode != "legacy")
    assert bool(cs.access & AR_DB) == (mode == "legacy")


@pytest.mark.parametrize("mode", ["64-bit", "compatibility"])
def test_all_64_bits_of_the_stack_count_in_long_mode(bench: Bench, mode: str) -> None:
    state = with_msrs(bench.state(user=True, rflags=0x202))
    state = attrs.evolve(state, msrs={**state.msrs, MSR_IA32_SYSENTER_ESP: 0xFFFF_8000_0001_2340})
    bench.execute(SYSENTER, state if mode == "64-bit" else compatibility(state))
    assert bench.vcpu.save().registers["rsp"] == 0xFFFF_8000_0001_2340


def test_32_bits_of_the_msrs_count_in_legacy_mode(bench: Bench) -> None:
    result = bench.execute(SYSENTER, legacy(with_msrs(bench.state(), high=0x5_0000_0000)))
    after = bench.vcpu.save()
    assert result.reason is ExitReason.HALTED
    assert (after.rip, after.registers["rsp"]) == (SYSCALL_ENTRY + 1, STACK_OF_MSR)


@pytest.mark.parametrize("selector", [0, 3])
def test_sysenter_without_a_code_segment(bench: Bench, selector: int) -> None:
    """RPL bits do not make a null selector another one."""
    # sysenter (left behind by the handler of #GP); syscall
    state = with_msrs(bench.state(user=True, rflags=0x202, r15=CODE + 2), cs=selector)
    bench.execute(SYSENTER + SYSCALL, state)
    assert [(r.vector, r.error, r.rip, r.cs) for r in bench.records()] == [(13, 0, CODE, USER_CS)]


def test_sysenter_on_amd_in_compatibility_mode(make_bench: Callable[..., Bench]) -> None:
    """Not there; its 32-bit programs use SYSCALL, which leads to CSTAR."""
    bench = make_bench(vendor=AMD)
    state = compatibility(with_msrs(bench.state(user=True, rflags=0x203, r15=CODE + 2)))
    result = bench.execute(SYSENTER + SYSCALL, state)
    assert result.reason is ExitReason.HALTED
    assert [(r.vector, r.rip) for r in bench.records()] == [(6, CODE)]
    after = bench.vcpu.save()
    assert (after.rip, after.registers["rcx"]) == (SYSCALL_ENTRY + 1, CODE + 4)
    assert after.segments["cs"].selector == KERNEL_CS


def test_sysenter_on_amd_in_64_bit_mode(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(vendor=AMD)
    bench.execute(SYSENTER + SYSCALL, with_msrs(bench.state(user=True, rflags=0x202, r15=CODE + 2)))
    assert [(r.vector, r.rip) for r in bench.records()] == [(6, CODE)]


def test_sysenter_on_amd_in_legacy_mode(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(vendor=AMD)
    result = bench.execute(SYSENTER, legacy(with_msrs(bench.state())))
    assert result.reason is ExitReason.HALTED
    assert bench.vcpu.save().rip == SYSCALL_ENTRY + 1


@pytest.mark.parametrize("user", [False, True])
def test_syscall_on_intel_in_compatibility_mode(bench: Bench, user: bool) -> None:
    """Not there, so it can lead no program to a CSTAR that no kernel on Intel sets."""
    state = compatibility(with_msrs(bench.state(user=user, rflags=0x202, r15=CODE + 2)))
    bench.execute(SYSCALL + SYSENTER, state)
    assert [(r.vector, r.rip) for r in bench.records()] == [(6, CODE)]


def test_trace_flag_stops_after_sysenter(bench: Bench) -> None:
    """SYSENTER leaves TF as it is: #DB comes before the first instruction of the kernel."""
    bench.memory.write(SYSCALL_ENTRY, bytes.fromhex("6a029df4"))  # push 2; popf (no more TF); hlt
    state = with_msrs(bench.state(user=True, rflags=0x302))
    assert bench.execute(SYSENTER, state).reason is ExitReason.HALTED
    first = bench.records()[0]
    assert (first.vector, first.rip, first.cs) == (1, SYSCALL_ENTRY, KERNEL_CS)


@pytest.mark.parametrize("instruction", ["sysenter", "cpuid", "syscall"])
def test_a_stop_just_before_does_not_hide_an_instruction(bench: Bench, instruction: str) -> None:
    """The kick comes while the block that holds the instruction runs: its port access is where."""
    state = with_msrs(bench.state(rax=0, rcx=0))
    head = bytes.fromhex("9090 e480 31c0 31c9 90")  # nop; nop; in al,0x80; xor eax,eax; xor ecx,ecx; nop
    raw = {"sysenter": SYSENTER, "syscall": SYSCALL, "cpuid": bytes.fromhex("0fa2 f4")}[instruction]
    kicks: list[int] = []

    def read(size: int) -> int:
        kicks.append(size)
        bench.vcpu.kick()
        return 0

    bench.port.read = read
    bench.load(head + raw, state)
    reasons = [bench.vcpu.run(None).reason]
    while reasons[-1] is ExitReason.KICKED:
        reasons.append(bench.vcpu.run(None).reason)
    assert kicks == [1]
    assert reasons == [ExitReason.KICKED, ExitReason.HALTED]
    assert bench.records() == []
    after = bench.vcpu.save()
    if instruction == "cpuid":
        assert after.registers["rbx"].to_bytes(4, "little") == b"Genu"
        assert after.registers["rax"] == bench.environment.cpuid.lookup(0, 0).eax
        assert after.rip == CODE + len(head) + 3
    else:
        assert after.rip == SYSCALL_ENTRY + 1


@pytest.mark.parametrize("instruction", ["sysenter", "cpuid", "syscall"])
def test_a_stop_at_any_moment_does_not_hide_an_instruction(bench: Bench, instruction: str) -> None:
    """The request stands all the time, as if another thread repeated it without a pause, and nothing takes it back.

    A program of two threads crashed in its vDSO when the request came between two steps of the engine's own loop.
    """
    request = bench.vcpu._engine.handle + stop_request()
    head = bytes.fromhex("9090 e480 31c0 31c9 90")
    raw = {"sysenter": SYSENTER, "syscall": SYSCALL, "cpuid": bytes.fromhex("0fa2 f4")}[instruction]

    def read(size: int) -> int:
        ctypes.memset(request, size, 1)
        return 0

    bench.port.read = read
    bench.load(head + raw, with_msrs(bench.state(rax=0, rcx=0)))
    assert bench.vcpu.run(None).reason is ExitReason.HALTED
    assert ctypes.string_at(request, 1) == b"\1"
    assert bench.records() == []
    after = bench.vcpu.save()
    if instruction == "cpuid":
        assert after.registers["rax"] == bench.environment.cpuid.lookup(0, 0).eax
        assert after.rip == CODE + len(head) + 3
    else:
        assert after.rip == SYSCALL_ENTRY + 1


def stop_request() -> int:
    """Where the engine keeps a request to stop, from the code that makes one: mov byte [rdi+disp32],1."""
    code = ctypes.string_at(engine.load().address["uc_emu_stop"], 64)
    found = re.search(rb"\xc6\x87(....)\x01", code, re.DOTALL)
    assert found is not None
    return int.from_bytes(found[1], "little")


@pytest.mark.parametrize("instruction", ["sysenter", "cpuid"])
def test_an_error_just_before_still_ends_the_slice(bench: Bench, instruction: str) -> None:
    raw = {"sysenter": SYSENTER, "cpuid": bytes.fromhex("0fa2 ebfe")}[instruction]
    bench.memory.write(SYSCALL_ENTRY, bytes.fromhex("ebfe"))  # for ever

    def read(size: int) -> int:
        raise RuntimeError("a device's fault")

    bench.port.read = read
    bench.load(bytes.fromhex("e480") + raw, with_msrs(bench.state()))
    with pytest.raises(PluginError, match="a device's fault"):
        bench.vcpu.run(None)
