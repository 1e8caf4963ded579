"""The kernel's /dev/kvm: whether it is there and may be used, and what it offers."""

from __future__ import annotations

import errno
import grp
import mmap
import os
import platform
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attrs import frozen

from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import BackendUnavailable
from vmf_cpu_kvm import abi

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12

REQUIRED: Final[Mapping[int, str]] = {
    abi.CAP_HLT: "KVM_CAP_HLT",
    abi.CAP_USER_MEMORY: "KVM_CAP_USER_MEMORY",
    abi.CAP_EXT_CPUID: "KVM_CAP_EXT_CPUID",
    abi.CAP_SYNC_MMU: "KVM_CAP_SYNC_MMU",
    abi.CAP_VCPU_EVENTS: "KVM_CAP_VCPU_EVENTS",
    abi.CAP_DEBUGREGS: "KVM_CAP_DEBUGREGS",
    abi.CAP_XSAVE: "KVM_CAP_XSAVE",
    abi.CAP_XCRS: "KVM_CAP_XCRS",
    abi.CAP_GET_TSC_KHZ: "KVM_CAP_GET_TSC_KHZ",
    abi.CAP_IMMEDIATE_EXIT: "KVM_CAP_IMMEDIATE_EXIT",
}
"""Without these the backend cannot work; Linux has them all since 4.12."""


