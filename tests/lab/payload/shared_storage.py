"""Two hosts' views of one directory or block device: does everything that keeps two machines apart work there?

    shared_storage.py DIRECTORY_A DIRECTORY_B
    shared_storage.py 'file:/dev/sda?lease=LEASE_A' 'file:/dev/sdb?lease=LEASE_B' 'file:/dev/sdc?lease=...'

The directories are two mounts of the same export, each with a cache of its own. The block devices are two logins to one
iSCSI target, with a lease on a file system that both hosts see; the third one is another disk of the same size. Prints
a line for each step and ends with status 0 if all is well. The sides are storages without machines, in processes of
their own where one must die.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from vmf.errors import ImageInUse, LeaseLost
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.media import break_lease, lease_of

ROUNDS = 20
registry = PluginRegistry()


def side(name: str, disk: str, kind: str = "hdd") -> MachineStorage:
    drives = (DriveConfig(port=0, medium=disk, type=kind),)
    return MachineStorage(MachineConfig(name=name, memory_mib=16, drives=drives), registry, print)


def write(storage: MachineStorage, text: str) -> None:
    storage.drives[0].writev(4096, [memoryview(text.encode().ljust(512))])


def read(storage: MachineStorage) -> str:
    data = bytearray(512)
    storage.drives[0].readv(4096, [memoryview(data)])
    return data.decode().rstrip()


def say(text: str) -> None:
    print(f"shared storage: {text}", flush=True)


def refused(storage: MachineStorage) -> str:
    try:
        storage.open()
    except ImageInUse as error:
        return str(error)
    raise AssertionError("two machines have the image at the same time")


def main() -> None:
    disk_a, disk_b = sys.argv[1:3]
    directories = Path(disk_a).is_dir()
    if directories:
        disk_a, disk_b = f"{disk_a}/disk.img", f"{disk_b}/disk.img"
        registry.storage("file").create(disk_a, 4 << 20)
    a, b = side("a", disk_a), side("b", disk_b)
    say(f"on {registry.storage('file').probe(disk_a).where}")
    a.open()
    write(a, "first")
    say(f"the second machine is refused: {refused(side('thief', disk_b))}")
    b.prepare()
    began = time.monotonic()
    assert b.check(a.describe(publish=True)) == [], "the image is not recognised"
    say(f"recognised in {(time.monotonic() - began) * 1e3:.0f} ms; leases decide here: {a.leased}")

    owner, heir = a, b
    times = []
    for number in range(ROUNDS):
        write(owner, f"round {number}")
        teleport = f"{number:032x}"
        began = time.monotonic()
        owner.pass_leases(teleport)
        heir.take_leases(teleport)
        times.append(time.monotonic() - began)
        assert read(heir) == f"round {number}", f"stale data at the other side: {read(heir)!r}"
        try:
            owner.take_leases(teleport)
            raise AssertionError("both sides took the lease")
        except LeaseLost:
            pass
        owner, heir = heir, owner
    say(f"{ROUNDS} handovers, none lost, {sorted(times)[ROUNDS // 2] * 1e3:.1f} ms each")

    try:
        break_lease(registry, disk_b if owner is a else disk_a)
        raise AssertionError("the lease of a living owner was broken")
    except ImageInUse as error:
        say(f"a living owner's lease is not broken: {error}")
    a.close()
    b.close()

    child = subprocess.Popen(
        [sys.executable, __file__, "hold", disk_a], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    refused(side("heir", disk_b))
    child.kill()
    child.wait()
    assert lease_of(registry, disk_b).alive is False, "the server keeps a dead owner's lock"
    heir = side("heir", disk_b)
    heir.open()
    say("a killed owner's image can be used")
    heir.close()

    first, second = side("c", disk_a, "dvddrive"), side("d", disk_b, "dvddrive")
    if directories:  # of devices the content is compared, so a copy would do
        other = disk_b.replace("disk.img", "copy.img")
        registry.storage("file").copy(disk_b, other)
    else:
        other = sys.argv[3]
    first.open()
    assert second.check(first.describe(publish=True)) == [], "a medium that is only read is not recognised"
    found = side("e", other, "dvddrive").check(first.describe(publish=True))
    assert len(found) == 1, found
    say(f"another one is told from it: {found[0].field}")
    first.close()
    say("OK")


def hold() -> None:
    storage = side("victim", sys.argv[2])
    storage.open()
    write(storage, "held")
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    hold() if sys.argv[1] == "hold" else main()
