"""Storage that does not answer: every call of an operation has an end, and what comes late does no harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmf.errors import OperationCancelled, StorageTimeout, VmfError
from vmf.machine import storage as machine_storage
from vmf.machine import storage_slot
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.plugins.bridge import PluginRegistry
from vmf.storage import calls
from vmf.storage.holder import Lease
from vmf.storage.media import lease_of

MIB = 1 << 20
TELEPORT = "ab" * 16
BOUND = 20.0
"""Seconds: far more than anything here takes, and less than for ever."""


class Gate:
    """Holds calls up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.opened = threading.Event()
        self.reached = threading.Event()

    def before(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return original(*arguments, **keywords)

        self._patch.setattr(owner, name, call)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    for module, names in (
        (machine_storage, ("CLOSE_SECONDS", "HANDOVER_SECONDS", "CALL_SECONDS")),
        (storage_slot, ("FLUSH_SECONDS", "ABORT_SECONDS", "CALL_SECONDS")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 0.2)
    made = Gate(monkeypatch)
    yield made
    made.opened.set()
    end = time.monotonic() + BOUND
    while calls.abandoned() and time.monotonic() < end:
        time.sleep(0.01)
    assert not calls.abandoned(), "an abandoned call did not end with what it waited for"


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.img")
    PluginRegistry().storage("file").create(path, MIB)
    return path


def side(disk: str, name: str = "vm", **settings: Any) -> MachineStorage:
    drive = DriveConfig(port=0, medium=disk, **settings)
    return MachineStorage(MachineConfig(name=name, memory_mib=16, drives=(drive,)), PluginRegistry(), lambda _: None)


def image_class() -> type:
    from vmf_storage_file.image import FileImage

    return FileImage


def driver_class() -> type:
    from vmf_storage_file.driver import FileDriver

    return FileDriver


@pytest.mark.parametrize("what", ["probe", "lease_store", "open"])
def test_a_start_ends(gate: Gate, disk: str, what: str) -> None:
    gate.before(driver_class(), what)
    storage = side(disk)
    with pytest.raises(StorageTimeout, match=r"drive at port 0 .*has not answered"):
        storage.open()
    gate.opened.set()
    storage = side(disk)  # nothing is held by what came late
    deadline = time.monotonic() + BOUND
    while True:
        try:
            storage.open()
            break
        except VmfError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    storage.close()


def test_a_claim_that_comes_late_is_given_back(gate: Gate, disk: str) -> None:
    gate.before(Lease, "claim")
    storage = side(disk)
    with pytest.raises(StorageTimeout):
        storage.open()
    gate.opened.set()
    deadline = time.monotonic() + BOUND
    while lease_of(PluginRegistry(), disk).alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("what", ["flush", "close"])
def test_the_guest_goes_on_after_a_handover_that_storage_held_up(gate: Gate, disk: str, what: str) -> None:
    storage = side(disk)
    storage.open()
    if what == "flush":
        gate.before(image_class(), "flush")
        with pytest.raises(StorageTimeout):
            storage.pass_leases(TELEPORT)
        storage.take_leases(TELEPORT)  # asks the storage nothing
        assert storage.drives[0].attached
    else:
        gate.before(Lease, "offer")
        with pytest.raises(StorageTimeout):
            storage.pass_leases(TELEPORT)
        with pytest.raises(VmfError):  # whether it was offered cannot be told: a person decides
            storage.take_leases(TELEPORT)
    gate.opened.set()
    time.sleep(0.1)
    deadline = time.monotonic() + BOUND
    while True:
        try:
            storage.take_leases(TELEPORT)
            break
        except VmfError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    storage.drives[0].writev(0, [memoryview(b"x" * 512)])
    storage.close()
    assert lease_of(PluginRegistry(), disk).standing == "free"


def test_a_cancel_is_seen_while_storage_is_waited_for(gate: Gate, disk: str) -> None:
    storage = side(disk)
    storage.open()
    gate.before(Lease, "publish")
    gate.before(image_class(), "flush")
    cancelled = threading.Event()

    def look() -> None:
        if cancelled.is_set():
            raise OperationCancelled("no more.")

    waits: list[Callable[[], object]] = [
        lambda: storage.describe(publish=True, look=look),
        lambda: storage.flush(look),
    ]
    for wait in waits:
        cancelled.clear()
        gate.reached.clear()
        threading.Timer(0.05, cancelled.set).start()
        with pytest.raises(OperationCancelled):
            wait()
    gate.opened.set()
    storage.close()


def test_the_end_says_what_was_not_flushed_and_keeps_the_lease(gate: Gate, disk: str) -> None:
    storage = side(disk)
    storage.open()
    storage.drives[0].writev(0, [memoryview(b"x" * 512)])
    gate.before(image_class(), "flush")
    (problem,) = storage.close()
    assert "drive at port 0" in problem
    assert "may not be on it" in problem
    assert "lease was not given back" in problem
    gate.opened.set()
    deadline = time.monotonic() + BOUND
    while calls.abandoned() or lease_of(PluginRegistry(), disk).alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lease_of(PluginRegistry(), disk).standing == "held", "another host could have taken it over unwritten"
    assert side(disk).close() == ()


def test_a_target_finds_stuck_media_as_blockers(gate: Gate, disk: str) -> None:
    source = side(disk, "source")
    source.open()
    described = source.describe(publish=True)
    target = side(disk, "target")
    target.prepare()
    gate.before(driver_class(), "lease_store")
    (found,) = target.check(described)
    assert "has not answered" in found.target
    gate.opened.set()
    source.close()


def test_a_medium_that_cannot_be_put_in_leaves_the_old_one(gate: Gate, disk: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.img")
    PluginRegistry().storage("file").create(other, 2 * MIB)
    storage = side(disk, type="floppy")
    storage.open()
    gate.before(driver_class(), "open")
    with pytest.raises(StorageTimeout):
        storage.change_medium(0, other, lambda drive, exchange: exchange())
    assert storage.drives[0].medium == disk
    storage.drives[0].writev(0, [memoryview(b"y" * 512)])
    gate.opened.set()
    storage.close()
    assert Path(disk).read_bytes()[:1] == b"y"


needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon"),
    reason="qemu-storage-daemon is not installed (Debian: apt install qemu-utils)",
)


@needs_qemu
def test_an_nbd_server_that_is_stopped(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: the connection stands, and nothing comes. A machine ends; what its guest waits for fails."""
    monkeypatch.setattr(storage_slot, "CALL_SECONDS", 10.0)  # claiming takes its time where nothing has locks
    for name, size in (("web", MIB), ("lease", 1 << 16)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    socket = tmp_path / "nbd.sock"
    command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"]
    for node, export in (("web", "web"), ("lease", "web.vmf-lease")):
        command += ["--blockdev", f"driver=file,node-name={node},filename={tmp_path / node}"]
        command += ["--export", f"type=nbd,id={node},node-name={node},name={export},writable=on"]
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            storage = side(f"nbd+unix:///web?socket={socket}")
            while True:
                try:
                    storage.open()
                    break
                except VmfError:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            os.kill(server.pid, signal.SIGSTOP)
            failed = threading.Event()

            def guest() -> None:
                try:
                    storage.drives[0].readv(0, [memoryview(bytearray(512))])
                except VmfError:
                    failed.set()

            threading.Thread(target=guest, daemon=True).start()
            with pytest.raises(StorageTimeout):
                storage.flush()
            began = time.monotonic()
            (problem,) = storage.close()
            assert time.monotonic() - began < BOUND
            assert "may not be on it" in problem
            assert failed.wait(BOUND), "a request of the guest still waits, and holds its RAM"
        finally:
            os.kill(server.pid, signal.SIGCONT)
            server.kill()
