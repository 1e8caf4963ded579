"""Who has a machine: what the lock in its directory says, and what it keeps from happening."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from vmf import host, record_locks
from vmf.control.client import ControlClient
from vmf.errors import InvalidStateError
from vmf.machine import death
from vmf.machine import lock as locks
from vmf.machine.config import MachineConfig
from vmf.machine.home import Home
from vmf.machine.lock import Holder

PROGRAM = """
import sys, time
from pathlib import Path
from vmf.machine.home import Home
with Home(Path(sys.argv[1]), Path(sys.argv[2])).own("vm"):
    print("up", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "data", tmp_path / "run")
    made.create(MachineConfig(name="vm", memory_mib=1))
    return made


@contextmanager
def running(home: Home, *before: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the machine."""
    child = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, str(home.data), str(home.runtime)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline() == "up\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stdin.close()


def assert_taken(home: Home) -> None:
    """Nothing that starts or changes the machine works."""
    for attempt in (
        lambda: home.own("vm").__enter__(),
        lambda: home.update("vm", lambda old: attrs.evolve(old, memory_mib=2)),
        lambda: home.unregister("vm"),
        lambda: home.unregister("vm", delete=True),
        lambda: home.changing("vm", "restore a snapshot", "put back").__enter__(),
    ):
        with pytest.raises(InvalidStateError, match="running"):
            attempt()
    assert home.load("vm").memory_mib == 1


def test_another_runtime_directory_hides_nothing(home: Home, tmp_path: Path) -> None:
    with running(home):
        other = Home(home.data, tmp_path / "elsewhere")
        holder = other.process("vm")
        assert holder is not None
        assert holder.runtime == str(home.paths("vm").runtime)
        assert_taken(other)
        shutil.rmtree(home.runtime)
        assert home.running() == ["vm"]
        assert_taken(home)


@pytest.mark.parametrize("what", ["deleted", "emptied", "rubbish", "replaced"])
def test_the_file_of_the_lock_is_not_all_there_is(home: Home, what: str) -> None:
    path = home.paths("vm").lock
    with running(home):
        if what in ("deleted", "replaced"):
            path.unlink()
        if what in ("replaced", "emptied"):
            path.write_text("")
        if what == "rubbish":
            path.write_text('{"pid": "x"')
        assert home.running() == ["vm"]
        if what == "rubbish":
            assert_taken(home)
        for start in (lambda: home.own("vm").__enter__(), lambda: home.unregister("vm", delete=True)):
            with pytest.raises(InvalidStateError, match="running"):
                start()


def test_another_pid_namespace(home: Home) -> None:
    """On either side."""
    isolated = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no PID namespace can be made here")
    with running(home, *isolated):
        holder = home.process("vm")
        assert holder is not None
        assert "another PID namespace" in holder.where
        assert_taken(home)
    wait_free(home)
    with running(home):
        program = PROGRAM.replace('print("up"', 'print("second"')
        done = subprocess.run(
            [*isolated, sys.executable, "-c", program, str(home.data), str(home.runtime)],
            input="\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert "InvalidStateError" in done.stderr
        assert "second" not in done.stdout


def wait_free(home: Home) -> None:
    deadline = time.monotonic() + 60
    while home.process("vm") is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_many_starts_one_wins(home: Home) -> None:
    won, lost = [], []
    gate = threading.Barrier(8)
    end = threading.Event()

    def start() -> None:
        gate.wait()
        try:
            with home.own("vm"):
                won.append(1)
                end.wait(60)
        except InvalidStateError:
            lost.append(1)
            if len(lost) == 7:
                end.set()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_a_start_waits_for_a_change_and_a_change_keeps_starts_out(home: Home) -> None:
    changed = threading.Event()

    def change(old: MachineConfig) -> MachineConfig:
        changed.set()
        time.sleep(0.3)
        return attrs.evolve(old, memory_mib=7)

    changing = threading.Thread(target=lambda: home.update("vm", change))
    changing.start()
    changed.wait()
    with home.own("vm"):
        assert home.load("vm").memory_mib == 7, "the start came after the whole change"
    changing.join()


def test_a_long_change_is_named(home: Home) -> None:
    with home.changing("vm", "restore a snapshot", "put back"):
        assert home.running() == []
        assert home.resting_state("vm") == "poweredoff"
        with pytest.raises(InvalidStateError, match=r"at work on machine 'vm' \(process [0-9]+\): restore a snapshot"):
            home.own("vm").__enter__()


def test_a_change_that_was_killed_is_no_dead_machine(home: Home) -> None:
    home.paths("vm").lock.write_text(json.dumps({"doing": "restore a snapshot", "pid": 1}) + "\n")
    assert home.resting_state("vm") == "poweredoff"
    with home.own("vm"):
        pass


def test_looking_disturbs_no_start(home: Home) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            home.process("vm")

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with home.own("vm"):
                assert home.process("vm") is not None
            assert not home.aborted("vm")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_file_is_made_again(home: Home) -> None:
    path = home.paths("vm").lock
    with home.tenure("vm") as tenure:
        path.unlink()
        assert tenure.renew()
        holder = json.loads(path.read_text())
        assert holder["pid"] == os.getpid()
        assert_taken(home)
        path.write_text("")
        assert tenure.renew()
        assert json.loads(path.read_text())["pid"] == os.getpid(), "emptied, as by unlockvm on another host"
        mine = path.read_text()
        leave(home, OTHER)
        assert not tenure.renew(), "and started there, where locks do not reach this far"
        path.write_text(mine)
        assert tenure.renew()
        path.unlink()
        path.touch()
        other = os.open(path, os.O_RDWR)
        assert record_locks.lock(other, locks._BYTE, exclusive=True)
        assert not tenure.renew(), "another host's"
        os.close(other)
    assert home.resting_state("vm") == "poweredoff"


# -- another host, simulated: what it wrote is there, and its lock is, or is not, seen


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The home is on a file system that hosts share."""
    monkeypatch.setattr(host, "is_shared", lambda descriptor: True)


OTHER = Holder(doing="run", pid=77, host="alpha\x1b[2J", machine_id="a" * 32, boot_id="another", shared=True)


def leave(home: Home, holder: Holder) -> None:
    home.paths("vm").lock.write_text(json.dumps(attrs.asdict(holder)) + "\n")


def test_a_machine_of_a_host_that_cannot_be_seen_is_not_started(home: Home, shared: None) -> None:
    leave(home, OTHER)
    assert home.resting_state("vm") == "elsewhere"
    for attempt in (
        lambda: home.own("vm").__enter__(),
        lambda: home.update("vm", lambda old: old),
        lambda: home.unregister("vm", delete=True),
        lambda: home.changing("vm", "restore a snapshot", "put back").__enter__(),
    ):
        with pytest.raises(InvalidStateError, match=r"on host alpha\?\[2J \(process 77\).*vmf unlockvm vm"):
            attempt()
        assert home.resting_state("vm") == "elsewhere", "an attempt changes nothing"
    with pytest.raises(InvalidStateError, match="on host alpha"):
        ControlClient.of(home, "vm")
    home.unlock("vm")
    assert home.resting_state("vm") == "aborted"
    assert "given up" in home.last_run("vm")["detail"]
    with home.own("vm"):
        pass


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"boot_id": "HERE"}, "aborted"),  # a container of this host: locks reach it
        ({"machine_id": "MINE", "host": "HERE"}, "aborted"),  # this host, before its last start
        ({"machine_id": "MINE"}, "elsewhere"),  # a clone of this host has its machine-id
        ({"machine_id": "", "host": "HERE"}, "elsewhere"),  # a host without a machine-id
        ({"shared": False}, "elsewhere"),
    ],
)
def test_which_hosts_are_this_one(
    home: Home, shared: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], state: str
) -> None:
    monkeypatch.setattr(host, "machine_id", lambda: "b" * 32)
    mine = {"boot_id": host.boot_id(), "machine_id": "b" * 32, "host": host.host_name()}
    leave(
        home,
        attrs.evolve(
            OTHER, **{key: mine[key] if value in ("HERE", "MINE") else value for key, value in change.items()}
        ),
    )
    assert home.resting_state("vm") == state


