"""Tracing: every instruction once, with its bytes and registers; and the guest does not notice."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import numpy as np
import pytest
from attrs import evolve

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import GENERAL_REGISTERS
from vmf.cpu.trace import RecordKind, TraceRecords, continuations
from vmf.machine.trace_format import TraceFormat, TraceHeader
from vmf_cpu_unicorn import engine
from vmf_cpu_unicorn.recorder import CAPACITY
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, SYSCALL_ENTRY, Bench
from vmf_cpu_unicorn.tracing import TracingVcpu

KHZ = 1_000_000
RAX, RCX = GENERAL_REGISTERS.index("rax"), GENERAL_REGISTERS.index("rcx")


class Traced:
    """A bench on a tracing vCPU, and what it recorded."""

    def __init__(self) -> None:
        self.batches: list[TraceRecords] = []
        self.bench = Bench(engine.load(), tsc_khz=KHZ)
        plain, self.bench.vcpu = (
            self.bench.vcpu,
            TracingVcpu(engine.load(), self.bench.environment, KHZ, self.batches.append),
        )
        plain.close()

    @property
    def records(self) -> TraceRecords:
        return np.concatenate(self.batches)

    @property
    def path(self) -> list[int]:
        """Offsets from CODE of the instructions there."""
        rows = self.records
        rows = rows[rows["kind"] == RecordKind.INSTRUCTION]
        return [int(address) - CODE for address in rows["linear"] if CODE <= address < CODE + 4096]


@pytest.fixture
def traced(gate: str) -> Iterator[Traced]:
    made = Traced()
    yield made
    made.bench.close()


def test_straight_code(traced: Traced) -> None:
    code = bytes.fromhex("b807000000 48ffc0 4839c8 7402 90 90 f4")
    traced.bench.execute(code)
    rows = traced.records
    assert traced.path == [0, 5, 8, 11, 13, 14, 15]
    assert [int(size) for size in rows["size"]] == [5, 3, 3, 2, 1, 1, 1]
    for row, at in zip(rows, traced.path, strict=True):
        size = int(row["size"])
        assert bytes(row["code"][:size]) == code[at : at + size]
        assert not row["code"][size:].any()
    assert [int(row["registers"][RAX]) for row in rows[:3]] == [0, 7, 8]
    assert set(rows["bits"]) == {64}
    assert set(rows["cpl"]) == {0}


def test_flags_are_those_of_the_instruction_before(traced: Traced) -> None:
    # xor eax,eax (ZF); stc; std; dec eax (SF, CF stays); hlt
    traced.bench.execute(bytes.fromhex("31c0f9fdffc8f4"))
    flags = [int(value) & 0x8D5 | int(value) & 0x400 for value in traced.records["rflags"]]
    assert flags[1:] == [0x44, 0x45, 0x445, 0x485 | 0x10]


def test_a_fault_between_compare_and_jump_keeps_the_flags(traced: Traced) -> None:
    """What makes the engine's own instruction hook unsound: cmp; mov that faults; the handler comes back; jz."""
    # cmp eax,eax; mov rcx,[rbx] (#PF, left behind to the jz); jz over ud2; hlt
    code = bytes.fromhex("39c0 488b0b 7402 0f0b f4")
    traced.bench.execute(code, traced.bench.state(rbx=0x0123_4567_8000, r15=CODE + 5))
    assert traced.path == [0, 2, 5, 9]
    event = traced.records[traced.records["kind"] == RecordKind.EXCEPTION]
    assert [(int(e["vector"]), int(e["error"]), int(e["cr2"]), int(e["rip"]) - CODE) for e in event] == [
        (14, 0, 0x0123_4567_8000, 2)
    ]


def test_invalid_instructions_software_interrupts_and_syscall(traced: Traced) -> None:
    bench = traced.bench
    bench.execute(bytes.fromhex("0f0bcd42f4"), bench.state(r15=CODE + 2))
    assert traced.path == [0, 2, 4]
    rows = traced.records
    assert [(int(row["kind"]), int(row["vector"])) for row in rows[rows["kind"] != 0]] == [
        (RecordKind.EXCEPTION, 6), (RecordKind.SOFTWARE_INTERRUPT, 0x42)
    ]  # fmt: skip
    traced.batches.clear()
    bench.execute(bytes.fromhex("0f05"), bench.state(user=True))
    assert [(int(row["linear"]), int(row["cpl"])) for row in traced.records] == [(CODE, 3), (SYSCALL_ENTRY, 0)]


