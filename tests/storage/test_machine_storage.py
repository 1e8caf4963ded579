"""A machine's disks between two hosts: claimed, recognised, passed on, fenced. Real files, no guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from vmf.errors import ConfigError, ImageInUse, LeaseLost, StorageError, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.holder import read_record

MIB = 1 << 20
TELEPORT = "ab" * 16


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry()


class Side:
    """A machine's storage, without the machine."""

    def __init__(self, registry: PluginRegistry, name: str, *drives: DriveConfig) -> None:
        self.lost: list[LeaseLost] = []
        config = MachineConfig(name=name, memory_mib=16, drives=drives)
        self.storage = MachineStorage(config, registry, self.lost.append)

    def write(self, text: bytes, port: int = 0) -> None:
        drive = next(each for each in self.storage.drives if each.port == port)
        drive.writev(0, [memoryview(text.ljust(512, b"\0"))])

    def read(self, port: int = 0) -> bytes:
        drive = next(each for each in self.storage.drives if each.port == port)
        data = bytearray(512)
        drive.readv(0, [memoryview(data)])
        return bytes(data).rstrip(b"\0")


@pytest.fixture
def disk(tmp_path: Path, registry: PluginRegistry) -> str:
    path = str(tmp_path / "disk.img")
    registry.storage("file").create(path, 4 * MIB)
    return path


@pytest.fixture
def side(registry: PluginRegistry) -> Iterator[object]:
    sides: list[Side] = []

    def make(name: str, *drives: DriveConfig) -> Side:
        sides.append(Side(registry, name, *drives))
        return sides[-1]

    yield make
    for each in sides:
        each.storage.close()


def hdd(path: str, port: int = 0, **settings: bool) -> DriveConfig:
    return DriveConfig(port=port, medium=path, **settings)


def record(registry: PluginRegistry, path: str):
    store = registry.storage("file").lease_store(path, create=False)
    assert store is not None
    try:
        return read_record(store)
    finally:
        store.close()


def test_one_machine_at_a_time(side, disk) -> None:
    first, second = side("first", hdd(disk)), side("second", hdd(disk))
    first.storage.open()
    first.write(b"mine")
    with pytest.raises(ImageInUse, match=r"machine first on host .*process"):
        second.storage.open()
    first.storage.close()
    second.storage.open()
    assert second.read() == b"mine"
    assert first.lost == second.lost == []


def test_a_reader_of_a_written_image_is_refused(side, disk) -> None:
    first, second = side("first", hdd(disk)), side("second", hdd(disk, read_only=True))
    first.storage.open()
    with pytest.raises(ImageInUse):
        second.storage.open()


def test_readers_share(side, disk) -> None:
    first, second = (side(name, hdd(disk, read_only=True)) for name in ("first", "second"))
    first.storage.open()
    second.storage.open()
    assert first.read() == second.read() == b""
    with pytest.raises(StorageError, match="read-only"):
        first.write(b"no")
    assert not Path(disk + ".vmf-lease").exists()


def test_the_machine_moves(side, disk, registry) -> None:
    source, target = side("source", hdd(disk)), side("target", hdd(disk))
    source.storage.open()
    source.write(b"one")
    target.storage.prepare()
    assert target.storage.drives[0].size == 4 * MIB
    assert target.storage.check(source.storage.describe(publish=True)) == []
    with pytest.raises(StorageError):
        target.read()  # not its own yet
    source.storage.pass_leases(TELEPORT)
    with pytest.raises(StorageError):
        source.write(b"late")
    target.storage.take_leases(TELEPORT)
    assert target.read() == b"one"
    target.write(b"two")
    with pytest.raises(LeaseLost, match="machine target"):
        source.storage.take_leases(TELEPORT)
    with pytest.raises(StorageError):
        source.write(b"later")
    assert target.read() == b"two"
    assert record(registry, disk).generation == 2
    assert target.lost == source.lost == []


