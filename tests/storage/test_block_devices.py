"""Disks on block devices, as with iSCSI: two loop devices of one file are one disk with a cache at each host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.plugins.bridge import PluginRegistry

PAYLOAD = Path(__file__).resolve().parents[1] / "lab/payload/shared_storage.py"
MIB = 1 << 20


def loop(image: Path) -> str:
    """A new loop device of the image."""
    found = shutil.which("losetup", path="/usr/sbin:/sbin:/usr/bin")
    if found is None or os.geteuid() != 0:
        pytest.skip("loop devices need root and losetup")
    done = subprocess.run([found, "--find", "--show", str(image)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[str]]:
    """Two of one disk, and a third of another one of the same size."""
    images = [tmp_path / "server.img", tmp_path / "other.img"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(4 * MIB)
    found: list[str] = []
    try:
        found.extend(loop(image) for image in (images[0], images[0], images[1]))
        yield found
    finally:
        for device in found:
            subprocess.run(["losetup", "--detach", device], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin"})


def test_two_hosts_with_one_block_device(devices: list[str], tmp_path: Path) -> None:
    """Handovers, a killed owner, breaking a lease, recognising: what `tests/lab` does on a real iSCSI target."""
    lease = tmp_path / "lease"
    media = [f"file:{device}?lease={lease}" for device in devices[:2]]
    done = subprocess.run(
        [sys.executable, str(PAYLOAD), *media, f"file:{devices[2]}?lease={tmp_path / 'another'}"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shared storage: OK" in done.stdout


def test_what_another_program_keeps_in_the_cache_is_not_read(devices: list[str]) -> None:
    """With any program's descriptor open, the kernel keeps what it read of a block device for good."""
    driver = PluginRegistry().storage("file")
    with open(devices[1], "rb", buffering=0) as watcher:
        assert watcher.read(512) == bytes(512)
        image = driver.open(f"file:{devices[0]}", False)
        image.writev(0, [memoryview(b"new".ljust(512))])
        image.flush()
        image.close()
        assert os.pread(watcher.fileno(), 512, 0) == bytes(512), "no cache is kept here: this test shows nothing"
        image = driver.open(f"file:{devices[1]}", True)
        data = bytearray(512)
        image.readv(0, [memoryview(data)])
        image.close()
    assert data == b"new".ljust(512)
