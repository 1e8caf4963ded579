"""Guests for tests, benchmarks and the demonstration.

`debian_kernel()` and `busybox()` find or fetch Debian's cloud kernel and static busybox with apt, from whatever
archive this machine's apt is set up for, and keep them under the user's cache directory (`VMF_CACHE` moves it).
Neither needs root: when apt has no package lists, private ones are fetched into the cache. `selfcheck()` compiles the
self-checking guest program. Each gives a `Found`: the path, or one line why there is none; a caller skips with that
line, it never fails for want of a network. `builtin_guest()` is always there: a small bare-metal guest of our own.

    python3 -m vmf.testing.guests --kernel vmlinuz --initrd initrd.img

writes a kernel and an initrd with a shell. Environment: VMF_KERNEL and VMF_BUSYBOX name files to use instead.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock
from attrs import frozen

from vmf import directories
from vmf.testing.initrd import COMMAND_INIT, SHELL_INIT, initrd

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
CMDLINE = "console=ttyS0 tsc=reliable mitigations=off cryptomgr.notests"
"""What a Linux guest needs to hear on a machine of ours; quiet is left to the caller."""

_HERE = Path(__file__).parent / "guest"
_APT_SECONDS = 300
_COMPILE = ("-O2", "-static", "-std=gnu11", "-Wall", "-Wextra", "-fno-fast-math", "-ffp-contract=off")
_LIBRARIES = ("-lm",)
_COMPILE_32 = ("-m32", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector", *_COMPILE[:5])
"""Needs no 32-bit C library: one program of ours does without."""


@frozen
class Found:
    """A file, or why there is none."""

    path: Path | None
    reason: str = ""

    def require(self) -> Path:
        """The path. Raises FileNotFoundError with the reason."""
        if self.path is None:
            raise FileNotFoundError(self.reason)
        return self.path


class Unavailable(Exception):
    """One line: why something cannot be had here."""


def cache_dir() -> Path:
    """Where fetched and built files are kept."""
    return directories.cache_directory() / "guests"


def builtin_guest() -> Path:
    """The bare-metal guest (flat image for `--image`): prints "tick N CHECKSUM", checks memory and SSE, echoes input.

    Its source is `guest/demo.S` beside this file, its build script `guest/build.py`.
    """
    return _HERE / "demo.bin"


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The final place of `name` in the cache, while no other process fetches it."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{name}.lock", timeout=2 * _APT_SECONDS):
            yield folder / name
    except (OSError, filelock.Timeout) as error:
        raise Unavailable(f"the cache {folder} cannot be used ({error}); set VMF_CACHE to another place") from error


def place(target: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o755)
    os.replace(file.name, target)


def run(command: list[str], where: Path, seconds: float = _APT_SECONDS) -> str:
    """Run a tool in a folder; its output. Raises Unavailable with the reason."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command,
            cwd=where,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        raise Unavailable(f"this machine has no {command[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {seconds:.0f} s") from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("E:", "W:"))]
        raise Unavailable(f"{' '.join(command[:1] + command[-2:])} failed: {(lines or ['no reason given'])[-1]}")
    return done.stdout


def _apt_options(private: Path | None) -> list[str]:
    options = ["-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=20", "-o", "APT::Sandbox::User="]
    if private is not None:
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (private / folder).mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State={private}/state", "-o", f"Dir::State::lists={private}/state/lists"]
        options += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        options += ["-o", f"Dir::Cache={private}/cache"]
    return options


def download(package: str, follow: str | None) -> Path:
    """Download a .deb into a new temporary folder; `follow` matches the dependency that is really wanted."""
    folder = Path(tempfile.mkdtemp(prefix="vmf-apt-"))
    problem: Unavailable | None = None
    for private in (None, cache_dir() / "apt"):
        options = _apt_options(private)
        try:
            if private is not None:
                run(["apt-get", *options, "-qq", "update"], folder)
            name = package
            if follow is not None:
                found = re.findall(follow, run(["apt-cache", *options, "depends", package], folder))
                if not found:
                    raise Unavailable(f"apt knows no package {package}")
                name = str(found[0])
            run(["apt-get", *options, "-qq", "download", name], folder)
            for deb in folder.glob("*.deb"):
                return deb
            raise Unavailable(f"apt-get download {name} left no package")
        except Unavailable as error:
            problem = problem or error
    shutil.rmtree(folder, ignore_errors=True)
    assert problem is not None
    raise problem


class _Limited:
    """The part of an open file that starts here and is `left` bytes long."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self._file, self._left = file, left

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(block)
        return block


class _Inflating:
    """A decompressor as a stream, for tarfile."""

    def __init__(self, source: _Limited, decompress: Callable[[bytes], bytes]) -> None:
        self._source, self._decompress, self._ready = source, decompress, b""

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and (block := self._source.read(1 << 20)):
            self._ready += self._decompress(block)
        out, self._ready = self._ready[:size], self._ready[size:]
        return out


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def zstd_decompress(content: bytes) -> bytes:
    """A whole zstd file's content."""
    return bytes(_zstd().decompress(content))


def _member_of_deb(deb: Path, pattern: str) -> bytes:
    """Content of the first file of a Debian package that matches."""
    for _, content in members_of_deb(deb, pattern):
        return content
    raise Unavailable(f"{deb.name} holds no {pattern}")


