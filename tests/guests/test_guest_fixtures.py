"""The guests of tests, benchmarks and demonstration: found or refused in one line, and right."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from vmf.testing import guests
from vmf.testing.guest import build as builder
from vmf.testing.initrd import APPLETS, Entry, cpio, initrd
from vmf.testing.serial_check import check


def parse(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """A reader of newc written from the format's description."""
    out: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + field[11]].rstrip(b"\0").decode()
        data = (at + 110 + field[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return out
        assert name not in out
        out[name] = field[1], archive[data : data + field[6]], (field[9], field[10])
        at = (data + field[6] + 3) // 4 * 4


def test_initrd_holds_everything_and_is_deterministic() -> None:
    made = initrd(b"BUSY" * 7, "#!/bin/sh\necho hi\n", {"/opt/a/tool": b"x" * 5})
    assert made == initrd(b"BUSY" * 7, "#!/bin/sh\necho hi\n", {"/opt/a/tool": b"x" * 5})
    found = parse(made)
    assert found["bin/busybox"] == (stat.S_IFREG | 0o755, b"BUSY" * 7, (0, 0))
    assert found["init"][1] == b"#!/bin/sh\necho hi\n"
    assert found["opt/a/tool"][:2] == (stat.S_IFREG | 0o755, b"xxxxx")
    assert stat.S_ISDIR(found["opt"][0])
    assert stat.S_ISDIR(found["opt/a"][0])
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    for applet in APPLETS:
        assert found[f"bin/{applet}"] == (stat.S_IFLNK | 0o777, b"busybox", (0, 0))
    names = list(found)
    assert names.index("opt") < names.index("opt/a") < names.index("opt/a/tool")


@pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio")
def test_cpio_reads_it() -> None:
    archive = cpio([Entry("d", stat.S_IFDIR | 0o755), Entry("d/f", stat.S_IFREG | 0o644, b"abc")])
    done = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert done.stdout.split() == [b"d", b"d/f"]


def make_deb(path: Path, compression: str) -> None:
    """A package with one file, as deb(5) describes it."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode=f"w:{compression}") as tar:  # type: ignore[call-overload]
        for name, content in (("./usr/share/x", b"no"), ("./boot/vmlinuz-6.1", b"kernel" * 9)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (f"data.tar.{compression}", inner.getvalue())]
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in parts:
            file.write(f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_file_out_of_a_package(tmp_path: Path, compression: str) -> None:
    make_deb(tmp_path / "p.deb", compression)
    assert guests._member_of_deb(tmp_path / "p.deb", r"\./boot/vmlinuz-.*") == b"kernel" * 9
    with pytest.raises(guests.Unavailable, match=r"p\.deb holds no"):
        guests._member_of_deb(tmp_path / "p.deb", "nothing")
    (tmp_path / "q.deb").write_bytes(b"<html>")
    with pytest.raises(guests.Unavailable, match="not a Debian package"):
        guests._member_of_deb(tmp_path / "q.deb", "nothing")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VMF_KERNEL", raising=False)
    monkeypatch.delenv("VMF_BUSYBOX", raising=False)
    return tmp_path


def one_line(found: guests.Found, *words: str) -> None:
    assert found.path is None
    assert "\n" not in found.reason
    for word in words:
        assert word in found.reason
    with pytest.raises(FileNotFoundError, match=re.escape(found.reason)):
        found.require()


def test_without_apt_there_is_a_reason(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    one_line(guests.debian_kernel.__wrapped__(), "linux-image-cloud-amd64", "has no apt")
    one_line(guests.busybox.__wrapped__(), "busybox-static", "has no apt")
    one_line(guests.selfcheck.__wrapped__(), "has no gcc")


def test_the_cache_is_used_and_fetched_only_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(package: str, follow: str | None) -> Path:
        asked.append(package)
        folder = empty_cache / "download"
        folder.mkdir()
        make_deb(folder / "p.deb", "xz")
        return folder / "p.deb"

    monkeypatch.setattr(guests, "download", download)
    first = guests.debian_kernel.__wrapped__().require()
    assert first.read_bytes() == b"kernel" * 9
    assert first.is_relative_to(empty_cache / "cache")
    assert guests.debian_kernel.__wrapped__().require() == first
    assert asked == ["linux-image-cloud-amd64"]
    assert not (empty_cache / "download").exists()


def test_a_cache_that_cannot_be_written(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("VMF_CACHE", str(empty_cache / "file"))
    one_line(guests.debian_kernel.__wrapped__(), "VMF_CACHE")


def test_named_files(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMF_KERNEL", str(empty_cache / "none"))
    one_line(guests.debian_kernel.__wrapped__(), "VMF_KERNEL", "not a file")
    (empty_cache / "none").write_bytes(b"k")
    assert guests.debian_kernel.__wrapped__().require() == empty_cache / "none"


def test_the_built_in_guest_is_what_its_source_says() -> None:
    if not all(shutil.which(tool) for tool in ("as", "ld", "objcopy")):
        pytest.skip("needs binutils to build the guest again")
    assert builder.build() == guests.builtin_guest().read_bytes()


def test_the_selfcheck_program_runs_clean_here() -> None:
    """On the host itself: whatever a virtual machine does to it later is the machine's doing."""
    found = guests.selfcheck()
    if found.path is None:
        pytest.skip(found.reason)
    process = subprocess.Popen(
        [found.path, "run", "-m", "4", "-p", "5", "-t", "50"], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        time.sleep(3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    report = check(process.stdout.read())
    process.wait()
    process.stdout.close()
    assert report.ok, report.problems
    assert report.ticks > 20
    assert report.rounds > 10
    assert len(report.clocks) >= 2


def test_the_selfcheck_program_knows_its_own_arithmetic() -> None:
    found = guests.selfcheck()
    if found.path is None:
        pytest.skip(found.reason)
    golden = subprocess.run([found.path, "golden"], capture_output=True, text=True, check=True).stdout.strip()
    assert f"0x{golden}ull" in (Path(builder.__file__).parent / "selfcheck.c").read_text()


@pytest.mark.linux
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
def test_initrd_boots_to_a_shell_that_answers() -> None:
    """Under QEMU: that our fixtures are right is not for our own backend to say."""
    try:
        guest = guests.linux_guest()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    board = "microvm,acpi=off,rtc=on,x-option-roms=off,isa-serial=on"
    command = ["qemu-system-x86_64", "-M", board, "-cpu", "max", "-m", "128", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-serial", "stdio", "-kernel", str(guest.kernel)]
    command += ["-initrd", str(guest.initrd), "-append", f"{guest.cmdline} quiet"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    seen = b""
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    try:
        while b"vmf# " not in seen and (block := process.stdout.read(4096)):
            seen += block
        process.stdin.write(b"echo $((6 * 7)) answers; uname -m\n")
        while b"x86_64" not in seen and (block := process.stdout.read(4096)):
            seen += block
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert b"vmf: init is running" in seen
    assert b"42 answers" in seen


def test_command_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "vmf.testing.guests"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--kernel" in done.stderr