def test_the_source_takes_back_and_the_target_finds_out(side, disk) -> None:
    source, target = side("source", hdd(disk)), side("target", hdd(disk))
    source.storage.open()
    source.storage.pass_leases(TELEPORT)
    source.storage.take_leases(TELEPORT)
    source.write(b"mine again")
    with pytest.raises(LeaseLost):
        target.storage.take_leases(TELEPORT)
    source.storage.pass_leases("cd" * 16)
    with pytest.raises(LeaseLost, match="too late"):
        target.storage.take_leases(TELEPORT)  # of the teleport before
    assert source.lost == []


def test_several_disks_are_won_or_lost_together(side, disk, tmp_path, registry) -> None:
    other = str(tmp_path / "other.img")
    registry.storage("file").create(other, MIB)
    drives = [hdd(other, 5), hdd(disk, 2)]
    source, target = side("source", *drives), side("target", *drives)
    source.storage.open()
    assert [drive.port for drive in source.storage.drives] == [2, 5]
    source.storage.pass_leases(TELEPORT)
    # The target cannot open the second: it gives the first one back, and the source goes on.
    blocker = registry.storage("file").open(other, False)
    with pytest.raises(VmfError):
        target.storage.take_leases(TELEPORT)
    with pytest.raises(StorageError):
        target.write(b"half", 2)
    blocker.close()
    source.storage.take_leases(TELEPORT)
    source.write(b"a", 2)
    source.write(b"b", 5)
    source.storage.pass_leases(TELEPORT)
    target.storage.take_leases(TELEPORT)
    assert (target.read(2), target.read(5)) == (b"a", b"b")


def test_an_old_owner_writes_nothing(side, disk, registry) -> None:
    """A person broke the lease; whoever still believes to hold it finds out before its next write."""
    old = side("old", hdd(disk))
    old.storage.open()
    old.write(b"before")
    store = registry.storage("file").lease_store(disk, create=False)
    from vmf.storage import lease as rules

    broken = rules.broken(read_record(store))
    store.write(broken.sequence % 2 * rules.BLOCK, rules.encode(broken))
    store.close()
    for _ in range(2):
        with pytest.raises(LeaseLost, match="nobody holds it"):
            old.write(b"after")
    with pytest.raises(LeaseLost):
        old.storage.drives[0].discard(0, 4096)
    with pytest.raises(LeaseLost):
        old.storage.drives[0].flush()
    assert len(old.lost) == 1
    assert Path(disk).read_bytes()[:6] == b"before"


def test_a_deleted_lease_stops_its_owner(side, disk) -> None:
    owner = side("owner", hdd(disk))
    owner.storage.open()
    os.unlink(disk + ".vmf-lease")
    with pytest.raises(LeaseLost, match="lock on the lease was lost"):
        owner.write(b"x")
    # The image's own lock still excludes others, as long as the owner lives.
    with pytest.raises(ImageInUse):
        side("thief", hdd(disk)).storage.open()


def test_after_a_crash_the_machine_starts_again(side, disk) -> None:
    script = textwrap.dedent(f"""
        import time
        from vmf.machine.config import DriveConfig, MachineConfig
        from vmf.machine.storage import MachineStorage
        from vmf.plugins.bridge import PluginRegistry
        config = MachineConfig(name="crashed", memory_mib=16, drives=(DriveConfig(port=0, medium={disk!r}),))
        storage = MachineStorage(config, PluginRegistry(), print)
        storage.open()
        print("open", flush=True)
        time.sleep(60)
    """)
    heir = side("heir", hdd(disk))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ImageInUse, match="machine crashed"):
            heir.storage.open()
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    heir.storage.open()
    heir.write(b"x")


# -- the check -----------------------------------------------------------------------------------------------


def blockers(source: Side, target: Side) -> list[str]:
    source.storage.open()
    target.storage.prepare()
    return [f"{each.field}|{each.source}|{each.target}|{each.remedy}" for each in target.storage.check(
        source.storage.describe(publish=True)
    )]  # fmt: skip


def test_same_path_other_image(side, disk, tmp_path) -> None:
    """As after `rsync -a`: the same content, even the lease's file, under another path or on another host."""
    source = side("source", hdd(disk))
    source.storage.open()
    copy = str(tmp_path / "copy.img")
    for name in ("", ".vmf-lease"):
        Path(copy + name).write_bytes(Path(disk + name).read_bytes())
    target = side("target", hdd(copy))
    target.storage.prepare()
    (found,) = target.storage.check(source.storage.describe(publish=True))
    assert found.field == "image of the drive at port 0"
    assert disk in found.source
    assert copy in found.target
    assert "same image on shared storage" in found.remedy


