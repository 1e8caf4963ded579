"""Hosts for tests, benchmarks and demonstrations: state directories with real machine processes.

A `Host` is what another computer would be: a `VMF_HOME` of its own, machines in processes of their own. Everything it
starts ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attrs import evolve

from vmf.control.client import ControlClient
from vmf.control.process import spawn_detached
from vmf.errors import MachineError, VmfError
from vmf.machine.config import MachineConfig, TeleporterConfig
from vmf.machine.home import Home


class Host:
    """One host below a directory."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.home = Home(directory, directory / "run")
        self.environment = {**os.environ, **(environment or {}), "VMF_HOME": str(directory)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def define(self, config: MachineConfig) -> None:
        """Define a machine, or replace its definition."""
        if config.name in self.home.names():
            self.home.update(config.name, lambda _old: config)
        else:
            self.home.create(config)

    def start(self, name: str) -> dict[str, Any]:
        """Boot a machine in a process of its own; returns when it runs."""
        self._teleporter(name, enabled=False)
        return spawn_detached(self.home, name, environment=self.environment)

    def wait(self, name: str, **settings: Any) -> int:
        """Start a machine that waits for a teleport on loopback; the port. `settings` as in TeleporterConfig."""
        self._teleporter(name, enabled=True, **settings)
        ready = spawn_detached(self.home, name, environment=self.environment)
        return int(ready["address"].rpartition(":")[2])

    def _teleporter(self, name: str, *, enabled: bool, **settings: Any) -> None:
        teleporter = TeleporterConfig(enabled=enabled, **{"port": 0, "address": "127.0.0.1", **settings})
        self.home.update(name, lambda old: evolve(old, teleporter=teleporter))

    def client(self, name: str) -> ControlClient:
        return ControlClient.of(self.home, name)

    def state(self, name: str) -> str:
        """The machine's state, from its process or from its last run."""
        try:
            with self.client(name) as client:
                return str(client.info()["state"])
        except VmfError:
            return self.home.resting_state(name)

    def wait_for_state(self, name: str, *states: str, timeout: float = 30) -> str:
        end = time.monotonic() + timeout
        while (state := self.state(name)) not in states:
            if time.monotonic() > end:
                raise MachineError(f"machine {name} is {state}, not {' or '.join(states)}, after {timeout} s.")
            time.sleep(0.02)
        return state

    def pid(self, name: str) -> int | None:
        """Of the machine's process, when it lives."""
        record = self.home.process(name)
        return None if record is None else record.pid

    def wait_gone(self, name: str, timeout: float = 30) -> None:
        """Until the machine's process has ended."""
        end = time.monotonic() + timeout
        while self.home.process(name) is not None:
            if time.monotonic() > end:
                raise MachineError(f"the process of machine {name} has not ended after {timeout} s.")
            time.sleep(0.01)

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to the machine's process."""
        if (pid := self.pid(name)) is not None:
            os.kill(pid, signal_number)

    def output(self, name: str) -> bytes:
        """What the guest wrote to its serial port since the machine's process started here."""
        try:
            return self.home.paths(name).console_log.read_bytes()
        except FileNotFoundError:
            return b""

    def wait_for_output(self, name: str, text: bytes, timeout: float = 60) -> bytes:
        """Until `text` stands in the output; the whole output."""
        end = time.monotonic() + timeout
        while text not in (output := self.output(name)):
            if time.monotonic() > end:
                raise MachineError(f"no {text!r} on the console of {name} after {timeout} s: ...{output[-500:]!r}")
            time.sleep(0.01)
        return output

    def wait_for_more(self, name: str, text: bytes = b"tick ", timeout: float = 60) -> None:
        """Until the guest has written `text` twice more than it has now: it lives."""
        before = self.output(name).count(text)
        end = time.monotonic() + timeout
        while (output := self.output(name)).count(text) < before + 2:
            if time.monotonic() > end:
                raise MachineError(f"no more {text!r} on the console of {name}: ...{output[-300:]!r}")
            time.sleep(0.02)

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `vmf` on this host; with `environment`."""
        return [sys.executable, "-m", "vmf.cli", *arguments]

    def vmf(self, *arguments: str, timeout: float = 60, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Run the `vmf` command on this host."""
        command = self.command(*arguments)
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, **keywords
        )

    def close(self) -> None:
        """Kill whatever still runs here."""
        for name in self.home.running():
            self.kill(name, signal.SIGKILL)
