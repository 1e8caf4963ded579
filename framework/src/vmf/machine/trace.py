"""Tracing a running machine: every instruction with its bytes and what it changed, while interrupts and time go on.

Theory of operation
    The machine's vCPU is exchanged (see `vmf.machine.switch`) for a tracing one of a backend that has them, and put
    back afterwards: a machine on KVM is watched in Unicorn for a moment and then runs on KVM again. The vCPU it had
    is kept, stopped, so that the way back needs nothing new.

    Records flow from the vCPU thread through a bounded queue to the thread that asked for the trace, which
    disassembles, formats and writes. When it lags behind, the guest waits: in slices of a few milliseconds in which
    the vCPU does not run but its thread still obeys (a pause, a power-off). Guest time goes on meanwhile. As soon as
    there are records enough, the machine gets its vCPU back, before the rest is written.

    The trace ends early, with what there is, when it is cancelled, or when the machine fails or is powered off.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from vmf.cpu.backend import CpuBackend, ExitReason, Vcpu, VmExit
from vmf.cpu.state import VcpuState
from vmf.cpu.trace import RecordKind, TraceRecords, continuations
from vmf.errors import BackendUnavailable, MachineError, StateError, VmfError
from vmf.machine import switch
from vmf.machine.trace_format import TraceFormat, TraceHeader
from vmf.memory.scattered import Ranges

if TYPE_CHECKING:
    from vmf.cpuid.table import CpuidTable
    from vmf.machine.hardware import Hardware
    from vmf.plugins.bridge import PluginRegistry

MAX_QUEUED = 16
"""Batches (of some hundred records, a few hundred bytes each) that may wait to be written."""
HOLD_NS = 5_000_000
"""How long the vCPU thread waits for the writer before it looks for other work."""
PROGRESS_SECONDS = 0.5
WAIT_SECONDS = 0.2

ProgressCallback = Callable[[dict[str, Any]], None]


@frozen
class TraceSummary:
    """A trace that was written.

    Attributes:
        instructions: how many (a repeated string instruction counts once).
        events: exceptions and interrupts among them.
        complete: whether these are all that were asked for.
        reason: why not, one line.
        backend: the one that traced.
        machine_backend: the one that the machine runs on otherwise.
        output: the file.
        traced_ns: how long the machine was being traced.
        stopped_ns: how long the guest stood still for the two exchanges.
    """

    instructions: int
    events: int
    complete: bool
    reason: str
    backend: str
    machine_backend: str
    output: str
    traced_ns: int
    stopped_ns: int


def choose_tracer(registry: PluginRegistry, name: str, hardware: Hardware, level: int) -> CpuBackend:
    """The backend to trace with: the machine's own if it can, else the first that can and honours the contract.

    Raises BackendUnavailable naming each candidate's reason, or TeleportBlocked when the contract is what is wrong.
    """
    if hardware.backend.can_trace:
        return hardware.backend
    reasons = []
    fitting = [backend for backend in registry.cpu_backends() if backend.can_trace]
    blocked: VmfError | None = None
    for backend in fitting:
        here = backend.availability()
        if not here.usable:
            reasons.append(f"{backend.name}: {here.reason.rstrip('.')}. {here.remedy}".strip())
            continue
        try:
            switch.check(name, hardware, backend, level)
        except VmfError as error:
            blocked = error
            continue
        return backend
    if blocked is not None:
        raise blocked
    raise BackendUnavailable(
        f"machine {name} runs on {hardware.backend.name}, which cannot trace, and no other CPU backend can here."
        + "".join(f" {reason}" for reason in reasons),
        "" if reasons else "Install one: pip install vmf-cpu-unicorn.",
    )


def open_output(path: Path) -> tuple[IO[str], bool]:
    """The file, with what is in it, and whether it was made; only its owner may read one that was, since a trace shows
    what the guest works with."""
    try:
        # Non-blocking, so that a pipe that nobody reads is an error and not a wait.
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor, made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            descriptor, made = os.open(path, flags), False
        os.set_blocking(descriptor, True)
        return open(descriptor, "w", encoding="utf-8", buffering=1 << 20), made
    except OSError as error:
        raise MachineError(
            f"the trace cannot be written to {path}: {error.strerror or error}.", "Give another file with --output."
        ) from error


class _GuardedVcpu(Vcpu):
    """The tracing vCPU, held back while the writer lags behind."""

    def __init__(self, session: TraceSession) -> None:
        self._session = session
        self.real: Vcpu

    def run(self, deadline_ns: int | None) -> VmExit:
        if self._session.held_back(deadline_ns):
            return VmExit(ExitReason.KICKED)
        return self.real.run(deadline_ns)

    def halted_for_good(self) -> bool:
        return self.real.halted_for_good()

    def kick(self) -> None:
        self.real.kick()

    def save(self) -> VcpuState:
        return self.real.save()

    def restore(self, state: VcpuState) -> None:
        self.real.restore(state)

    def read_cpuid(self) -> CpuidTable | None:
        return self.real.read_cpuid()

    def read_tsc(self) -> int:
        return self.real.read_tsc()

    def write_tsc(self, value: int) -> None:
        self.real.write_tsc(value)

    def invalidate_code(self, gpa: int, size: int) -> None:
        self.real.invalidate_code(gpa, size)

    def memory_written(self, gpa: int, size: int) -> None:
        self.real.memory_written(gpa, size)

    def ranges_written(self, ranges: Ranges) -> None:
        self.real.ranges_written(ranges)

    def close(self) -> None:
        self.real.close()


class TraceSession:
    """One trace of one machine. `begin`, `write` and `end` on the thread that asked for it, in this order."""

    def __init__(
        self, name: str, hardware: Hardware, tracer: CpuBackend, instructions: int, output: Path, json_lines: bool
    ) -> None:
        """Opens the file, and leaves its content until the trace has begun. Raises MachineError when it cannot."""
        self._name = name
        self._hardware = hardware
        self._tracer = tracer
        self._wanted = instructions
        self._path = output
        self._home = hardware.backend
        self._condition = threading.Condition()
        self._queue: deque[TraceRecords] = deque()
        self._counted = 0
        self._last: TraceRecords | None = None
        self._full = False
        self._reason = ""
        self.done = threading.Event()
        """Set by the machine when it has forgotten this session."""
        self._old: Vcpu | None = None
        self._stopped_ns = 0
        self._begun = self._ended = 0
        self._json_lines = json_lines
        self._file, self._made = open_output(output)
        self._format: TraceFormat

    # -- from any thread

    def cancel(self, reason: str = "cancelled") -> None:
        """End it early."""
        with self._condition:
            if not self._full:
                self._reason = self._reason or reason
            self._condition.notify_all()

    @property
    def _over(self) -> bool:
        return self._full or bool(self._reason)

    # -- on the vCPU thread

    def sink(self, records: TraceRecords) -> None:
        """Take records over from the tracing vCPU."""
        with self._condition:
            if self._over:
                return
            last = self._last
            joined = records if last is None else np.concatenate((last, records))
            begins = (joined["kind"] == RecordKind.INSTRUCTION) & ~continuations(joined)
            if last is not None:
                begins = begins[1:]
            self._last = records[-1:]
            found = np.flatnonzero(begins)
            # One more than wanted: what the last instruction changed is seen in the record that follows it.
            if self._counted + len(found) > self._wanted:
                records = records[: int(found[self._wanted - self._counted]) + 1]
                self._full = True
            self._counted += len(found)
            self._queue.append(records)
            self._condition.notify_all()
            stop = self._full or len(self._queue) >= MAX_QUEUED
        if stop:
            self._hardware.vcpu.kick()

    def held_back(self, deadline_ns: int | None) -> bool:
        """Wait a moment for the writer, if there is more to write than may wait; whether there still is."""
        with self._condition:
            if len(self._queue) < MAX_QUEUED or self._over:
                return False
            end = time.monotonic_ns() + HOLD_NS
            if deadline_ns is not None:
                end = min(end, deadline_ns)
            while len(self._queue) >= MAX_QUEUED and not self._over:
                left = end - time.monotonic_ns()
                if left <= 0:
                    return True
                self._condition.wait(left / 1e9)
            return False

    # -- on the thread that asked for it

    def begin(self) -> None:
        """Exchange the vCPU, and empty the file. Raises VmfError; then machine and file are as before."""
        try:
            self._exchange()
        except BaseException:
            self.close()
            if self._made:
                self._path.unlink(missing_ok=True)
            raise
        now, clock = datetime.now(UTC), self._hardware.clock
        header = TraceHeader(self._name, self._home.name, self._tracer.name, self._wanted, now, clock.now())
        try:
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                os.ftruncate(self._file.fileno(), 0)
        except OSError as error:
            self.end()
            raise self._unwritable(error) from error
        self._format = TraceFormat(self._file.write, header, self._json_lines)
        self._begun = time.monotonic_ns()

    def _exchange(self) -> None:
        guarded = _GuardedVcpu(self)
        guarded.real = self._tracer.create_tracing_vcpu(self._hardware.vcpu_environment(), self.sink)
        try:
            self._old, self._stopped_ns = switch.exchange(self._hardware, self._tracer, guarded)
        except BaseException:
            guarded.close()
            raise

    def write(self, progress: ProgressCallback | None) -> None:
        """Write what comes until there is enough or it is cancelled. Raises MachineError when the file is full."""
        shown = time.monotonic()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._queue) or self._over, WAIT_SECONDS)
                if self._over:
                    return
                batch = self._queue.popleft() if self._queue else None
                self._condition.notify_all()
            if batch is not None:
                self._put(batch)
            now = time.monotonic()
            if progress is not None and now - shown >= PROGRESS_SECONDS:
                shown = now
                progress(self._status())

    def end(self) -> None:
        """Give the machine its vCPU back. Raises MachineError when it must stay on the tracing backend."""
        old, self._old = self._old, None
        if old is None:
            return
        self._ended = time.monotonic_ns()
        hardware = self._hardware
        try:
            tracing, stopped_ns = switch.exchange(hardware, self._home, old)
        except StateError as error:
            old.close()
            if self._tracer is not self._home:
                with contextlib.suppress(VmfError):
                    switch.switch(self._name, hardware, self._tracer, 0)
            raise MachineError(
                f"machine {self._name} was traced, but cannot go back to the CPU backend {self._home.name} and stays"
                f" on {self._tracer.name}: {error.message}",
                f"Try again with `vmf controlvm {self._name} switch-backend {self._home.name}`.",
            ) from error
        except BaseException:
            old.close()
            raise
        self._stopped_ns += stopped_ns
        tracing.close()

    def finish(self, progress: ProgressCallback | None) -> TraceSummary:
        """Write the rest. Raises MachineError when the file is full."""
        shown = time.monotonic()
        while self._queue:
            self._put(self._queue.popleft())
            if progress is not None and time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                progress(self._status())
        complete = self._full
        try:
            self._format.finish(complete, self._reason)
        except OSError as error:
            raise self._unwritable(error) from error
        self.close()
        form = self._format
        return TraceSummary(
            form.instructions, form.events, complete, "" if complete else self._reason, self._tracer.name,
            self._home.name, str(self._path), self._ended - self._begun, self._stopped_ns,
        )  # fmt: skip

    def close(self) -> None:
        """Close the file; idempotent."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _put(self, batch: TraceRecords) -> None:
        try:
            self._format.add(batch)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> MachineError:
        return MachineError(
            f"the trace cannot be written to {self._path}: {error.strerror or error}.",
            "Make room there, or give another file with --output.",
        )

    def _status(self) -> dict[str, Any]:
        seconds = (time.monotonic_ns() - self._begun) / 1e9
        done = self._format.instructions
        return {
            "phase": "tracing" if not self._over else "writing",
            "instructions": done,
            "wanted": self._wanted,
            "per_second": round(done / seconds) if seconds > 0 else 0,
        }
