"""A disk on an iSCSI target that both hosts log in to by themselves, each with a user-space initiator.

Each host runs qemu-storage-daemon, whose iSCSI driver logs in, and vmf speaks NBD to it on the same host; the lease is
a second unit of the target. No kernel support is needed. For the kernel's initiator there is
`tests/lab/payload/mount_shares.sh`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.testing.guests import compiled

MACHINES = Path(__file__).resolve().parents[1] / "lab/payload/shared_machines.py"
TARGET = "iqn.2026-01.example:web"
HOPS = 2


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is missing (apt install {package})")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def portal(tmp_path: Path) -> Iterator[int]:
    """A target with two units, the disk and its lease; the port."""
    tgtd, tgtadm = program("tgtd", "tgt"), program("tgtadm", "tgt")
    if os.geteuid() != 0:
        pytest.skip("tgtd needs root")
    Path("/var/run/tgtd").mkdir(exist_ok=True)
    port, control = free_port(), str(os.getpid() % 30000 + 1)
    with (tmp_path / "tgtd.log").open("wb") as log:
        server = subprocess.Popen([tgtd, "-f", "-C", control, "--iscsi", f"portal=127.0.0.1:{port}"], stderr=log)

    def admin(*arguments: str) -> bool:
        return not subprocess.run([tgtadm, "-C", control, "--lld", "iscsi", *arguments], capture_output=True).returncode

    try:
        end = time.monotonic() + 30
        while not admin("--op", "show", "--mode", "sys"):
            assert server.poll() is None, (tmp_path / "tgtd.log").read_text()
            assert time.monotonic() < end, "tgtd does not answer"
            time.sleep(0.1)
        assert admin("--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET)
        for unit in (1, 2):
            image = tmp_path / f"unit-{unit}"
            with image.open("wb") as file:
                file.truncate(4 << 20)
            assert admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", str(unit), "-b", str(image))
        assert admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        yield port
    finally:
        server.kill()
        server.wait(30)


def initiator(directory: Path, portal: int, host: str) -> tuple[subprocess.Popen[bytes], str]:
    """(the host's qemu-storage-daemon, the medium as the host's machine has it)."""
    path = directory / f"{host}.sock"
    units = [
        f"driver=iscsi,transport=tcp,portal=127.0.0.1:{portal},target={TARGET},lun={unit},"
        f"initiator-name=iqn.2026-01.example:{host},node-name=unit{unit}"
        for unit in (1, 2)
    ]
    daemon = subprocess.Popen(
        [
            *(program("qemu-storage-daemon", "qemu-utils"), "--blockdev", units[0], "--blockdev", units[1]),
            *("--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0"),
            *("--export", "type=nbd,id=a,node-name=unit1,name=web,writable=on"),
            *("--export", "type=nbd,id=b,node-name=unit2,name=web.vmf-lease,writable=on"),
        ],
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 30
    while not path.exists():
        if daemon.poll() is not None:
            assert daemon.stderr is not None
            said = daemon.stderr.read().decode()
            if "Unknown driver" in said:
                pytest.skip("qemu-storage-daemon has no iSCSI driver here (apt install qemu-block-extra)")
            raise AssertionError(said)
        assert time.monotonic() < end, "qemu-storage-daemon does not answer"
        time.sleep(0.05)
    return daemon, f"nbd+unix:///web?socket={path}"


@pytest.mark.linux
@pytest.mark.timeout(300)
def test_a_machine_teleports_between_two_initiators(tmp_path: Path, portal: int) -> None:
    if compiled("diskcheck").path is None:
        pytest.skip(compiled("diskcheck").reason)
    daemons = []
    try:
        media = []
        for host in ("host-a", "host-b"):
            daemon, medium = initiator(tmp_path, portal, host)
            daemons.append(daemon)
            media.append(medium)
        command = [sys.executable, str(MACHINES), *media, "--backend", "unicorn", "--hops", str(HOPS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "none lost" in done.stdout
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait(30)
            assert daemon.stderr is not None
            daemon.stderr.close()
