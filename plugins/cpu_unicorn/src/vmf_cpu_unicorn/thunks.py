"""Machine code for the gate without a compiler.

Only what must not have a Python frame beneath it: the calls into the engine that may leave by longjmp (delivering an
exception, raising one). Everything a thunk needs lies in the control block that the engine passes as the hook's user
pointer, so that the code is position-independent and the same for every vCPU. System V AMD64 calling convention.

The assembler is the smallest that can say these few lines; tests/test_unicorn_thunks.py disassembles the result.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from ctypes import addressof, c_char
from functools import lru_cache

from vmf_cpu_unicorn import layout as at

# The control block: 8-byte slots.
CPU, ENV, DO_INTERRUPT, RAISE_EXCEPTION, CHECK_B, CHECK_W, CHECK_L = range(0, 56, 8)
PY_IN, PY_OUT, PY_SYSCALL, PY_VECTOR = range(56, 88, 8)
EXCEPTION, EXCEPTION_CODE, SAVED_IF, SAVED_INHIBIT, REQUEST_ADDRESS, REQUEST_AFTER = range(88, 136, 8)
PY_SYSENTER, AMD = range(136, 152, 8)
BLOCK_SIZE = 152

_VECTOR_UD = 6
_VECTOR_GP = 13
_HF_LMA = 1 << 14
_HF_CS64 = 1 << 15
_SELECTOR = 0xFFFC

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11 = range(12)
_JB_FAMILY = {"jz": 0x84, "jnz": 0x85, "jbe": 0x86, "ja": 0x87, "js": 0x88}


class Assembler:
    """Appends instructions; labels are resolved by `code`."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    @property
    def labels(self) -> Mapping[str, int]:
        return self._labels

    def code(self) -> bytes:
        for position, name in self._jumps:
            struct.pack_into("<i", self._code, position, self._labels[name] - position - 4)
        return bytes(self._code)

    def _memory(self, opcode: bytes, register: int, base: int, displacement: int, wide: bool) -> None:
        """opcode with ModRM [base + disp32]; base is never RSP or R12."""
        rex = 0x40 | (8 if wide else 0) | (4 if register >= 8 else 0) | (1 if base >= 8 else 0)
        self._code += bytes([rex]) + opcode + bytes([0x80 | (register & 7) << 3 | base & 7])
        self._code += struct.pack("<i", displacement)

    def _registers(self, opcode: bytes, register: int, target: int, wide: bool) -> None:
        rex = 0x40 | (8 if wide else 0) | (4 if register >= 8 else 0) | (1 if target >= 8 else 0)
        self._code += bytes([rex]) + opcode + bytes([0xC0 | (register & 7) << 3 | target & 7])

    def load(self, register: int, base: int, displacement: int, wide: bool = True) -> None:
        self._memory(b"\x8b", register, base, displacement, wide)

    def store(self, base: int, displacement: int, register: int, wide: bool = True) -> None:
        self._memory(b"\x89", register, base, displacement, wide)

    def store_immediate(self, base: int, displacement: int, value: int) -> None:
        """32 bits."""
        self._memory(b"\xc7", 0, base, displacement, False)
        self._code += struct.pack("<i", value)

    def or_memory(self, base: int, displacement: int, register: int) -> None:
        """32 bits."""
        self._memory(b"\x09", register, base, displacement, False)

    def test_memory(self, base: int, displacement: int, mask: int) -> None:
        """32 bits."""
        self._memory(b"\xf7", 0, base, displacement, False)
        self._code += struct.pack("<I", mask)

    def lea(self, register: int, base: int, displacement: int) -> None:
        self._memory(b"\x8d", register, base, displacement, True)

    def move(self, target: int, source: int) -> None:
        self._registers(b"\x89", source, target, True)

    def move_immediate(self, register: int, value: int) -> None:
        """32 bits, zero-extended."""
        self._registers(b"\xc7", 0, register, False)
        self._code += struct.pack("<I", value)

    def _group(self, extension: int, register: int, value: int, wide: bool = False) -> None:
        self._registers(b"\x81", extension, register, wide)
        self._code += struct.pack("<i", value)

    def and_immediate(self, register: int, value: int, wide: bool = False) -> None:
        self._group(4, register, value, wide)

    def sub_immediate(self, register: int, value: int, wide: bool = False) -> None:
        self._group(5, register, value, wide)

    def add_immediate(self, register: int, value: int, wide: bool = False) -> None:
        self._group(0, register, value, wide)

    def compare_immediate(self, register: int, value: int) -> None:
        self._group(7, register, value)

    def compare(self, left: int, right: int) -> None:
        self._registers(b"\x39", right, left, False)

    def test(self, left: int, right: int) -> None:
        self._registers(b"\x85", right, left, False)

    def or_(self, target: int, source: int) -> None:
        self._registers(b"\x09", source, target, True)

    def shift_right(self, register: int, count: int) -> None:
        self._registers(b"\xc1", 5, register, False)
        self._code.append(count)

    def push(self, register: int) -> None:
        self._code += bytes([0x40 | register >> 3, 0x50 | register & 7])

    def pop(self, register: int) -> None:
        self._code += bytes([0x40 | register >> 3, 0x58 | register & 7])

    def jump(self, name: str, condition: str = "") -> None:
        self._code += bytes([0x0F, _JB_FAMILY[condition]]) if condition else b"\xe9"
        self._jumps.append((len(self._code), name))
        self._code += bytes(4)

    def call(self, name: str) -> None:
        self._code.append(0xE8)
        self._jumps.append((len(self._code), name))
        self._code += bytes(4)

    def jump_memory(self, base: int, displacement: int) -> None:
        self._memory(b"\xff", 4, base, displacement, False)

    def call_memory(self, base: int, displacement: int) -> None:
        self._memory(b"\xff", 2, base, displacement, False)

    def call_indexed(self, base: int, index: int, displacement: int) -> None:
        """CALL [base + index*8 + disp32]."""
        rex = 0x40 | (2 if index >= 8 else 0) | (1 if base >= 8 else 0)
        self._code += bytes([rex, 0xFF, 0x94, 0xC0 | (index & 7) << 3 | base & 7])
        self._code += struct.pack("<i", displacement)

    def ret(self) -> None:
        self._code.append(0xC3)


