"""Small machines for the tests of cpu_kvm: memory, a bus that records, a toy interrupt controller, and guests.

Needs pytest and vmf only (hypothesis is used by one test module, which is skipped without it), so that these tests
can be carried into the KVM lab. Everything that needs /dev/kvm is skipped, with the reason, where there is none.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from vmf.cpu.backend import CpuBackend, ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    GENERAL_REGISTERS,
    MSR_IA32_PAT,
    REQUIRED_MSRS,
    DescriptorTable,
    Segment,
    VcpuState,
)
from vmf.cpuid.contract import make_contract
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable
from vmf.machine.bus import Bus
from vmf.memory.guest import GuestMemory

CODE_AT = 0x10000
TICKS_AT = 0x14000
STACK_TOP = 0x1C000
MMIO_HOLE = 0xE000_0000
MEMORY = 2 << 20
VECTOR = 0x40

WORKLOAD = bytes.fromhex(
    "488d0542000000bf0024010066890766c74702080066c74704008e48c1e81066894706c74708"
    "000000000f011d3d0000006a23680080010068020200006a2b488d053a0000005048cf50488b"
    "04250040010048ffc04889042500400100b020e6205848cf0f1f4000000000000000ff0f0020"
    "0100000000000f1f84000000000048bb157c4a7fb979379e66480f6ec349bcefcdab89674523"
    "0166490f6efc41bd801f0000dbe3d9eed9e8bd000100004889d848c1e00d4831c34889d848c1"
    "e8074831c34889d848c1e0114831c3660f6fc8660f73f10d660fefc1660f6fc8660f73d10766"
    "0fefc1660f6fc8660f73f111660fefc1dcc1ffcd75b566480f7ec14839d9753866480f7ef94c"
    "39e1752ed9c14883ec08df3c2459f6c1ff751f48c1e90849ffc64c39f17513bae00500e0891a"
    "660f7ec0894204e96effffffbae80500e0891aebf7"
)
"""workload.S"""
WORKLOAD_AVX = bytes.fromhex(
    "488d0542000000bf0024010066890766c74702080066c74704008e48c1e81066894706c74708000000000f011d3d0000006a"
    "23680080010068020200006a2b488d053a0000005048cf50488b04250040010048ffc04889042500400100b020e6205848cf"
    "0f1f4000000000000000ff0f00200100000000000f1f84000000000048bb157c4a7fb979379e66480f6ec349bcefcdab8967"
    "45230166490f6efc41bd801f0000c461f96ecbc4433d18c101c441f96eccc4432d18d101c4432518d901c4431d18e101c443"
    "1518e901c4430d18f101c4430518f901dbe3d9eed9e8bd000100004889d848c1e00d4831c34889d848c1e8074831c34889d8"
    "48c1e0114831c3660f6fc8660f73f10d660fefc1660f6fc8660f73d107660fefc1660f6fc8660f73f111660fefc1c4437d19"
    "c101c4c16973f10dc531efcac4c16973d107c531efcac4c16973f111c531efcac4433d18c101dcc1ffcd758b66480f7ec148"
    "39d90f85b000000066480f7ef94c39e10f85a2000000c4437d19c101c461f97ec94839d90f858e000000c4437d19d101c461"
    "f97ec94c39e1757ec4437d19d901c461f97ec94c39e1756ec4437d19e101c461f97ec94c39e1755ec4437d19e901c461f97e"
    "c94c39e1754ec4437d19f101c461f97ec94c39e1753ec4437d19f901c461f97ec94c39e1752ed9c14883ec08df3c2459f6c1"
    "ff751f48c1e90849ffc64c39f17513bae00500e0891a660f7ec0894204e9c8feffffbae80500e0891aebf7"
)


class ToyPic:
    """One interrupt source: `raise_` asserts it, acknowledging clears it."""

    def __init__(self) -> None:
        self.requests = 0
        self.acknowledged = 0
        self.vector = VECTOR

    def raise_(self) -> None:
        self.requests += 1

    def pending(self) -> bool:
        return self.requests > 0

    def acknowledge(self) -> int:
        if self.requests:
            self.requests -= 1
            self.acknowledged += 1
        return self.vector


class Recorder:
    """An I/O handler that notes every access and answers from `answers` (or with all ones)."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.answer: Callable[[int, int], int] = lambda offset, size: (1 << 8 * size) - 1
        self.on_write: Callable[[int, int, int], None] | None = None

    def io_read(self, offset: int, size: int) -> int:
        self.reads.append((self.base + offset, size))
        return self.answer(offset, size)

    def io_write(self, offset: int, size: int, value: int) -> None:
        if self.on_write is not None:
            self.on_write(self.base + offset, size, value)
        else:
            self.writes.append((self.base + offset, size, value))


