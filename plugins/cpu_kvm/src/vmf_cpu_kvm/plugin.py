"""The entry point `kvm` in group `vmf.cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmf.plugins import API_VERSION, hookimpl

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend

vmf_api_version = API_VERSION


@hookimpl
def vmf_cpu_backend() -> CpuBackend:
    from vmf_cpu_kvm.backend import KvmBackend

    return KvmBackend()
