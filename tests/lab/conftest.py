"""Makes `kvmlab` importable for the tests here, and gives them the lab or the reason why there is none."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kvmlab.budget import BUDGET_SECONDS, BudgetedLab

VARIABLE = "VMF_LAB"
"""Environment: "0" leaves the lab's tests out, "full" runs all; otherwise the chosen ones run where they can."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: runs in the KVM lab (tests/lab; skipped with the reason when it cannot)")
    config.addinivalue_line("markers", "lab_full: in the lab's full set only (VMF_LAB=full)")


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
