"""vmf and QEMU's own programs on one image: neither writes what the other has. With the real programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmf import record_locks
from vmf.errors import ImageInUse
from vmf_storage_file import qemulocks
from vmf_storage_file.driver import FileDriver

MIB = 1 << 20
needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-storage-daemon") and shutil.which("qemu-img") and shutil.which("qemu-io")),
    reason="qemu-utils is not installed (Debian: apt install qemu-utils)",
)
COPY = ("qemu-img", "convert", "-f", "raw", "-O", "raw")
WRITE = ("qemu-io", "-f", "raw", "-c", "write -P 7 0 4096")
INFO = ("qemu-img", "info", "-f", "raw")
RESIZE = ("qemu-img", "resize", "-q", "-f", "raw")
WRITES, KEEPS_WRITING = qemulocks.USES + qemulocks.WRITE, qemulocks.KEEPS + qemulocks.WRITE
MORE = {COPY: ("/dev/null",), RESIZE: ("8M",)}


@pytest.fixture
def driver() -> FileDriver:
    return FileDriver()


@pytest.fixture
def path(driver: FileDriver, tmp_path: Path) -> str:
    made = str(tmp_path / "disk.img")
    driver.create(made, 4 * MIB)
    return made


def runs(command: tuple[str, ...], path: str, *more: str) -> bool:
    """Whether QEMU's program does it; what it says otherwise is about the lock."""
    done = subprocess.run([*command, path, *more], capture_output=True, text=True, timeout=60)
    if done.returncode:
        assert "lock" in done.stderr, done.stderr
    return not done.returncode


@needs_qemu
def test_what_vmf_writes_is_not_touched(driver: FileDriver, path: str) -> None:
    image = driver.open(path, False)
    for command in (COPY, WRITE, RESIZE):
        assert not runs(command, path, *MORE.get(command, ()))
    assert runs(("qemu-img", "info", "-U", "-f", "raw"), path), "who asks for it may look"
    image.writev(0, [memoryview(b"x" * 4096)])
    image.close()
    assert runs(INFO, path)
    assert runs(WRITE, path)


@needs_qemu
def test_what_vmf_reads_is_not_changed(driver: FileDriver, path: str) -> None:
    image = driver.open(path, True)
    second = driver.open(path, True)
    assert runs(INFO, path)
    assert runs(("qemu-io", "-r", "-f", "raw", "-c", "read 0 4096"), path)
    assert not runs(WRITE, path)
    assert not runs(RESIZE, path, *MORE[RESIZE])
    image.close()
    assert not runs(WRITE, path)
    second.close()
    assert runs(WRITE, path)


@pytest.fixture
def held(path: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program of QEMU, and returns when it has locked a byte of the image."""
    processes: list[subprocess.Popen[str]] = []

    def hold(*command: str, until: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        processes.append(process)
        end = time.monotonic() + 60
        descriptor = os.open(path, os.O_RDWR)
        try:
            while not record_locks.is_locked(descriptor, until):
                assert process.poll() is None, "it ended"
                assert time.monotonic() < end, "it does not take the image"
                time.sleep(0.01)
        finally:
            os.close(descriptor)
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


def storage_daemon(path: str, *, writable: bool) -> tuple[str, ...]:
    return (
        "qemu-storage-daemon",
        "--blockdev", f"driver=file,filename={path},node-name=f,read-only={'off' if writable else 'on'}",
        "--nbd-server", f"addr.type=unix,addr.path={path}.sock",
        "--export", f"type=nbd,id=e,node-name=f,name=disk,writable={'on' if writable else 'off'}",
    )  # fmt: skip


@needs_qemu
@pytest.mark.parametrize("kind", ["qemu-io", "qemu-storage-daemon"])
def test_what_qemu_writes_is_refused(
    driver: FileDriver, path: str, held: Callable[..., subprocess.Popen[str]], kind: str
) -> None:
    commands = {"qemu-io": ("qemu-io", "-f", "raw", path), "qemu-storage-daemon": storage_daemon(path, writable=True)}
    process = held(*commands[kind], until=WRITES)
    for read_only in (False, True):
        with pytest.raises(ImageInUse, match="QEMU or one of its tools has locked it"):
            driver.open(path, read_only)
    process.kill()
    process.wait(20)
    driver.open(path, False).close()


@needs_qemu
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
def test_a_machine_of_qemu(driver: FileDriver, path: str, held: Callable[..., subprocess.Popen[str]]) -> None:
    """It writes: nothing else opens the disk. It reads: all may read, and none write."""
    start = ("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-device", "virtio-blk-pci,drive=d")
    disk = f"file={path},format=raw,if=none,id=d"
    writer = held(*start, "-drive", disk, until=WRITES)
    for read_only in (False, True):
        with pytest.raises(ImageInUse, match="QEMU or one of its tools has locked it"):
            driver.open(path, read_only)
    writer.kill()
    writer.wait(20)
    held(*start, "-drive", f"{disk},readonly=on", until=KEEPS_WRITING)
    driver.open(path, True).close()
    with pytest.raises(ImageInUse, match="QEMU or one of its tools has locked it"):
        driver.open(path, False)


@needs_qemu
def test_what_qemu_reads_may_be_read(driver: FileDriver, path: str, held: Callable[..., subprocess.Popen[str]]) -> None:
    held("qemu-io", "-r", "-f", "raw", path, until=qemulocks.USES + qemulocks.READ)
    held(*storage_daemon(path, writable=False), until=qemulocks.KEEPS + qemulocks.RESIZE)
    driver.open(path, True).close()


def test_the_bytes(driver: FileDriver, path: str) -> None:
    """What QEMU's own virtual disk marks, by its block/file-posix.c: uses 100 + n, shares not 200 + n."""
    other = os.open(path, os.O_RDWR)
    for read_only, bytes_ in ((False, [100, 101, 201, 203]), (True, [100, 201, 203])):
        image = driver.open(path, read_only)
        assert [offset for offset in range(90, 210) if record_locks.is_locked(other, offset)] == bytes_
        image.close()
    os.close(other)


def test_an_attempt_that_fails_leaves_no_locks(driver: FileDriver, path: str) -> None:
    other = os.open(path, os.O_RDWR)
    record_locks.lock(other, qemulocks.USES + qemulocks.WRITE, exclusive=False)
    for read_only in (False, True):
        with pytest.raises(ImageInUse, match="another program"):
            driver.open(path, read_only)
    record_locks.unlock(other, qemulocks.USES + qemulocks.WRITE)
    assert not any(record_locks.is_locked(other, offset) for offset in range(100, 204))
    driver.open(path, False).close()
    os.close(other)


def test_a_program_that_locks_the_whole_file(driver: FileDriver, path: str) -> None:
    """Not QEMU's way, but plain enough: lockf(3) and others lock everything, exclusively."""
    other = os.open(path, os.O_RDWR)
    try:
        os.lockf(other, os.F_TLOCK, 4096)
        with pytest.raises(ImageInUse):
            driver.open(path, False)
    finally:
        os.close(other)
