"""Proof that this build of the engine is the one that layout.py describes, before any guest runs on it.

Three kinds of evidence, together covering every offset used:
  1. the exported functions' own machine code (fields that nothing public touches);
  2. registers written through the public interface and found at their offset, and the other way round;
  3. a small guest, run through the same gate as any other, whose exceptions, SYSCALL, interrupt and asynchronous
     stop must come out as the manuals say.
Once a process; takes some 10 ms.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from functools import lru_cache

from vmf.errors import BackendUnavailable
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.engine import REQUIRED_VERSION, Engine, Library

_REMEDY = f"Reinstall the engine: `pip install --force-reinstall unicorn=={REQUIRED_VERSION}`."

# unicorn/x86.h
_REG_CR2 = 52
_REG_DR0, _REG_DR6, _REG_DR7 = 66, 72, 73
_REG_RAX, _REG_RIP = 35, 41
_REG_FP0, _REG_XMM0 = 82, 122
_REG_IDTR, _REG_GDTR, _REG_LDTR, _REG_TR = 242, 243, 244, 245
_REG_FPCW, _REG_FPSW, _REG_MSR, _REG_MXCSR = 246, 31, 248, 249

_EFER = 0xC0000080

_GENERAL = (35, 38, 40, 37, 44, 36, 43, 39, 106, 107, 108, 109, 110, 111, 112, 113)
"""rax rcx rdx rbx rsp rbp rsi rdi r8-r15 in unicorn/x86.h's numbers."""

_MSR_OFFSETS = {
    0x174: at.SYSENTER_CS, 0x175: at.SYSENTER_ESP, 0x176: at.SYSENTER_EIP, 0x277: at.PAT, 0xC0000081: at.STAR,
    0xC0000082: at.LSTAR, 0xC0000083: at.CSTAR, 0xC0000084: at.FMASK, 0xC0000102: at.KERNEL_GS_BASE,
    0xC0000103: at.TSC_AUX, 0x1A0: at.MISC_ENABLE, 0xC0000080: at.EFER,
    0x17A: at.MCG_STATUS, 0xC0010117: at.VM_HSAVE_PA, 0xD90: at.BNDCFGS,
    **{index: at.MTRRS + 8 * i for i, index in enumerate(at.MTRR_INDICES)},
    0xC0000100: at.SEGS + 4 * at.SEGMENT_SIZE + 8, 0xC0000101: at.SEGS + 5 * at.SEGMENT_SIZE + 8,
}  # fmt: skip


def _differs(what: str) -> BackendUnavailable:
    return BackendUnavailable(f"This build of the Unicorn engine differs from the known one: {what}.", _REMEDY)


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise _differs(what)


def _verify_code(library: Library) -> None:
    """Displacements inside exported functions: CMP byte [reg+disp32],0 and MOV r32,[rdi+disp32]."""
    code = ctypes.string_at(library.address["check_exit_request"], 16)
    _expect(b"\xbe" + struct.pack("<I", at.UC_NO_EXIT_REQUEST) + b"\x00" in code, "no_exit_request lies elsewhere")
    code = ctypes.string_at(library.address["x86_update_hflags"], 96)
    for name, offset in (
        ("SS flags", at.SEGS + 2 * at.SEGMENT_SIZE + 20), ("eflags", at.EFLAGS), ("cr0", at.CR), ("hflags", at.HFLAGS)
    ):  # fmt: skip
        _expect(struct.pack("<I", offset) in code, f"{name} lies elsewhere")
    for helper, fields in (
        ("helper_fmov_ST0_FT0", {"FT0": at.FT0, "the x87 registers": at.FPREGS, "the x87 stack pointer": at.FPSTT}),
        ("helper_fninit", {"FPU CS and DS": at.FPCS, "FPU IP and DP": at.FPIP, "the x87 tags": at.FPTAGS}),
    ):
        code = ctypes.string_at(library.address[helper], 64)
        for name, offset in fields.items():
            _expect(struct.pack("<I", offset) in code, f"{name} lies elsewhere")
    code = ctypes.string_at(library.address["cpu_loop_exit"], 64)
    _expect(struct.pack("<I", at.CPU_HALTED + 4) in code, "can_do_io lies elsewhere")  # the next field


