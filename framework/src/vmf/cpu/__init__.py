"""The CPU seam: what a backend implements, and the neutral vCPU state that all backends speak."""

from vmf.cpu.backend import Availability, CpuBackend, ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import DescriptorTable, PendingEvents, Segment, VcpuState

__all__ = [
    "Availability",
    "CpuBackend",
    "DescriptorTable",
    "ExitReason",
    "PendingEvents",
    "Segment",
    "Vcpu",
    "VcpuEnvironment",
    "VcpuState",
    "VmExit",
]
