"""The entry point `vmf.cpu: unicorn`. Importing it loads neither the engine nor NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vmf.plugins

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend

vmf_api_version = 1


@vmf.plugins.hookimpl
def vmf_cpu_backend() -> CpuBackend:
    from vmf_cpu_unicorn.backend import UnicornBackend

    return UnicornBackend()
