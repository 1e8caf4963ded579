"""Records every instruction that the engine begins, in machine code, into a buffer.

Theory of operation
    The engine's per-instruction hook (UC_HOOK_CODE) is no use: the code it adds puts the flags into another form in
    the middle of a block, behind the back of the engine's restoring after a fault, so that a guest that takes page
    faults goes on with wrong flags. uc_emu_start's `count` is built on it. What is sound is a block of one
    instruction: the engine makes such blocks itself (for code that modifies itself), each begins and ends with a
    complete state, and stops and interrupts are looked at between blocks, as always. So:

      - `cflags_next_tb` = 1 asks for the next block to have one instruction. It is used up by one block, so the block
        hook sets it again each time; whatever else may use it up (an instruction fetch that faults, a stop) ends in
        the exception hook or in a new slice, and both set it too.
      - The block hook copies the registers, lets the engine compute the arithmetic flags (which it keeps in a lazy
        form), and copies the instruction's bytes with the engine's own fetch. That fetch may fault when the guest
        took the page away without telling the TLB; then the guest gets the page fault that a processor with a smaller
        TLB would have given it, and nothing is recorded.
      - The engine looks for stops *after* the block hook. One that is there already is seen here, and nothing is
        recorded; one that another thread makes in between leaves a record of an instruction that was not begun. It is
        begun in a later slice, from the same state, and recorded again: so the first of two equal records on both
        sides of a slice's end is dropped. `arm` counts slices (and more often, which does no harm). A jump to itself
        looks the same; it loses an iteration there.
      - A full buffer ends the slice before the instruction that found no room; so none is lost.

    It is machine code, position-independent, with everything it needs in a control block: it runs for every
    instruction, without the GIL, and the engine may leave it by longjmp.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from ctypes import addressof, c_char, c_int32, c_uint32
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vmf.cpu.trace import CODE_BYTES, TRACE_RECORD, RecordKind, TraceRecords
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.convert import FLAG_DF, FLAGS_ARITHMETIC
from vmf_cpu_unicorn.engine import Engine
from vmf_cpu_unicorn.thunks import R8, R9, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, Assembler

CAPACITY = 512
"""Instructions in a batch, at most. When whoever takes them lags behind, the guest stands still for a batch: for
some milliseconds, less than a tick of its timer."""
RESERVE = 64
"""Records beyond that for events, of which each needs no instruction."""

# The control block: 8-byte slots, of which flags and counters use 4 bytes.
CPU, ENV, ICOUNT_DECR, CC_COMPUTE, FETCH_BYTE, EMU_STOP, NEXT = range(0, 56, 8)
ACTIVE, ROOM, INDEX, LOST, SLICE = range(56, 96, 8)
BLOCK_SIZE = 96

_RAW = np.dtype(
    {
        "names": [
            "kind", "size", "linear", "error", "arithmetic", "cr2", "cr3", "code", "registers", "rip", "eflags",
            "cc_op", "df", "hflags", "is_int",
        ],
        "formats": [
            "<u4", "<u4", "<u8", "<u8", "<u4", "<u8", "<u8", ("u1", CODE_BYTES), ("<u8", 16), "<u8", "<u8",
            "<u4", "<i4", "<u4", "<u4",
        ],
        "offsets": [
            0, 4, 8, 16, 24, 32, 40, 48, 64 + at.REGS, 64 + at.EIP, 64 + at.EFLAGS,
            64 + at.CC_OP, 64 + at.DF, 64 + at.HFLAGS, 28,
        ],
        "itemsize": 256,
    }
)  # fmt: skip
_KIND, _SIZE, _LINEAR, _ERROR, _ARITHMETIC, _IS_INT, _CR2, _CR3, _CODE, _ENV = 0, 4, 8, 16, 24, 28, 32, 40, 48, 64
_ENV_BYTES = at.HFLAGS2 + 4
"""From env's start: registers, RIP, flags in all their parts, hidden flags."""
assert _ENV_BYTES % 8 == 0
assert _RAW.itemsize >= _ENV + _ENV_BYTES
_MOST_CODE = 15
_SIGN = 1 << 31
_INVALID_OPCODE = 6
_HF_CS32, _HF_CS64 = 1 << 4, 1 << 15
_REP_MOVSQ = b"\xf3\x48\xa5"
_ADD_RSI_RAX = b"\x48\x01\xc6"
_STORE_AL_AT_RBP_RCX = b"\x88\x84\x0d"


