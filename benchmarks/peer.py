"""The peer that the benchmarks run beside vmf: QEMU from the distribution, emulating (TCG) as Unicorn does.

Each `Qemu` is one process with its serial port in a file and its monitor (QMP) on a socket pair; it ends with us.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = shutil.which("qemu-system-x86_64")


def version() -> str:
    """Like "QEMU 7.2.22", or "" when there is none."""
    if PROGRAM is None:
        return ""
    line = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return "QEMU " + line.split()[3]


class Qemu:
    """One QEMU process running a Linux guest."""

    def __init__(
        self,
        kernel: Path,
        initrd: Path,
        cmdline: str,
        memory_mib: int,
        *,
        machine: str = "microvm,acpi=off,rtc=on,pit=on,pic=on,isa-serial=on",
        incoming: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        """`extra`: more of the command line, disks say."""
        assert PROGRAM is not None
        ours, theirs = socket.socketpair()
        self._directory = tempfile.TemporaryDirectory(prefix="vmf-peer-")
        self.log = Path(self._directory.name) / "serial"
        self.log.touch()
        command = [
            *(PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-M", machine, "-accel", "tcg"),
            *("-cpu", "max", "-smp", "1", "-m", f"{memory_mib}M"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline),
            *("-chardev", f"file,id=serial,path={self.log}", "-serial", "chardev:serial"),
            *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"),
        ]
        command += extra
        if incoming:
            command += ["-incoming", "defer"]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self._monitor = ours.makefile("rw", encoding="utf-8", newline="\n")
        ours.settimeout(60)
        self._socket = ours
        greeting = self._monitor.readline()
        if not greeting:
            assert self.process.stderr is not None
            raise RuntimeError(f"QEMU did not start: {self.process.stderr.read().decode()}")
        self.command("qmp_capabilities")

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def command(self, execute: str, **arguments: Any) -> Any:
        """One QMP command; its result."""
        self._monitor.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "error" in answer:
                raise RuntimeError(f"QEMU: {execute}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def output(self) -> bytes:
        return self.log.read_bytes()

    def wait_for_output(self, text: bytes, timeout: float = 120) -> float:
        """Seconds from the process's start until `text` stands in the serial output."""
        end = time.monotonic() + timeout
        while text not in self.output():
            if time.monotonic() > end:
                raise RuntimeError(f"no {text!r} from QEMU's guest: ...{self.output()[-300:]!r}")
            time.sleep(0.005)
        return time.monotonic() - self.started

    def listen(self) -> int:
        """Wait for a migration on loopback (made with `incoming`); the port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        self.command("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        return port

    def migrate(self, port: int, max_downtime_ms: int, timeout: float = 300) -> dict[str, Any]:
        """Migrate to a QEMU that listens; QEMU's own account of it, with "wall-time" in ms added."""
        self.command("migrate-set-parameters", **{"max-bandwidth": 100 << 30, "downtime-limit": max_downtime_ms})
        started = time.monotonic()
        self.command("migrate", uri=f"tcp:127.0.0.1:{port}")
        while True:
            status: dict[str, Any] = self.command("query-migrate")
            if status["status"] == "completed":
                status["wall-time"] = (time.monotonic() - started) * 1000
                return status
            if status["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"QEMU's migration {status['status']}: {status.get('error-desc')}")
            if time.monotonic() - started > timeout:
                raise RuntimeError(f"QEMU's migration did not end within {timeout} s: {status}")
            time.sleep(0.005)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._socket.close()
        self._directory.cleanup()
