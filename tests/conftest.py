"""Fixtures for tests across packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.testing.hosts import Host


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts: source and target."""
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        yield source, target
