"""What goes into the lab for one job, and what comes out of it: tar archives on raw virtio disks.

A tar archive ends by itself (two zero blocks), so it needs neither a file system nor a length on a disk that is
larger than it is. The guest writes it with one command and no mount, and a run that was cut off leaves a disk of
zeros or an archive without its status, which is told from a finished one.
"""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from kvmlab.packages import GENERATED, TREE
from vmf.testing.guests import compiled

HERE = Path(__file__).resolve().parent
SECTOR = 512

TREE_PARTS = ("pyproject.toml", "tests", "examples", "benchmarks", "plugins/*/tests", "plugins/*/pyproject.toml")
"""What of the tree is copied to /lab/tree: tests and what they read. The sources come as wheels."""


@frozen
class Outcome:
    """What the lab wrote when its job had ended: the command's exit status, and seconds since the lab's boot."""

    status: int
    started: float
    ended: float


def _tree_files() -> Iterator[tuple[str, Path]]:
    for pattern in TREE_PARTS:
        for start in sorted(TREE.glob(pattern)):
            for path in sorted(start.rglob("*")) if start.is_dir() else [start]:
                relative = path.relative_to(TREE)
                generated = any(Path(part).match(name) for part in relative.parts for name in GENERATED)
                if path.is_file() and not generated:
                    yield str(relative), path


def write_job(
    disk: Path,
    sites: Sequence[Path],
    command: Sequence[str],
    *,
    timeout: float,
    slowdown: int = 1,
    files: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Write the disk with the project's packages, the tests and the command.

    Args:
        sites: directories of installed packages, together they become /lab/site.
        command: runs in /lab/tree, the copy of the project's tests.
        timeout: seconds for the command alone, outside; slowdown: how many of them are one inside.
        files: more files or directories, by their place under /lab.
        environment: more variables for the command.
    """
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (environment or {}).items())
    with tarfile.open(disk, "w", format=tarfile.GNU_FORMAT) as archive:
        _text(archive, "init", (HERE / "job-init.sh").read_text(), 0o755)
        _text(archive, "settings", f"LAB_TIMEOUT={max(1, round(timeout / slowdown))}\nVMF_LAB_SLOWDOWN={slowdown}\n")
        _text(archive, "command", f"{exports}exec {shlex.join(command)}\n")
        for site in sites:
            archive.add(site, "site")
        for name, path in _tree_files():
            archive.add(path, f"tree/{name}")
        for name in ("selfcheck", "diskcheck"):  # the lab has no compiler; the tree's, as its wheels will look for them
            if (program := compiled(name, TREE / "framework/src/vmf/testing/guest").path) is not None:
                archive.add(program, f"cache/guests/{program.name}")
        for name, path in (files or {}).items():
            archive.add(path, name.strip("/"))
    with disk.open("ab") as file:
        file.truncate(-(-disk.stat().st_size // SECTOR) * SECTOR)


def _text(archive: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(text.encode()), mode
    archive.addfile(member, io.BytesIO(text.encode()))


def make_results_disk(disk: Path, size_mib: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size_mib << 20)


def read_results(disk: Path, directory: Path) -> Outcome | None:
    """Unpack what the lab wrote: its results, and its kernel log as `dmesg`. None when it did not get that far."""
    try:
        with tarfile.open(disk, "r:") as archive:
            # An argument of extractall from Python 3.11.4 on; Debian 12 has an older one.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(directory)
        started, ended = (directory / "uptime").read_text().split()
        outcome = Outcome(int((directory / "status").read_text()), float(started), float(ended))
    except (tarfile.TarError, FileNotFoundError, ValueError):
        return None
    for name in ("status", "uptime"):
        (directory / name).unlink()
    return outcome
