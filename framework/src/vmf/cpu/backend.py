"""What a CPU backend plugin implements.

Ownership: one thread per vCPU owns everything about it. `Vcpu.run`, `save`, `restore` and all device and interrupt
code are called on that thread only; `kick` may be called from any thread at any time. A vCPU may be made on another
thread (while the machine's present one still runs), and is then the vCPU thread's.

Time: the TSC the guest reads is `host time based` while the vCPU exists; the core reads and writes it with
`read_tsc`/`write_tsc` around pauses so that guest time does what the machine says (see `vmf.machine.clock`).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs import frozen

from vmf.cpu.state import RFLAGS_IF, VcpuState
from vmf.errors import BackendUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from vmf.cpu.trace import TraceSink
    from vmf.cpuid.table import CpuidTable
    from vmf.device.interrupts import InterruptController
    from vmf.machine.bus import Bus
    from vmf.memory.guest import GuestMemory
    from vmf.memory.scattered import Ranges


class ExitReason(enum.Enum):
    """Why `Vcpu.run` returned."""

    KICKED = "kicked"
    """`kick()` was called, or the deadline passed."""
    HALTED = "halted"
    """The guest executed HLT; no interrupt is deliverable. With RFLAGS.IF clear only an NMI or reset wakes it."""
    SHUTDOWN = "shutdown"
    """Triple fault."""
    ERROR = "error"
    """The engine cannot go on; `VmExit.detail` says why."""


@frozen
class VmExit:
    """The result of one `Vcpu.run`. `detail` is one line for people, "" unless the reason is ERROR or SHUTDOWN."""

    reason: ExitReason
    detail: str = ""


@frozen
class Availability:
    """Whether a backend can work here. `reason` and `remedy` are one line each, "" when usable.

    `version` is the engine's own version, for people.
    """

    usable: bool
    reason: str = ""
    remedy: str = ""
    version: str = ""


@frozen
class VcpuEnvironment:
    """What a vCPU is made for.

    Attributes:
        memory: guest RAM; the backend maps `memory.regions` at `memory.address + region.offset`.
        bus: where port and MMIO accesses go. Reads of what nobody claims give all ones.
        interrupts: the interrupt controller to poll and acknowledge.
        cpuid: the contract: every CPUID leaf the guest may see. The engine's own CPUID never shows through.
        tsc_khz: rate of the guest's TSC; the backend refuses what it cannot give.
    """

    memory: GuestMemory
    bus: Bus
    interrupts: InterruptController
    cpuid: CpuidTable
    tsc_khz: int


class WriteLog(ABC):
    """An engine's own log of the pages that its guest writes. Any thread, one at a time, while the vCPU exists."""

    @abstractmethod
    def start(self) -> None:
        """From now on. Raises MachineError when the engine refuses."""

    @abstractmethod
    def collect(self) -> npt.NDArray[np.uint64]:
        """Numbers of the pages (of the RAM mapping, ascending) that the guest wrote since `start` or the last call.
        A write during the call is reported by this or by the next one."""

    @abstractmethod
    def stop(self) -> None:
        """End; idempotent."""


