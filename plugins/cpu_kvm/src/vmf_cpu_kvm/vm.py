"""Making a VM: the capabilities that vmf wants switched on, and one memory slot for each region of RAM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmf_cpu_kvm import abi
from vmf_cpu_kvm.dirtylog import PROTECT_FLAGS

if TYPE_CHECKING:
    from vmf.memory.guest import GuestMemory

_ASKED = (
    abi.CAP_EXCEPTION_PAYLOAD, abi.CAP_TRIPLE_FAULT_EVENT, abi.CAP_PMU_CAPABILITY, abi.CAP_DISABLE_QUIRKS2,
    abi.CAP_EXIT_ON_EMULATION_FAILURE, abi.CAP_SREGS2, abi.CAP_XSAVE2, abi.CAP_SET_TSS_ADDR,
    abi.CAP_SET_IDENTITY_MAP_ADDR, abi.CAP_ENFORCE_PV_FEATURE_CPUID, abi.CAP_MANUAL_DIRTY_LOG_PROTECT2,
)  # fmt: skip
_QUIRKS_OFF = abi.QUIRK_OUT_7E_INC_RIP | abi.QUIRK_FIX_HYPERCALL_INSN | abi.QUIRK_MWAIT_NEVER_UD_FAULTS
_TSS_ADDRESS = 0xFFFBD000
_IDENTITY_MAP_ADDRESS = 0xFFFBC000
"""Four pages below 4 GiB that KVM on Intel needs for real mode without unrestricted guests; never RAM here."""


def enable(fd: int, capability: int, argument: int) -> None:
    """KVM_ENABLE_CAP of a VM or a vCPU."""
    abi.ioctl(fd, abi.ENABLE_CAPABILITY, abi.buffer_of(abi.ENABLE_CAP, capability, 0, argument, 0, 0, 0))


def can_log(extensions: Mapping[int, int]) -> bool:
    """Whether `vmf_cpu_kvm.dirtylog` works here."""
    return extensions[abi.CAP_MANUAL_DIRTY_LOG_PROTECT2] & PROTECT_FLAGS == PROTECT_FLAGS


def make_vm(device: int, memory: GuestMemory, *, dirty_log: bool) -> tuple[int, dict[int, int]]:
    """A VM on that memory, without a vCPU: its descriptor, and what KVM said to each capability asked for.

    Args:
        dirty_log: let KVM log writes from the beginning.

    Raises OSError.
    """
    vm = abi.ioctl(device, abi.CREATE_VM, 0)
    try:
        extensions = {capability: abi.check_extension(vm, capability) for capability in _ASKED}
        for capability in (abi.CAP_EXCEPTION_PAYLOAD, abi.CAP_TRIPLE_FAULT_EVENT, abi.CAP_EXIT_ON_EMULATION_FAILURE):
            if extensions[capability]:
                enable(vm, capability, 1)
        if extensions[abi.CAP_PMU_CAPABILITY] & abi.PMU_CAP_DISABLE:
            enable(vm, abi.CAP_PMU_CAPABILITY, abi.PMU_CAP_DISABLE)
        if quirks := extensions[abi.CAP_DISABLE_QUIRKS2] & _QUIRKS_OFF:
            enable(vm, abi.CAP_DISABLE_QUIRKS2, quirks)
        if extensions[abi.CAP_SET_TSS_ADDR]:
            abi.ioctl(vm, abi.SET_TSS_ADDR, _TSS_ADDRESS)
        if extensions[abi.CAP_SET_IDENTITY_MAP_ADDR]:
            abi.ioctl(vm, abi.SET_IDENTITY_MAP_ADDR, abi.buffer_of("<Q", _IDENTITY_MAP_ADDRESS))
        if can_log(extensions):
            enable(vm, abi.CAP_MANUAL_DIRTY_LOG_PROTECT2, PROTECT_FLAGS)
        flags = abi.MEM_LOG_DIRTY_PAGES if dirty_log else 0
        for slot, region in enumerate(memory.regions):
            arguments = (slot, flags, region.gpa, region.size, memory.address + region.offset)
            abi.ioctl(vm, abi.SET_USER_MEMORY_REGION, abi.buffer_of(abi.MEMORY_REGION, *arguments))
    except BaseException:
        os.close(vm)
        raise
    return vm, extensions