def test_a_copied_dvd_is_not_the_same(side, disk, tmp_path) -> None:
    copy = tmp_path / "copy.iso"
    copy.write_bytes(Path(disk).read_bytes())
    source, other, same = (
        side(name, DriveConfig(port=3, type="dvddrive", medium=path))
        for name, path in (("source", disk), ("other", str(copy)), ("same", disk))
    )
    assert blockers(source, other)[0].startswith("image of the drive at port 3|")
    source.storage.close()
    assert blockers(source, same) == []


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ("size", "size of the drive at port 0|4 MiB|8 MiB", "--port 0 --type hdd"),
        ("missing", "medium of the drive at port 0", "createmedium"),
        ("type", "type of the drive at port 0|hdd|floppy", "--type hdd"),
        ("read-only setting", "drive at port 0|writable|read-only", "vmf storageattach target"),
        ("no drive", "drive at port 0|hdd of 4 MiB|missing", "vmf storageattach target --port 0 --type hdd"),
        ("another drive", "drive at port 1|missing|empty dvddrive", "--medium none"),
        ("unused copy", "image of the drive at port 0", "not a copy"),
    ],
)
def test_differences_are_named_with_their_remedy(side, disk, tmp_path, registry, change, field, remedy) -> None:
    other = str(tmp_path / "other.img")
    drives = {
        "size": [hdd(other)],
        "missing": [hdd(str(tmp_path / "nothing"))],
        "type": [DriveConfig(port=0, type="floppy", medium=disk)],
        "read-only setting": [hdd(disk, read_only=True)],
        "no drive": [],
        "another drive": [hdd(disk), DriveConfig(port=1, type="dvddrive")],
        "unused copy": [hdd(other)],
    }[change]
    registry.storage("file").create(other, (8 if change == "size" else 4) * MIB)
    found = blockers(side("source", hdd(disk)), side("target", *drives))
    assert len(found) == 1
    assert found[0].startswith(field)
    assert remedy in found[0]


def test_read_only_at_the_target(side, disk, registry, monkeypatch) -> None:
    """By permission or mount; made up here, as root may write everything."""
    source, target = side("source", hdd(disk)), side("target", hdd(disk))
    source.storage.open()
    driver = registry.storage("file")
    info = attrs.evolve(driver.probe(disk), writable=False, why_read_only="its file system is mounted read-only")
    monkeypatch.setattr(driver, "probe", lambda uri: info)
    target.storage.prepare()
    (found,) = target.storage.check(source.storage.describe(publish=True))
    assert found.field == "medium of the drive at port 0"
    assert "mounted read-only" in found.target
    assert "--read-only" in found.remedy


def test_rubbish_from_the_other_side_is_a_blocker(side, disk) -> None:
    target = side("target", hdd(disk))
    target.storage.prepare()
    for rubbish in ([{}], [None], [{"port": "0"}], [[]], [{"port": 0, "type": "hdd", "medium": 5}]):
        assert target.storage.check(rubbish)[0].target == "-"
    many = [
        {"port": n, "type": "hdd", "medium": "x", "read_only": False, "size": 1, "image": "", "probe": ""}
        for n in range(100)
    ]
    assert target.storage.check(many)


def test_a_drive_without_a_device(side, disk) -> None:
    owner = side("owner", hdd(disk))
    with pytest.raises(ConfigError, match="none of its devices serves the drive at port 0"):
        owner.storage.require_claimed()
    owner.storage.drives[0].claim("test")
    owner.storage.require_claimed()


def test_a_device_without_a_lease_does_not_teleport(side, disk, registry, monkeypatch) -> None:
    monkeypatch.setattr(registry.storage("file"), "lease_store", lambda uri, create: None)
    owner = side("owner", hdd(disk))
    owner.storage.open()
    owner.write(b"works")
    (found,) = owner.storage.local_blockers()
    assert found.field == "lease of the drive at port 0"
    assert not owner.storage.leased