def _rflags(raw: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """RFLAGS of records: the engine keeps the arithmetic flags and the direction flag apart while it runs."""
    apart = raw["arithmetic"].astype(np.uint64) | (raw["df"].astype(np.int64) & FLAG_DF).astype(np.uint64)
    answer: npt.NDArray[np.uint64] = raw["eflags"] & np.uint64(~(FLAGS_ARITHMETIC | FLAG_DF) & (1 << 64) - 1) | apart
    return answer


class _Assembler(Assembler):
    def raw(self, code: bytes) -> None:
        self._code += code


def _copy_registers(asm: _Assembler, out: int) -> None:
    """Copy the start of env to the record at RBP or R9; the block is in RBX. Clobbers RCX, RSI, RDI."""
    asm.lea(RDI, out, _ENV)
    asm.load(RSI, RBX, ENV)
    asm.move_immediate(RCX, _ENV_BYTES // 8)
    asm.raw(_REP_MOVSQ)
    asm.load(RSI, RBX, ENV)
    for slot, offset in ((_CR2, 16), (_CR3, 24)):
        asm.load(RAX, RSI, at.CR + offset)
        asm.store(out, slot, RAX)


def _compute_flags(asm: _Assembler) -> None:
    asm.load(RDI, RBX, ENV)
    asm.load(RSI, RDI, at.CC_OP, wide=False)
    asm.call_memory(RBX, CC_COMPUTE)
    asm.store(RBP, _ARITHMETIC, RAX, wide=False)


def _enter(asm: _Assembler, user: int) -> None:
    """Save RBX and RBP, align the stack, RBX = block, RBP = the record to fill."""
    asm.push(RBX)
    asm.push(RBP)
    asm.sub_immediate(RSP, 8, wide=True)
    asm.move(RBX, user)
    asm.load(RBP, RBX, NEXT)


def _leave(asm: _Assembler) -> None:
    """Count the record."""
    asm.add_immediate(RBP, _RAW.itemsize, wide=True)
    asm.store(RBX, NEXT, RBP)
    asm.load(RAX, RBX, ROOM, wide=False)
    asm.sub_immediate(RAX, 1)
    asm.store(RBX, ROOM, RAX, wide=False)
    asm.add_immediate(RSP, 8, wide=True)
    asm.pop(RBP)
    asm.pop(RBX)


def assemble() -> _Assembler:
    asm = _Assembler()
    # block(uc, address, size, user)
    asm.label("block")
    asm.test_memory(RCX, ACTIVE, 1)
    asm.jump("block_end", "jz")
    asm.load(R8, RCX, CPU)
    asm.store_immediate(R8, at.CPU_CFLAGS_NEXT_TB, 1)
    asm.load(R8, RCX, ICOUNT_DECR)
    asm.test_memory(R8, 0, _SIGN)
    asm.jump("block_end", "jnz")
    asm.load(RAX, RCX, ROOM, wide=False)
    asm.compare_immediate(RAX, RESERVE)
    asm.jump("block_full", "jbe")
    _enter(asm, RCX)
    asm.compare_immediate(RDX, _MOST_CODE)
    asm.jump("block_size", "jbe")
    asm.move_immediate(RDX, _MOST_CODE)
    asm.label("block_size")
    asm.store_immediate(RBP, _KIND, RecordKind.INSTRUCTION)
    asm.store_immediate(RBP, _IS_INT, 0)
    asm.store(RBP, _SIZE, RDX, wide=False)
    asm.store(RBP, _LINEAR, RSI)
    asm.move_immediate(RAX, 0)
    asm.store(RBP, _CODE, RAX)
    asm.store(RBP, _CODE + 8, RAX)
    asm.store(RBX, INDEX, RAX)
    asm.load(RAX, RBX, SLICE)
    asm.store(RBP, _ERROR, RAX)
    _copy_registers(asm, RBP)
    _compute_flags(asm)
    asm.label("block_byte")
    asm.load(RAX, RBX, INDEX)
    asm.load(RCX, RBP, _SIZE, wide=False)
    asm.compare(RAX, RCX)
    asm.jump("block_done", "jz")
    asm.load(RDI, RBX, ENV)
    asm.load(RSI, RBP, _LINEAR)
    asm.raw(_ADD_RSI_RAX)
    asm.call_memory(RBX, FETCH_BYTE)
    asm.load(RCX, RBX, INDEX)
    asm.raw(_STORE_AL_AT_RBP_RCX + _CODE.to_bytes(4, "little"))
    asm.add_immediate(RCX, 1)
    asm.store(RBX, INDEX, RCX)
    asm.jump("block_byte")
    asm.label("block_done")
    _leave(asm)
    asm.label("block_end")
    asm.ret()
    asm.label("block_full")
    asm.sub_immediate(RSP, 8, wide=True)
    asm.call_memory(RCX, EMU_STOP)
    asm.add_immediate(RSP, 8, wide=True)
    asm.ret()
    # invalid(uc, user) -> false: the gate's own hook comes after this one
    asm.label("invalid")
    asm.move(RDX, RSI)
    asm.move_immediate(RSI, _INVALID_OPCODE)
    # exception(uc, vector, user)
    asm.label("exception")
    asm.test_memory(RDX, ACTIVE, 1)
    asm.jump("exception_end", "jz")
    asm.load(R8, RDX, CPU)
    asm.store_immediate(R8, at.CPU_CFLAGS_NEXT_TB, 1)
    asm.test_memory(RDX, ROOM, 0xFFFF_FFFF)
    asm.jump("exception_lost", "jz")
    _enter(asm, RDX)
    asm.store_immediate(RBP, _KIND, RecordKind.EXCEPTION)
    asm.store(RBP, _SIZE, RSI, wide=False)
    asm.load(R9, RBX, ENV)
    asm.load(RAX, R9, at.EIP)
    asm.store(RBP, _LINEAR, RAX)
    asm.load(RAX, R9, at.ERROR_CODE, wide=False)
    asm.store(RBP, _ERROR, RAX)
    asm.load(RAX, R9, at.EXCEPTION_IS_INT, wide=False)
    asm.store(RBP, _IS_INT, RAX, wide=False)
    _copy_registers(asm, RBP)
    _compute_flags(asm)
    _leave(asm)
    asm.jump("exception_end")
    asm.label("exception_lost")
    asm.store_immediate(RDX, LOST, 1)
    asm.label("exception_end")
    asm.move_immediate(RAX, 0)
    asm.ret()
    return asm


class _Page:
    def __init__(self) -> None:
        asm = assemble()
        code = asm.code()
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(code)
        base = addressof(c_char.from_buffer(self._page))
        self.address: Callable[[str], int] = lambda name: base + asm.labels[name]


@lru_cache(maxsize=1)
def page() -> _Page:
    """The code, mapped once per process."""
    return _Page()


class Recorder:
    """One engine's buffer. Everything on the vCPU thread."""

    def __init__(self, engine: Engine) -> None:
        cpu = at.cpu_address(engine.handle)
        self._cpu = cpu
        self._env = cpu + at.CPU_ENV
        self._quick: Any = engine.library.quick
        self._quick.cpu_cc_compute_all_x86_64.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._quick.cpu_cc_compute_all_x86_64.restype = c_uint32
        self._raw: npt.NDArray[Any] = np.zeros(CAPACITY + RESERVE, dtype=_RAW)
        self._block = (ctypes.c_uint64 * (BLOCK_SIZE // 8))()
        address = engine.library.address
        for slot, value in {
            CPU: cpu,
            ENV: self._env,
            ICOUNT_DECR: at.read_pointer(cpu + at.CPU_ICOUNT_DECR_PTR),
            CC_COMPUTE: address["cpu_cc_compute_all"],
            FETCH_BYTE: address["cpu_ldub_code"],
            EMU_STOP: address["uc_emu_stop"],
        }.items():
            self._block[slot // 8] = value
        self._next_block = c_int32.from_address(cpu + at.CPU_CFLAGS_NEXT_TB)
        self._df = c_int32.from_address(self._env + at.DF)
        self._clear()

    def hook(self, name: str) -> int:
        """Address of the callback "block", "exception" or "invalid"."""
        return page().address(name)

    @property
    def user(self) -> int:
        """The pointer to pass to them."""
        return addressof(self._block)

    @property
    def active(self) -> bool:
        return bool(self._block[ACTIVE // 8])

    @active.setter
    def active(self, value: bool) -> None:
        self._block[ACTIVE // 8] = int(value)
        if not value:
            self._next_block.value = -1

    def _clear(self) -> None:
        self._block[NEXT // 8] = self._raw.ctypes.data
        self._block[ROOM // 8] = len(self._raw)

    def arm(self) -> None:
        """Before a slice: its first block shall be one instruction too."""
        if self.active:
            self._next_block.value = 1
            self._block[SLICE // 8] += 1

    @property
    def count(self) -> int:
        return len(self._raw) - self._block[ROOM // 8]

    @property
    def full(self) -> bool:
        """No instruction can go on before `take`."""
        return bool(self._block[ROOM // 8] <= RESERVE)

    @property
    def lost(self) -> bool:
        """More events came at once than there was room for (never seen)."""
        return bool(self._block[LOST // 8])

    def interrupt(self, vector: int) -> None:
        """Record the delivery of an external interrupt, which the engine is about to do."""
        if not self.active:
            return
        count = self.count
        if count >= len(self._raw):
            self._block[LOST // 8] = 1
            return
        start = self._raw.ctypes.data + count * _RAW.itemsize
        ctypes.memmove(start + _ENV, self._env, _ENV_BYTES)
        row = self._raw[count]
        row["kind"], row["size"], row["is_int"] = RecordKind.INTERRUPT, vector, 0
        row["linear"] = row["rip"]
        row["error"] = 0
        row["cr2"] = at.read_pointer(self._env + at.CR + 16)
        row["cr3"] = at.read_pointer(self._env + at.CR + 24)
        row["arithmetic"] = self._quick.cpu_cc_compute_all_x86_64(self._env, int(row["cc_op"]))
        self._block[NEXT // 8] = start + _RAW.itemsize
        self._block[ROOM // 8] -= 1

    def take_ended(self) -> TraceRecords:
        """After a slice: all records; the last one is left out when its instruction was not begun."""
        answer = self._convert(self.count)
        self._clear()
        if len(answer) and answer[-1]["kind"] == RecordKind.INSTRUCTION:
            now = np.zeros(1, dtype=_RAW)
            ctypes.memmove(now.ctypes.data + _ENV, self._env, _ENV_BYTES)
            now["arithmetic"] = self._quick.cpu_cc_compute_all_x86_64(self._env, int(now["cc_op"][0]))
            ended = answer[-1:]
            if (_rflags(now) == ended["rflags"]) & (now["rip"] == ended["rip"]) and (
                now["registers"] == ended["registers"]
            ).all():
                return answer[:-1]
        return answer

    def take_most(self) -> TraceRecords:
        """Maybe within a slice: all records but the last, which stays."""
        count = self.count
        if count < 2:
            return np.zeros(0, dtype=TRACE_RECORD)
        answer = self._convert(count - 1)
        self._raw[0] = self._raw[count - 1]
        self._clear()
        self._block[NEXT // 8] += _RAW.itemsize
        self._block[ROOM // 8] -= 1
        return answer

    def _convert(self, count: int) -> TraceRecords:
        """The first records, in the core's form."""
        raw = self._raw[:count]
        rflags = _rflags(raw)
        if count > 1:
            instruction = raw["kind"] == RecordKind.INSTRUCTION
            ends = np.flatnonzero(instruction[:-1] & instruction[1:] & (raw["error"][:-1] != raw["error"][1:]))
            again = ends[
                (raw["rip"][ends] == raw["rip"][ends + 1])
                & (rflags[ends] == rflags[ends + 1])
                & (raw["registers"][ends] == raw["registers"][ends + 1]).all(axis=1)
            ]
            raw, rflags = np.delete(raw, again), np.delete(rflags, again)
        answer = np.zeros(len(raw), dtype=TRACE_RECORD)
        kind = raw["kind"].astype(np.uint8)
        event = kind != RecordKind.INSTRUCTION
        kind[(kind == RecordKind.EXCEPTION) & (raw["is_int"] != 0)] = RecordKind.SOFTWARE_INTERRUPT
        hflags = raw["hflags"]
        answer["kind"] = kind
        answer["bits"] = np.where(hflags & _HF_CS64, 64, np.where(hflags & _HF_CS32, 32, 16))
        answer["cpl"] = hflags & 3
        answer["size"] = np.where(event, 0, raw["size"])
        answer["vector"] = np.where(event, raw["size"], 0)
        answer["rip"] = raw["rip"]
        answer["linear"] = raw["linear"]
        answer["rflags"] = rflags
        answer["cr2"] = raw["cr2"]
        answer["cr3"] = raw["cr3"]
        answer["error"] = np.where(kind == RecordKind.EXCEPTION, raw["error"], 0)
        answer["registers"] = raw["registers"]
        answer["code"] = np.where(event[:, None], 0, raw["code"])
        return answer