def members_of_deb(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a Debian package (deb(5): an ar archive with a tar in it) that match."""
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise Unavailable(f"{deb.name} is not a Debian package")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if not name.startswith("data.tar"):
                file.seek(size + size % 2, os.SEEK_CUR)
                continue
            source: Any = _Limited(file, size)
            if name.endswith(".xz"):
                source = _Inflating(source, lzma.LZMADecompressor().decompress)
            elif name.endswith(".gz"):
                source = _Inflating(source, zlib.decompressobj(31).decompress)
            elif name.endswith(".zst"):
                source = _Inflating(source, _zstd().ZstdDecompressor().decompress)
            with tarfile.open(fileobj=source, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and re.fullmatch(pattern, member.name):
                        content = archive.extractfile(member)
                        assert content is not None
                        yield member.name, content.read()


def _fetched(name: str, variable: str, package: str, follow: str | None, pattern: str) -> Found:
    named = os.environ.get(variable)
    if named:
        given = Path(named)
        return Found(given) if given.is_file() else Found(None, f"{variable}={named} is not a file")
    ready = cache_dir() / name
    if ready.is_file():
        return Found(ready)
    try:
        with locked(name) as target:
            if not target.is_file():
                deb = download(package, follow)
                try:
                    place(target, _member_of_deb(deb, pattern))
                finally:
                    shutil.rmtree(deb.parent, ignore_errors=True)
            return Found(target)
    except Unavailable as error:
        return Found(None, f"no {package}: {error}")


@functools.cache
def debian_kernel() -> Found:
    """Debian's cloud kernel for amd64 (a bzImage), from the cache or by apt."""
    follow = r"Depends: (linux-image-\S*cloud-amd64)"
    return _fetched("vmlinuz", "VMF_KERNEL", KERNEL_PACKAGE, follow, r"\./boot/vmlinuz-.*")


@functools.cache
def kernel_of(package: str) -> Found:
    """The kernel (a bzImage) of another of Debian's packages, `linux-image-amd64` for one, from the cache or by apt."""
    follow = None if re.search(r"\d", package.removesuffix("amd64")) else r"Depends: (linux-image-\S*amd64)"
    return _fetched(f"vmlinuz-{package}", "", package, follow, r"\./boot/vmlinuz-.*")


@functools.cache
def busybox() -> Found:
    """A statically linked busybox for amd64, from the cache or by apt."""
    return _fetched("busybox", "VMF_BUSYBOX", BUSYBOX_PACKAGE, None, r"\./(usr/)?bin/busybox")


@functools.cache
def memtest() -> Found:
    """memtest86+ for x86-64 (a bzImage without a packed kernel), from the cache or by apt."""
    return _fetched("memtest86+x64", "VMF_MEMTEST_FILE", "memtest86+", None, r"\./boot/(memtest86\+x64\.bin|mt86\+x64)")


@functools.cache
def selfcheck() -> Found:
    """The self-checking guest program (`guest/selfcheck.c`), compiled statically, again when it changes."""
    return compiled("selfcheck")


def compiled(program: str, folder: Path = _HERE) -> Found:
    """One of the C programs in `guest/` (or in another tree's), compiled statically, again when it changes."""
    return _compiled(program, folder, _COMPILE, _LIBRARIES)


@functools.cache
def entry32() -> Found:
    """The 32-bit program (`guest/entry32.c`) that enters the kernel in every way, compiled without a C library."""
    return _compiled("entry32", _HERE, _COMPILE_32, ())


def _compiled(program: str, folder: Path, options: tuple[str, ...], libraries: tuple[str, ...]) -> Found:
    source = folder / f"{program}.c"
    digest = hashlib.sha256(source.read_bytes() + " ".join(options).encode()).hexdigest()[:16]
    try:
        with locked(f"{program}-{digest}") as target:
            if not target.is_file():
                with tempfile.TemporaryDirectory(prefix="vmf-cc-") as work:
                    built = Path(work) / program
                    run(["gcc", *options, "-o", str(built), str(source), *libraries], Path(work))
                    place(target, built.read_bytes())
            return Found(target)
    except Unavailable as error:
        return Found(None, f"no guest program {program}: {error}")


@frozen
class LinuxGuest:
    """What a machine needs to boot."""

    kernel: Path
    initrd: Path
    cmdline: str = CMDLINE


def linux_guest(command: str | None = None, files: Mapping[str, bytes] | None = None) -> LinuxGuest:
    """The Debian kernel and an initrd (in the cache) that runs `command` on the console, or a shell.

    Raises FileNotFoundError with one line when kernel or busybox cannot be had here.
    """
    kernel, box = debian_kernel().require(), busybox().require()
    init = SHELL_INIT if command is None else COMMAND_INIT.format(command=command)
    image = initrd(box.read_bytes(), init, files)
    name = f"initrd-{hashlib.sha256(image).hexdigest()[:16]}"
    try:
        with locked(name) as target:
            if not target.is_file():
                place(target, image)
            return LinuxGuest(kernel, target)
    except Unavailable as error:
        raise FileNotFoundError(str(error)) from error


def selfcheck_guest(arguments: str = "run") -> LinuxGuest:
    """`linux_guest` that runs the self-checking program, see `guest/selfcheck.c` for its arguments.

    Raises FileNotFoundError with one line when something cannot be had here.
    """
    program = selfcheck().require().read_bytes()
    return linux_guest(f"/bin/selfcheck {arguments}", {"bin/selfcheck": program})


def main() -> int:
    """Write a kernel and an initrd with a shell."""
    parser = argparse.ArgumentParser(prog="python3 -m vmf.testing.guests", description=main.__doc__)
    parser.add_argument("--kernel", type=Path, help="where to put Debian's cloud kernel")
    parser.add_argument("--initrd", type=Path, help="where to put an initrd with a busybox shell")
    options = parser.parse_args()
    if options.kernel is None and options.initrd is None:
        parser.error("give --kernel, --initrd or both")
    try:
        guest = linux_guest()
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    for source, target in ((guest.kernel, options.kernel), (guest.initrd, options.initrd)):
        if target is not None:
            shutil.copyfile(source, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
