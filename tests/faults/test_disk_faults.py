"""A machine with a disk: either side killed or stopped, or the cable cut, at every message around the handover.

The guest writes numbers to its disk and says which are flushed. In every cell somebody is struck at a message; a person
then has the living side go on with one command, as docs/explanation/leases.md says; a side that was stopped wakes up at
the end. At no time does a number come from both sides, or an image have two writers; at the end one machine
runs, the other one does not, and every number that was ever acknowledged is on the disk.

The ordinary run has three cells; `VMF_DISK_FAULTS=full` has all of them:

    VMF_DISK_FAULTS=full pytest -n 2 --dist load tests/faults/test_disk_faults.py
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.errors import VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.media import lease_of
from vmf.testing.disks import disk_guest
from vmf.testing.faults import Fault, FaultProxy
from vmf.testing.hosts import Host

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

MESSAGES = ("STATE", "READY", "HANDOVER", "RUNNING", "DONE")
KINDS = (
    "kill-source", "kill-source-after", "kill-target", "kill-target-after", "stop-source", "stop-source-after",
    "stop-target", "stop-target-after", "cut", "cut-after",
)  # fmt: skip
"""SIGKILL or SIGSTOP of a side, before or after the message is passed on; the connection cut."""
FULL = [(kind, message) for message in MESSAGES for kind in KINDS]
FEW = [("stop-source-after", "HANDOVER"), ("stop-target", "HANDOVER"), ("kill-source-after", "HANDOVER")]
CELLS = FULL if os.environ.get("VMF_DISK_FAULTS") == "full" else FEW

MIB = 1 << 20
STAMP = """
i=0
while true; do
    i=$((i+1))
    printf '%016d' $i | dd of=/dev/vda bs=512 seek=$i conv=fsync,notrunc 2>/dev/null || echo "FAILED $i"
    echo "stamped $i"
