"""A home that is full or read-only, a process that was killed: one clear line, nothing lost, nothing open to others."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.errors import TeleportError
from vmf.machine.config import MachineConfig
from vmf.testing.hosts import Host

SIZE = 512 << 10


class TinyDisk:
    """A small file system of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        self._ballast.unlink()

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.directory], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[TinyDisk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", directory], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield TinyDisk(directory)
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def tiny(disk: TinyDisk) -> Iterator[Host]:
    with Host(disk.directory / "home") as host:
        yield host


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path / "other") as host:
        yield host


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("vmf: error: ")
    for word in words:
        assert word in line


def test_a_full_disk_is_named_by_every_command_that_writes(tiny: Host, disk: TinyDisk, builtin: MachineConfig) -> None:
    tiny.define(builtin)
    definition = tiny.home.paths("box").definition
    before = definition.read_bytes()
    disk.fill()
    one_line(tiny.vmf("createvm", "new", "--memory", "16", "--image", str(builtin.image)), "new", "the disk is full")
    one_line(tiny.vmf("modifyvm", "box", "--memory", "32"), str(definition), "the disk is full", "nothing was changed")
    one_line(tiny.vmf("startvm", "box", "--detach"), "the disk is full")
    one_line(tiny.vmf("startvm", "box"), "the disk is full")
    assert definition.read_bytes() == before
    assert tiny.home.names() == ["box"]
    assert sorted(path.name for path in definition.parent.parent.iterdir()) == [".lock", "box"]
    assert tiny.vmf("showvminfo", "box").returncode == 0
    disk.free()
    tiny.start("box")
    tiny.wait_for_output("box", b"tick 1 ")


def test_a_machine_whose_disk_fills_up_goes_on(tiny: Host, other: Host, disk: TinyDisk, builtin: MachineConfig) -> None:
    """Its log ends; a teleport that cannot be written down does not begin; it can be teleported when there is room."""
    for host in (tiny, other):
        host.define(builtin)
    tiny.start("box")
    port = other.wait("box")
    tiny.wait_for_output("box", b"tick 1 ")
    disk.fill()
    with tiny.client("box") as client, pytest.raises(TeleportError, match="the disk is full"):
        client.teleport("127.0.0.1", port)
    tiny.wait_for_state("box", "running")
    other.wait_for_state("box", "teleportingin")
    disk.free()
    with tiny.client("box") as client:
        client.teleport("127.0.0.1", port)
    other.wait_for_more("box")
    tiny.wait_gone("box")
    assert tiny.state("box") == "teleported"


def test_a_target_whose_disk_is_full_takes_no_machine(
    tiny: Host, other: Host, disk: TinyDisk, builtin: MachineConfig
) -> None:
    for host in (tiny, other):
        host.define(builtin)
    other.start("box")
    other.wait_for_output("box", b"tick 1 ")
    port = tiny.wait("box")
    disk.fill()
    with other.client("box") as client, pytest.raises(TeleportError, match="the disk is full"):
        client.teleport("127.0.0.1", port)
    other.wait_for_state("box", "running")
    other.wait_for_more("box")
    tiny.wait_for_state("box", "teleportingin")
    disk.free()
    with other.client("box") as client:
        client.teleport("127.0.0.1", port)
    tiny.wait_for_state("box", "running")


def test_a_disk_that_fills_up_in_the_middle_does_not_stop_a_handover(
    tiny: Host, other: Host, disk: TinyDisk, builtin: MachineConfig
) -> None:
    """What is written while the guest stands still needs no room."""
    for host in (tiny, other):
        host.define(builtin)
    other.start("box")
    other.wait_for_output("box", b"tick 1 ")
    port = tiny.wait("box")
    filled: list[str] = []

    def fill(event: dict[str, object]) -> None:
        if event["phase"] == "pause" and not filled:
            filled.append("now")
            disk.fill()

    with other.client("box") as client:
        client.teleport("127.0.0.1", port, progress=fill)  # type: ignore[arg-type]
    tiny.wait_for_state("box", "running")
    other.wait_gone("box")
    assert other.state("box") == "teleported"


def test_a_read_only_home(tiny: Host, disk: TinyDisk, builtin: MachineConfig) -> None:
    tiny.define(builtin)
    disk.remount("ro")
    try:
        for command in (
            ("createvm", "new", "--memory", "16", "--image", str(builtin.image)),
            ("modifyvm", "box", "--memory", "32"),
            ("startvm", "box", "--detach"),
            ("startvm", "box"),
            ("unregistervm", "box"),
        ):
            one_line(tiny.vmf(*command), "read-only file system")
        assert "box" in tiny.vmf("list", "vms").stdout
        assert "poweredoff" in tiny.vmf("showvminfo", "box").stdout
    finally:
        disk.remount("rw")


def test_what_a_machine_s_process_opens_is_private_and_a_killed_one_leaves_no_obstacle(
    other: Host, builtin: MachineConfig
) -> None:
    before = os.umask(0)
    try:
        other.define(builtin)
        other.start("box")
    finally:
        os.umask(before)
    paths = other.home.paths("box")
    for directory in (other.home.runtime, paths.runtime, paths.definition.parent, paths.logs):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory
    found = [path for path in (*paths.runtime.rglob("*"), *paths.definition.parent.rglob("*")) if not path.is_dir()]
    assert sum(stat.S_ISSOCK(path.stat().st_mode) for path in found) == len(paths.sockets)
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    other.kill("box", signal.SIGKILL)
    other.wait_gone("box")
    assert paths.control_socket.exists(), "a killed process cleans nothing up"
    shown = other.vmf("showvminfo", "box").stdout
    assert "aborted" in shown
    assert "startvm" in shown
    one_line(other.vmf("controlvm", "box", "pause"), "not running", "aborted", "startvm")
    started = other.vmf("startvm", "box", "--detach")
    assert started.returncode == 0, started.stderr
    other.wait_for_more("box")
    one_line(other.vmf("startvm", "box", "--detach"), "running already")
    assert other.vmf("controlvm", "box", "poweroff").returncode == 0
    assert other.state("box") == "poweredoff"
    assert list(paths.runtime.iterdir()) == []
