"""The entry point's module: says for which vmf it is, and gives the backend."""

from __future__ import annotations

from vmf.cpu.backend import CpuBackend
from vmf.plugins import hookimpl

vmf_api_version = 1


@hookimpl
def vmf_cpu_backend() -> CpuBackend:
    from vmf_cpu_stepper.backend import StepperBackend

    return StepperBackend()