class Vcpu(ABC):
    """One virtual CPU. Not thread-safe except `kick`."""

    @abstractmethod
    def run(self, deadline_ns: int | None) -> VmExit:
        """Execute the guest until something ends the slice.

        Before entering and after every port or MMIO access the backend asks `interrupts.pending()` and, as soon as
        the guest can take it (IF set, no shadow), acknowledges and delivers it. It returns HALTED only when no
        interrupt is pending-and-deliverable; the core then sleeps and calls `run` again. What bus or controller raise
        passes through to the core, which knows whose it is.

        Args:
            deadline_ns: `time.monotonic_ns()` value by which to return KICKED (a little late is fine; early is not
                an error), or None for no deadline.
        """

    def halted_for_good(self) -> bool:
        """After `run` returned HALTED: whether interrupts are off (RFLAGS.IF clear), so that no device can wake the
        guest. That is how a Linux without ACPI ends when it is switched off. Override where it is cheaper to tell."""
        return not self.save().rflags & RFLAGS_IF

    @abstractmethod
    def kick(self) -> None:
        """Make the present or the next `run` return KICKED soon. Never lost, callable from any thread."""

    @abstractmethod
    def save(self) -> VcpuState:
        """The complete state; the vCPU is between two instructions and stays usable."""

    @abstractmethod
    def restore(self, state: VcpuState) -> None:
        """Take over a state. Raises StateError, naming the field, when this backend cannot hold it."""

    def read_cpuid(self) -> CpuidTable | None:
        """What the guest really gets from the CPUID instruction, read back from the engine; None where the engine
        cannot tell. The core compares it with the contract and refuses to run a guest that would see anything else.
        Bits that follow the guest's state (OSXSAVE, OSPKE, sizes by XCR0) may be as they are."""
        return None

    @abstractmethod
    def read_tsc(self) -> int:
        """The guest's TSC now."""

    @abstractmethod
    def write_tsc(self, value: int) -> None:
        """Set the guest's TSC; it counts on from there."""

    def write_log(self) -> WriteLog | None:
        """The engine's log of the guest's writes, not started; None where it has none. On any thread."""
        return None

    @abstractmethod
    def invalidate_code(self, gpa: int, size: int) -> None:
        """RAM [gpa, gpa+size) was written from outside the engine: drop anything translated from it."""

    def memory_written(self, gpa: int, size: int) -> None:
        """A device has written RAM [gpa, gpa+size) (DMA): whatever was translated from it is dropped, cheaply.

        Like `invalidate_code`, but on the hot path: called for every transfer, and hardly ever is there code.
        """
        self.invalidate_code(gpa, size)

    def ranges_written(self, ranges: Ranges) -> None:
        """`memory_written` of many pieces at once: rows (gpa, size)."""
        for gpa, size in ranges.tolist():
            self.memory_written(gpa, size)

    @abstractmethod
    def close(self) -> None:
        """Free everything; idempotent."""


class CpuBackend(ABC):
    """A way to execute x86-64 code."""

    name: str
    """As the user writes it in `--cpu-backend`, equal to the entry point's name."""
    preference: int = 0
    """`auto` tries usable backends from the highest preference down (KVM 100, Unicorn 10)."""

    caveat: str = ""
    """What the user should know when a guest comes here from another backend: a sentence that names where more stands.
    Shown by `teleport --check`, after a teleport and by `switch-backend`."""

    @abstractmethod
    def availability(self) -> Availability:
        """Whether it works here; cheap to call twice (cache it), never raises."""

    @abstractmethod
    def cpuid_capability(self) -> CpuidTable:
        """Everything this backend can present *and execute* here: the widest contract it can honour."""

    @abstractmethod
    def tsc_khz(self) -> int:
        """The TSC rate this backend gives a guest by default, kHz."""

    def tsc_khz_supported(self, khz: int) -> bool:
        """Whether a guest TSC of that rate can be given (within 250 ppm of the native rate unless scaling exists)."""
        native = self.tsc_khz()
        return abs(khz - native) * 4000 <= native

    @abstractmethod
    def create_vcpu(self, environment: VcpuEnvironment) -> Vcpu:
        """Make the vCPU of a machine, in its reset state. Raises BackendUnavailable or StateError."""

    can_trace: bool = False
    """Whether `create_tracing_vcpu` works."""

    def create_tracing_vcpu(self, environment: VcpuEnvironment, sink: TraceSink) -> Vcpu:
        """Optional: like `create_vcpu`, but every instruction and event is recorded and handed to `sink`.

        The vCPU must behave to the guest as any other of this backend, only slower: interrupts are delivered, time
        goes on. It hands over records in batches of bounded size, the last ones before `run` returns; an instruction
        is recorded exactly once for each time it is begun. Raises BackendUnavailable, as the default does.
        """
        raise BackendUnavailable(
            f"The CPU backend '{self.name}' cannot trace instructions.", "Use one that can: unicorn."
        )


BackendFactory = Callable[[], CpuBackend]
