"""Makes `kvmlab` importable for the tests here, and gives them the lab or the reason why there is none."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

VARIABLE = "VMF_LAB"
"""Environment: "0" leaves the lab's tests out, "full" runs all; otherwise the chosen ones run where they can."""
BUDGET_SECONDS = 720.0
"""For the chosen tests together, building the lab included. What has not begun by then is left out, aloud."""
RESERVE_SECONDS = 30.0
"""A test that has less than this left does not begin."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: runs in the KVM lab (tests/lab; skipped with the reason when it cannot)")
    config.addinivalue_line("markers", "lab_full: in the lab's full set only (VMF_LAB=full)")


class BudgetedLab:
    """The lab, with what is left of the time for all of its tests."""

    def __init__(self, lab: Any, end: float | None) -> None:
        self._lab = lab
        self._end = end

    def run(self, command: list[str], *, timeout: float, **options: Any) -> Any:
        """`kvmlab.Lab.run`; skips the test when the time of all tests is over, before or during it."""
        left = float("inf") if self._end is None else self._end - time.monotonic()
        if left < RESERVE_SECONDS:
            pytest.skip(f"the {BUDGET_SECONDS / 60:.0f} minutes for the KVM lab are over; VMF_LAB=full has no limit")
        result = self._lab.run(command, timeout=min(timeout, left), **options)
        print(
            f"lab: boot {result.boot_seconds:.1f} s, command {result.command_seconds:.1f} s, all"
            f" {result.total_seconds:.1f} s; time {self._lab.clock.factor} times slower than outside"
        )
        if result.timed_out and left < timeout:
            print(result.stdout, result.stderr)
            pytest.skip(f"cut off: the {BUDGET_SECONDS / 60:.0f} minutes for the KVM lab are over (a busy machine?)")
        return result


@pytest.fixture(scope="session")
def lab_is_full() -> bool:
    """Whether everything was asked for, without a limit."""
    return os.environ.get(VARIABLE, "") == "full"


@pytest.fixture(scope="session")
def built_lab(lab_is_full: bool) -> BudgetedLab:
    """Building takes some two minutes the first time on a machine."""
    from kvmlab import Lab, LabUnavailable

    if os.environ.get(VARIABLE, "") == "0":
        pytest.skip("VMF_LAB=0: the KVM lab was not wanted")
    end = None if lab_is_full else time.monotonic() + BUDGET_SECONDS
    try:
        return BudgetedLab(Lab.build(), end)
    except LabUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def kvm_lab(request: pytest.FixtureRequest, lab_is_full: bool) -> BudgetedLab:
    """The lab, for a test that has its turn; skipped with the reason otherwise."""
    if request.node.get_closest_marker("lab_full") and not lab_is_full:
        pytest.skip("in the KVM lab's full set only: VMF_LAB=full")
    lab: BudgetedLab = request.getfixturevalue("built_lab")
    return lab
