"""Fixtures: a bare guest on a vCPU, once for each gate; and the host's own processor."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from vmf_cpu_unicorn import engine, gates
from vmf_cpu_unicorn.selftest_guest import Bench


@pytest.fixture(params=["native", "python"])
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The gate in force; the native one is skipped where it was not built."""
    name: str = request.param
    if name == "native":
        pytest.importorskip("vmf_cpu_unicorn._gate")
    monkeypatch.setenv(gates.GATE_VARIABLE, name)
    return name


@pytest.fixture
def make_bench(gate: str) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: object) -> Bench:
        made.append(Bench(engine.load(), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bench in reversed(made):
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture(scope="session")
def native() -> Callable[[bytes, bytearray], None]:
    """Runs a few bytes of code on the host's processor, with one argument: the address of some data."""
    try:
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        pytest.skip(f"no executable memory here: {error}")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def run(code: bytes, data: bytearray) -> None:
        memory[: len(code) + 1] = code + b"\xc3"
        argument = (ctypes.c_char * len(data)).from_buffer(data)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(argument))

    return run
