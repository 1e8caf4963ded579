"""Writing a trace for people (one line an instruction) or for programs (JSON lines)."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
from attrs import frozen

from vmf.cpu.state import GENERAL_REGISTERS
from vmf.cpu.trace import RecordKind, TraceRecords, continuations, iterates

FORMAT_VERSION = 1
_CACHE_LIMIT = 200_000
_FLAGS = (
    (0, "CF"), (2, "PF"), (4, "AF"), (6, "ZF"), (7, "SF"), (8, "TF"), (9, "IF"), (10, "DF"), (11, "OF"), (14, "NT"),
    (16, "RF"), (17, "VM"), (18, "AC"), (19, "VIF"), (20, "VIP"), (21, "ID"),
)  # fmt: skip
"""RFLAGS, SDM vol. 1 figure 3-8."""
_EXCEPTIONS = {
    0: "#DE divide error", 1: "#DB debug", 2: "NMI", 3: "#BP breakpoint", 4: "#OF overflow", 5: "#BR bound range",
    6: "#UD invalid opcode", 7: "#NM device not available", 8: "#DF double fault", 10: "#TS invalid TSS",
    11: "#NP segment not present", 12: "#SS stack fault", 13: "#GP general protection", 14: "#PF page fault",
    16: "#MF x87 error", 17: "#AC alignment check", 18: "#MC machine check", 19: "#XM SIMD error",
}  # fmt: skip
"""SDM vol. 3A table 6-1."""
_WITH_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_PAGE_FAULT = 14
_COLUMNS = (*GENERAL_REGISTERS, "rflags", "cr3")


@frozen
class TraceHeader:
    """What a trace begins with. `guest_ns` is guest time at the start."""

    machine: str
    machine_backend: str
    backend: str
    wanted: int
    time: datetime
    guest_ns: int


class Disassembler:
    """Text of instructions; "" for all of them where capstone is not installed."""

    def __init__(self) -> None:
        self._engines: dict[int, Any] = {}
        self._cache: dict[tuple[int, bytes, int], str] = {}
        try:
            import capstone
        except ImportError:
            self.available = False
            return
        self.available = True
        modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
        self._engines = {bits: capstone.Cs(capstone.CS_ARCH_X86, mode) for bits, mode in modes.items()}

    def text(self, address: int, code: bytes, bits: int) -> str:
        """Mnemonic and operands, "(unknown)" when these bytes are no instruction known to capstone."""
        if not self.available:
            return ""
        key = (address, code, bits)
        found = self._cache.get(key)
        if found is None:
            found = "(unknown)"
            for _, _, mnemonic, operands in self._engines[bits].disasm_lite(code, address, 1):
                found = f"{mnemonic} {operands}".rstrip()
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            self._cache[key] = found
        return found


def flag_names(rflags: int) -> str:
    """The flags that are set: "CF ZF"."""
    return " ".join(name for bit, name in _FLAGS if rflags >> bit & 1)


class TraceFormat:
    """Turns records into text, batch by batch. Iterations of one repeated string instruction become one entry.

    Attributes:
        instructions, events: written so far.
    """

    def __init__(self, write: Callable[[str], object], header: TraceHeader, json_lines: bool) -> None:
        self._write = write
        self._json = json_lines
        self._disassembler = Disassembler()
        self._held: TraceRecords | None = None
        """The last entry, first and latest record: what it changed is not known before the next one."""
        self._held_more = 0
        """Iterations between the two, not counting theirs."""
        self._limit = header.wanted
        self.instructions = self.events = 0
        self._header(header)

    def add(self, records: TraceRecords) -> None:
        """Write everything but the last entry, which the next batch may go on with."""
        held = self._held
        rows = records if held is None else np.concatenate((held, records))
        if not len(rows):
            return
        starts = np.flatnonzero(~continuations(rows))
        works = iterates(rows)
        iterations = np.add.reduceat(works, starts, dtype=np.int64)
        if held is not None:
            iterations[0] += self._held_more
        self._entries(rows, starts, iterations)
        first = int(starts[-1])
        self._held = rows[[first, -1]] if len(rows) - first > 1 else rows[first:].copy()
        self._held_more = int(iterations[-1] - iterates(self._held).sum())

    def finish(self, complete: bool, reason: str) -> None:
        """Write the end. Of a trace that ended early the last entry is written too, without what it changed."""
        if not complete and self._held is not None:
            iterations = np.array([self._held_more + int(iterates(self._held).sum())])
            self._entries(np.concatenate((self._held[:1], self._held[:1])), np.array([0, 1]), iterations)
        self._held = None
        if self._json:
            end = {"instructions": self.instructions, "events": self.events, "complete": complete, "reason": reason}
            self._write(json.dumps({"end": end}) + "\n")
        else:
            early = f", ended early: {reason}" if not complete else ""
            self._write(f"# {self.instructions} instructions, {self.events} events{early}\n")

    def _header(self, header: TraceHeader) -> None:
        if self._json:
            fields = {
                "version": FORMAT_VERSION,
                "machine": header.machine,
                "machine_backend": header.machine_backend,
                "backend": header.backend,
                "time": header.time.isoformat(timespec="milliseconds"),
                "guest_time_ns": header.guest_ns,
                "wanted": header.wanted,
                "disassembled": self._disassembler.available,
            }
            self._write(json.dumps({"trace": fields}) + "\n")
            return
        runs = "" if header.backend == header.machine_backend else f" (the machine runs on {header.machine_backend})"
        self._write(
            f"# vmf trace of machine {header.machine}, {header.wanted} instructions\n"
            f"# {header.time.isoformat(sep=' ', timespec='milliseconds')}, guest time {header.guest_ns / 1e9:.6f} s\n"
            f"# CPU backend {header.backend}{runs}\n"
        )
        if not self._disassembler.available:
            self._write("# no mnemonics: the Python package capstone is not installed (pip install 'vmf[trace]')\n")
        self._write("# number, privilege level, address, bytes, instruction; registers and flags it changed\n")

    def _entries(self, rows: TraceRecords, starts: Any, iterations: Any) -> None:
        """Write the entries that begin at `starts`, except the last, which is only there to compare with."""
        if len(starts) < 2:
            return
        first = rows[starts]
        state = np.concatenate(
            (first["registers"], first["rflags"][:, None], first["cr3"][:, None]), axis=1, dtype=np.uint64
        )
        which, column = np.nonzero(state[1:] != state[:-1])
        changes: list[list[tuple[str, int]]] = [[] for _ in range(len(starts) - 1)]
        for entry, index, value in zip(which.tolist(), column.tolist(), state[1:][which, column].tolist(), strict=True):
            changes[entry].append((_COLUMNS[index], value))
        make = self._json_entry if self._json else self._text_entry
        fields = ("kind", "cpl", "bits", "size", "vector", "rip", "linear", "error", "cr2")
        columns = [first[field][:-1].tolist() for field in fields]
        code = np.ascontiguousarray(first["code"][:-1]).tobytes()
        width = first["code"].shape[1]
        lines = []
        for number, (row, changed, count) in enumerate(
            zip(zip(*columns, strict=True), changes, iterations.tolist(), strict=False)
        ):
            at = number * width
            lines.append(make(dict(zip(fields, row, strict=True)), code[at : at + row[3]], changed, count))
        self._write("".join(lines))

    def _text_entry(self, row: dict[str, int], code: bytes, changed: list[tuple[str, int]], count: int) -> str:
        if row["kind"] != RecordKind.INSTRUCTION:
            self.events += 1
            return f"{'':>9}  -- {self._event(row)}\n"
        self.instructions += 1
        text = self._disassembler.text(row["rip"], code, row["bits"])
        if count != 1:
            text = f"{text}  (x{count})".lstrip()
        shown = [
            f"{name}=[{flag_names(value)}]" if name == "rflags" else f"{name}={value:x}" for name, value in changed
        ]
        start = f"{self.instructions:>9}  {row['cpl']}  {row['rip']:016x}  {code.hex(' '):<29}  "
        return f"{start}{text:<44}  {' '.join(shown)}".rstrip() + "\n"

    @staticmethod
    def _event(row: dict[str, int]) -> str:
        vector, where = row["vector"], f"at {row['rip']:x}"
        if row["kind"] == RecordKind.INTERRUPT:
            return f"interrupt {vector:#x} {where}"
        if row["kind"] == RecordKind.SOFTWARE_INTERRUPT:
            return f"software interrupt {vector:#x}, return {where}"
        text = _EXCEPTIONS.get(vector, f"exception {vector}")
        if vector in _WITH_CODE:
            text += f", error code {row['error']:#x}"
        if vector == _PAGE_FAULT:
            text += f", address {row['cr2']:x}"
        return f"{text} {where}"

    def _json_entry(self, row: dict[str, int], code: bytes, changed: list[tuple[str, int]], count: int) -> str:
        entry: dict[str, Any]
        if row["kind"] != RecordKind.INSTRUCTION:
            self.events += 1
            kind = RecordKind(row["kind"]).name.lower()
            entry = {"event": kind, "vector": row["vector"], "address": f"{row['rip']:#x}"}
            if row["kind"] == RecordKind.EXCEPTION and row["vector"] in _WITH_CODE:
                entry["error_code"] = row["error"]
            if row["kind"] == RecordKind.EXCEPTION and row["vector"] == _PAGE_FAULT:
                entry["fault_address"] = f"{row['cr2']:#x}"
        else:
            self.instructions += 1
            entry = {
                "number": self.instructions,
                "address": f"{row['rip']:#x}",
                "bytes": code.hex(),
                "cpl": row["cpl"],
                "bits": row["bits"],
            }
            if row["linear"] != row["rip"]:
                entry["linear"] = f"{row['linear']:#x}"
            if self._disassembler.available:
                entry["text"] = self._disassembler.text(row["rip"], code, row["bits"])
            if count != 1:
                entry["iterations"] = count
        entry["changes"] = {name: f"{value:#x}" for name, value in changed}
        return json.dumps(entry) + "\n"
