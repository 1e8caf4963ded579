"""The KVM backend."""

from __future__ import annotations

import os
import platform
from functools import cached_property
from typing import Final

from vmf.cpu.backend import Availability, CpuBackend, Vcpu, VcpuEnvironment
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable
from vmf_cpu_kvm import cpuid, host, selftest
from vmf_cpu_kvm.vcpu import KvmVcpu

TRUST_VARIABLE: Final = "VMF_KVM_TRUST"
"""Environment: "1" uses a KVM that failed the self-test all the same."""


def _trusted() -> bool:
    return os.environ.get(TRUST_VARIABLE, "") not in ("", "0")


class KvmBackend(CpuBackend):
    """Runs guests on the CPU itself, by the kernel's KVM."""

    name = "kvm"
    preference = 100

    def __init__(self) -> None:
        self._device = -1
        self._host: host.HostKvm | None = None
        self._refusal: BackendUnavailable | None = None
        self._problems: list[str] | None = None

    def __del__(self) -> None:
        if self._device >= 0:
            os.close(self._device)

    def _open(self) -> host.HostKvm:
        """Open the device once; raises BackendUnavailable."""
        if self._host is None:
            if self._refusal is not None:
                raise self._refusal
            try:
                device = host.open_device()
                try:
                    self._host = host.read_host(device)
                except BaseException:
                    os.close(device)
                    raise
                self._device = device
            except BackendUnavailable as error:
                self._refusal = error
                raise
        return self._host

    def availability(self) -> Availability:
        """Whether KVM is there, may be used, and keeps a machine's contract (see `vmf_cpu_kvm.selftest`)."""
        version = f"Linux {platform.release()}"
        try:
            here = self._open()
        except BackendUnavailable as error:
            return Availability(False, error.message, error.remedy, version)
        if _trusted():
            return Availability(True, version=f"{version}, trusted by {TRUST_VARIABLE}")
        if self._problems is None:
            self._problems = selftest.verdict(self._device, here)
        if self._problems:
            return Availability(
                False,
                f"this host's KVM does not keep a machine's CPU contract: {'; '.join(self._problems)}",
                "Use the Unicorn backend here, or a host with VMX or SVM"
                f" ({TRUST_VARIABLE}=1 overrides this, for tests).",
                version,
            )
        return Availability(True, version=version)

    @cached_property
    def _capability(self) -> CpuidTable:
        here = self._open()
        return cpuid.capability(here.supported_cpuid, here.tsc_khz)

    def cpuid_capability(self) -> CpuidTable:
        return self._capability

    def tsc_khz(self) -> int:
        return self._open().tsc_khz

    def tsc_khz_supported(self, khz: int) -> bool:
        """Any rate where the CPU scales the TSC; otherwise within 250 ppm of the native one."""
        return khz > 0 and (self._open().tsc_control or super().tsc_khz_supported(khz))

    def create_vcpu(self, environment: VcpuEnvironment) -> Vcpu:
        here = self._open()
        availability = self.availability()
        if not availability.usable:
            raise BackendUnavailable(availability.reason, availability.remedy)
        return KvmVcpu(self._device, here, environment, strict=not _trusted())

    def create_logging_vcpu(self, environment: VcpuEnvironment) -> KvmVcpu:
        """A vCPU whose writes KVM logs, for `vmf_cpu_kvm.dirtylog`."""
        return KvmVcpu(self._device, self._open(), environment, strict=not _trusted(), dirty_log=True)
