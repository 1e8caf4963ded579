"""Stores to pages with code in them, through every alias: what is executed afterwards is what was stored last."""

from __future__ import annotations

import random
import struct

import pytest

from vmf.cpu.backend import ExitReason
from vmf_cpu_unicorn import engine
from vmf_cpu_unicorn.selftest_guest import CODE, Bench

_PD = 0x3000
ALIASES = (0, 0x40_0000, 0x60_0000)
"""Virtual addresses at which physical 0 to 2 MiB lie: executable, executable, not executable."""
FIRST_PAGE, PAGES = 0x10_0000, 4
FUNCTIONS = 8
"""In each page, 64 bytes apart: `mov eax, imm32; ret`."""
RESULTS = 0x12_0000
DATA_OFFSET = 0x800


def function(page: int, number: int) -> int:
    return FIRST_PAGE + page * 0x1000 + number * 64


class Script:
    """Random stores and calls in one straight program, and what the calls must return."""

    def __init__(self, seed: int, length: int) -> None:
        self.random = random.Random(seed)
        self.values = {(page, n): page << 8 | n for page in range(PAGES) for n in range(FUNCTIONS)}
        self.code = bytearray(b"\x48\xbf" + struct.pack("<Q", RESULTS))  # mov rdi, RESULTS
        self.expected: list[int] = []
        for _ in range(length):
            page, number = self.random.randrange(PAGES), self.random.randrange(FUNCTIONS)
            self.random.choices((self.call, self.change, self.data), (5, 3, 2))[0](page, number)
        self.code += b"\xf4"

    def address(self, address: int, aliases: tuple[int, ...] = ALIASES) -> None:
        self.code += b"\x48\xbb" + struct.pack("<Q", address + self.random.choice(aliases))  # mov rbx, address

    def call(self, page: int, number: int) -> None:
        self.address(function(page, number), ALIASES[:2])
        self.code += b"\xff\xd3\x89\x07\x48\x83\xc7\x04"  # call rbx; mov [rdi], eax; add rdi, 4
        self.expected.append(self.values[page, number])

    def change(self, page: int, number: int) -> None:
        """Overwrite the function's constant, or a part of it."""
        value = self.random.getrandbits(32)
        size = self.random.choice((1, 2, 4))
        offset = self.random.randrange(0, 5 - size)
        self.address(function(page, number) + 1 + offset)
        part = value & (1 << 8 * size) - 1
        mask = (1 << 8 * size) - 1 << 8 * offset
        self.values[page, number] = self.values[page, number] & ~mask | part << 8 * offset
        opcode = {1: b"\xc6\x03", 2: b"\x66\xc7\x03", 4: b"\xc7\x03"}[size]  # mov [rbx], imm
        self.code += opcode + part.to_bytes(size, "little")

    def data(self, page: int, _number: int) -> None:
        """Many stores to data beside the code, so that the page is once taken for data."""
        self.address(FIRST_PAGE + page * 0x1000 + DATA_OFFSET)
        count = self.random.choice((1, 5, 100))
        # mov ecx, count; a: mov [rbx+rcx*8], rcx; dec ecx; jnz a
        self.code += b"\xb9" + struct.pack("<I", count) + b"\x48\x89\x0c\xcb\xff\xc9\x75\xf8"


@pytest.mark.parametrize("seed", range(40))
def test_code_that_was_changed_through_any_alias_is_executed_as_it_is_now(seed: int) -> None:
    bench = Bench(engine.load())
    try:
        if not bench.vcpu.fast_stores:
            pytest.skip("the C extension _stores is not there (the engine's own way fails here: see the README)")
        script = Script(seed, 400)
        assert len(script.code) < 0x10000
        bench.memory.write(_PD + 16, struct.pack("<QQ", 0x87, 0x87 | 1 << 63))
        for page in range(PAGES):
            for number in range(FUNCTIONS):
                code = b"\xb8" + struct.pack("<I", page << 8 | number) + b"\xc3"
                bench.memory.write(function(page, number), code)
        result = bench.execute(bytes(script.code), bench.state(rip=CODE), seconds=20)
        assert result.reason is ExitReason.HALTED
        got = struct.unpack(f"<{len(script.expected)}I", bench.memory.read(RESULTS, 4 * len(script.expected)))
        assert list(got) == script.expected
    finally:
        bench.close()


def test_stores_across_pages_and_to_mmio_take_the_engines_way() -> None:
    bench = Bench(engine.load())
    try:
        # mov rbx, 0x130ffd; mov rax, 0x1122334455667788; 3 x mov [rbx], rax; hlt
        code = bytes.fromhex("48bbfd0f13000000000048b88877665544332211488903488903488903f4")
        assert bench.execute(code).reason is ExitReason.HALTED
        assert bench.memory.read(0x130FFD, 8) == bytes.fromhex("8877665544332211")
    finally:
        bench.close()


def test_engines_come_and_go() -> None:
    for _ in range(3):
        benches = [Bench(engine.load()) for _ in range(5)]
        for bench in benches:
            # mov dword [0x130000], 7; hlt
            assert bench.execute(bytes.fromhex("c704250000130007000000f4")).reason is ExitReason.HALTED
            assert bench.memory.read(0x130000, 4) == b"\7\0\0\0"
        for bench in benches:
            bench.close()