class Rig:
    """A machine without vmf.machine around it: memory, bus, interrupt controller and one vCPU of any backend."""

    def __init__(
        self,
        backend: CpuBackend,
        contract: CpuidTable | None = None,
        tsc_khz: int | None = None,
        memory: GuestMemory | None = None,
    ) -> None:
        self.backend = backend
        self.owns_memory = memory is None
        self.memory = memory or GuestMemory(MEMORY)
        self.bus = Bus()
        self.pic = ToyPic()
        self.ports = Recorder(0x500)
        self.bus.claim_ports("test", 0x500, 0x100, self.ports)
        self.mmio = Recorder(MMIO_HOLE)
        self.bus.claim_mmio("test", MMIO_HOLE, 0x1000, self.mmio)
        self.contract = contract or make_contract(backend.cpuid_capability())
        self.tsc_khz = tsc_khz or backend.tsc_khz()
        self.vcpu: Vcpu = backend.create_vcpu(
            VcpuEnvironment(self.memory, self.bus, self.pic, self.contract, self.tsc_khz)
        )
        self.vcpu.write_tsc(1 << 51)
        self.tsc_can_be_set = self.vcpu.read_tsc() >= 1 << 51
        """Not on PVM: its guests have the host's."""

    def close(self) -> None:
        self.vcpu.close()
        if self.owns_memory:
            self.memory.close()

    def load(self, code: bytes, *, rflags: int = 2, registers: dict[str, int] | None = None) -> None:
        """Page tables, GDT, TSS and `code`; the vCPU stands before its first instruction in ring 0."""
        load_guest(self.memory, code)
        self.vcpu.restore(entry_state(self.tsc_khz, rflags=rflags, registers=registers))

    def run(self, seconds: float = 0.5) -> VmExit:
        """One slice."""
        return self.vcpu.run(time.monotonic_ns() + int(seconds * 1e9))

    def run_to_halt(self, seconds: float = 5.0) -> None:
        exit_ = self.run(seconds)
        assert exit_.reason is ExitReason.HALTED, exit_

    def registers(self) -> dict[str, int]:
        return dict(self.vcpu.save().registers)


def load_guest(memory: GuestMemory, code: bytes) -> None:
    user = 7  # present, writable, user
    memory.write(0x1000, struct.pack("<Q", 0x2000 | user))
    directories = [0x3000, 0x4000, 0x5000, 0x6000]
    memory.write(0x2000, struct.pack("<4Q", *(directory | user for directory in directories)))
    for gib, directory in enumerate(directories):
        entries = ((gib << 30) + (i << 21) | 0x80 | user for i in range(512))
        memory.write(directory, struct.pack("<512Q", *entries))
    gdt = (
        0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
        0x00008B0007000067, 0,
    )  # fmt: skip
    memory.write(0x500, struct.pack("<8Q", *gdt))
    memory.write(0x700, bytes(4) + struct.pack("<Q", STACK_TOP) + bytes(0x68 - 12))
    memory.write(CODE_AT, code)


