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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """From the reports, so that it is whole when several processes ran the cells."""
    rows: list[Row] = [
        tuple(row)
        for report in terminalreporter.stats.get("passed", [])
        for name, row in getattr(report, "user_properties", ())
        if name == "matrix"
    ]
    if not rows:
        return
    terminalreporter.section(f"fault matrix: {len(rows)} cells, none with two running machines")
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(4)]
    for row in (HEAD, tuple("-" * width for width in widths), *rows):
        terminalreporter.line("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
