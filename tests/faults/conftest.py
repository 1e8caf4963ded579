"""The table at the end of the fault matrix."""

from __future__ import annotations

import pytest

from vmf.machine.config import MachineConfig
from vmf.testing import guests

Row = tuple[str, str, str, str]
HEAD: Row = ("fault", "source", "target", "then")


@pytest.fixture
def builtin() -> MachineConfig:
    """A machine with the built-in self-checking guest."""
    return MachineConfig(name="box", memory_mib=16, image=guests.builtin_guest(), cpu_backend="unicorn")


ROWS: list[Row] = []


@pytest.fixture
def matrix() -> list[Row]:
    """Where a cell puts its row."""
    return ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    terminalreporter.section(f"fault matrix: {len(ROWS)} cells, none with two running machines")
    widths = [max(len(row[column]) for row in (HEAD, *ROWS)) for column in range(4)]
    for row in (HEAD, tuple("-" * width for width in widths), *ROWS):
        terminalreporter.line("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
