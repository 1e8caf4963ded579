"""Machines with a disk on shared storage, between two hosts with processes of their own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.errors import TeleportError, TeleportUncertain, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.storage import lease as rules
from vmf.storage.holder import read_record
from vmf.storage.media import lease_of
from vmf.testing.disks import disk_guest
from vmf.testing.faults import Fault, FaultProxy
from vmf.testing.hosts import Host

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

MIB = 1 << 20
STAMP = """
i=0
while true; do
    i=$((i+1))
    printf '%016d' $i | dd of=/dev/vda bs=512 seek=$i conv=fsync,notrunc 2>/dev/null || echo "FAILED $i"
    echo "stamped $i"
done
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "shared" / "disk.img"
    path.parent.mkdir()
    PluginRegistry().storage("file").create(str(path), 8 * MIB)
    return path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with Host(tmp_path / "a") as a, Host(tmp_path / "b") as b:
        yield a, b


def machine(disk: Path | str) -> MachineConfig:
    try:
        guest = disk_guest(STAMP)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return MachineConfig(
        name="vm",
        memory_mib=128,
        kernel=guest.kernel,
        initrd=guest.initrd,
        devices=("pc", "virtio"),
        drives=(DriveConfig(port=0, medium=str(disk)),),
    )


def stamps(*hosts: Host) -> list[int]:
    return [int(each) for host in hosts for each in re.findall(rb"stamped (\d+)", host.output("vm"))]


def verify(disk: Path, acknowledged: int) -> None:
    """Every acknowledged write is there."""
    with disk.open("rb") as file:
        for number in range(1, min(acknowledged, 8 * MIB // 512 - 1) + 1):
            file.seek(number * 512)
            assert file.read(16) == b"%016d" % number, f"write {number} of {acknowledged} is lost"


def test_every_acknowledged_write_is_there_after_teleports(hosts: tuple[Host, Host], disk: Path) -> None:
    for host in hosts:
        host.define(machine(disk))
    source, target = hosts
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=300)
    last = 0
    for _ in range(4):
        port = target.wait("vm")
        with source.client("vm") as client:
            summary = client.teleport("127.0.0.1", port, max_downtime_ms=500)
        target.wait_for_more("vm", b"stamped ", timeout=300)
        print(f"downtime {summary['downtime_ns'] / 1e6:.1f} ms")
        assert b"FAILED" not in target.output("vm")
        assert b"I/O error" not in target.output("vm")
        last = max(last, *stamps(source, target))
        source.wait_gone("vm")
        source, target = target, source
    lease = lease_of(PluginRegistry(), str(disk))
    assert (lease.standing, lease.generation, lease.alive) == ("held", 5, True)
    with source.client("vm") as client:
        client.power_off()
    source.wait_gone("vm")
    verify(disk, max(last, *stamps(source)))
    assert lease_of(PluginRegistry(), str(disk)).standing == "free"


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon (apt: qemu-utils)")
def test_a_disk_on_an_nbd_server(hosts: tuple[Host, Host], disk: Path) -> None:
    """The same, with the image and its lease on a server; it serves qcow2 as well."""
    lease, socket = disk.with_name("lease"), disk.with_name("nbd.sock")
    lease.write_bytes(bytes(8192))
    server = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,filename={disk},node-name=f", "--blockdev", "driver=raw,file=f,node-name=d"),
            *("--blockdev", f"driver=file,filename={lease},node-name=g", "--blockdev", "driver=raw,file=g,node-name=l"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
            *("--export", "type=nbd,id=a,node-name=d,name=web,writable=on"),
            *("--export", "type=nbd,id=b,node-name=l,name=web.vmf-lease,writable=on"),
        ]
    )
    try:
        end = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < end:
            time.sleep(0.02)
        medium = f"nbd+unix:///web?socket={socket}"
        source, target = hosts
        for host in hosts:
            host.define(machine(medium))
        source.start("vm")
        source.wait_for_more("vm", b"stamped ", timeout=300)
        for _ in range(2):
            port = target.wait("vm")
            with source.client("vm") as client:
                client.teleport("127.0.0.1", port, max_downtime_ms=500)
            target.wait_for_more("vm", b"stamped ", timeout=300)
            source.wait_gone("vm")
            source, target = target, source
        last = max(stamps(source, target))
        assert b"FAILED" not in source.output("vm")
        with source.client("vm") as client:
            client.power_off()
        source.wait_gone("vm")
    finally:
        server.terminate()
        server.wait(30)
    verify(disk, last)


def test_a_second_machine_is_refused_with_the_owners_name(hosts: tuple[Host, Host], disk: Path) -> None:
    for host in hosts:
        host.define(machine(disk))
    hosts[0].start("vm")
    with pytest.raises(VmfError, match=r"in use: it is held by machine vm on host"):
        hosts[1].start("vm")
    hosts[0].kill("vm", signal.SIGKILL)
    hosts[0].wait_gone("vm")
    hosts[1].start("vm")  # the lock has gone with the process; the same kernel proves it


