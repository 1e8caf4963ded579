"""Snapshots of machines in processes of their own, with the `vmf` command."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.errors import TeleportError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.testing.disks import disk_guest
from vmf.testing.hosts import Host

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

MIB = 1 << 20
COUNT = """
i=0
while true; do
    i=$((i+1))
    printf '%016d' $i | dd of=/dev/vda bs=512 seek=1 conv=fsync,notrunc 2>/dev/null || echo "FAILED $i"
    echo "counted $i"
done
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path / "a") as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    PluginRegistry().storage("file").create(str(path), 4 * MIB)
    return path


def define(host: Host, disk: Path) -> None:
    try:
        guest = disk_guest(COUNT)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    drives = (DriveConfig(port=0, medium=str(disk)),)
    host.define(
        MachineConfig(
            name="vm",
            memory_mib=96,
            kernel=guest.kernel,
            initrd=guest.initrd,
            devices=("pc", "virtio"),
            drives=drives,
        )
    )


def counted(output: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"counted (\d+)", output)]


def on_disk(disk: Path) -> int:
    return int(disk.read_bytes()[512:528] or b"0")


def vmf(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_a_running_machine_goes_back_and_goes_on(host: Host, disk: Path, tmp_path: Path) -> None:
    define(host, disk)
    host.start("vm")
    host.wait_for_more("vm", b"counted ", timeout=300)
    taken = json.loads(vmf(host, "snapshot", "vm", "take", "first", "--json"))
    assert (taken["state"], taken["disks"]) == ("running", {"0": 4 * MIB})
    at_snapshot = on_disk(tmp_path / "a/machines/vm/snapshots/first/disk-0.img")
    host.wait_for_more("vm", b"counted ", timeout=100)  # it goes on

    # A machine with snapshots does not teleport, and is told how to.
    with Host(tmp_path / "b") as other:
        define(other, disk)
        port = other.wait("vm")
        with host.client("vm") as client, pytest.raises(TeleportError, match=r"snapshots: 1 \(first\).*delete first"):
            client.teleport("127.0.0.1", port)
    host.wait_for_more("vm", b"counted ", timeout=100)

    refused = host.vmf("snapshot", "vm", "restore", "first", "--yes")
    assert "poweroff" in refused.stderr
    vmf(host, "controlvm", "vm", "poweroff")
    host.wait_gone("vm")
    assert on_disk(disk) > at_snapshot
    assert "continues from there" in vmf(host, "snapshot", "vm", "restore", "first", "--yes")
    assert on_disk(disk) == at_snapshot
    assert json.loads(vmf(host, "snapshot", "vm", "list", "--json"))[0]["next_start"]
    assert "next start" in host.vmf("snapshot", "vm", "delete", "first").stderr
    vmf(host, "modifyvm", "vm", "--memory", "64")  # a start that is refused uses nothing up
    assert "cannot continue from snapshot 'first'" in host.vmf("startvm", "vm", "--detach").stderr
    vmf(host, "modifyvm", "vm", "--memory", "96")

    host.start("vm")
    host.wait_for_more("vm", b"counted ", timeout=100)
    numbers = counted(host.output("vm"))
    assert at_snapshot - 1 <= numbers[0] <= at_snapshot + 2, "it did not go on where it was"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert b"FAILED" not in host.output("vm")
    assert b"Linux version" not in host.output("vm"), "it booted"

    # Once only: after a crash it boots.
    host.kill("vm", signal.SIGKILL)
    host.wait_gone("vm")
    host.start("vm")
    host.wait_for_output("vm", b"Linux version", timeout=300)
    vmf(host, "snapshot", "vm", "delete", "first")
    assert json.loads(vmf(host, "snapshot", "vm", "list", "--json")) == []


def test_a_disk_that_was_used_in_between_does_not_meet_the_old_memory(host: Host, disk: Path, tmp_path: Path) -> None:
    define(host, disk)
    host.start("vm")
    host.wait_for_more("vm", b"counted ", timeout=300)
    vmf(host, "snapshot", "vm", "take", "s")
    vmf(host, "controlvm", "vm", "poweroff")
    host.wait_gone("vm")
    vmf(host, "snapshot", "vm", "restore", "s", "--yes")
    with Host(tmp_path / "b") as other:
        define(other, disk)
        other.start("vm")
        other.kill("vm", signal.SIGKILL)
        other.wait_gone("vm")
    refused = host.vmf("startvm", "vm", "--detach")
    assert refused.returncode == 1
    assert "was used since" in refused.stderr
    assert "boots" in vmf(host, "snapshot", "vm", "discard-state")
    host.start("vm")


def test_a_stopped_machine(host: Host, disk: Path, tmp_path: Path) -> None:
    define(host, disk)
    disk.write_bytes(b"a" * MIB + bytes(3 * MIB))
    vmf(host, "snapshot", "vm", "take", "off", "--description", "as delivered")
    disk.write_bytes(b"b" * 2 * MIB + bytes(2 * MIB))
    assert "switched off" in vmf(host, "snapshot", "vm", "restore", "off", "--yes")
    assert disk.read_bytes() == b"a" * MIB + bytes(3 * MIB)
    for arguments, said in (
        (("take", "off"), "already"),
        (("take", "../off"), "not a snapshot's name"),
        (("restore", "other", "--yes"), "It has off"),
        (("delete", "other"), "no snapshot"),
    ):
        refused = host.vmf("snapshot", "vm", *arguments)
        assert refused.returncode in (1, 2)
        assert said in refused.stderr
    # What a killed process left behind is no snapshot, and goes away.
    (tmp_path / "a/machines/vm/snapshots/.partial-x").mkdir()
    vmf(host, "snapshot", "vm", "take", "two")
    assert [each["name"] for each in json.loads(vmf(host, "snapshot", "vm", "list", "--json"))] == ["off", "two"]
    assert sorted(each.name for each in (tmp_path / "a/machines/vm/snapshots").iterdir()) == ["off", "two"]
