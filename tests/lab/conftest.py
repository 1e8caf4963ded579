"""Makes `kvmlab` importable for the tests here, and gives them the lab or the reason why there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: runs in the KVM lab (tests/lab; skipped with the reason when it cannot)")


@pytest.fixture(scope="session")
def kvm_lab() -> object:
    """The built `kvmlab.Lab`; building it takes some minutes the first time on a machine."""
    from kvmlab import Lab, LabUnavailable

    if os.environ.get("VMF_LAB") != "1":
        pytest.skip("the KVM lab takes some ten minutes: set VMF_LAB=1 to run its tests")
    try:
        return Lab.build()
    except LabUnavailable as error:
        pytest.skip(str(error))
