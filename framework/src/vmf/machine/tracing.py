"""The traces of one machine: who may start one, how it is cancelled. A trace itself is `vmf.machine.trace`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf.errors import InvalidStateError, MachineError
from vmf.machine.states import MachineState

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.machine.trace import TraceSession, TraceSummary

END_SECONDS = 30.0
"""How long a cancelled trace may take to end."""


class Tracing:
    """At most one trace at a time; `Machine`'s methods are its public face."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._session: TraceSession | None = None

    @property
    def under_way(self) -> bool:
        return self._session is not None

    def run(
        self, instructions: int, output: Path, json_lines: bool, progress: Callable[[dict[str, Any]], None] | None
    ) -> TraceSummary:
        from vmf.machine.trace import TraceSession, choose_tracer

        if instructions < 1:
            raise MachineError(f"a trace of {instructions} instructions is none.", "Ask for at least one.")
        machine = self._machine
        with machine.operation:
            if machine.state is not MachineState.RUNNING:
                raise machine.illegal("traced", "running")
            self.refuse("traced")
            hardware = machine.hardware
            tracer = choose_tracer(machine.registry, machine.name, hardware, machine.level)
            session = TraceSession(machine.name, hardware, tracer, instructions, output, json_lines)
            session.begin()
            self._session = session
        try:
            try:
                session.write(progress)
            finally:
                session.end()
            return session.finish(progress)
        finally:
            self._session = None
            session.done.set()
            session.close()

    def cancel(self, *, wait: bool, reason: str) -> bool:
        session = self._session
        if session is None:
            return False
        session.cancel(reason)
        if wait:
            session.done.wait(END_SECONDS)
        return True

    def refuse(self, action: str) -> None:
        """Raise InvalidStateError while a trace is under way."""
        if self._session is not None:
            name = self._machine.name
            raise InvalidStateError(
                f"machine {name} is being traced and cannot be {action} now.",
                f"Wait for it, or cancel it with `vmf controlvm {name} trace --cancel`.",
            )
