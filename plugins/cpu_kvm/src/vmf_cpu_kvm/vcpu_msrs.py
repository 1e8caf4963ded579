"""The MSRs of one vCPU, its TSC among them, by KVM's ioctls. Which MSRs are state: `vmf_cpu_kvm.msrs`.

A guest TSC is the host's (scaled) plus an offset. KVM_SET_MSRS guesses whether a written value was meant to synchronise
with earlier writes, and may ignore it; so the offset itself is set (KVM_VCPU_TSC_OFFSET, Linux 5.16), or where that is
missing, the value is written twice, the first time so far off that no guess is possible.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping

from vmf.cpu.state import REQUIRED_MSRS
from vmf.errors import BackendUnavailable, MachineError, StateError
from vmf_cpu_kvm import abi, msrs

_FAR_OFF = 1 << 52
"""TSC ticks; more than any drift that KVM takes for an attempt to synchronise (one second)."""


class VcpuMsrs:
    """On the vCPU thread, after the vCPU's CPUID has been set, which decides what MSRs it has."""

    def __init__(self, fd: int, listed: Iterable[int], vendor: str) -> None:
        """
        Args:
            fd: of the vCPU.
            listed: what KVM says must be carried (KVM_GET_MSR_INDEX_LIST).
            vendor: of the machine's CPUID.
        """
        self._fd = fd
        self._tsc_entry = abi.buffer(abi.MSRS_HEADER + abi.MSR_ENTRY.size)
        self._offset = abi.buffer(8)
        self._offset_attribute = abi.buffer_of(
            abi.DEVICE_ATTR, 0, abi.VCPU_TSC_CTRL, abi.VCPU_TSC_OFFSET, ctypes.addressof(self._offset)
        )
        self._tsc_by_offset = abi.raw_ioctl(fd, abi.HAS_DEVICE_ATTR, self._offset_attribute) == 0
        self._choose(listed, vendor)

    def _choose(self, listed: Iterable[int], vendor: str) -> None:
        """Find the MSRs that this vCPU has: KVM_GET_MSRS stops at the first that it has not."""
        wanted = msrs.candidates(listed)
        present: list[int] = []
        while wanted:
            buffer = _msr_buffer(dict.fromkeys(wanted, 0))
            got = abi.ioctl(self._fd, abi.GET_MSRS, buffer)
            present += wanted[:got]
            wanted = wanted[got + 1 :]
        if missing := REQUIRED_MSRS - set(present):
            raise BackendUnavailable(f"this KVM has no {msrs.describe(min(missing))}.", "Use another backend.")
        # The guest of an AMD contract loses nothing by that: see amd_value.
        self._half_sysenter = vendor != "GenuineIntel"
        self._present = tuple(present)
        self._buffer = _msr_buffer(dict.fromkeys(present, 0))
        self._format = struct.Struct("<" + "8xQ" * len(present))
        self._resets = {index: msrs.reset_value(index, fresh) for index, fresh in self.read().items()}

    def saved(self) -> dict[int, int]:
        """What belongs into a state: the required ones, and those that are not at rest."""
        return {
            index: value
            for index, value in self.read().items()
            if index in REQUIRED_MSRS or value != self._resets[index]
        }

    def read(self) -> dict[int, int]:
        got = abi.ioctl(self._fd, abi.GET_MSRS, self._buffer)
        if got != len(self._present):
            raise MachineError(f"KVM cannot read {msrs.describe(self._present[got])} any more.")
        values = self._format.unpack_from(self._buffer, abi.MSRS_HEADER)
        return dict(zip(self._present, values, strict=True))

    def write(self, wanted: Mapping[int, int]) -> None:
        """Set what differs: some MSRs read as a constant and refuse every write."""
        current = self.read()
        resets = self._resets
        for index, value in wanted.items():
            if index not in current and value != msrs.reset_value(index):
                raise StateError(f"vCPU state: this vCPU has no {msrs.describe(index)}, which holds {value:#x}.")
        changes = {
            index: target for index, value in current.items() if (target := wanted.get(index, resets[index])) != value
        }
        if not changes:
            return
        done = abi.ioctl(self._fd, abi.SET_MSRS, _msr_buffer(changes))
        if done != len(changes):
            index = list(changes)[done]
            raise StateError(f"vCPU state: KVM does not take {msrs.describe(index)} = {changes[index]:#x}.")
        kept = self.read()
        for index, value in changes.items():
            if kept[index] != value and not (self._half_sysenter and kept[index] == msrs.amd_value(index, value)):
                raise StateError(
                    f"vCPU state: KVM keeps {kept[index]:#x} of {msrs.describe(index)} = {value:#x} for this CPU."
                )

    # -- the TSC

    def read_tsc(self) -> int:
        struct.pack_into("<I4xI4xQ", self._tsc_entry, 0, 1, 0x10, 0)
        if abi.ioctl(self._fd, abi.GET_MSRS, self._tsc_entry) != 1:
            raise MachineError("KVM cannot read the guest's TSC.")
        value: int = abi.MSR_ENTRY.unpack_from(self._tsc_entry, abi.MSRS_HEADER)[2]
        return value

    def write_tsc(self, value: int) -> None:
        if self._tsc_by_offset:
            abi.ioctl(self._fd, abi.GET_DEVICE_ATTR, self._offset_attribute)
            (offset,) = struct.unpack_from("<Q", self._offset)
            struct.pack_into("<Q", self._offset, 0, offset + value - self.read_tsc() & (1 << 64) - 1)
            abi.ioctl(self._fd, abi.SET_DEVICE_ATTR, self._offset_attribute)
            return
        for attempt in ((value + _FAR_OFF) & (1 << 64) - 1, value or 1):
            struct.pack_into("<I4xI4xQ", self._tsc_entry, 0, 1, 0x10, attempt)
            if abi.ioctl(self._fd, abi.SET_MSRS, self._tsc_entry) != 1:
                raise MachineError("KVM cannot set the guest's TSC.")


def _msr_buffer(values: Mapping[int, int]) -> abi.Buffer:
    """A struct kvm_msrs."""
    buffer = abi.buffer(abi.MSRS_HEADER + len(values) * abi.MSR_ENTRY.size)
    struct.pack_into("<I", buffer, 0, len(values))
    for i, (index, value) in enumerate(values.items()):
        abi.MSR_ENTRY.pack_into(buffer, abi.MSRS_HEADER + i * abi.MSR_ENTRY.size, index, 0, value)
    return buffer
