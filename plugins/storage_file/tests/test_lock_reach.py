"""File systems whose locks reach one host only, and files that a group must be able to write."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from vmf_storage_file import mounts
from vmf_storage_file.driver import FileDriver
from vmf_storage_file.leasefile import LeaseFile

TABLE = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
40 22 0:45 / /mnt/a rw,relatime shared:20 - nfs4 h:/x rw,vers=4.2,hard,proto=tcp,sec=sys,local_lock=none,addr=192.0.2.1
41 22 0:46 / /mnt/b rw,relatime shared:21 - nfs h:/x rw,vers=3,hard,nolock,proto=tcp,local_lock=none,addr=192.0.2.1
42 22 0:47 / /mnt/c rw,relatime - nfs h:/x rw,vers=3,hard,proto=tcp,local_lock=all,addr=192.0.2.1
43 22 0:48 / /mnt/d rw,relatime - nfs h:/x rw,vers=3,hard,proto=tcp,local_lock=posix,addr=192.0.2.1
44 22 0:49 / /mnt/e rw,relatime - nfs h:/x rw,vers=3,hard,proto=tcp,local_lock=flock,addr=192.0.2.1
45 22 0:50 / /mnt/f rw,relatime - cifs //h/x rw,vers=3.0,cache=none,username=vmf,nobrl,soft
46 22 0:51 / /mnt/g rw,relatime shared:3 master:2 - cifs //h/x rw,vers=3.0,cache=none,username=nobrl-fan,soft
47 22 0:52 / /mnt/h\\040i rw,nosuid - fuse.sshfs me@h:/x rw,user_id=0,group_id=0
48 22 0:53 / /mnt/j rw,nosuid - fuse.rclone r:x rw,user_id=0
49 22 0:54 / /mnt/k rw - fuse.glusterfs h:/x rw,user_id=0
50 22 8:17 / /mnt/l rw - fuseblk /dev/sdb1 rw,user_id=0
51 22 0:55 / /mnt/m rw - 9p share rw,trans=virtio
52 22 0:56 / /mnt/n rw - virtiofs share rw
53 22 0:57 / /mnt/o rw - ceph 192.0.2.1:/ rw,acl
54 22 8:33 / /mnt/p rw - gfs2 /dev/sdc rw,localflocks
55 22 8:33 / /mnt/q rw - gfs2 /dev/sdc rw
4 22 0:58 / /mnt/r rw - fuse x rw
"""
LOCAL = {41: "nolock", 42: "local_lock=all", 43: "local_lock=posix", 45: "nobrl", 47: "fuse.sshfs", 48: "fuse.rclone",
         51: "9p", 52: "virtiofs", 54: "localflocks", 4: "fuse"}  # fmt: skip
REACHING = (22, 40, 44, 46, 49, 50, 53, 55)


def test_which_locks_reach_other_hosts() -> None:
    """Lines as Linux writes them."""
    for mount, named in LOCAL.items():
        assert named in mounts.local_locks(*mounts.find(TABLE, str(mount)))
    for mount in REACHING:
        kind, options = mounts.find(TABLE, str(mount))
        assert kind
        assert mounts.local_locks(kind, options) == ""
    assert mounts.local_locks(*mounts.find(TABLE, "5")) == "", "not in the table"


def test_the_mount_of_an_open_file() -> None:
    """What is found by number is what the kernel calls it by path."""
    with open("/proc/self/mountinfo") as table:
        points = {line.split(" ")[4]: line for line in table}
    descriptor = os.open("/proc", os.O_PATH)
    try:
        assert mounts.mount_of(descriptor)[0] == "proc"
        assert " - proc " in points["/proc"]
    finally:
        os.close(descriptor)
    assert mounts.local_locks_at("/nowhere/at/all") == ""


@pytest.fixture
def sshfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of which the table of mounts says that it is on sshfs."""
    descriptor = os.open(tmp_path, os.O_PATH)
    found = re.search(r"mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text())
    os.close(descriptor)
    assert found
    table = tmp_path / "mountinfo"
    table.write_text(TABLE.replace("\n47 ", f"\n{found[1]} "))
    monkeypatch.setattr(mounts, "MOUNTINFO", table)
    return tmp_path


def test_a_lease_there(sshfs: Path) -> None:
    """Its lock keeps out this host's processes, and is not believed to do more."""
    driver, path = FileDriver(), str(sshfs / "disk.img")
    driver.create(path, 1 << 20)
    assert "fuse.sshfs" in driver.probe(path).local_locks
    first, second = LeaseFile(path + ".vmf-lease", create=True), LeaseFile(path + ".vmf-lease", create=False)
    assert (first.excludes, first.excludes_here, first.shared_slowly) == (False, True, True)
    assert "fuse.sshfs" in first.weakness
    assert first.lock()
    assert first.still_locked()
    assert not second.lock()
    os.unlink(first.place)
    assert not first.still_locked()
    first.close()
    second.close()


def test_a_mark_there_is_the_content(sshfs: Path) -> None:
    """Another host would not see a lock."""
    driver, path = FileDriver(), str(sshfs / "disk.img")
    driver.create(path, 1 << 20)
    mark = driver.mark(path)
    assert mark.token.startswith("content:")
    assert driver.recognises(path, mark.token)
    mark.close()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_group_can_write_image_and_lease(tmp_path: Path, umask: int) -> None:
    driver, path = FileDriver(), str(tmp_path / "disk.img")
    before = os.umask(umask)
    try:
        driver.create(path, 1 << 20)
        store = driver.lease_store(path, create=True)
        assert store is not None
        store.close()
        os.chmod(store.place, 0o600)
        again = driver.lease_store(path, create=True)
        assert again is not None
        again.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert stat.S_IMODE(os.stat(store.place).st_mode) == 0o600, "what was there keeps the mode that it was given"
    os.unlink(store.place)
    os.umask(umask)
    LeaseFile(store.place, create=True).close()
    os.umask(before)
    assert stat.S_IMODE(os.stat(store.place).st_mode) == 0o660