done
"""
RESTING = ("running", "uncertain", "teleported", "aborted", "teleportingin", "poweredoff")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "shared" / "disk.img"
    path.parent.mkdir()
    PluginRegistry().storage("file").create(str(path), 8 * MIB)
    return path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        yield source, target


class Cell:
    """Two hosts, and who was struck."""

    def __init__(self, source: Host, target: Host, kind: str) -> None:
        self.source, self.target = source, target
        self.stops = kind.startswith("stop")
        self.struck: Host | None = None
        self.lives: dict[Host, list[list[int]]] = {source: [], target: []}
        self.then: list[str] = []

    def strike(self, side: str) -> None:
        self.struck = self.source if side == "source" else self.target
        if self.stops:
            self.struck.kill("vm", signal.SIGSTOP)
        else:
            self.struck.kill("vm", signal.SIGKILL)
            self.struck.wait_gone("vm")

    def sleeps(self, host: Host) -> bool:
        return self.stops and host is self.struck

    def wake(self) -> None:
        if self.stops and self.struck is not None:
            self.struck.kill("vm", signal.SIGCONT)
        self.stops = False

    def state(self, host: Host) -> str:
        return "asleep" if self.sleeps(host) else host.state("vm")

    def settle(self) -> tuple[str, str]:
        """Until whoever is awake is in the middle of nothing."""
        end = time.monotonic() + 90
        while True:
            states = self.state(self.source), self.state(self.target)
            assert states != ("running", "running")
            if all(state in (*RESTING, "asleep") for state in states):
                return states
            assert time.monotonic() < end, f"{states} for ever"
            time.sleep(0.1)

    def begin(self, host: Host) -> None:
        """Start it anew: what the guest wrote until now is noted."""
        self.lives[host].append(stamps(host))
        host.start("vm")

    def recover(self) -> None:
        """What a person does; at most one command at each side."""
        source, target = self.settle()
        if source == "uncertain" and self.source.pid("vm") is not None:
            try:
                with self.source.client("vm") as client:
                    client.resolve_teleport("resume")
                self.then.append("resumed")
            except VmfError as error:
                self.then.append(f"refused ({type(error).__name__})")
        elif source in ("aborted", "uncertain") and target != "running":
            if source == "uncertain":  # its process died, and the target can be asked
                done = self.source.vmf("controlvm", "vm", "teleport", "--resolve", "discard")
                assert done.returncode == 0, done.stderr
                self.then.append("discarded")
            self.begin(self.source)
            self.then.append("started at the source")
        elif target == "aborted" and source == "teleported":
            self.begin(self.target)
            self.then.append("started at the target")

    def finish(self) -> Host:
        """Wake who sleeps; who runs in the end."""
        self.wake()
        source, target = self.settle()
        if source == "running" or target == "running":
            return self.source if source == "running" else self.target
        if source == "uncertain" and self.source.pid("vm") is not None and target == "teleportingin":
            with self.source.client("vm") as client:
                client.resolve_teleport("resume")
            self.then.append("resumed")
            return self.source
        assert target == "aborted", (source, target, self.then)  # it died there, holding the lease: it is booted there
        self.begin(self.target)
        self.then.append("started at the target")
        return self.target


def stamps(host: Host) -> list[int]:
    return [int(each) for each in re.findall(rb"stamped (\d+)\r?\n", host.output("vm"))]


@pytest.mark.parametrize(("kind", "message"), CELLS)
def test_at_most_one_writer_and_one_command(hosts: tuple[Host, Host], disk: Path, kind: str, message: str) -> None:
    try:
        guest = disk_guest(STAMP)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source, target = hosts
    for host in hosts:
        host.define(
            MachineConfig(
                name="vm",
                memory_mib=96,
                kernel=guest.kernel,
                initrd=guest.initrd,
                cpu_backend="unicorn",
                devices=("pc", "virtio"),
                drives=(DriveConfig(port=0, medium=str(disk)),),
            )
        )
    source.start("vm")
    source.wait_for_more("vm", b"stamped ", timeout=200)
    cell = Cell(source, target, kind)
    with FaultProxy(target.wait("vm"), Fault(kind.replace("stop", "kill"), message), cell.strike) as proxy:

        def teleport() -> None:
            try:
                with source.client("vm") as client:
                    client.teleport("127.0.0.1", proxy.port, max_downtime_ms=500, timeout_s=5)
            except VmfError:
                pass  # what it leaves behind is looked at

        thread = threading.Thread(target=teleport, daemon=True)
        thread.start()
        assert proxy.happened.wait(120), proxy.seen
        try:
            cell.recover()
            runner = cell.finish()
        finally:
            cell.wake()
        thread.join(60)
    runner.wait_for_more("vm", b"stamped ", timeout=200)
    other = target if runner is source else source
    assert other.state("vm") != "running"
    before = len(stamps(other))
    # What a boot wrote anew it wrote from 1 on; in one life a number comes once, and from one side.
    first, second = (cell.lives[host][0] if cell.lives[host] else stamps(host) for host in hosts)
    assert not set(first) & set(second), "both sides wrote the same"
    lease = lease_of(PluginRegistry(), str(disk))
    assert (lease.standing, lease.alive) == ("held", True)
    assert lease.owner is not None
    assert lease.owner.pid == runner.pid("vm")
    with runner.client("vm") as client:
        client.power_off()
    runner.wait_gone("vm")
    assert len(stamps(other)) == before, "both went on"
    assert b"FAILED" not in source.output("vm") + target.output("vm")
    content = disk.read_bytes()
    for number in {each for host in hosts for life in (*cell.lives[host], stamps(host)) for each in life}:
        assert content[number * 512 : number * 512 + 16] == b"%016d" % number, f"write {number} is lost"
    print(f"{kind} {message}: {' '.join(cell.then) or 'nothing to do'}; runs at the {runner.directory.name}")
