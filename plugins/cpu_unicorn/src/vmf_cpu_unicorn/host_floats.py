"""Floating point by the host's processor, where the C extension is there; its theory stands at the top of _floats.c.

Without the extension, on a host without SSE4.2, when the engine's image is not as expected, or with
VMF_UNICORN_FLOATS=engine, the engine computes in software. What differs then: docs/explanation/engine-deviations.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from vmf_cpu_unicorn import layout as at

FLOATS_VARIABLE = "VMF_UNICORN_FLOATS"


def install(handle: int, address: Mapping[str, int]) -> bool:
    """Replace the engine's helpers in the library that dlopen gave `handle` for, before its first engine is opened."""
    if os.environ.get(FLOATS_VARIABLE) == "engine":
        return False
    try:
        from vmf_cpu_unicorn import _floats
    except ImportError:
        return False
    functions = (
        "raise_exception_ra", "raise_exception_err_ra", "cpu_lduw_data_ra",
        "cpu_ldl_data_ra", "cpu_ldq_data_ra", "cpu_stw_data_ra", "cpu_stl_data_ra", "cpu_stq_data_ra",
    )  # fmt: skip
    offsets = (
        at.REGS, at.CC_SRC, at.CR, at.MXCSR, at.XMM,
        at.FPSTT, at.FPUS, at.FPUC, at.FPTAGS, at.FPREGS, at.FPCS, at.FPDS, at.FPIP, at.FPDP, at.FT0,
    )  # fmt: skip
    values = (*(address[name] for name in functions), *offsets)
    return _floats.install(handle, struct.pack(f"={len(values)}Q", *values))
