"""Resets are counted, told with their reason, and a triple fault without end ends the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vmf.errors import InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.resets import FAST_S, LIMIT, LOG_S, LOOP, ResetReason, Resets
from vmf.machine.states import MachineState

TRIPLE_FAULT = bytes.fromhex("0f011c2500001000cc")
"""lidt [0x100000], where there are zeroes; int3."""
RESETS_ITSELF = bytes.fromhex("b0fee664ebfa")
"""mov al, 0xfe; out 0x64, al; again: the keyboard controller pulls the reset line."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_triple_faults_in_a_row_end_the_machine_and_slow_ones_do_not() -> None:
    clock = Clock()
    resets = Resets("m", clock)
    for _ in range(3 * LIMIT):
        assert resets.note(ResetReason.TRIPLE_FAULT) == ""
        clock.now += FAST_S
    assert resets.problem() == ""
    told = []
    for _ in range(LIMIT):
        told.append(resets.note(ResetReason.TRIPLE_FAULT))
        clock.now += 0.01
    assert [bool(each) for each in told] == [False] * (LIMIT - 1) + [True]
    assert "triple fault" in told[-1]
    assert "controlvm m reset" in told[-1]
    assert resets.note(ResetReason.TRIPLE_FAULT) == "", "after a reset by its user it gets all tries again"


def test_other_resets_in_between_are_no_loop_of_triple_faults() -> None:
    clock = Clock()
    resets = Resets("m", clock)
    for _ in range(3 * LIMIT):
        assert resets.note(ResetReason.TRIPLE_FAULT) == ""
        assert resets.note(ResetReason.GUEST) == ""
    assert "resets again and again" in resets.problem()
    resets.note(ResetReason.USER)
    assert resets.problem() == ""
    assert resets.info()["count"] == 6 * LIMIT + 1
    assert resets.info()["last_reason"] == "user"


def test_a_loop_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    resets = Resets("m", clock)
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            resets.note(ResetReason.GUEST)
            clock.now += 0.1
    lines = [record.message for record in caplog.records]
    assert LOOP + 1000 * 0.1 / LOG_S - 2 <= len(lines) <= LOOP + 1000 * 0.1 / LOG_S + 1
    assert lines[0] == "machine m was reset: guest reset (1 in all)"
    assert "more since the last line" in lines[-1]


def _config(tmp_path: Path, code: bytes) -> MachineConfig:
    image = tmp_path / "guest.img"
    image.write_bytes(code)
    return MachineConfig(name="m", memory_mib=4, image=image, cpu_backend="unicorn")


def test_a_guest_that_triple_faults_for_ever_is_failed_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Machine(_config(tmp_path, TRIPLE_FAULT)) as machine:
        machine.start()
        machine.wait_for(MachineState.FAILED, timeout=120)
        info = machine.info()
        assert f"triple fault {LIMIT} times in a row" in info["failure"]
        assert info["resets"]["count"] == LIMIT
        assert info["resets"]["last_reason"] == "triple fault"
        machine.reset()
        machine.wait_for(MachineState.FAILED, timeout=120)
    assert "machine m was reset: triple fault (1 in all)" in caplog.text
    assert "machine m failed: the guest ended in a triple fault" in caplog.text


def test_a_guest_that_resets_itself_again_and_again_is_a_problem_to_see(tmp_path: Path) -> None:
    with Machine(_config(tmp_path, RESETS_ITSELF)) as machine:
        seen = []

        def look(*_states: object) -> None:
            seen.append(machine.info()["problem"])

        machine.start()
        while machine.resets.count <= LIMIT:
            machine.wait_for(MachineState.RUNNING, timeout=60)
        look()
        assert machine.state is MachineState.RUNNING, "it may: it asks for it"
        assert "resets again and again" in seen[0]
        assert "guest reset" in seen[0]


def test_what_was_handed_over_is_not_reset(tmp_path: Path) -> None:
    with Machine(_config(tmp_path, TRIPLE_FAULT)) as machine:
        machine.start()
        machine.wait_for(MachineState.FAILED, timeout=120)
        machine.handed_over = True
        with pytest.raises(InvalidStateError):
            machine.reset()
