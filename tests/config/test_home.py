"""The state of a host: definitions, who runs, and what can go wrong with the directory itself."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest

from vmf.errors import ConfigError, InvalidStateError, NotFoundError
from vmf.machine.config import MachineConfig
from vmf.machine.home import Home, HomeError, write_atomically


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "data", tmp_path / "run")


def config(name: str = "vm") -> MachineConfig:
    return MachineConfig(name=name, memory_mib=16)


def test_definitions_are_private_and_come_back(home: Home) -> None:
    assert home.names() == []
    before = os.umask(0)
    try:
        home.create(config())
    finally:
        os.umask(before)
    path = home.paths("vm").definition
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert home.load("vm").memory_mib == 16
    home.update("vm", lambda old: attrs.evolve(old, memory_mib=32))
    assert home.load("vm").memory_mib == 32
    assert home.names() == ["vm"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["identity.json", "lock", "machine.toml"]


def test_name_taken_unknown_and_renamed(home: Home) -> None:
    home.create(config())
    with pytest.raises(ConfigError, match="already"):
        home.create(config())
    with pytest.raises(NotFoundError, match=r"Did you mean vm\?"):
        home.load("vmm")
    with pytest.raises(ConfigError, match="cannot be changed"):
        home.update("vm", lambda old: attrs.evolve(old, name="other"))
    path = home.paths("vm").definition
    path.write_text(path.read_text().replace('"vm"', '"other"'))
    with pytest.raises(ConfigError, match="does not agree"):
        home.load("vm")
    with pytest.raises(ConfigError):
        home.paths("../vm")


@pytest.mark.parametrize("delete", [False, True])
def test_unregister(home: Home, delete: bool) -> None:
    home.create(config())
    kept = home.unregister("vm", delete=delete)
    assert home.names() == []
    assert (kept is None) is delete
    if kept is not None:
        assert "memory_mib = 16" in (kept / "machine.toml").read_text()
        assert not home.paths("vm").directory.exists()
    else:
        assert not home.paths("vm").definition.parent.exists()
    with pytest.raises(NotFoundError):
        home.unregister("vm")
    home.create(config())


def test_only_one_process_owns_a_machine(home: Home) -> None:
    home.create(config())
    with home.own("vm") as paths:
        assert home.running() == ["vm"]
        record = home.process("vm")
        assert record is not None
        assert record.pid == os.getpid()
        paths.control_socket.touch()
        with pytest.raises(InvalidStateError, match=f"process {os.getpid()}"), home.own("vm"):
            pass
        with pytest.raises(InvalidStateError, match="cannot be modified"):
            home.update("vm", lambda old: old)
        with pytest.raises(InvalidStateError, match="cannot be unregistered"):
            home.unregister("vm")
    assert home.running() == []
    assert home.resting_state("vm") == "poweredoff"
    assert list(paths.runtime.iterdir()) == []


def test_killed_process_leaves_aborted_and_is_recovered(home: Home) -> None:
    home.create(config())
    program = (
        "import sys, time; from pathlib import Path; from vmf.machine.home import Home\n"
        "with Home(Path(sys.argv[1]), Path(sys.argv[2])).own('vm') as paths:\n"
        "    paths.control_socket.touch(); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(home.data), str(home.runtime)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    record = home.process("vm")
    assert record is not None
    assert record.pid == child.pid
    child.kill()
    while home.process("vm") is not None:  # a zombie is dead, before anybody reaps it
        pass
    assert home.resting_state("vm") == "aborted"
    child.wait()
    child.stdout.close()
    assert home.aborted("vm")
    with home.own("vm") as paths:
        assert not paths.control_socket.exists(), "stale sockets are recovered"
    assert home.resting_state("vm") == "aborted"


def test_what_a_killed_process_left_is_still_known_when_its_traces_are_gone(home: Home) -> None:
    """Whoever has the machine for a moment (to resolve a teleport, say) without running it."""
    home.create(config())
    paths = home.paths("vm")
    paths.lock.write_text('{"doing": "run", "pid": 1, "boot_id": "another"}\n')
    assert home.resting_state("vm") == "aborted"
    with home.changing("vm", "modify"):
        pass
    assert paths.lock.read_text() == ""
    assert home.resting_state("vm") == "aborted"
    assert "restarted" in home.last_run("vm")["detail"]


def test_last_run_is_remembered(home: Home) -> None:
    home.create(config())
    home.record_end("vm", "teleported", "to elsewhere")
    assert home.resting_state("vm") == "teleported"
    assert home.last_run("vm")["detail"] == "to elsewhere"
    home.paths("vm").last.write_text("{")
    assert home.resting_state("vm") == "poweredoff"


def test_concurrent_updates_are_all_kept(home: Home) -> None:
    home.create(config())

    def add() -> None:
        for _ in range(10):
            home.update("vm", lambda old: attrs.evolve(old, memory_mib=old.memory_mib + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert home.load("vm").memory_mib == 56


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")]
)
def test_disk_trouble_is_named_and_nothing_is_lost(
    home: Home, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    home.create(config())

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(HomeError, match=said) as caught:
            home.update("vm", lambda old: attrs.evolve(old, memory_mib=99))
    assert caught.value.remedy
    assert home.load("vm").memory_mib == 16
    left = sorted(each.name for each in home.paths("vm").directory.iterdir())
    assert left == ["identity.json", "lock", "machine.toml"]


def test_read_only_home(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(HomeError, match="not a directory"):
        Home(blocked / "data", tmp_path / "run").create(config())


def test_environment_chooses_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMF_HOME", str(tmp_path / "h"))
    assert Home.default().data == tmp_path / "h"
    assert Home.default().runtime == tmp_path / "h" / "run"
    monkeypatch.delenv("VMF_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert Home.default().data == tmp_path / "data" / "vmf"
    assert Home.default().runtime == tmp_path / "vmf"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert Home.default().runtime == tmp_path / "data" / "vmf" / "run"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    runtime = Home.default().runtime
    assert runtime == tmp_path / "data" / "vmf" / "run" or runtime.is_relative_to("/run/user")


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
