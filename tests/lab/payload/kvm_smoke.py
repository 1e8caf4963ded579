"""Proves that the lab's /dev/kvm runs guests with real hardware semantics. Standard library only; runs in the lab.

Three guests, each a few bytes in real mode or in 64-bit mode: port output and HLT; 64-bit code with SYSCALL to ring 0
(broken on paravirtual KVMs) and SSE in ring 0; and CPUID with a masked bit, which the guest must see masked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time

# linux/kvm.h
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_SET_MSRS = 0x4008AE89
EXIT_IO, EXIT_HLT = 2, 5

RAM_SIZE = 1 << 21
CODE = 0x10000
STACK = 0x20000
GDT = 0x1000
PML4, PDPT, PD = 0x2000, 0x3000, 0x4000
AVX_BIT = 1 << 28

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def ioctl(fd: int, request: int, argument: object = None) -> int:
    result = libc.ioctl(fd, request, argument)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ioctl {request:#x}: {os.strerror(number)}")
    return int(result)


class Guest:
    def __init__(self, code: bytes) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        if ioctl(self.kvm, KVM_GET_API_VERSION) != 12:
            raise SystemExit("unexpected KVM API version")
        self.vm = ioctl(self.kvm, KVM_CREATE_VM)
        self.ram = mmap.mmap(-1, RAM_SIZE)
        self.ram[CODE : CODE + len(code)] = code
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, RAM_SIZE, self.address))
        self.vcpu = ioctl(self.vm, KVM_CREATE_VCPU)
        self.run_page = mmap.mmap(self.vcpu, ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE))
        self.exits = 0

    def set_cpuid(self, mask_1_ecx: int) -> None:
        """All that KVM supports, without the bits of `mask_1_ecx` in leaf 1 ECX."""
        table = ctypes.create_string_buffer(struct.pack("<II", 256, 0), 8 + 256 * 40)
        ioctl(self.kvm, KVM_GET_SUPPORTED_CPUID, table)
        (count,) = struct.unpack_from("<I", table)
        for index in range(count):
            at = 8 + index * 40
            if struct.unpack_from("<I", table, at) == (1,):
                (ecx,) = struct.unpack_from("<I", table, at + 20)
                struct.pack_into("<I", table, at + 20, ecx & ~mask_1_ecx)
        ioctl(self.vcpu, KVM_SET_CPUID2, table)

    def registers(self, **changed: int) -> list[int]:
        """rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags, after setting those that are named."""
        names = [
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rsp",
            "rbp",
            *(f"r{n}" for n in range(8, 16)),
            "rip",
            "rflags",
        ]
        buffer = ctypes.create_string_buffer(144)
        ioctl(self.vcpu, KVM_GET_REGS, buffer)
        values = list(struct.unpack("<18Q", buffer))
        for name, value in changed.items():
            values[names.index(name)] = value
        ioctl(self.vcpu, KVM_SET_REGS, struct.pack("<18Q", *values))
        return values

    def real_mode(self) -> None:
        sregs = ctypes.create_string_buffer(312)
        ioctl(self.vcpu, KVM_GET_SREGS, sregs)
        struct.pack_into("<QIH", sregs, 0, CODE, 0xFFFF, CODE >> 4)  # CS
        ioctl(self.vcpu, KVM_SET_SREGS, sregs)
        self.registers(rip=0, rflags=2)

    def long_mode(self) -> None:
        """64-bit, ring 0, identity mapped and user-accessible; GDT: 8/16 ring 0, 0x1b/0x23 ring 3."""
        for at, value in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):
            self.ram[at : at + 8] = value.to_bytes(8, "little")
        descriptors = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
        self.ram[GDT : GDT + 40] = struct.pack("<5Q", *descriptors)
        sregs = ctypes.create_string_buffer(312)
        ioctl(self.vcpu, KVM_GET_SREGS, sregs)
        # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
        struct.pack_into("<QIH10B", sregs, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
        for number in range(1, 6):
            struct.pack_into("<QIH10B", sregs, number * 24, 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        struct.pack_into("<QH", sregs, 8 * 24, GDT, 39)
        # CR0 PG WP NE MP PE, CR2, CR3, CR4 PAE OSFXSR OSXMMEXCPT, CR8, EFER NX LMA LME SCE
        struct.pack_into("<6Q", sregs, 10 * 24 - 16, 0x80010023, 0, PML4, 0x620, 0, 0xD01)
        ioctl(self.vcpu, KVM_SET_SREGS, sregs)
        self.registers(rip=CODE, rsp=STACK, rflags=2)

    def set_msrs(self, values: dict[int, int]) -> None:
        body = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in values.items())
        if ioctl(self.vcpu, KVM_SET_MSRS, struct.pack("<II", len(values), 0) + body) != len(values):
            raise SystemExit("KVM_SET_MSRS was refused")

    def run(self) -> bytes:
        """Run to HLT; what was written to port 0xE9, one byte a write."""
        output = b""
        while True:
            ioctl(self.vcpu, KVM_RUN)
            self.exits += 1
            (reason,) = struct.unpack_from("<I", self.run_page, 8)
            if reason == EXIT_HLT:
                return output
            if reason != EXIT_IO:
                raise SystemExit(f"unexpected exit {reason}; data {self.run_page[32:48].hex()}")
            _, size, port, count, offset = struct.unpack_from("<BBHIQ", self.run_page, 32)
            if port != 0xE9:
                raise SystemExit(f"unexpected port {port:#x}")
            output += self.run_page[offset : offset + size * count]


def real_mode_output() -> None:
    code = b"".join(b"\xb0" + bytes([letter]) + b"\xe6\xe9" for letter in b"lab") + b"\xf4"  # mov al; out 0xe9; hlt
    guest = Guest(code)
    guest.real_mode()
    output = guest.run()
    assert output == b"lab", output
    print(f"real mode: wrote {output!r} and halted")


def syscall_and_sse() -> None:
    entry = bytes.fromhex("660f6fc8660fefc9b053e6e9f4")  # movdqa xmm1,xmm0; pxor xmm1,xmm1; 'S'; hlt
    user = bytes.fromhex("b0550f05")  # mov al,'U'; syscall
    # ring 0: push ss, rsp, rflags, cs, rip of ring 3; iretq
    start = (
        b"\x6a\x1b" + b"\x68" + STACK.to_bytes(4, "little") + b"\x6a\x02" + b"\x6a\x23"
        + b"\x68" + (CODE + 0x100).to_bytes(4, "little") + b"\x48\xcf"
    )  # fmt: skip
    guest = Guest(start.ljust(0x100, b"\xcc") + user.ljust(0x100, b"\xcc") + entry)
    guest.set_cpuid(0)
    guest.long_mode()
    star, lstar, fmask = 0xC0000081, 0xC0000082, 0xC0000084
    guest.set_msrs({star: (0x13 << 48) | (8 << 32), lstar: CODE + 0x200, fmask: 0x200})
    output = guest.run()
    assert output == b"S", output
    assert guest.registers()[2] == CODE + 0x104, "RCX holds the address after SYSCALL"
    print("64-bit: ring 3, SYSCALL to ring 0 and SSE there")


def masked_cpuid() -> None:
    code = bytes.fromhex("b80100000031c90fa2f4")  # mov eax,1; xor ecx,ecx; cpuid; hlt
    seen = []
    for mask in (0, AVX_BIT | 1 << 19):  # AVX, SSE4.1
        guest = Guest(code)
        guest.set_cpuid(mask)
        guest.long_mode()
        guest.run()
        seen.append(guest.registers()[2])
    assert seen[0] & 1 << 19, f"no SSE4.1 to mask: {seen[0]:#x}"
    assert not seen[1] & (AVX_BIT | 1 << 19), f"masked bits are presented: {seen[1]:#x}"
    print(f"CPUID: leaf 1 ECX {seen[0]:#010x}, masked {seen[1]:#010x}")


def exit_cost() -> None:
    rounds = 2000
    code = b"\xb9" + rounds.to_bytes(4, "little") + bytes.fromhex("e6e9e2fcf4")  # mov ecx; out; loop; hlt
    guest = Guest(code)
    guest.long_mode()
    began = time.perf_counter()
    assert len(guest.run()) == rounds
    print(f"port exits: {(time.perf_counter() - began) / rounds * 1e6:.0f} us each")


if __name__ == "__main__":
    for case in (real_mode_output, syscall_and_sse, masked_cpuid, exit_cost):
        case()
    print("kvm smoke: all right")
