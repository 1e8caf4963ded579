"""The benchmark of writes through teleports, in small: two hops on NBD, between three network namespaces.

In full: `python benchmarks/bench_disk_stress.py`, and again with `--storage nbd` (Debian, 20 hops each).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmf.testing import disks, guests, network

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.linux
@pytest.mark.timeout(600)
def test_writes_through_teleports_on_nbd_between_namespaces(tmp_path: Path) -> None:
    reason = network.missing()
    if reason:
        pytest.skip(reason)
    for name, package in (("qemu-storage-daemon", "qemu-utils"), ("qemu-img", "qemu-utils"), ("debugfs", "e2fsprogs")):
        if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{name} is missing (apt install {package})")
    try:
        disks.disk_guest("true")
        guests.compiled("diskcheck").require()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    command = [
        "bench_disk_stress.py",
        "--storage",
        "nbd",
        "--guest",
        "small",
        "--hops",
        "2",
        "--directory",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=BENCHMARKS, capture_output=True, text=True, timeout=500, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
