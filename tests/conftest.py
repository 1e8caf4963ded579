"""Fixtures for tests across packages."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.testing.hosts import Host


def pytest_configure() -> None:
    """Signals that whoever started pytest has ignored (nohup, a script's `&`) reach the machines that tests start.

    A handler of ours, unlike an ignored signal, is not inherited by the programs that are executed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts: source and target."""
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        yield source, target
