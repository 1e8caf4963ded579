"""The lab for the ordinary tests: a limit for all of them together, and a second attempt when the lab itself fails."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvmlab.errors import LabHung

BUDGET_SECONDS = 480.0
"""For the chosen tests together, building the lab included. What has not begun by then is left out, aloud."""
RESERVE_SECONDS = 30.0
"""A test that has less than this left does not begin."""


class BudgetedLab:
    """The lab, with what is left of the time for all of its tests."""

    def __init__(self, lab: Any, end: float | None) -> None:
        self._lab = lab
        self._end = end

    def run(self, command: list[str], *, timeout: float, **options: Any) -> Any:
        """`kvmlab.Lab.run`; skips the test when the time of all tests is over, before or during it.

        A lab that hangs (seen twice, both times on a machine with other work) is started once more.
        """
        left = self._left()
        try:
            result = self._lab.run(command, timeout=min(timeout, left), **options)
        except LabHung as error:
            print(f"once more, as {error}")
            left = self._left()
            result = self._lab.run(command, timeout=min(timeout, left), **options)
        print(
            f"lab: boot {result.boot_seconds:.1f} s, command {result.command_seconds:.1f} s, all"
            f" {result.total_seconds:.1f} s; time {self._lab.clock.factor} times slower than outside"
        )
        if result.timed_out and left < timeout:
            print(result.stdout, result.stderr)
            pytest.skip(f"cut off: the {BUDGET_SECONDS / 60:.0f} minutes for the KVM lab are over (a busy machine?)")
        return result

    def _left(self) -> float:
        left = float("inf") if self._end is None else self._end - time.monotonic()
        if left < RESERVE_SECONDS:
            pytest.skip(f"the {BUDGET_SECONDS / 60:.0f} minutes for the KVM lab are over; VMF_LAB=full has no limit")
        return left
