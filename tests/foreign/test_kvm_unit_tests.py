"""kvm-unit-tests' images as machines, a part of the lane of foreign suites: see docs/how-to/foreign-suites.md."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from vmf.testing import foreign
from vmf.testing.hosts import Host

SUITES = os.environ.get("VMF_FOREIGN_SUITES")
EXPECTED = tomllib.loads(Path(__file__).with_name("kvm-unit-tests.toml").read_text())
SECONDS = 20.0


def _images() -> list[Path]:
    folder = Path(SUITES or "/nonexistent") / "kvm-unit-tests"
    return sorted([*folder.glob("*.flat"), *folder.glob("*.elf")])


@pytest.mark.slow
@pytest.mark.skipif(not SUITES, reason="VMF_FOREIGN_SUITES names no directory with foreign test programs")
@pytest.mark.parametrize("image", _images(), ids=lambda path: path.name)
def test_as_expected(tmp_path: Path, image: Path) -> None:
    with Host(tmp_path) as host:
        outcome = foreign.run_image(host, image, SECONDS)
    expected = EXPECTED.get(image.stem, EXPECTED["default"])
    assert outcome == expected["outcome"], f"{outcome} instead of {expected['outcome']} ({expected['reason']})"
