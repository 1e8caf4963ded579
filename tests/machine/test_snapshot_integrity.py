"""Snapshots and their disks: all of it or nothing, whatever fails at whichever moment. Real files, no guest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmf.errors import InvalidStateError, OperationCancelled, StateError, StorageError, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.operations import Operation
from vmf.machine.snapshot import SnapshotStore, restore, take_stopped
from vmf.machine.snapshot_restore import read_ram
from vmf.memory.guest import GuestMemory
from vmf.plugins.bridge import PluginRegistry
from vmf.storage import sparse
from vmf.storage.drive import Drive
from vmf.storage.media import lease_of

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry()


class Case:
    """A machine with one disk and one snapshot, "s", of an older content of it."""

    def __init__(self, directory: Path, registry: PluginRegistry) -> None:
        self.registry = registry
        self.disk = directory / "disk.img"
        self.old = bytearray(SIZE)
        self.old[MIB : 5 * MIB] = os.urandom(4 * MIB)
        self.old[10 * MIB : 10 * MIB + 5] = b"alone"
        with self.disk.open("wb") as file:
            for at, length in ((MIB, 4 * MIB), (10 * MIB, 4096)):
                file.seek(at)
                file.write(self.old[at : at + length])
            file.truncate(SIZE)
        drives = (DriveConfig(port=0, medium=str(self.disk)),)
        self.config = MachineConfig(name="vm", memory_mib=16, drives=drives)
        self.own = directory / "own"
        self.own.mkdir(mode=0o700)
        self.store = SnapshotStore("vm", self.own / "snapshots")
        self.take("s")
        self.copy = self.store.path("s") / "disk-0.img"
        self.new = os.urandom(SIZE)
        self.disk.write_bytes(self.new)

    def take(self, name: str) -> None:
        take_stopped(self.config, self.registry, self.store, name)

    def restore(self, operation: Operation | None = None) -> None:
        restore(self.config, self.registry, self.store, "s", None, operation)

    def start(self) -> None:
        machine = Machine(self.config, self.registry)
        machine.snapshots = self.store
        machine.start()


@pytest.fixture
def case(tmp_path: Path, registry: PluginRegistry) -> Case:
    return Case(tmp_path, registry)


def test_back_to_the_byte(case: Case) -> None:
    case.restore()
    assert case.disk.read_bytes() == case.old
    assert case.store.restoring() == ""
    assert os.stat(case.disk).st_blocks * 512 < 5 * MIB, "the holes were filled"


def shorten(copy: Path) -> None:
    os.truncate(copy, SIZE - 512)


def lengthen(copy: Path) -> None:
    os.truncate(copy, SIZE + 512)


def flip(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(3 * MIB)
        byte = file.read(1)
        file.seek(3 * MIB)
        file.write(bytes([byte[0] ^ 1]))


def zero(copy: Path) -> None:
    """What a file system that lost a block shows."""
    with copy.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(bytes(4096))


@pytest.mark.parametrize("harm", [shorten, lengthen, flip, zero, Path.unlink])
def test_a_damaged_snapshot_destroys_nothing(case: Case, harm: Callable[[Path], None]) -> None:
    harm(case.copy)
    with pytest.raises(StateError, match=r"disk-0\.img"):
        case.restore()
    assert case.disk.read_bytes() == case.new
    assert case.store.restoring() == ""


def test_other_holes_are_no_damage(case: Case) -> None:
    """As after a copy of the snapshot by a program that knows no holes."""
    content = case.copy.read_bytes()
    case.copy.unlink()
    case.copy.write_bytes(content)
    case.restore()
    assert case.disk.read_bytes() == case.old


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_an_error_while_holes_are_looked_for_is_no_hole(
    case: Case, monkeypatch: pytest.MonkeyPatch, number: int, whence: int
) -> None:
    seek = os.lseek

    def failing(descriptor: int, offset: int, how: int) -> int:
        if how == whence and os.readlink(f"/proc/self/fd/{descriptor}") == str(case.copy):
            raise OSError(number, os.strerror(number))
        return seek(descriptor, offset, how)

    monkeypatch.setattr(os, "lseek", failing)
    with pytest.raises(StateError, match=r"disk-0\.img cannot be used"):
        case.restore()
    monkeypatch.undo()
    assert case.disk.read_bytes() == case.new


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_holes_cannot_be_found_everything_is_read(
    case: Case, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Block devices, and file systems without holes."""
    seek = os.lseek

    def failing(descriptor: int, offset: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(number, os.strerror(number))
        return seek(descriptor, offset, how)

    monkeypatch.setattr(os, "lseek", failing)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "")))
    case.restore()
    case.take("again")
    monkeypatch.undo()
    copy = case.store.path("again") / "disk-0.img"
    assert copy.read_bytes() == case.disk.read_bytes() == case.old
    assert os.stat(copy).st_blocks * 512 < SIZE - 3 * MIB, "zeroes were written"


def test_short_reads_and_writes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write, copied = os.preadv, os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "preadv", lambda d, views, at, *f: read(d, [views[0][: 300 << 10]], at, *f))
    monkeypatch.setattr(os, "pwrite", lambda d, view, at: write(d, view[: 700 << 10], at))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *at: copied(a, b, min(n, 1 << 20), *at))
    case.restore()
    case.take("again")
    monkeypatch.undo()
    assert (case.store.path("again") / "disk-0.img").read_bytes() == case.disk.read_bytes() == case.old


