"""What a tracing vCPU records: a fixed-size record for every instruction, before it is executed, and for every event.

Records travel as NumPy arrays, many at a time, so that whoever records need not know who formats. What an instruction
changed is the difference between its record and the next one, whatever its kind: every record carries the registers.
A repeated string instruction (REP MOVS and the like) gives a record for each iteration, and may give one more that
finds the counter at 0; `continuations` finds those that only go on with the instruction before, `iterates` those that
do something.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

CODE_BYTES = 16
"""Room for an instruction; the architecture's longest has 15 bytes (SDM vol. 2A 2.3.11)."""


class RecordKind(enum.IntEnum):
    """What a record stands for."""

    INSTRUCTION = 0
    EXCEPTION = 1
    """A fault or trap is about to be delivered; `vector`, `error` and, for a page fault, `cr2` describe it."""
    SOFTWARE_INTERRUPT = 2
    """INT n, INT3 or INTO."""
    INTERRUPT = 3
    """An external interrupt is about to be delivered."""


TRACE_RECORD = np.dtype(
    [
        ("kind", "<u1"),
        ("bits", "<u1"),  # 16, 32 or 64: how the code is to be decoded
        ("cpl", "<u1"),
        ("size", "<u1"),  # of the instruction, bytes; 0 for an event
        ("vector", "<u4"),
        ("rip", "<u8"),
        ("linear", "<u8"),  # RIP plus the base of CS
        ("rflags", "<u8"),
        ("cr2", "<u8"),
        ("cr3", "<u8"),
        ("error", "<u8"),
        ("registers", "<u8", 16),  # in the order of vmf.cpu.state.GENERAL_REGISTERS
        ("code", "u1", CODE_BYTES),
    ]
)

TraceRecords = npt.NDArray[np.void]
"""A one-dimensional array of TRACE_RECORD."""

TraceSink = Callable[[TraceRecords], None]
"""Takes records over, in order. Called on the vCPU thread between two instructions: it must not block, and may kick
the vCPU to get back the thread soon."""

_PREFIXES = np.zeros(256, dtype=bool)
_PREFIXES[[0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3]] = True
_REX = np.zeros(256, dtype=bool)
_REX[0x40:0x50] = True
_STRING = np.zeros(256, dtype=bool)
_STRING[[0x6C, 0x6D, 0x6E, 0x6F, 0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF]] = True
"""INS, OUTS, MOVS, CMPS, STOS, LODS, SCAS."""


def repeated_string(records: TraceRecords) -> npt.NDArray[np.bool_]:
    """Which records are string instructions with a REP prefix."""
    code: Any = records["code"]
    size: Any = records["size"]
    answer = np.zeros(len(records), dtype=bool)
    looking = (records["kind"] == RecordKind.INSTRUCTION) & (size > 1)
    repeated = np.zeros(len(records), dtype=bool)
    for position in range(CODE_BYTES - 1):  # byte by byte of all of them at once; few have more than two prefixes
        if not looking.any():
            break
        byte = code[:, position]
        repeated |= looking & ((byte == 0xF2) | (byte == 0xF3))
        prefix = _PREFIXES[byte] | (_REX[byte] & (records["bits"] == 64))
        answer |= looking & ~prefix & repeated & _STRING[byte]
        looking &= prefix & (position + 1 < size)
    return answer


_RCX = 1
_OTHER_ADDRESS_SIZE = 0x67
_COUNTER_MASK = {16: 0xFFFF, 32: 0xFFFF_FFFF, 64: (1 << 64) - 1}
_OTHER_SIZE = {16: 32, 32: 16, 64: 32}


def iterates(records: TraceRecords) -> npt.NDArray[np.bool_]:
    """Which records do something: all but those of a repeated string instruction whose counter is 0 already. Such a
    record is how a backend finds that the instruction has ended (or that there was nothing to do)."""
    answer = np.ones(len(records), dtype=bool)
    for index in np.flatnonzero(repeated_string(records) & (records["registers"][:, _RCX] & np.uint64(0xFFFF) == 0)):
        row = records[index]
        bits = int(row["bits"])
        prefixes = bytes(row["code"][: row["size"] - 1])
        size = _OTHER_SIZE[bits] if _OTHER_ADDRESS_SIZE in prefixes else bits
        answer[index] = int(row["registers"][_RCX]) & _COUNTER_MASK[size] != 0
    return answer


def continuations(records: TraceRecords) -> npt.NDArray[np.bool_]:
    """Which records go on with the repeated string instruction of the record before; the first one never does."""
    answer = np.zeros(len(records), dtype=bool)
    if len(records) > 1:
        repeated = repeated_string(records)
        same = records["linear"][1:] == records["linear"][:-1]
        answer[1:] = repeated[1:] & repeated[:-1] & same
    return answer
