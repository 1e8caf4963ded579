"""A vCPU whose every instruction is recorded; recorder.py has the theory."""

from __future__ import annotations

from functools import lru_cache

from attrs import evolve

from vmf.cpu.backend import VcpuEnvironment, VmExit
from vmf.cpu.state import VcpuState
from vmf.cpu.trace import RecordKind, TraceRecords, TraceSink
from vmf.device.interrupts import InterruptController
from vmf.errors import BackendUnavailable
from vmf_cpu_unicorn.engine import HOOK_BLOCK, HOOK_INSN_INVALID, HOOK_INTR, REQUIRED_VERSION, Library
from vmf_cpu_unicorn.recorder import Recorder
from vmf_cpu_unicorn.vcpu import UnicornVcpu


class _Watched:
    """The machine's interrupt controller, seen by the engine: asked before every slice, so that is where a slice is
    prepared; and told of every interrupt that is taken."""

    def __init__(self, real: InterruptController) -> None:
        self._pending, self._acknowledge = real.pending, real.acknowledge
        self.vcpu: TracingVcpu | None = None

    def pending(self) -> bool:
        if self.vcpu is not None:
            self.vcpu.prepare()
        return self._pending()

    def acknowledge(self) -> int:
        vector = self._acknowledge()
        if self.vcpu is not None:
            self.vcpu.recorder.interrupt(vector)
        return vector


class TracingVcpu(UnicornVcpu):
    """See `CpuBackend.create_tracing_vcpu`."""

    recorder: Recorder

    def __init__(self, library: Library, environment: VcpuEnvironment, tsc_khz: int, sink: TraceSink) -> None:
        self._sink = sink
        watched = _Watched(environment.interrupts)
        self._announce = -1
        super().__init__(library, evolve(environment, interrupts=watched), tsc_khz)
        watched.vcpu = self
        self.recorder.active = True

    def _install_hooks(self) -> None:
        # Before the gate's: for an exception the first is called while the state is still that of the instruction.
        recorder = self.recorder = Recorder(self._engine)
        for kind, name in ((HOOK_BLOCK, "block"), (HOOK_INTR, "exception"), (HOOK_INSN_INVALID, "invalid")):
            self._engine.hook(kind, recorder.hook(name), recorder.user)
        super()._install_hooks()

    def prepare(self) -> None:
        """Before a slice, and whenever a device has been accessed."""
        recorder = self.recorder
        if recorder.full:
            self._sink(recorder.take_most())
        recorder.arm()

    def run(self, deadline_ns: int | None) -> VmExit:
        recorder = self.recorder
        if self._announce >= 0:
            # Acknowledged on another backend; the gate delivers it first of all.
            recorder.interrupt(self._announce)
            self._announce = -1
        result = super().run(deadline_ns)
        records = recorder.take_ended()
        if len(records):
            self._sink(records)
        return result

    def restore(self, state: VcpuState) -> None:
        super().restore(state)
        self._announce = -1 if state.events.interrupt is None else state.events.interrupt


@lru_cache(maxsize=1)
def verify(library: Library) -> None:
    """Raises BackendUnavailable unless a small guest is recorded instruction by instruction; cached."""
    from vmf_cpu_unicorn.selftest_guest import CODE, Bench

    batches: list[TraceRecords] = []
    bench = Bench(library, tsc_khz=1_000_000)
    try:
        plain = bench.vcpu
        bench.vcpu = vcpu = TracingVcpu(library, bench.environment, 1_000_000, batches.append)
        plain.close()
        # mov eax,7; inc rax; ud2 (left behind by its handler); hlt
        bench.execute(bytes.fromhex("b807000000 48ffc0 0f0b f4"), bench.state(r15=CODE + 10))
        vcpu.recorder.active = False
    finally:
        bench.close()
    rows = [row for batch in batches for row in batch]
    found = [(int(row["kind"]), int(row["linear"]) - CODE, int(row["registers"][0])) for row in rows]
    wanted = [(0, 0, 0), (0, 5, 7), (0, 8, 8), (int(RecordKind.EXCEPTION), 8, 8)]
    if found[:4] != wanted or not found or found[-1][:2] != (0, 10):
        raise BackendUnavailable(
            "This build of the Unicorn engine does not execute single instructions as the known one does.",
            f"Reinstall the engine: `pip install --force-reinstall unicorn=={REQUIRED_VERSION}`.",
        )
