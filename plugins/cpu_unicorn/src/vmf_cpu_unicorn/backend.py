"""The backend: availability, capability, vCPUs."""

from __future__ import annotations

import threading

from vmf.cpu.backend import Availability, CpuBackend, VcpuEnvironment
from vmf.cpu.trace import TraceSink
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable, StateError, VmfError
from vmf_cpu_unicorn import cpuid, engine, gates, tsc
from vmf_cpu_unicorn.vcpu import ADDRESS_BITS, UnicornVcpu


class UnicornBackend(CpuBackend):
    """Runs anywhere where the `unicorn` wheel runs (Linux x86-64); needs no KVM, no root and no compiler."""

    name = "unicorn"
    preference = 10
    can_trace = True
    caveat = "docs/explanation/engine-deviations.md lists the instructions that do otherwise here."

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._availability: Availability | None = None

    def availability(self) -> Availability:
        with self._lock:
            if self._availability is None:
                self._availability = self._look()
            return self._availability

    @staticmethod
    def _look() -> Availability:
        try:
            library = engine.load()
            gate = gates.chosen_gate()
            from vmf_cpu_unicorn.selftest import verify

            verify(library)
        except VmfError as error:
            return Availability(False, error.message, error.remedy)
        except Exception as error:  # noqa: BLE001 - never raises: whatever is wrong is a reason, not a crash
            return Availability(False, f"The Unicorn engine cannot be used: {type(error).__name__}: {error}.")
        floats = "host" if library.host_floats else "engine's"
        return Availability(True, version=f"{library.version} ({gate} gate, {floats} floating point)")

    def cpuid_capability(self) -> CpuidTable:
        return cpuid.capability(self.tsc_khz(), ADDRESS_BITS)

    def tsc_khz(self) -> int:
        return tsc.host_tsc_khz()

    def create_vcpu(self, environment: VcpuEnvironment) -> UnicornVcpu:
        self._check(environment)
        return UnicornVcpu(engine.load(), environment, self.tsc_khz())

    def create_tracing_vcpu(self, environment: VcpuEnvironment, sink: TraceSink) -> UnicornVcpu:
        from vmf_cpu_unicorn.tracing import TracingVcpu, verify

        self._check(environment)
        verify(engine.load())
        return TracingVcpu(engine.load(), environment, self.tsc_khz(), sink)

    def _check(self, environment: VcpuEnvironment) -> None:
        available = self.availability()
        if not available.usable:
            raise BackendUnavailable(available.reason, available.remedy)
        if not self.tsc_khz_supported(environment.tsc_khz):
            raise StateError(
                f"The machine's TSC runs at {environment.tsc_khz} kHz; the Unicorn backend gives "
                f"{self.tsc_khz()} kHz on this host and cannot scale it.",
                "Run the machine on a host with that TSC rate.",
            )
