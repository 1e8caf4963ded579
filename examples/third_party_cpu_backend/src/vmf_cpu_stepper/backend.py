"""The backend: whether it works here, what it can present, and vCPUs."""

from __future__ import annotations

import importlib.metadata

from vmf.cpu.backend import Availability, CpuBackend, Vcpu, VcpuEnvironment
from vmf.cpuid.features import features, with_features
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import BackendUnavailable

PRESENTED = (
    *("fpu", "pse", "msr", "pae", "cx8", "pge", "cmov", "pat", "clflush", "mmx", "fxsr", "sse", "sse2"),
    *("syscall", "nx", "lm"),
)
"""What the engine executes *and* this backend carries: the x86-64 baseline. Not `tsc`, as the engine's cannot be set;
not `apic`, as there is none; nothing whose state `Vcpu.save` would not see."""
SIGNATURE = 0x000506C9
ADDRESS_BITS = 39


class StepperBackend(CpuBackend):
    """Executes one instruction after the other. Exact, and slow: about a million a second."""

    name = "stepper"
    preference = 1  # below every other: `auto` takes it when nothing else suits

    def availability(self) -> Availability:
        try:
            return Availability(True, version=importlib.metadata.version("unicorn"))
        except importlib.metadata.PackageNotFoundError:
            return Availability(False, "the Python package unicorn is not installed.", "pip install unicorn")

    def cpuid_capability(self) -> CpuidTable:
        """A table of numbers, and the features by name. No vendor: it presents that of any machine."""
        numbers = {
            (0x0, 0): CpuidRegisters(0x1),
            (0x1, 0): CpuidRegisters(SIGNATURE, 8 << 8),  # CLFLUSH lines of 8 * 8 bytes
            (0x8000_0000, 0): CpuidRegisters(0x8000_0008),
            (0x8000_0008, 0): CpuidRegisters(48 << 8 | ADDRESS_BITS),
        }
        return with_features(CpuidTable(numbers), features(PRESENTED))

    def tsc_khz(self) -> int:
        return 1_000_000

    def tsc_khz_supported(self, khz: int) -> bool:
        """It counts a TSC that no guest can read: at any rate."""
        return khz > 0

    def create_vcpu(self, environment: VcpuEnvironment) -> Vcpu:
        here = self.availability()
        if not here.usable:
            raise BackendUnavailable(here.reason, here.remedy)
        from vmf_cpu_stepper.vcpu import StepperVcpu

        return StepperVcpu(environment)
