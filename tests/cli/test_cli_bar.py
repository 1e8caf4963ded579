"""What a command shows of something long."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vmf.cli.bar import StartBar
from vmf.errors import ControlError
from vmf.machine.home import Home


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be put in place of standard error by the test itself: pytest puts its own back after a fixture."""
    made = Terminal()
    monkeypatch.setattr(StartBar, "FIRST_S", 0.0)
    monkeypatch.setattr(StartBar, "EVERY_S", 0.01)
    return made


def wait_for(terminal: Terminal, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.01)


def test_a_start_that_takes_long_is_shown(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [
        ControlError("It does not serve its socket yet."),
        {"operation": None},
        {"operation": {"what": "the start", "step": "", "done": 0, "total": 0, "seconds": 3.2}},
        {"operation": {"what": "the start", "step": "memory", "done": 1 << 20, "total": 4 << 20, "seconds": 4}},
    ]
    monkeypatch.setattr("vmf.control.asking.ask", lambda *_: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = StartBar(Home(tmp_path, tmp_path / "run"), "vm")
    wait_for(terminal, "the start of machine 'vm': 3 s")
    wait_for(terminal, "memory: 1.0 MiB of 4.0 MiB")
    bar.end()
    assert terminal.getvalue().endswith("\r\x1b[K")
    bar.end()


def test_the_end_of_a_start_waits_for_no_answer(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def slow(*_: object) -> dict[str, Any]:
        asked.append(time.monotonic())
        time.sleep(1)
        return {"operation": {"what": "the start", "seconds": 1}}

    monkeypatch.setattr("vmf.control.asking.ask", slow)
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = StartBar(Home(tmp_path, tmp_path / "run"), "vm")
    while not asked:
        time.sleep(0.01)
    bar.end()
    time.sleep(1.5)
    assert terminal.getvalue() == ""