def test_a_fetch_that_faults_is_an_event_and_what_follows_is_traced(traced: Traced) -> None:
    # jmp rbx, which is nowhere; the handler returns to the hlt
    traced.bench.execute(bytes.fromhex("ffe3909090f4"), traced.bench.state(rbx=0x0123_4567_8000, r15=CODE + 2))
    assert traced.path == [0, 2, 3, 4, 5]
    rows = traced.records
    assert int(rows[1]["kind"]) == RecordKind.EXCEPTION
    assert set(rows["size"][rows["kind"] == 0]) <= set(range(1, 16))
    # the handler, too, is recorded instruction by instruction
    assert len(rows) > 30


def test_interrupts_are_delivered_and_recorded(traced: Traced) -> None:
    bench = traced.bench
    bench.interrupts.queue = [0x55, 0x66]
    bench.execute(bytes.fromhex("90fb9090f4"))
    rows = traced.records
    events = rows[rows["kind"] == RecordKind.INTERRUPT]
    assert [int(row["vector"]) for row in events] == [0x55, 0x66]
    assert [record.vector for record in bench.records()] == [0x55, 0x66]
    assert int(events[0]["rip"]) == CODE + 3
    assert traced.path == [0, 1, 2, 3, 4], "no instruction is recorded twice"


def test_ports_and_mmio(traced: Traced) -> None:
    bench = traced.bench
    seen: list[int] = []
    bench.port.read = lambda size: 0x77
    bench.port.write = lambda size, value: seen.append(value)
    bench.execute(bytes.fromhex("e480e6808b03f4"), bench.state(rbx=0x3000))
    assert seen == [0x77]
    assert traced.path == [0, 2, 4, 6]
    assert int(traced.records[1]["registers"][RAX]) == 0x77


def test_a_port_access_may_raise_an_interrupt(traced: Traced) -> None:
    bench = traced.bench

    def write(size: int, value: int) -> None:
        bench.interrupts.queue.append(0x44)

    bench.port.write = write
    bench.execute(bytes.fromhex("fb90e68090f4"))
    assert [record.vector for record in bench.records()] == [0x44]
    assert traced.path == [0, 1, 2, 4, 5]


def test_repeated_strings_are_one_instruction_with_iterations(traced: Traced) -> None:
    bench = traced.bench
    bench.execute(bytes.fromhex("f348ab90f4"), bench.state(rdi=DATA, rcx=5, rax=0x1122))
    rows = traced.records
    assert bench.memory.read(DATA, 48) == struct.pack("<6Q", *[0x1122] * 5, 0)
    goes_on = continuations(rows)
    assert [int(row["linear"]) - CODE for row in rows[~goes_on]] == [0, 3, 4]
    assert [int(row["registers"][RCX]) for row in rows][:5] == [5, 4, 3, 2, 1]
    assert not goes_on[0]


def test_code_that_writes_itself(traced: Traced) -> None:
    """The second round must see, and record, the new instruction."""
    bench = traced.bench
    # loop: nop -> (mov byte [rip-8], 0xf4 makes it hlt); jmp loop
    bench.execute(bytes.fromhex("90 c605f8fffffff4 ebf6"))
    rows = traced.records
    assert traced.path == [0, 1, 8, 0]
    assert bytes(rows[0]["code"][:1]) == b"\x90"
    assert bytes(rows[3]["code"][:1]) == b"\xf4"


def test_batches_are_bounded_and_nothing_is_lost_between_them(traced: Traced) -> None:
    count = 3 * CAPACITY
    # mov ecx, count; l: dec ecx; jnz l; hlt
    traced.bench.execute(b"\xb9" + struct.pack("<I", count) + bytes.fromhex("ffc975fcf4"))
    rows = traced.records
    assert len(rows) == 2 * count + 2
    assert all(len(batch) <= CAPACITY + 64 for batch in traced.batches)
    assert traced.path == [0, *[5, 7] * count, 9]
    assert [int(value) for value in rows["registers"][1:-1:2, RCX]] == list(range(count, 0, -1))


