"""What stands between the engine and vmf, in two interchangeable forms.

`native` is the C extension `_gate`: fastest, slices end without the GIL. `python` needs no compiler: a few
hand-assembled instructions where native code is indispensable, and ctypes callbacks for the rest.
`VMF_UNICORN_GATE=native|python` forces one; otherwise native is used when it was built.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from attrs import frozen

from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable
from vmf_cpu_unicorn.engine import Engine

GATE_VARIABLE = "VMF_UNICORN_GATE"

EXIT_KICKED = 0
EXIT_HALTED = 1
EXIT_SHUTDOWN = 2
EXIT_ERROR = 3


@frozen
class Handlers:
    """Where the guest's accesses go. `pending` and `acknowledge` are the interrupt controller's."""

    port_read: Callable[[int, int], int]
    port_write: Callable[[int, int, int], None]
    mmio_read: Callable[[int, int], int]
    mmio_write: Callable[[int, int, int], None]
    pending: Callable[[], bool]
    acknowledge: Callable[[], int]


class Gate(Protocol):
    """Everything here on the vCPU thread, except `kick`."""

    def hooks(self) -> Mapping[str, int]:
        """Addresses of the callbacks for the engine: exception, invalid, syscall, sysenter, in, out, cpuid, mmio_read,
        mmio_write, vector_read, vector_write; and `user`, the pointer to pass to them."""

    def mmio_window(self, base: int, /) -> int:
        """The pointer to pass to the MMIO callbacks of a window at guest-physical `base`."""

    def run(self, deadline_ns: int | None, /) -> int:
        """Execute until one of the EXIT_ reasons."""

    def kick(self) -> None:
        """End the present or the next `run` soon."""

    def take_error(self) -> tuple[BaseException | None, int]:
        """After EXIT_ERROR: what a callback raised, or the engine's error code."""

    def get_events(self) -> tuple[bool, int, int, int, bool]:
        """(halted, vector in flight or -1, exception to raise or -1, its error code, NMI waits)."""

    def set_events(self, halted: bool, inflight: int, exception: int, code: int, nmi_pending: bool, /) -> None:
        """The inverse; forgets what else was requested."""

    def close(self) -> None:
        """Stop helpers; idempotent. `run` must not be called any more."""


def chosen_gate() -> str:
    """Either "native" or "python". Raises BackendUnavailable when the environment asks for what is not there."""
    wish = os.environ.get(GATE_VARIABLE, "")
    if wish not in ("", "native", "python"):
        raise BackendUnavailable(
            f"{GATE_VARIABLE} is {wish!r}.", f"Set {GATE_VARIABLE} to native or python, or leave it unset."
        )
    if wish == "python":
        return wish
    try:
        import vmf_cpu_unicorn._gate  # noqa: F401
    except ImportError as error:
        if wish == "native":
            raise BackendUnavailable(
                f"The native gate of vmf-cpu-unicorn was not built: {error}.",
                f"Install a C compiler and reinstall vmf-cpu-unicorn, or unset {GATE_VARIABLE}.",
            ) from error
        return "python"
    return "native"


def make_gate(engine: Engine, cpu: int, cpuid: CpuidTable, handlers: Handlers, vector_page: int) -> Gate:
    """A gate of the chosen kind for the engine's CPU at address `cpu`."""
    if chosen_gate() == "native":
        from vmf_cpu_unicorn.gate_native import make_native_gate

        return make_native_gate(engine, cpu, cpuid, handlers, vector_page)
    from vmf_cpu_unicorn.gate_python import PythonGate

    return PythonGate(engine, cpu, cpuid, handlers, vector_page)