def open_device(path: str = DEVICE) -> int:
    """A descriptor of the KVM device that speaks the API this backend needs.

    Raises BackendUnavailable saying what is missing and what to do about it.
    """
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64") or struct.calcsize("P") != 8:
        raise BackendUnavailable(
            f"This is a {machine} host, and the KVM backend runs x86-64 guests on x86-64 hosts in 64-bit Python.",
            "Use the Unicorn backend here: --cpu-backend unicorn.",
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BackendUnavailable(f"{path} does not exist.", _no_device_remedy()) from None
    except PermissionError:
        raise BackendUnavailable(*_no_permission(path)) from None
    except OSError as error:
        raise BackendUnavailable(
            f"{path} cannot be opened: {error.strerror}.",
            "Load the kernel's module for this CPU: modprobe kvm_intel or modprobe kvm_amd."
            if error.errno in (errno.ENODEV, errno.ENXIO)
            else "",
        ) from error
    try:
        _check_api(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_api(fd: int, path: str) -> None:
    try:
        version = abi.ioctl(fd, abi.GET_API_VERSION)
    except OSError as error:
        raise BackendUnavailable(f"{path} is not KVM: it answers {error.strerror}.", "") from error
    if version != API_VERSION:
        raise BackendUnavailable(
            f"{path} speaks version {version} of KVM's API; this backend needs version {API_VERSION}.",
            "Use a Linux kernel of version 4.12 or later.",
        )
    missing = [name for number, name in REQUIRED.items() if not abi.check_extension(fd, number)]
    if missing:
        raise BackendUnavailable(
            f"The KVM of this kernel ({platform.release()}) lacks {', '.join(missing)}.",
            "Use a Linux kernel of version 4.12 or later.",
        )


def _no_device_remedy() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    module = "kvm_amd" if " svm" in flags else "kvm_intel" if " vmx" in flags else ""
    if module:
        return f"Load the kernel's module: modprobe {module}. In a container, pass the device in."
    return (
        "This CPU shows no virtualisation (VMX or SVM): enable it in the firmware or, inside a VM, ask for nested"
        " virtualisation; in a container, pass /dev/kvm in."
    )


def _no_permission(path: str) -> tuple[str, str]:
    try:
        status = os.stat(path)
    except OSError:
        return f"{path} may not be opened.", "Ask for access to it."
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    mode = stat.filemode(status.st_mode)
    reason = f"this user may not open {path} ({mode}, group {group})."
    if status.st_mode & stat.S_IWGRP and status.st_gid:
        if status.st_gid in os.getgroups():
            return reason, "Its access control list or a security module forbids it: ask your administrator."
        return reason, f"Join the group {group} (sudo usermod -aG {group} $USER) and log in again."
    return reason, f"Let the group kvm use it (sudo chgrp kvm {path}; sudo chmod 660 {path}) and join that group."


@frozen
class HostKvm:
    """What the KVM of this host offers; read once per process.

    Attributes:
        mmap_size: bytes of a vCPU's shared area.
        supported_cpuid: KVM_GET_SUPPORTED_CPUID as it is.
        msr_indices: MSRs that KVM says must be carried.
        tsc_khz: rate of the TSC a guest gets without asking.
        tsc_control: any other rate can be given too.
        capabilities: capability number to answer, as far as they were asked for.
    """

    mmap_size: int
    supported_cpuid: CpuidTable
    msr_indices: tuple[int, ...]
    tsc_khz: int
    tsc_control: bool


def read_host(fd: int) -> HostKvm:
    """Ask KVM. Takes some milliseconds, as the TSC's rate is known to a vCPU only. Raises BackendUnavailable."""
    try:
        vm = abi.ioctl(fd, abi.CREATE_VM, 0)
        try:
            vcpu = abi.ioctl(vm, abi.CREATE_VCPU, 0)
            try:
                khz = abi.ioctl(vcpu, abi.GET_TSC_KHZ)
            finally:
                os.close(vcpu)
        finally:
            os.close(vm)
        return HostKvm(
            mmap_size=max(abi.ioctl(fd, abi.GET_VCPU_MMAP_SIZE), mmap.PAGESIZE),
            supported_cpuid=_supported_cpuid(fd),
            msr_indices=_msr_indices(fd),
            tsc_khz=khz,
            tsc_control=bool(abi.check_extension(fd, abi.CAP_TSC_CONTROL)),
        )
    except OSError as error:
        raise BackendUnavailable(
            f"KVM refuses to make a VM: {error.strerror}.",
            "Another hypervisor (VirtualBox, VMware) may hold the CPU's virtualisation: stop its machines."
            if error.errno == errno.EBUSY
            else "See the kernel's log (dmesg).",
        ) from error


def unpack_cpuid(buffer: abi.Buffer) -> CpuidTable:
    """A struct kvm_cpuid2 as a table."""
    (count,) = struct.unpack_from("<I", buffer)
    entries: dict[tuple[int, int], CpuidRegisters] = {}
    for i in range(count):
        leaf, subleaf, flags, eax, ebx, ecx, edx = abi.CPUID_ENTRY.unpack_from(
            buffer, abi.CPUID_HEADER + i * abi.CPUID_ENTRY.size
        )
        if not flags & abi.CPUID_SIGNIFICANT_INDEX:
            subleaf = 0
        entries.setdefault((leaf, subleaf), CpuidRegisters(eax, ebx, ecx, edx))
    return CpuidTable(entries)


def pack_cpuid(table: CpuidTable) -> abi.Buffer:
    """A table as a struct kvm_cpuid2."""
    buffer = abi.buffer(abi.CPUID_HEADER + len(table.entries) * abi.CPUID_ENTRY.size)
    struct.pack_into("<I", buffer, 0, len(table.entries))
    for i, ((leaf, subleaf), registers) in enumerate(table.entries.items()):
        flags = abi.CPUID_SIGNIFICANT_INDEX if leaf in CpuidTable.SUBLEAF_LEAVES else 0
        abi.CPUID_ENTRY.pack_into(buffer, abi.CPUID_HEADER + i * abi.CPUID_ENTRY.size, leaf, subleaf, flags, *registers)
    return buffer


def get_cpuid(fd: int, request: int) -> CpuidTable:
    """GET_SUPPORTED_CPUID of the system, or GET_CPUID2 of a vCPU. Raises OSError."""
    count = 256
    while True:
        buffer = abi.buffer(abi.CPUID_HEADER + count * abi.CPUID_ENTRY.size)
        struct.pack_into("<I", buffer, 0, count)
        try:
            abi.ioctl(fd, request, buffer)
            return unpack_cpuid(buffer)
        except OSError as error:
            if error.errno != errno.E2BIG or count >= 4096:
                raise
            count *= 2


def _supported_cpuid(fd: int) -> CpuidTable:
    return get_cpuid(fd, abi.GET_SUPPORTED_CPUID)


def _msr_indices(fd: int) -> tuple[int, ...]:
    count = 1024
    buffer = abi.buffer(4 + 4 * count)
    struct.pack_into("<I", buffer, 0, count)
    abi.ioctl(fd, abi.GET_MSR_INDEX_LIST, buffer)
    (count,) = struct.unpack_from("<I", buffer)
    return struct.unpack_from(f"<{count}I", buffer, 4)


def boot_identity() -> str:
    """What a judgement about this KVM is valid for: this boot of the kernel, with these modules loaded."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"unknown-{os.getpid()}"
    modules = []
    for module in ("kvm", "kvm_amd", "kvm_intel", "kvm_pvm"):
        try:
            modules.append(f"{module}@{os.stat(f'/sys/module/{module}').st_ctime_ns}")
        except OSError:
            continue
    return " ".join([boot, platform.release(), *modules])