def test_on_a_disk_of_this_host_the_lock_alone_decides(home: Home) -> None:
    """A container's volume, say, started anew under another name."""
    leave(home, attrs.evolve(OTHER, shared=False))
    assert home.resting_state("vm") == "aborted"
    with home.own("vm"):
        pass


def test_a_lock_that_another_host_s_death_left_at_the_server(home: Home, shared: None) -> None:
    """As NFS 3 keeps it. Only a person can say that the host is gone."""
    leave(home, OTHER)
    theirs = os.open(home.paths("vm").lock, os.O_RDWR)
    try:
        assert record_locks.lock(theirs, locks._BYTE, exclusive=True)
        holder = home.process("vm")
        assert holder is not None
        assert holder.where == "process 77 on host alpha?[2J"
        assert_taken(home)
        home.unlock("vm")
        with home.own("vm"):
            pass
    finally:
        os.close(theirs)


def test_a_machine_of_this_host_cannot_be_unlocked(home: Home, shared: None) -> None:
    with running(home):
        for name in ("its own", "another host's"):
            if name == "another host's":
                leave(home, OTHER)
            before = home.paths("vm").lock.stat().st_ino
            with pytest.raises(InvalidStateError, match="cannot be unlocked"):
                home.unlock("vm")
            assert home.paths("vm").lock.stat().st_ino == before
            assert_taken(home)


# -- processes of the version that kept lock and process id in the runtime directory


def test_a_process_of_an_earlier_version_is_seen(home: Home) -> None:
    paths = home.paths("vm")
    paths.runtime.mkdir(parents=True)
    (paths.runtime / "pid").write_text(json.dumps({"pid": 88, "start_ticks": 5, "boot_id": host.boot_id()}))
    earlier = os.open(paths.runtime / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(earlier, fcntl.LOCK_EX)
    holder = home.process("vm")
    assert holder is not None
    assert holder.pid == 88
    assert_taken(home)
    os.close(earlier)
    assert home.resting_state("vm") == "aborted"
    with home.own("vm"):
        assert not (paths.runtime / "pid").exists()
    assert not home.aborted("vm")


# -- deaths


def test_why_a_process_died(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(home) as child:
        child.send_signal(signal.SIGKILL)
        wait_free(home)
    left = home.sight("vm").left
    assert left is not None
    log = tmp_path / "vmm.log"
    assert "lack of memory" in death.explain(left, log)
    log.write_text(f"\n{death.BEGIN}machine vm\nFatal Python error: Aborted\n\n{death.BEGIN}machine vm\nrunning\n")
    assert "lack of memory" in death.explain(left, log), "that was an earlier run"
    with log.open("a") as file:
        file.write("Fatal Python error: Segmentation fault\n\nCurrent thread 0x0000 (most recent call first):\n")
    assert f"crashed (Segmentation fault); {log}" in death.explain(left, log)
    monkeypatch.setattr(host, "machine_id", lambda: "b" * 32)
    assert "restarted" in death.explain(attrs.evolve(left, boot_id="another", machine_id="b" * 32), log)
