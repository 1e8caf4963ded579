"""The lab as its users see it: build it, run a command in it, look at what came back."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from kvmlab import base as base_module
from kvmlab import job, needs, packages, qemu
from kvmlab.base import Base
from kvmlab.errors import LabError, LabHung
from kvmlab.slowclock import SlowClock, slow_clock

BOOT_SECONDS = 180.0
"""Allowed for booting and for writing the results, beside the command's own time; a quiet machine needs 10."""


@frozen
class LabResult:
    """What came back from the lab.

    Attributes:
        status: the command's exit status; 124 when its time was over.
        timed_out: the command was ended because its time was over.
        stdout, stderr: what it printed.
        console: the lab's kernel console.
        directory: what it wrote to $VMF_LAB_RESULTS is in `results` here, its kernel log is `dmesg`.
        boot_seconds: from the start of QEMU's guest to that of the command; command_seconds: what the command took;
            total_seconds: the whole run, preparation included. All by this machine's clock.
    """

    status: int
    timed_out: bool
    stdout: str
    stderr: str
    console: str
    directory: Path
    boot_seconds: float
    command_seconds: float
    total_seconds: float

    @property
    def results(self) -> Path:
        return self.directory / "results"


def missing() -> list[str]:
    """What this machine lacks to run the lab, one line each; empty when it can."""
    return needs.missing(base_is_built=base_module.is_built())


@frozen
class Lab:
    """A built lab. Any number of runs may be under way at once; each has a machine of its own."""

    base: Base
    dependencies: Path
    clock: SlowClock = field(factory=SlowClock)

    @classmethod
    def build(cls, *, fresh: bool = False) -> Lab:
        """Make what is not in the cache yet. Raises LabUnavailable when this machine cannot, LabError when it fails.

        Args:
            fresh: make everything anew, with the archive's newest packages.
        """
        base = base_module.base(fresh=fresh)
        return cls(base, packages.dependencies_image(base.python, fresh=fresh), slow_clock())

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = 300.0,
        directory: Path | None = None,
        files: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        memory_mib: int = 2048,
        processors: int = 2,
        cpu: str = qemu.CPU,
        results_mib: int = 512,
        echo: qemu.Echo | None = None,
    ) -> LabResult:
        """Run a command in a newly booted lab and bring back what it printed and wrote.

        It starts in /lab/tree, where the project's tests, examples and benchmarks are; the project is installed for
        /usr/bin/python3. In its environment: VMF_LAB=1 and VMF_LAB_RESULTS, a directory whose content comes back. The
        guests of `vmf.testing.guests` are there: the stock Debian kernel, busybox, the self-checking program.

        Args:
            command: program and arguments.
            timeout: seconds for the command, by this machine's clock (the lab's is slower, see `kvmlab.slowclock`);
                the lab's boot is not counted.
            directory: where to put the results; must be empty or missing. Default: a new temporary directory.
            files: more files or directories to take along, by their place under /lab.
            environment: more variables for the command.
            cpu: QEMU's description of the lab's processors.
            results_mib: how much may come back.
            echo: called with what is printed, as it is.

        Raises LabError when the lab did not come up or hung; a command that fails is a result.
        """
        began = time.monotonic()
        target = Path(tempfile.mkdtemp(prefix="vmf-lab-")) if directory is None else directory
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise LabError(f"{target} is not empty.", "Name another directory for the results.")
        with tempfile.TemporaryDirectory(prefix="vmf-lab-") as name:
            work = Path(name)
            job.write_job(
                work / "job", packages.sites(self.base.python), command,
                timeout=timeout, slowdown=self.clock.factor, files=files, environment=environment,
            )  # fmt: skip
            job.make_results_disk(work / "disk", results_mib)
            disks = (
                (self.base.root_image, False),
                (self.dependencies, False),
                (work / "job", False),
                (work / "disk", True),
            )
            machine = qemu.Hardware(self.base.vmlinuz, self.base.initrd, disks, memory_mib, processors, cpu)
            finished = qemu.run(machine, work, timeout + BOOT_SECONDS, echo, self.clock.environment())
            printed = {name: _text(work / name) for name in ("stdout", "stderr", "console")}
            outcome = job.read_results(work / "disk", target)
        if outcome is None:
            shutil.rmtree(target, ignore_errors=True)
            tail = "\n".join((printed["stdout"] + printed["stderr"] + printed["console"]).splitlines()[-25:])
            if not finished:
                raise LabHung(f"the lab hung and was killed; its last words:\n{tail}")
            raise LabError(f"the lab ended without results; its last words:\n{tail}")
        slowdown = self.clock.factor
        command_seconds = (outcome.ended - outcome.started) * slowdown
        return LabResult(
            status=outcome.status,
            timed_out=outcome.status in (124, 137) and command_seconds >= timeout - slowdown,
            **printed,
            directory=target,
            boot_seconds=outcome.started * slowdown,
            command_seconds=command_seconds,
            total_seconds=time.monotonic() - began,
        )

    def pytest(self, arguments: Sequence[str], **options: object) -> LabResult:
        """Run pytest in the lab; `results/junit.xml` comes back. Options as for `run`."""
        return self.run(pytest_command(arguments), **options)  # type: ignore[arg-type]


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """How pytest is called in the lab."""
    return ["python3", "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=/lab/out/results/junit.xml", *arguments]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