def _port(asm: Assembler, name: str, user: int, handler: int) -> None:
    """(uc, port, size, [value,] user): #GP by the engine's own check unless CPL <= IOPL, else on to Python."""
    asm.label(name)
    asm.load(RAX, user, ENV)
    asm.test_memory(RAX, at.CR, 1)  # CR0.PE
    asm.jump(f"{name}_go", "jz")
    asm.load(R10, RAX, at.EFLAGS, wide=False)
    asm.move(R11, R10)
    asm.and_immediate(R11, 1 << 17)  # VM
    asm.jump(f"{name}_check", "jnz")
    asm.shift_right(R10, 12)
    asm.and_immediate(R10, 3)  # IOPL
    asm.load(R11, RAX, at.HFLAGS, wide=False)
    asm.and_immediate(R11, 3)  # CPL
    asm.compare(R11, R10)
    asm.jump(f"{name}_go", "jbe")
    asm.label(f"{name}_check")
    for register in (RDI, RSI, RDX, RCX, R8):  # five pushes align the stack
        asm.push(register)
    asm.move(R9, user)
    asm.move(RDI, RAX)
    asm.move(RAX, RDX)
    asm.shift_right(RAX, 1)  # size 1, 2, 4 -> slot 0, 1, 2
    asm.call_indexed(R9, RAX, CHECK_B)
    for register in (R8, RCX, RDX, RSI, RDI):
        asm.pop(register)
    asm.label(f"{name}_go")
    asm.jump_memory(user, handler)


