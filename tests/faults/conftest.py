"""The tables at the end of the fault matrix."""

from __future__ import annotations

from collections import Counter

import pytest

from vmf.machine.config import MachineConfig
from vmf.testing import guests
from vmf.testing.faults import CONVERSATION, KINDS

Row = tuple[str, str, str, str, str, str]
"""Transport, kind of fault, message, state of the source, state of the target, what was done then."""
HEAD: Row = ("over", "fault", "at", "source", "target", "then")

OUTCOMES = {
    ("running", "teleportingin", "goes on"): "S",
    ("running", "aborted", "goes on"): "S",
    ("teleported", "running", "goes on"): "T",
    ("teleported", "aborted", "goes on"): "T†",
    ("aborted", "teleportingin", "started anew"): "A",
    ("uncertain", "teleportingin", "asked: never, resumed"): "u→S",
    ("uncertain", "aborted", "asked: never, resumed"): "u→S",
    ("uncertain", "running", "asked: runs, discarded"): "u→T",
    ("uncertain", "aborted", "asked: ended, resumed by force"): "u→S!",
    ("uncertain", "teleportingin", "start refused, asked: never, discarded, started anew"): "o→A",
    ("uncertain", "running", "start refused, asked: runs, discarded"): "o→T",
}
"""What docs/explanation/handover.md calls them."""


@pytest.fixture
def builtin() -> MachineConfig:
    """A machine with the built-in self-checking guest."""
    return MachineConfig(name="box", memory_mib=16, image=guests.builtin_guest(), cpu_backend="unicorn")


def grid(rows: list[Row]) -> list[str]:
    """A line for each message, a column for each kind of fault."""
    kinds, messages = (list(dict.fromkeys(row[column] for row in rows)) for column in (1, 2))
    cells = {(row[1], row[2]): OUTCOMES.get(row[3:], "?") for row in rows}
    lines = [["message", *kinds], ["---"] * (1 + len(kinds))]
    lines += [[name, *(cells.get((kind, name), "") for kind in kinds)] for name in messages]
    return ["| " + " | ".join(line) + " |" for line in lines]


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
    rows.sort(key=lambda row: (row[0], KINDS.index(row[1]), CONVERSATION.index(row[2])))
    terminalreporter.section(f"fault matrix: {len(rows)} cells, none with two running machines")
    widths = [max(len(row[column]) for row in (HEAD, *rows)) for column in range(len(HEAD))]
    for row in (HEAD, tuple("-" * width for width in widths), *rows):
        terminalreporter.line("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
    for transport in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == transport]
        count = Counter(OUTCOMES.get(row[3:], "?") for row in mine)
        terminalreporter.line("")
        terminalreporter.line(f"{transport}: " + ", ".join(f"{name} {number}" for name, number in count.items()))
        for line in grid(mine):
            terminalreporter.line(line)