def test_an_image_that_becomes_shorter_is_not_copied(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = os.copy_file_range

    def cut(source: int, target: int, count: int, *at: int) -> int:
        os.truncate(case.disk, 3 * MIB)
        return copied(source, target, count, *at)

    monkeypatch.setattr(os, "copy_file_range", cut)
    with pytest.raises(StorageError, match=r"disk\.img"):
        case.take("cut")
    assert case.store.names() == ["s"]
    assert [each.name for each in case.store.directory.iterdir()] == ["s"]


# -- cut short while the disk is written ---------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here: nothing is tidied up that an exception would reach."""


@pytest.mark.parametrize("error", [StorageError("x: the file system is full."), KeyboardInterrupt(), Crash()])
@pytest.mark.parametrize("nth", [0, 1, 3])
def test_cut_short(case: Case, monkeypatch: pytest.MonkeyPatch, error: BaseException, nth: int) -> None:
    left = [nth]

    def failing(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            if left[0] == 0:
                raise error
            left[0] -= 1
            original(*arguments)

        return call

    for name in ("writev", "write_zeroes"):
        monkeypatch.setattr(Drive, name, failing(getattr(Drive, name)))
    with pytest.raises((VmfError, Crash)) as caught:
        case.restore()
    if isinstance(caught.value, VmfError):
        assert "partly written" in str(caught.value)
        assert "restore s" in caught.value.remedy
    monkeypatch.undo()
    assert case.store.restoring() == "s"
    assert lease_of(case.registry, str(case.disk)).standing == "held", "another host would boot it"
    with pytest.raises(InvalidStateError, match="partly written"):
        case.start()
    with pytest.raises(InvalidStateError, match="partly written"):
        case.take("half")
    with pytest.raises(InvalidStateError, match="needed"):
        case.store.delete("s")
    machine = Machine(case.config, case.registry)
    machine.snapshots = case.store
    with pytest.raises(InvalidStateError, match="partly written"):
        machine.listen("127.0.0.1", 0)
    case.restore()
    assert case.disk.read_bytes() == case.old
    case.take("whole")
    assert lease_of(case.registry, str(case.disk)).standing == "free"


def test_cancelled_while_it_is_checked_nothing_happens(case: Case) -> None:
    operation = Operation("vm", "putting back snapshot 's'")
    operation.cancel("the terminal was closed")
    with pytest.raises(OperationCancelled, match="the terminal was closed"):
        case.restore(operation)
    assert case.disk.read_bytes() == case.new
    assert case.store.restoring() == ""


def test_a_snapshot_that_is_cancelled_leaves_nothing(case: Case) -> None:
    operation = Operation("vm", "the snapshot 'late'")

    def progress(what: str, done: int, total: int) -> None:
        if done > 2 * MIB:
            operation.cancel()

    with pytest.raises(OperationCancelled):
        take_stopped(case.config, case.registry, case.store, "late", "", progress, operation)
    assert [each.name for each in case.store.directory.iterdir()] == ["s"]
    case.take("late")


def test_a_snapshot_of_an_older_vmf(case: Case) -> None:
    """Without digests: sizes are compared."""
    path = case.store.path("s") / "snapshot.json"
    plain = json.loads(path.read_text())
    del plain["files"]
    path.write_text(json.dumps(plain))
    shorten(case.copy)
    with pytest.raises(StateError, match="bytes instead of"):
        case.restore()
    os.truncate(case.copy, SIZE)
    case.restore()
    assert case.disk.read_bytes() == case.old


def test_a_snapshot_that_cannot_be_read_can_be_listed_and_deleted(case: Case) -> None:
    case.take("two")
    (case.store.path("s") / "snapshot.json").write_text("{")
    assert {each.name: each.state for each in case.store.list()} == {"s": "damaged", "two": "poweredoff"}
    case.store.delete("s")
    assert case.store.names() == ["two"]


# -- RAM -----------------------------------------------------------------------------------------------------


def silent(what: str, done: int, total: int) -> None:
    pass


def test_ram_comes_back_and_errors_are_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ram.img"
    content = bytearray(16 * MIB)
    content[5 * MIB : 6 * MIB] = os.urandom(MIB)
    content[15 * MIB + 4096 : 15 * MIB + 8192] = os.urandom(4096)
    path.write_bytes(content)
    with path.open("rb") as file:
        digest = sparse.digest(file.fileno(), 16 * MIB)
    memory = GuestMemory(16 * MIB)
    try:
        read_ram(memory, path, digest, silent)
        assert memory.buffer == content
        used = sum(end - first for first, end in memory.touched_ranges().tolist())
        assert used <= 16 * MIB // 4096 // 2, "zeroes take memory"
        with pytest.raises(StateError, match="not what was written"):
            read_ram(memory, path, sparse.ALGORITHM + ":00", silent)
        monkeypatch.setattr(os, "lseek", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(StateError, match="Input/output error"):
            read_ram(memory, path, digest, silent)
    finally:
        monkeypatch.undo()
        memory.close()