def entry_state(tsc_khz: int, *, rflags: int = 2, registers: dict[str, int] | None = None) -> VcpuState:
    data = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data)
    segments["cs"] = Segment(0x08, 0, 0xFFFF_FFFF, 0xA09B)
    values = {**dict.fromkeys(GENERAL_REGISTERS, 0), "rsp": STACK_TOP, **(registers or {})}
    msrs = dict.fromkeys(sorted(REQUIRED_MSRS), 0)
    msrs[MSR_IA32_PAT] = 0x0007_0406_0007_0406
    return VcpuState(
        registers=values,
        rip=CODE_AT,
        rflags=rflags,
        segments=segments,
        ldtr=Segment(0, 0, 0, 1 << 16),
        tr=Segment(0x30, 0x700, 0x67, 0x8B),
        gdtr=DescriptorTable(0x500, 63),
        idtr=DescriptorTable(0, 0),
        cr0=0x80050033,
        cr3=0x1000,
        cr4=0x620,
        efer=0xD01,
        msrs=msrs,
        tsc_khz=tsc_khz,
    )


class Workload:
    """Watches a guest that executes workload.S: its outputs must be the generator's, each once and in order."""

    def __init__(self, rig: Rig) -> None:
        self.state = 0x9E3779B97F4A7C15
        self.outputs = 0
        self.problem = ""
        self.expected_sse: int | None = None
        self.attach(rig)

    def attach(self, rig: Rig) -> None:
        rig.mmio.on_write = self._written

    def _written(self, gpa: int, size: int, value: int) -> None:
        if gpa == MMIO_HOLE + 0x5E0:
            x = self.state
            for _ in range(256):
                x ^= x << 13 & 0xFFFF_FFFF_FFFF_FFFF
                x ^= x >> 7
                x ^= x << 17 & 0xFFFF_FFFF_FFFF_FFFF
            self.state = x
            self.expected_sse = x & 0xFFFF_FFFF
            self.outputs += 1
            if value != self.expected_sse:
                self.problem = self.problem or f"output {self.outputs}: {value:#x}, not {self.expected_sse:#x}"
        elif gpa == MMIO_HOLE + 0x5E4:
            if value != self.expected_sse:
                self.problem = self.problem or f"SSE output {self.outputs}: {value:#x}, not {self.expected_sse}"
            self.expected_sse = None
        else:
            self.problem = self.problem or f"the guest found a mismatch after output {self.outputs} ({gpa:#x})"

    def has_more_than(self, outputs: int) -> bool:
        """So many outputs, or a reason to wait no longer."""
        return bool(self.problem) or self.outputs > outputs

    def check(self) -> None:
        assert not self.problem, self.problem


class Kicks:
    """Kicks a vCPU every so often from a thread of its own while in the `with` block."""

    def __init__(self, vcpu: Vcpu, every: float) -> None:
        self.vcpu, self.every, self.count = vcpu, every, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self._stop.wait(self.every):
            self.vcpu.kick()
            self.count += 1

    def __enter__(self) -> Kicks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def kvm() -> Iterator[CpuBackend]:
    """The KVM backend, trusted: small guests work on any KVM. Skips when there is no KVM.

    For a module only: other modules' tests in the same process choose a backend as users do.
    """
    from vmf_cpu_kvm.backend import TRUST_VARIABLE, KvmBackend

    interval = sys.getswitchinterval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRUST_VARIABLE, "1")
        sys.setswitchinterval(0.0005)  # as vmf.machine.vcpu_thread does
        backend = KvmBackend()
        try:
            backend.tsc_khz()
        except BackendUnavailable as error:
            pytest.skip(f"no usable KVM: {error}")
        try:
            yield backend
        finally:
            sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def pvm(kvm: CpuBackend) -> bool:
    """Whether this is a KVM that fails the self-test: a few exact semantics are not to be had of it."""
    from vmf_cpu_kvm import selftest

    backend: Any = kvm
    return bool(selftest.run_selftest(backend._device, backend._open()))


@pytest.fixture
def make_rig(kvm: CpuBackend) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(backend: CpuBackend | None = None, **options: Any) -> Rig:
        rigs.append(Rig(backend or kvm, **options))
        return rigs[-1]

    yield make
    for rig in reversed(rigs):
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, for test modules: `kit.Workload` ..."""
    return sys.modules[__name__]


def changed(state: VcpuState, **fields: Any) -> VcpuState:
    """A state with some fields changed."""
    return attrs.evolve(state, **fields)
