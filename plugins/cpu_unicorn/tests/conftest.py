"""Fixtures: a bare guest on a vCPU, once for each gate."""

from __future__ import annotations

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
