"""Machines whose processes are stopped hold up neither the others nor whoever asks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.control.asking import ANSWER_SECONDS, ask_all
from vmf.control.process import spawn_detached
from vmf.errors import VmfError
from vmf.machine.config import MachineConfig, TeleporterConfig
from vmf.machine.home import Home
from vmf.testing.guests import builtin_guest


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Home]:
    """Three machines that run; the processes of the first two are stopped."""
    home = Home(tmp_path / "home", tmp_path / "home" / "run")
    pids = []
    try:
        for name in ("one", "three", "two"):
            home.create(MachineConfig(name=name, memory_mib=16, image=builtin_guest(), cpu_backend="unicorn"))
            pids.append(spawn_detached(home, name)["pid"])
        for pid in pids[:2]:
            os.kill(pid, signal.SIGSTOP)
        yield home
    finally:
        for name in home.names():
            if (process := home.process(name)) is not None:
                os.kill(process.pid, signal.SIGKILL)


def test_all_are_asked_at_once(stopped: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmf.cli.show import _states

    begun = time.monotonic()
    states = {name: state for name, (state, _) in _states(stopped, stopped.names()).items()}
    assert states == {"one": "does not answer", "three": "does not answer", "two": "running"}
    assert time.monotonic() - begun < 10 * ANSWER_SECONDS  # one after the other: 30 seconds each
    answers = ask_all(stopped, ["one", "two"], lambda client: client.info()["state"])
    assert isinstance(answers["one"], VmfError)
    assert answers["two"] == "running"


def test_a_target_starts_beside_them(stopped: Home) -> None:
    teleporter = TeleporterConfig(enabled=True, port=0, address="127.0.0.1")
    stopped.create(
        MachineConfig(name="t", memory_mib=16, image=builtin_guest(), cpu_backend="unicorn", teleporter=teleporter)
    )
    begun = time.monotonic()
    assert spawn_detached(stopped, "t")["address"].startswith("tcp:127.0.0.1:")
    assert time.monotonic() - begun < 30  # 30 seconds for each that is stopped, once
