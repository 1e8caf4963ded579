"""One run of the lab's machine: QEMU, from its start to its certain end.

The machine is Linux on an emulated AMD processor with SVM and nested paging, so kvm-amd inside it offers the real
/dev/kvm semantics. Two serial ports of virtio carry the command's standard output and error as they are written; the
UART carries the kernel's console. QEMU is killed when its time is over, when this process is interrupted, and by the
kernel when this process dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import field, frozen

from kvmlab import needs
from kvmlab.errors import LabError

CPU = "max,+svm,+npt"
POLL_SECONDS = 0.05
LOST_TIMER = b"kthread timer wakeup didn't happen"
"""Of Linux's RCU stall detector, kernel/rcu/tree_stall.h; first after 21 seconds, then every 63."""
_PR_SET_PDEATHSIG = 1  # prctl(2)

Echo = Callable[[str, bytes], None]
"""Called with "stdout", "stderr" or "console" and what arrived there."""


@frozen
class Hardware:
    """The lab's machine: its kernel and initrd, its disks in the order vda, vdb, ..., memory in MiB, processors."""

    kernel: Path
    initrd: Path
    disks: tuple[tuple[Path, bool], ...]
    """Image and whether the machine may write to it."""
    memory_mib: int = 2048
    processors: int = 2
    cpu: str = CPU
    cmdline: str = "console=ttyS0 panic=-1 mitigations=off tsc=reliable loglevel=5 no_timer_check"
    """no_timer_check: that check waits for a number of TSC cycles, too short with a slow clock (`slowclock`)."""
    streams: tuple[str, ...] = field(default=("stdout", "stderr"))

    def arguments(self, directory: Path) -> list[str]:
        """QEMU's command line; the streams and the console are written to `directory`."""
        arguments = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"]
        arguments += ["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", self.cpu]
        arguments += ["-smp", str(self.processors), "-m", str(self.memory_mib)]
        arguments += ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", self.cmdline]
        arguments += [
            "-chardev",
            f"file,id=console,path={_quoted(directory / 'console')}",
            "-serial",
            "chardev:console",
        ]
        for disk, writable in self.disks:
            access = "cache=unsafe" if writable else "readonly=on"
            arguments += ["-drive", f"file={_quoted(disk)},if=virtio,format=raw,{access}"]
        arguments += ["-device", "virtio-serial-pci"]
        for number, name in enumerate(self.streams, 1):
            arguments += ["-chardev", f"file,id={name},path={_quoted(directory / name)}"]
            arguments += ["-device", f"virtserialport,chardev={name},nr={number},name={name}"]
        return arguments


def _quoted(path: Path) -> str:
    """A path in one of QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


def run(
    hardware: Hardware,
    directory: Path,
    timeout: float,
    echo: Echo | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Run the machine until it switches itself off; False when it had to be killed, after `timeout` seconds or because
    it hangs (`lost_timer`).

    `environment`: more variables for QEMU.

    Raises LabError when QEMU itself fails.
    """
    command = [needs.which("qemu-system-x86_64") or "qemu-system-x86_64", *hardware.arguments(directory)]
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    streams = {name: directory / name for name in (*hardware.streams, "console")}
    read = dict.fromkeys(streams, 0)
    end = time.monotonic() + timeout
    with (directory / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < end and not lost_timer(streams["console"]):
                time.sleep(POLL_SECONDS)
                _pass_on(streams, read, echo)
            finished = process.poll() is not None
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    _pass_on(streams, read, echo)
    if finished and process.returncode:
        said = (directory / "qemu.log").read_text(errors="replace").strip()
        raise LabError(f"QEMU ended with status {process.returncode}: {said}")
    return finished


def lost_timer(console: Path) -> bool:
    """Whether a processor of the lab gets no timer interrupts any more: its kernel has said so twice, a minute apart.

    Seen with QEMU 7.2 and guests of nested SVM, now and then: that processor sleeps for ever, QEMU idles or spins, and
    nothing that is still to come needs to be waited for.
    """
    return console.exists() and console.read_bytes().count(LOST_TIMER) >= 2


def _pass_on(streams: dict[str, Path], read: dict[str, int], echo: Echo | None) -> None:
    """Hand what has been written since the last call to `echo`."""
    if echo is None:
        return
    for name, path in streams.items():
        if path.exists():
            with path.open("rb") as file:
                file.seek(read[name])
                if data := file.read():
                    read[name] += len(data)
                    echo(name, data)
