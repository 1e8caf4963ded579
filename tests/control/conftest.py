"""A machine that is all pretence, to test the process around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vmf.control.client import ControlClient
from vmf.control.console import ConsoleServer
from vmf.control.server import ControlServer
from vmf.errors import InvalidStateError, OperationCancelled, TeleportBlocked, TeleportCancelled
from vmf.machine.config import MachineConfig
from vmf.machine.home import Home
from vmf.teleport.check import Blocker


class FakeMachine:
    """Implements `ControlledMachine`; the console echoes."""

    def __init__(self, name: str = "vm") -> None:
        self.name = name
        self.state = "poweredoff"
        self.changed = threading.Condition()
        self.listeners: list[Callable[[str, str], None]] = []
        self.console: list[Callable[[bytes], None]] = []
        self.cancel = threading.Event()
        self.trace_cancelled = threading.Event()
        self.operation_cancelled = threading.Event()
        self.why = ""
        self.room = 1 << 30
        self.closed = False

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state}

    def set(self, new: str) -> None:
        with self.changed:
            old, self.state = self.state, new
            self.changed.notify_all()
        for listener in self.listeners:
            listener(old, new)

    def start(self) -> None:
        self.set("running")

    def listen(self) -> str:
        self.cancel.clear()
        self.set("teleportingin")
        return "tcp:127.0.0.1:4711"

    def wait_for_teleport(self, progress: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        progress({"role": "target", "phase": "waiting"})
        if self.cancel.wait(30):
            self.set("poweredoff")
            raise TeleportCancelled("the wait for a teleport was cancelled.")
        self.set("running")
        return {"rounds": 1}

    def _need(self, state: str) -> None:
        if self.state != state:
            raise InvalidStateError(f"machine {self.name} is {self.state}.", "Do something else.")

    def pause(self) -> None:
        self._need("running")
        self.set("paused")

    def resume(self) -> None:
        self._need("paused")
        self.set("running")

    def power_off(self) -> None:
        self.cancel.set()
        if self.state == "poweredoff":
            raise InvalidStateError("it is off.")
        self.set("poweredoff")

    def reset(self) -> None:
        raise ZeroDivisionError("a bug")

    def start_teleport(
        self,
        host: str,
        port: int,
        transport: str,
        max_downtime_ms: int,
        timeout_s: float | None,
        progress: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        self.cancel.clear()
        if host == "blocked":
            raise TeleportBlocked("no.", "Change it.", (Blocker("memory", "1", "2", "Set it."),))
        self.set("teleporting")
        for number in range(1, 4):
            progress({"role": "source", "phase": "precopy", "round": number, "sent_bytes": number << 20})
        if host == "slow" and self.cancel.wait(30):
            self.set("running")
            raise TeleportCancelled("the teleport was cancelled.")
        self.set("teleported")
        return {"rounds": 3, "downtime_ns": 5, "asked": [host, port, transport, max_downtime_ms, timeout_s]}

    def check_teleport(self, host: str, port: int, transport: str) -> dict[str, Any]:
        self._need("running")
        blockers = [{"field": "memory", "source": "1", "target": "2", "remedy": "Set it."}] if host == "blocked" else []
        return {"ok": not blockers, "target": f"{transport}:{host}:{port}", "blockers": blockers}

    def cancel_teleport(self) -> bool:
        active = self.state.startswith("teleporting")
        self.cancel.set()
        return active

    def switch_backend(self, backend: str) -> dict[str, Any]:
        self._need("running")
        return {"before": "fake", "after": backend, "stopped_ns": 1, "total_ns": 2}

    def change_medium(self, port: int, medium: str) -> None:
        self._need("running")
        self.media = {port: medium}

    def trace(
        self, instructions: int, output: str, json_lines: bool, progress: Callable[[Mapping[str, Any]], None]
    ) -> dict[str, Any]:
        self._need("running")
        progress({"phase": "tracing", "instructions": 1, "wanted": instructions, "per_second": 1})
        self.trace_cancelled.wait(10 if instructions > 1000 else 0)
        complete = not self.trace_cancelled.is_set()
        return {"instructions": instructions, "output": output, "json_lines": json_lines, "complete": complete}

    def use_snapshots(self, store: object) -> None: ...

    def take_snapshot(
        self, name: str, description: str, progress: Callable[[Mapping[str, Any]], None]
    ) -> dict[str, Any]:
        progress({"what": "memory", "done": 1, "total": 2})
        if not self.operation_cancelled.wait(30):
            return {"name": name}
        raise OperationCancelled(f"the snapshot '{name}' was cancelled: {self.why}.")

    def cancel_operation(self, reason: str = "") -> str:
        self.why = reason
        self.operation_cancelled.set()
        return "the snapshot"

    def cancel_trace(self) -> bool:
        self.trace_cancelled.set()
        return True

    def teleport_status(self) -> dict[str, Any]:
        return {"active": self.state.startswith("teleporting"), "role": "", "progress": {}, "summary": None}

    def console_write(self, data: bytes) -> int:
        taken = min(len(data), self.room)
        self.room -= taken
        self.print(data[:taken])
        return taken

    def print(self, data: bytes) -> None:
        for listener in self.console:
            listener(data)

    def add_console_listener(self, listener: Callable[[bytes], None]) -> None:
        self.console.append(listener)

    def add_state_listener(self, listener: Callable[[str, str], None]) -> None:
        self.listeners.append(listener)

    def wait_finished(self) -> str:
        with self.changed:
            self.changed.wait_for(lambda: self.state in ("poweredoff", "teleported"))
            return self.state

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake_class() -> type[FakeMachine]:
    return FakeMachine


@pytest.fixture(params=["short", "long"])
def home(tmp_path: Path, request: pytest.FixtureRequest) -> Home:
    """A home with machine "vm"; once with paths longer than a socket's address may be."""
    root = tmp_path
    if request.param == "long":
        root = tmp_path / ("d" * 100) / ("e" * 100)
        root.mkdir(parents=True)
    made = Home(root, root / "run")
    made.create(MachineConfig(name="vm", memory_mib=1))
    return made


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def server(home: Home, machine: FakeMachine) -> Iterator[ControlServer]:
    """A served, running machine that this process owns."""
    with home.own("vm") as paths:
        made = ControlServer(machine, paths.control_socket)
        made.start()
        machine.start()
        yield made
        made.close()


@pytest.fixture
def client(home: Home, server: ControlServer) -> Iterator[ControlClient]:
    with ControlClient.of(home, "vm") as made:
        yield made


@pytest.fixture
def console(home: Home, machine: FakeMachine) -> Iterator[ConsoleServer]:
    with home.own("vm") as paths:
        made = ConsoleServer(machine.console_write, paths)
        machine.add_console_listener(made.output)
        made.start()
        yield made
        made.close()