def test_stops_at_random_instants_neither_repeat_nor_lose_an_instruction(traced: Traced) -> None:
    bench = traced.bench
    count = 200_000
    bench.load(b"\xb9" + struct.pack("<I", count) + bytes.fromhex("ffc975fcf4"), bench.state())
    kicks = 0
    done = threading.Event()

    def disturb() -> None:
        nonlocal kicks
        while not done.wait(0.0002):
            bench.vcpu.kick()
            kicks += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        end = time.monotonic() + 60
        while bench.vcpu.run(time.monotonic_ns() + 300_000).reason is ExitReason.KICKED:
            assert time.monotonic() < end
    finally:
        done.set()
        thread.join()
    rows = traced.records
    assert kicks > 10
    assert len(rows) == 2 * count + 2
    loop = rows["registers"][1:-1, RCX]
    assert (loop == np.repeat(np.arange(count, 0, -1), 2) - np.tile([0, 1], count)).all()


@pytest.mark.parametrize("traced_half", [0, 1])
def test_the_result_is_that_of_an_untraced_run(gate: str, make_bench: Callable[..., Bench], traced_half: int) -> None:
    """The same computation, half of it traced, ends in the same state, flags included."""
    # l: imul rax,rax,0x19660d; add rax,rcx; ror rax,7; adc rdx,rax; mov [rdi+rcx*8-8],rdx; pushfq; pop rsi;
    #    xor rbp,rsi; loop l; hlt
    code = bytes.fromhex("4869c00d661900 4801c8 48c1c807 4811c2 488954cff8 9c 5e 4831f5 e2e6 f4")
    start = {"rax": 12345, "rcx": 500, "rdi": DATA}
    plain = make_bench(tsc_khz=KHZ)
    plain.execute(code, plain.state(**start))
    wanted, memory = plain.vcpu.save(), plain.memory.read(DATA, 4000)
    traced = Traced()
    try:
        other = make_bench(tsc_khz=KHZ)
        halves = [other, traced.bench] if traced_half else [traced.bench, other]
        halves[0].load(code, halves[0].state(**start))
        # the first half ends at a limit in guest memory: run until rcx is small by short slices
        while halves[0].vcpu.save().registers["rcx"] > 250:
            if halves[0].vcpu.run(time.monotonic_ns() + 20_000).reason is ExitReason.HALTED:
                break
        state = halves[0].vcpu.save()
        halves[1].memory.write(0, halves[0].memory.read(0, 4 << 20))
        halves[1].vcpu.invalidate_code(0, 4 << 20)
        halves[1].vcpu.restore(evolve(state))
        if not state.halted:
            assert halves[1].go().reason is ExitReason.HALTED
        got = halves[1].vcpu.save()
        assert evolve(got, tsc=0) == evolve(wanted, tsc=0)
        assert halves[1].memory.read(DATA, 4000) == memory
    finally:
        traced.bench.close()


@pytest.mark.parametrize(
    ("text", "registers", "iterations"),
    [
        ("f348ab", {"rcx": 5}, 5),  # rep stosq
        ("f348ab", {"rcx": 1}, 1),
        ("f348ab", {"rcx": 0}, 0),
        ("f3a4", {"rcx": CAPACITY * 2}, CAPACITY * 2),  # rep movsb, in several batches
        ("67f3aa", {"rcx": 0x7_0000_0003}, 3),  # rep stosb with ECX
        ("f3a6", {"rcx": 9}, 4),  # repe cmpsb: the fourth bytes differ
        ("f2ae", {"rcx": 9, "rax": 7}, 9),  # repne scasb: not found
        ("ab", {"rcx": 0}, 1),  # no prefix, no counter
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000], ids="batches of {}".format)
def test_iterations_are_those_that_did_something(
    traced: Traced, text: str, registers: dict[str, int], iterations: int, size: int
) -> None:
    """Not the last look at the counter."""
    bench = traced.bench
    bench.memory.write(DATA, bytes(CAPACITY * 4))
    bench.memory.write(DATA + 3, b"\1")
    raw = bytes.fromhex(text)
    bench.execute(b"\x90" + raw + b"\x90\xf4", bench.state(rdi=DATA, rsi=DATA + 0x1000, **registers))
    lines: list[str] = []
    header = TraceHeader("m", "unicorn", "unicorn", 100, datetime.now(tz=UTC), 0)
    written = TraceFormat(lines.append, header, json_lines=True)
    rows = traced.records
    for start in range(0, len(rows), size):
        written.add(rows[start : start + size])
    written.finish(complete=True, reason="")
    entries = [json.loads(line) for line in "".join(lines).splitlines()]
    (entry,) = [entry for entry in entries if entry.get("bytes") == text]
    assert entry.get("iterations", 1) == iterations
    assert int(entry["address"], 16) == CODE + 1