def test_another_image_is_refused_and_the_source_goes_on(hosts: tuple[Host, Host], disk: Path) -> None:
    source, target = hosts
    other = disk.with_name("other.img")
    other.write_bytes(disk.read_bytes())
    source.define(machine(disk))
    target.define(machine(other))
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=300)
    port = target.wait("vm")
    with source.client("vm") as client, pytest.raises(TeleportError, match="image of the drive at port 0"):
        client.teleport("127.0.0.1", port)
    other.unlink()
    with source.client("vm") as client, pytest.raises(TeleportError, match="missing"):
        client.teleport("127.0.0.1", port)
    other.symlink_to(disk)
    source.wait_for_more("vm", b"stamped ", timeout=100)
    with source.client("vm") as client:  # the same image by another name
        client.teleport("127.0.0.1", port, max_downtime_ms=500)
    target.wait_for_more("vm", b"stamped ", timeout=300)
    shown = json.loads(target.vmf("media", "locks", "--json").stdout)
    assert shown[0]["alive"]


def test_a_stopped_target_does_not_get_the_machine_any_more(hosts: tuple[Host, Host], disk: Path) -> None:
    """SIGSTOP of the target in the middle of a teleport: the source goes on, and the target that wakes up waits."""
    source, target = hosts
    for host in hosts:
        host.define(machine(disk))
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=300)
    port = target.wait("vm")
    target.kill("vm", signal.SIGSTOP)
    with source.client("vm") as client, pytest.raises(TeleportError):
        client.teleport("127.0.0.1", port, timeout_s=5)
    source.wait_for_more("vm", b"stamped ", timeout=100)
    target.kill("vm", signal.SIGCONT)
    assert target.wait_for_state("vm", "teleportingin") == "teleportingin"
    with source.client("vm") as client:
        client.teleport("127.0.0.1", port, max_downtime_ms=500)
    target.wait_for_more("vm", b"stamped ", timeout=300)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "HANDOVER"),
        ("kill-target", "HANDOVER"),
        ("stop-target", "HANDOVER"),
        ("cut", "RUNNING"),
        ("kill-target", "RUNNING"),
    ],
)
def test_the_lease_decides_an_interrupted_handover(
    hosts: tuple[Host, Host], disk: Path, kind: str, message: str
) -> None:
    """HANDOVER or its answer is lost, or the target dies or stops there, and nobody can be asked: one command recovers.

    Whoever gets the lease is the machine; the other one cannot write, whatever it believes.
    """
    source, target = hosts
    for host in hosts:
        host.define(machine(disk))
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=300)
    port = target.wait("vm")

    def strike(side: str) -> None:
        target.kill("vm", signal.SIGSTOP if kind == "stop-target" else signal.SIGKILL)

    fault = Fault("kill-target" if kind == "stop-target" else kind, message)
    with FaultProxy(port, fault, strike) as proxy:
        with source.client("vm") as client, pytest.raises(TeleportUncertain):
            client.teleport("127.0.0.1", proxy.port, max_downtime_ms=500)
        assert source.state("vm") == "uncertain"
        proxy.deaf = True  # the target cannot be asked: only the lease is left
        lease = lease_of(PluginRegistry(), str(disk))
        with source.client("vm") as client:
            if message == "RUNNING":
                assert lease.standing == "held"
                with pytest.raises(VmfError, match="machine vm"):
                    client.resolve_teleport("resume")
                runs = target if kind == "cut" else None
            else:
                assert lease.standing == "offered"
                client.resolve_teleport("resume")
                runs = source
    if kind == "stop-target":
        target.kill("vm", signal.SIGCONT)
        assert target.wait_for_state("vm", "teleportingin") == "teleportingin"
    if runs is None:  # it died there: what it acknowledged is on the disk, and it can be booted where it died
        assert source.state("vm") == "uncertain"
        verify(disk, max(stamps(source, target)))
        return
    runs.wait_for_more("vm", b"stamped ", timeout=300)
    assert b"FAILED" not in runs.output("vm")
    last = max(stamps(source, target))
    with runs.client("vm") as client:
        client.power_off()
    runs.wait_gone("vm")
    verify(disk, last)


def test_a_machine_that_lost_its_lease_stands_still(hosts: tuple[Host, Host], disk: Path) -> None:
    """Somebody broke it although the machine lives (here by hand, as the command refuses): nothing more is written."""
    host = hosts[0]
    host.define(machine(disk))
    host.start("vm")
    host.wait_for_more("vm", b"stamped ", timeout=300)
    store = PluginRegistry().storage("file").lease_store(str(disk), create=False)
    assert store is not None
    record = rules.broken(read_record(store))
    store.write(record.sequence % 2 * rules.BLOCK, rules.encode(record))
    store.close()
    host.wait_for_state("vm", "failed", timeout=60)
    before = disk.read_bytes()
    with host.client("vm") as client:
        assert "does not belong to machine vm" in client.info()["failure"]
        client.power_off()
    host.wait_gone("vm")
    assert disk.read_bytes() == before


def test_a_medium_that_comes_later(hosts: tuple[Host, Host], disk: Path) -> None:
    """A target waits although its medium is missing; the check names it, and looks again each time."""
    source, target = hosts
    other = disk.with_name("other.img")
    source.define(machine(disk))
    target.define(machine(other))
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=300)
    port = target.wait("vm")
    with source.client("vm") as client, pytest.raises(TeleportError, match="missing"):
        client.teleport("127.0.0.1", port)
    other.write_bytes(bytes(4 * MIB))
    with source.client("vm") as client, pytest.raises(TeleportError, match="size of the drive at port 0: 8 MiB"):
        client.teleport("127.0.0.1", port)
    other.unlink()
    other.symlink_to(disk)
    with source.client("vm") as client:
        client.teleport("127.0.0.1", port, max_downtime_ms=500)
    target.wait_for_more("vm", b"stamped ", timeout=300)
    assert b"I/O error" not in target.output("vm")
