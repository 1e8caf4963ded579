"""What is no file where a file of a home is expected: nothing waits for it, nothing is decided by it in silence."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vmf import reading
from vmf.errors import NotFoundError, StateError, VmfError
from vmf.machine import identity, shelf
from vmf.machine import lock as locks
from vmf.machine.config import MachineConfig
from vmf.machine.doubt import refuse_in_doubt
from vmf.machine.home import Home
from vmf.machine.snapshot_restore import read_checked
from vmf.machine.snapshot_store import FileInfo, SnapshotStore
from vmf.storage import sparse

T = TypeVar("T")
FILES = [
    "identity.json",
    "last.json",
    "lock",
    "logs",
    "machine.toml",
    "restoring.json",
    "snapshots",
    "teleports",
    "resume.json",
    "snapshots/s/snapshot.json",
    "teleports/t.json",
]
KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path, tmp_path / "run")
    home.create(MachineConfig(name="vm", memory_mib=16))
    return home


def ends(call: Callable[[], T]) -> T | VmfError:
    """What a call returns or how it refuses; that it does within a minute is the point."""
    found: list[T | VmfError] = []

    def run() -> None:
        try:
            found.append(call())
        except VmfError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits, or failed with something that is no VmfError"
    return found[0]


def put(home: Home, name: str, kind: str) -> Path:
    path = home.paths("vm").directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_nothing_waits_for_it(home: Home, name: str, kind: str) -> None:
    put(home, name, kind)
    store = SnapshotStore("vm", home.paths("vm").snapshots)
    ends(lambda: home.resting_state("vm"))
    ends(lambda: identity.strangers(home.paths("vm").directory))
    ends(store.list)
    ends(store.resuming)
    ends(store.restoring)
    ends(lambda: refuse_in_doubt(home, "vm"))
    ends(lambda: home.load("vm"))
    ends(lambda: home.unregister("vm"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_no_file_is_named(home: Home, kind: str) -> None:
    path = put(home, "lock", kind)
    assert home.resting_state("vm") == "poweredoff"
    refused = ends(lambda: home.update("vm", lambda config: config))
    assert isinstance(refused, VmfError)
    assert str(path) in refused.message
    assert "Delete it" in refused.remedy
    path.rmdir() if kind == "directory" else path.unlink()
    assert isinstance(ends(lambda: home.update("vm", lambda config: config)), MachineConfig)


@pytest.mark.parametrize("name", ["teleports", "teleports/t.json"])
@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_a_note_of_a_teleport_that_cannot_be_read_may_be_a_doubt(home: Home, name: str, kind: str) -> None:
    path = put(home, name, kind)
    for refuse in (refuse_in_doubt, shelf.refuse_loss):
        with pytest.raises(VmfError, match="which may run there") as caught:
            refuse(home, "vm")
        assert str(path) in caught.value.message


@pytest.mark.parametrize("kind", ["pipe", "loop", "file"])
def test_what_lies_where_the_sockets_belong_says_nothing_of_a_run(home: Home, kind: str) -> None:
    if kind == "file":
        home.runtime.write_text("")
    else:
        KINDS[kind](home.runtime)
    assert ends(lambda: home.resting_state("vm")) == "poweredoff"
    assert isinstance(ends(lambda: home.update("vm", lambda config: config)), MachineConfig)


def test_a_log_is_no_pipe_but_may_be_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe"):
        reading.open_to_append(tmp_path / "pipe")
    read = reading.os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="it is a pipe"):
        reading.open_to_append(tmp_path / "pipe")
    os.close(read)
    os.close(reading.open_to_append("/dev/null"))
    os.close(reading.open_to_append(tmp_path / "log"))


def test_a_snapshot_s_state_is_compared_before_a_start_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "state.cbor"
    path.write_bytes(bytes(range(256)))
    with path.open("rb") as file:
        noted = FileInfo(256, sparse.digest(file.fileno(), 256))
    assert read_checked(path, noted) == bytes(range(256))
    path.write_bytes(bytes(range(255)) + b"x")
    with pytest.raises(StateError, match="not what was written"):
        read_checked(path, noted)
    assert read_checked(path, None)[255:] == b"x", "an earlier vmf noted no digest"


def test_unregistered_while_it_is_loaded(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(definition: Path) -> str:
        definition.unlink()
        return ""

    monkeypatch.setattr(identity, "uuid_in", gone)
    with pytest.raises(NotFoundError):
        home.load("vm")


@pytest.mark.parametrize("moment", ["opening", "locking"])
def test_unregistered_before_it_is_locked(home: Home, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = home.paths("vm").directory
    lock_folder, init = locks.MachineLock._lock_folder, locks.MachineLock.__init__

    def move_away() -> None:
        if directory.exists():
            directory.rename(directory.with_name("moved"))

    def before_opening(self: locks.MachineLock, *places: Path) -> None:
        move_away()
        init(self, *places)

    def before_locking(self: locks.MachineLock) -> bool:
        move_away()
        return lock_folder(self)

    monkeypatch.setattr(
        locks.MachineLock, *{"opening": ("__init__", before_opening)}.get(moment, ("_lock_folder", before_locking))
    )
    with pytest.raises(NotFoundError), home.changing("vm", "modify"):
        pass
    assert not directory.exists()


NONSENSE = ["", "[]", "5", "null", '""', "{", "[" * 100_000, "{}", '{"uuid": 5}', "\0"]
VALUES = [None, [1], {"x": [1]}, -1, "x", float("inf"), {"0": "x"}, {"0": -5}, {"../../0": 1}, {"f": {"size": "x"}}]


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("name", FILES)
def test_nonsense_is_an_error_or_nothing(home: Home, name: str, text: str) -> None:
    path = home.paths("vm").directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    store = SnapshotStore("vm", home.paths("vm").snapshots)
    ends(lambda: home.resting_state("vm"))
    ends(lambda: identity.strangers(home.paths("vm").directory))
    ends(store.list)
    ends(lambda: store.get("s"))
    ends(store.resuming)
    ends(lambda: refuse_in_doubt(home, "vm"))
    if name == "restoring.json" and text not in ("{}", '{"uuid": 5}'):
        with pytest.raises(VmfError, match="a snapshot was cut short"):
            store.refuse_half_restored("started")


def test_a_snapshot_s_description_is_whole_or_damaged(home: Home) -> None:
    store = SnapshotStore("vm", home.paths("vm").snapshots)
    files = {"ram.img": {"size": 16, "digest": "x"}}
    plain: dict[str, Any] = {"format": 1, "uuid": home.load("vm").uuid, "name": "s", "description": "", "taken": 1}
    plain |= {"state": "paused", "memory_mib": 16, "disks": {"0": 512}, "files": files}
    path = store.path("s") / "snapshot.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(plain | {"name": "of earlier, before it was renamed"}))
    assert store.get("s").name == "s"
    for key in plain:
        for value in VALUES:
            path.write_text(json.dumps(plain | {key: value}))
            found = ends(lambda: store.get("s"))
            assert isinstance(found, VmfError) or key in ("name", "description") or value == {"0": -5}


@pytest.mark.parametrize("kind", [*KINDS, "dangling"])
def test_a_machine_whose_definition_is_out_of_reach_is_still_there(home: Home, kind: str) -> None:
    path = home.paths("vm").definition
    if kind == "dangling":
        path.unlink()
        path.symlink_to("/nonexistent/vm.toml")
    else:
        put(home, "machine.toml", kind)
    assert home.names() == ["vm"]
    with pytest.raises(VmfError, match=r"cannot be read|is not there"):
        home.load("vm")
    with pytest.raises(VmfError, match="There is a machine 'vm' already"):
        home.create(MachineConfig(name="vm", memory_mib=16))
    kept = home.unregister("vm")
    assert kept is not None
    assert os.path.lexists(kept / "machine.toml")


@pytest.mark.parametrize("state", [[1], "running", "", None, "paused"])
def test_a_note_of_the_last_run_gives_no_state_in_which_a_run_does_not_end(home: Home, state: Any) -> None:
    home.record_end("vm", "failed")
    assert home.resting_state("vm") == "failed"
    home.record_end("vm", state)
    assert home.resting_state("vm") == "poweredoff"