class _Probe:
    """Writes and reads registers of an idle engine through the public interface."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._api = engine.library.api

    def write(self, register: int, value: bytes) -> None:
        code = self._api.uc_reg_write(self._engine.handle, register, value)
        _expect(code == 0, f"register {register} cannot be written ({self._engine.library.strerror(code)})")

    def read(self, register: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(max(size, 32))
        code = self._api.uc_reg_read(self._engine.handle, register, buffer)
        _expect(code == 0, f"register {register} cannot be read ({self._engine.library.strerror(code)})")
        return buffer.raw[:size]


def _verify_registers(engine: Engine) -> None:
    probe = _Probe(engine)
    probe.write(_REG_RAX, bytes(8))
    cpu = at.cpu_address(engine.handle)
    env = cpu + at.CPU_ENV
    _expect(at.read_pointer(cpu + at.CPU_ENV_PTR) == env, "CPUState.env_ptr lies elsewhere")
    icount = at.read_pointer(cpu + at.CPU_ICOUNT_DECR_PTR)
    _expect(cpu < icount < env, "CPUState.icount_decr_ptr lies elsewhere")

    def at_offset(offset: int, size: int = 8) -> bytes:
        return ctypes.string_at(env + offset, size)

    def both_ways(register: int, offset: int, size: int, name: str, mask: int = (1 << 80) - 1) -> None:
        """A pattern written by the interface is at the offset; one put at the offset is what the interface reads."""
        old = at_offset(offset, size)
        value = (0x5AA5_0F1E_2D3C_4B69_7887_96A5 >> 8 & mask & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        probe.write(register, value)
        _expect(at_offset(offset, size) == value, f"{name} lies elsewhere")
        other = bytes(byte ^ 0xFF for byte in value)
        ctypes.memmove(env + offset, other, size)
        _expect(probe.read(register, size) == other, f"{name} is not read where it is written")
        ctypes.memmove(env + offset, old, size)

    for i, register in enumerate(_GENERAL):
        both_ways(register, at.REGS + 8 * i, 8, f"general register {i}")
    both_ways(_REG_RIP, at.EIP, 8, "rip")
    both_ways(_REG_CR2, at.CR + 16, 8, "cr2")
    for i in range(4):
        both_ways(_REG_DR0 + i, at.DR + 8 * i, 8, f"dr{i}")
    both_ways(_REG_DR6, at.DR + 48, 8, "dr6")
    both_ways(_REG_DR7, at.DR + 56, 8, "dr7")
    for i in range(16):
        both_ways(_REG_XMM0 + i, at.XMM + at.XMM_STRIDE * i, 16, f"xmm{i}")
    for i in range(8):
        both_ways(_REG_FP0 + i, at.FPREGS + 16 * i, 10, f"x87 register {i}")
    probe.write(_REG_FPCW, struct.pack("<H", 0x27F))
    _expect(at_offset(at.FPUC, 2) == struct.pack("<H", 0x27F), "FPU control word lies elsewhere")
    probe.write(_REG_FPSW, struct.pack("<H", 5 << 11 | 0x41))
    _expect(at_offset(at.FPSTT, 6) == struct.pack("<IH", 5, 0x41), "FPU status word lies elsewhere")
    probe.write(_REG_MXCSR, struct.pack("<I", 0x3FA0))
    _expect(at_offset(at.MXCSR, 4) == struct.pack("<I", 0x3FA0), "MXCSR lies elsewhere")
    for register, offset, name in (
        (_REG_GDTR, at.GDT, "gdtr"), (_REG_IDTR, at.IDT, "idtr"), (_REG_LDTR, at.LDT, "ldtr"), (_REG_TR, at.TR, "tr")
    ):  # fmt: skip
        # uc_x86_mmr: selector u16, base u64, limit u32, flags u32
        probe.write(register, struct.pack("<H6xQII", 0x28, 0x1234_5678_9ABC, 0x777, 0x8B00))
        selector, base, limit, flags = struct.unpack("<I4xQII", at_offset(offset, at.SEGMENT_SIZE))
        _expect((base, limit) == (0x1234_5678_9ABC, 0x777), f"{name} lies elsewhere")
        if name in ("ldtr", "tr"):
            _expect((selector, flags) == (0x28, 0x8B00), f"{name}'s selector and flags lie elsewhere")
    for index, offset in _MSR_OFFSETS.items():
        # The engine keeps 16 bits of SYSENTER_CS and the bits of EFER that it knows: SCE and NXE among them.
        value, mask = {0x174: (0x3C4D, 0xFFFF), _EFER: (0x801, 0x801)}.get(index, (0x1A2B_3C4D, (1 << 64) - 1))
        probe.write(_REG_MSR, struct.pack("<I4xQ", index, value))
        _expect(int.from_bytes(at_offset(offset), "little") & mask == value, f"MSR {index:#x} lies elsewhere")
    probe.write(_REG_MSR, struct.pack("<I4xQ", _EFER, 0))
    _expect(not int.from_bytes(at_offset(at.EFER), "little") & 0x801, "EFER lies elsewhere")


@lru_cache(maxsize=1)
def verify(library: Library) -> None:
    """Raises BackendUnavailable naming the first difference. Cached once it has passed."""
    _verify_code(library)
    engine = Engine(library, 4 << 20)
    try:
        _verify_registers(engine)
    finally:
        engine.close()
    _verify_behaviour(library)


def _verify_behaviour(library: Library) -> None:
    """Run the guest of selftest_guest.py; the time-out is for an engine that does not stop when it is told to."""
    from vmf_cpu_unicorn.selftest_guest import Trial

    trial = Trial(library)
    watchdog = threading.Timer(5.0, trial.abandon)
    watchdog.daemon = True
    begun = time.monotonic()
    watchdog.start()
    try:
        found = trial.run()
    finally:
        watchdog.cancel()
        trial.close()
    _expect(not found, f"{found} (after {time.monotonic() - begun:.1f} s)")
