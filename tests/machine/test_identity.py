"""What lies in a machine's directory serves that machine only; a machine's directory that was copied starts nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest

from vmf import host
from vmf.errors import ConfigError, InvalidStateError, NotFoundError
from vmf.machine import identity
from vmf.machine.config import MachineConfig
from vmf.machine.files import HomeError, explained
from vmf.machine.home import Home
from vmf.machine.journal import FileJournal, in_doubt
from vmf.machine.snapshot_store import SnapshotStore
from vmf.teleport.journal import Entry
from vmf.teleport.protocol.handover import Answer, Note
from vmf.teleport.protocol.states import Role
from vmf.transport.base import Address

ID = bytes(range(16))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "data", tmp_path / "run")
    made.create(config())
    return made


def config(name: str = "web", **more: Any) -> MachineConfig:
    return MachineConfig(name=name, memory_mib=4, **more)


def store(home: Home, name: str = "web") -> SnapshotStore:
    return SnapshotStore(name, home.paths(name).snapshots)


def snapshot(home: Home, label: str, name: str = "web") -> None:
    """As `snapshot_take` leaves it, without the state itself."""
    plain = {"format": 1, "uuid": home.load(name).uuid, "name": label, "description": "", "taken": 5}
    with store(home, name).new(label) as directory:
        (directory / "snapshot.json").write_text(json.dumps(plain | {"state": "running", "memory_mib": 4, "disks": {}}))


def doubt(home: Home, name: str = "web", role: Role = Role.SOURCE) -> None:
    journal = FileJournal(home, name)
    journal.begin(Entry(ID, role, Note.OFFERED, Address("tcp", "there", 6000)))
    journal.mark(ID, Note.HANDED_OVER if role is Role.SOURCE else Note.TAKEN)


def everything(home: Home) -> None:
    """All that a machine leaves."""
    snapshot(home, "s1")
    store(home).note_resume("s1", {})
    doubt(home)
    home.record_end("web", "teleported", "to there")


def make_unstamped(directory: Path) -> None:
    """As an earlier vmf wrote it."""
    (directory / identity.FILE).unlink()
    for path, _ in identity._stamped(directory):
        fields = json.loads(path.read_text())
        fields.pop("uuid")
        text = json.dumps(fields)
        path.write_text(text)


def assert_fresh(home: Home) -> None:
    """Nothing of an earlier machine has any part."""
    assert home.resting_state("web") == "poweredoff"
    assert home.last_run("web") == {}
    assert in_doubt(home, "web") is None
    assert store(home).names() == []
    assert store(home).resuming() == ""


def assert_all_there(home: Home) -> None:
    assert home.resting_state("web") == "uncertain"
    assert home.last_run("web")["detail"] == "to there"
    assert store(home).names() == ["s1"]
    assert store(home).resuming() == "s1"


# -- unregistering and coming back


def test_a_new_machine_of_a_name_has_nothing_of_the_earlier_one(home: Home) -> None:
    everything(home)
    first = home.load("web").uuid
    kept = home.unregister("web")
    assert kept is not None
    assert home.create(config(description="second")) is None
    assert_fresh(home)
    again = home.unregister("web")
    assert again is not None
    assert again != kept
    assert sorted(path.name for path in (home.data / "unregistered").iterdir()) == sorted([kept.name, again.name])
    back = home.register(kept)
    assert back.uuid == first
    assert_all_there(home)
    assert not kept.exists()
    with pytest.raises(ConfigError, match="already"):
        home.register(again)
    assert home.register(again, "web2").description == "second"
    assert home.names() == ["web", "web2"]


@pytest.mark.parametrize("name", ["machine.toml", "machine.toml.unregistered"])
def test_a_full_disk_leaves_what_was_unregistered_where_it_is(
    home: Home, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = home.unregister("web")
    assert kept is not None
    os.rename(kept / "machine.toml", kept / name)
    with monkeypatch.context() as patch:
        patch.setattr("vmf.machine.home.write_atomically", _full)
        with pytest.raises(HomeError, match="the disk is full"):
            home.register(kept)
    assert home.names() == []
    assert (kept / name).exists()
    assert home.register(kept).name == "web"


def _full(path: Path, text: str) -> None:
    raise explained(OSError(errno.ENOSPC, "full"), path)


def test_unregistering_twice_within_a_second_overwrites_nothing(home: Home) -> None:
    same = home.load("web")
    first = home.unregister("web")
    home.create(same)
    second = home.unregister("web")
    assert first is not None
    assert second is not None
    assert first != second
    assert (first / "machine.toml").exists()
    assert (second / "machine.toml").exists()


def test_deleting_what_is_in_doubt_is_refused(home: Home) -> None:
    everything(home)
    with pytest.raises(InvalidStateError, match=r"handed over to tcp:there:6000.*--status"):
        home.unregister("web", delete=True)
    FileJournal(home, "web").mark(ID, Note.GONE)
    with pytest.raises(InvalidStateError, match=r"snapshot 's1'.*discard-state"):
        home.unregister("web", delete=True)
    assert store(home).names() == ["s1"]
    store(home).forget_resume()
    store(home).note_restoring("s1")
    with pytest.raises(InvalidStateError, match=r"snapshot 's1' was cut short.*restore s1"):
        home.unregister("web", delete=True)
    store(home).forget_restoring()
    assert home.unregister("web", delete=True) is None
    assert not home.paths("web").directory.exists()
    assert list((home.data / "unregistered").iterdir()) == []


def test_what_ran_here_is_still_said_after_it_was_unregistered(home: Home) -> None:
    home.create(config("other"))
    doubt(home, role=Role.TARGET)
    home.unregister("web")
    said = FileJournal(home, "other").testify(ID)
    assert said.answer is Answer.ENDED
    assert "unregistered" in said.detail


def test_remains_without_a_definition_are_set_aside(home: Home) -> None:
    everything(home)
    home.paths("web").definition.unlink()
    aside = home.create(config())
    assert aside is not None
    assert (aside / "snapshots/s1/snapshot.json").exists()
    assert_fresh(home)
    with pytest.raises(NotFoundError, match=r"no machine\.toml"):
        home.register(aside)


def test_a_definition_that_vanished_under_a_running_machine(home: Home) -> None:
    same = home.load("web")
    with home.own("web"):
        home.paths("web").definition.unlink()
        with pytest.raises(InvalidStateError, match="process at work"):
            home.create(config())
        home.paths("web").directory.rename(home.data / "moved")
        with pytest.raises(NotFoundError, match="no machine's directory"):
            home.register(home.data / "moved")
    assert same.name == "web"


def test_a_definition_can_be_registered(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    shutil.copy(home.paths("web").definition, file)
    with pytest.raises(ConfigError, match="has the UUID"):
        home.register(file, "web2")
    home.unregister("web")
    assert home.register(file, "web2").name == "web2"
    assert file.exists()


def test_a_linked_directory_and_a_linked_definition(home: Home, tmp_path: Path) -> None:
    paths = home.paths("web")
    real = tmp_path / "big-disk"
    paths.directory.rename(real)
    paths.directory.symlink_to(os.path.relpath(real, paths.directory.parent))
    elsewhere = tmp_path / "dotfiles.toml"
    (real / "machine.toml").rename(elsewhere)
    (real / "machine.toml").symlink_to("../dotfiles.toml")
    home.update("web", lambda old: attrs.evolve(old, description="changed"))
    assert (real / "machine.toml").is_symlink()
    assert "changed" in elsewhere.read_text()
    with home.own("web"):
        assert home.process("web") is not None
    kept = home.unregister("web")
    assert kept is not None
    assert "changed" in (kept / "machine.toml").read_text()
    home.register(kept)
    assert home.load("web").description == "changed"
    home.unregister("web", delete=True)
    assert not real.exists()
    assert elsewhere.exists()


# -- files of another machine in the directory


def test_another_uuid_in_the_definition_owns_nothing_of_the_former(home: Home) -> None:
    everything(home)
    path = home.paths("web").definition
    path.write_text(path.read_text().replace(home.load("web").uuid, "00000000-0000-4000-8000-000000000000"))
    assert_fresh(home)
    left = {str(each.relative_to(path.parent)) for each in identity.strangers(path.parent)}
    assert left == {"resume.json", "last.json", f"teleports/{ID.hex()}.json", "snapshots/s1/snapshot.json"}
    with home.own("web"):
        pass
    with pytest.raises(NotFoundError, match="of another machine"):
        store(home).get("s1")
    kept = home.unregister("web", delete=True)
    assert kept is not None, "what is of another machine is not deleted with this one"
    assert (kept / "snapshots/s1/snapshot.json").exists()
    assert (kept / f"teleports/{ID.hex()}.json").exists()


def test_a_definition_that_cannot_be_read_hides_no_doubt(home: Home) -> None:
    doubt(home)
    home.paths("web").definition.write_text("broken = [")
    assert in_doubt(home, "web") is not None


def test_a_definition_without_a_uuid_gets_one_once(home: Home) -> None:
    path = home.paths("web").definition
    text = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("uuid"))
    path.write_text("# by hand\n" + text)
    first = home.load("web").uuid
    assert home.load("web").uuid == first
    assert "# by hand" in path.read_text()
    home.update("web", lambda old: attrs.evolve(old, description="x"))
    assert home.load("web").uuid == first


# -- what an earlier vmf left


def test_files_without_a_uuid_are_taken_over_once(home: Home) -> None:
    everything(home)
    directory = home.paths("web").directory
    make_unstamped(directory)
    assert_all_there(home)
    with home.changing("web", "modify"):
        pass
    assert_all_there(home)
    assert identity.strangers(directory) == []
    kept = identity.read(directory)
    assert kept is not None
    assert "resume.json" in kept.adopted
    (directory / "teleports/ff.json").write_text((directory / f"teleports/{ID.hex()}.json").read_text())
    assert [path.name for path in identity.strangers(directory)] == ["ff.json"]


def test_what_an_earlier_vmf_mixed_is_told_apart(home: Home) -> None:
    """It forgot a machine by renaming its definition, and left everything else to the next one of that name."""
    everything(home)
    directory = home.paths("web").directory
    make_unstamped(directory)
    before = home.paths("web").definition.read_bytes()
    os.rename(directory / "machine.toml", directory / identity.EARLIER)
    fresh = MachineConfig(name="web", memory_mib=4)
    home.write(fresh, identify=False)
    assert_fresh(home)
    with home.own("web"):
        pass
    assert_fresh(home)
    assert directory / identity.EARLIER in identity.strangers(directory)
    home.paths("web").definition.unlink()
    aside = home.create(config(description="third"))
    assert aside is not None
    home.unregister("web", delete=True)
    back = home.register(aside)
    assert before.decode().count(back.uuid) == 1


# -- copies


def copy(home: Home, name: str) -> Path:
    target = home.paths(name).directory
    shutil.copytree(home.paths("web").directory, target, symlinks=True)
    return target


def assert_refused(home: Home, name: str) -> None:
    with pytest.raises(InvalidStateError, match=f"is a copy.*modifyvm {name} --uuid new"):
        home.own(name).__enter__()


def test_a_copy_in_the_same_home(home: Home) -> None:
    everything(home)
    copy(home, "web2")
    with pytest.raises(ConfigError, match="modifyvm web2 --uuid new"):
        home.load("web2")
    path = home.paths("web2").definition
    path.write_text(path.read_text().replace('"web"', '"web2"'))
    assert_refused(home, "web2")
    with home.own("web"):
        pass
    with pytest.raises(InvalidStateError, match="is there still"):
        home.reidentify("web2", new=False)
    made = home.reidentify("web2", new=True)
    assert made.uuid != home.load("web").uuid
    assert store(home, "web2").names() == []
    assert home.resting_state("web2") == "poweredoff"
    with home.own("web2"), home.own("web"):
        pass
    assert_all_there(home)


def test_a_copied_home_on_the_same_host(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.data, tmp_path / "copy")
    other = Home(tmp_path / "copy", tmp_path / "run2")
    assert_refused(other, "web")
    with pytest.raises(InvalidStateError, match="is there still"):
        other.reidentify("web", new=False)
    with home.own("web"):
        pass
    home.unregister("web")
    with other.own("web"):  # the original has gone: this was a move
        pass
    moved = tmp_path / "moved"
    other.data.rename(moved)
    with Home(moved, tmp_path / "run3").own("web"):
        pass


def test_a_copy_that_came_from_another_host(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(home.data, tmp_path / "copy")
    shutil.rmtree(home.data)
    other = Home(tmp_path / "copy", tmp_path / "run2")
    monkeypatch.setattr(host, "host_name", lambda: "elsewhere")
    monkeypatch.setattr(host, "machine_id", lambda: "e" * 32)
    monkeypatch.setattr(host, "boot_id", lambda: "another")
    assert_refused(other, "web")
    other.reidentify("web", new=False)
    with other.own("web"):
        pass


def test_one_directory_seen_by_two_hosts_is_no_copy(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home on NFS, at another place on either."""
    (tmp_path / "mount").symlink_to(home.data)
    for name in ("alpha", "beta", "alpha"):
        with monkeypatch.context() as patched:
            patched.setattr(host, "host_name", lambda name=name: name)
            patched.setattr(host, "machine_id", lambda name=name: name.encode().hex().ljust(32, "0"))
            patched.setattr(host, "boot_id", lambda name=name: name)
            view = Home(tmp_path / "mount", tmp_path / f"run-{name}") if name == "beta" else home
            with view.own("web"):
                pass


def test_a_backup_put_back_in_place_is_the_machine(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.data, tmp_path / "backup")
    shutil.rmtree(home.data)
    shutil.copytree(tmp_path / "backup", home.data)
    with home.own("web"):
        pass


def test_twins_of_an_earlier_vmf_are_both_refused_until_one_is_named(home: Home) -> None:
    copy(home, "web2")
    path = home.paths("web2").definition
    path.write_text(path.read_text().replace('"web"', '"web2"'))
    for name in ("web", "web2"):
        (home.paths(name).directory / identity.FILE).unlink()
    assert_refused(home, "web")
    assert_refused(home, "web2")
    home.reidentify("web2", new=True)
    with home.own("web"), home.own("web2"):
        pass


def test_a_machine_that_is_no_copy_keeps_what_it_has(home: Home) -> None:
    snapshot(home, "s1")
    with pytest.raises(InvalidStateError, match="s1"):
        home.reidentify("web", new=True)
    home.reidentify("web", new=False)
    assert store(home).names() == ["s1"]