def assemble() -> Assembler:
    asm = Assembler()
    # exception(uc, vector, user); see on_exception in _gate_hooks.c
    asm.label("exception")
    asm.load(RAX, RDX, ENV)
    asm.test_memory(RAX, at.EXCEPTION_IS_INT, 0xFFFF_FFFF)
    asm.jump("deliver", "jz")
    asm.load(RCX, RAX, at.EXCEPTION_NEXT_EIP)
    asm.lea(R8, RCX, -2)
    asm.sub_immediate(RSI, 3)
    asm.compare_immediate(RSI, 1)
    asm.jump("rewind", "ja")
    asm.lea(R8, RCX, -1)
    asm.label("rewind")
    asm.store(RAX, at.EIP, R8)
    asm.label("deliver")
    asm.load(RDI, RDX, CPU)
    asm.jump_memory(RDX, DO_INTERRUPT)
    # invalid(uc, user) -> true
    asm.label("invalid")
    asm.sub_immediate(RSP, 8, wide=True)
    asm.move(RDX, RSI)
    asm.move_immediate(RSI, _VECTOR_UD)
    asm.call("exception")
    asm.move_immediate(RAX, 1)
    asm.add_immediate(RSP, 8, wide=True)
    asm.ret()
    # syscall(uc, user): #UD without EFER.SCE, and outside 64-bit mode unless the processor is AMD's
    asm.label("syscall")
    asm.load(RAX, RSI, ENV)
    asm.test_memory(RAX, at.EFER, 1)
    asm.jump("undefined", "jz")
    asm.test_memory(RSI, AMD, 1)
    asm.jump("syscall_go", "jnz")
    asm.test_memory(RAX, at.HFLAGS, _HF_CS64)
    asm.jump("undefined", "jz")
    asm.label("syscall_go")
    asm.jump_memory(RSI, PY_SYSCALL)
    # sysenter(uc, user): #UD on AMD's processor in long mode, #GP without a code segment
    asm.label("sysenter")
    asm.load(RAX, RSI, ENV)
    asm.test_memory(RSI, AMD, 1)
    asm.jump("sysenter_go", "jz")
    asm.test_memory(RAX, at.HFLAGS, _HF_LMA)
    asm.jump("undefined", "jnz")
    asm.label("sysenter_go")
    asm.move_immediate(RDX, _VECTOR_GP)
    asm.test_memory(RAX, at.SYSENTER_CS, _SELECTOR)
    asm.jump("raise", "jz")
    asm.jump_memory(RSI, PY_SYSENTER)
    asm.label("undefined")
    asm.move_immediate(RDX, _VECTOR_UD)
    asm.label("raise")
    asm.sub_immediate(RSP, 8, wide=True)
    asm.move(RDI, RAX)
    asm.move(RAX, RSI)
    asm.move(RSI, RDX)
    asm.move_immediate(RDX, 0)
    asm.call_memory(RAX, RAISE_EXCEPTION)
    _port(asm, "in", RCX, PY_IN)
    _port(asm, "out", R8, PY_OUT)
    # vector_read(uc, offset, size, user): see on_vector_read in _gate_hooks.c
    asm.label("vector_read")
    asm.load(RSI, RCX, EXCEPTION, wide=False)
    asm.test(RSI, RSI)
    asm.jump("interrupt", "js")
    asm.store_immediate(RCX, EXCEPTION, -1)
    asm.load(RAX, RCX, ENV)
    asm.load(RDX, RAX, at.EFLAGS)
    asm.and_immediate(RDX, ~(1 << 9), wide=True)
    asm.load(R8, RCX, SAVED_IF)
    asm.or_(RDX, R8)
    asm.store(RAX, at.EFLAGS, RDX)
    asm.load(RDX, RCX, SAVED_INHIBIT, wide=False)
    asm.or_memory(RAX, at.HFLAGS, RDX)
    asm.load(R8, RCX, REQUEST_ADDRESS)
    asm.load(RDX, RCX, REQUEST_AFTER, wide=False)
    asm.store(R8, 0, RDX, wide=False)
    asm.load(RDX, RCX, EXCEPTION_CODE, wide=False)
    asm.move(RDI, RAX)
    asm.sub_immediate(RSP, 8, wide=True)
    asm.call_memory(RCX, RAISE_EXCEPTION)
    asm.label("interrupt")
    asm.jump_memory(RCX, PY_VECTOR)
    return asm


class _Page:
    def __init__(self) -> None:
        asm = assemble()
        code = asm.code()
        # Where such a mapping is forbidden, the engine itself, a translator, cannot work either.
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code)
        base = addressof(c_char.from_buffer(self._page))
        self.address: Callable[[str], int] = lambda name: base + asm.labels[name]


@lru_cache(maxsize=1)
def page() -> _Page:
    """The thunks, mapped once per process."""
    return _Page()
