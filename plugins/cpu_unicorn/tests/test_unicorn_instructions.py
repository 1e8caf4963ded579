"""Every CPUID bit that is presented is executed; what is not presented is not relied upon.

`_EXECUTED` has one program for each bit; bits that promise no instruction have a test function of their own, which
`_SHOWN_BY` names. The groups of vector instructions are executed one by one beside the host's processor, too, where it
has them: results, flags and registers must be the same.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import Segment
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import FREE_FEATURES, features_of
from vmf_cpu_unicorn import cpuid, engine
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, Bench

# Feature: (instructions, registers before, what is expected after). RDI points to the bytes 00 to 1f, whose halves
# are loaded into XMM0 and XMM1. Expected are registers, "xmm" for XMM0, "mem0" and "mem1" for words at RDI.
_EXECUTED: dict[str, tuple[str, dict[str, Any], dict[str, int | None]]] = {
    "fpu": ("d9e8 d9e8 dec1 df3f 488b07", {}, {"rax": 2}),  # fld1; fld1; faddp; fistp qword [rdi]; mov rax,[rdi]
    "vme": ("0f20e0 4883c801 0f22e0 0f20e0", {}, {"rax": 0x621}),  # CR4.VME can be set
    "de": ("0f20e0 4883c808 0f22e0 0f20e0", {}, {"rax": 0x628}),  # CR4.DE can be set
    "pse": ("0f20e0 4883c810 0f22e0 0f20e0", {}, {"rax": 0x630}),  # CR4.PSE can be set; 2 MiB pages are in use
    "tsc": ("0f31 48c1e220 4809d0 4885c0 0f95c0 0fb6c0", {}, {"rax": 1}),  # rdtsc gives something
    "msr": ("b9820000c0 0f32", {}, {"rax": 0x21000, "rdx": 0}),  # rdmsr LSTAR
    "pae": ("0f20e0 83e020", {}, {"rax": 0x20}),  # 64-bit paging is PAE
    "cx8": ("0fc70f", {"rax": 0x03020100, "rdx": 0x07060504, "rbx": 1, "rcx": 2}, {"mem0": 0x2_0000_0001}),
    "pge": ("0f20e0 4881c880000000 0f22e0 0f20e0", {}, {"rax": 0x6A0}),
    "cmov": ("31d2 480f44c3", {"rax": 1, "rbx": 2}, {"rax": 2}),  # xor edx,edx; cmovz rax,rbx
    "pat": ("b977020000 0f32", {}, {"rax": 0x00070406, "rdx": 0x00070406}),  # rdmsr PAT
    "clflush": ("0fae3f", {}, {}),
    "mmx": ("0f6f07 0f6f4f08 0ffdc1 0f7e07 0f77", {}, {"mem0": 0x07060504_0E0C0A08}),
    "fxsr": ("0fae4720 488b4720 25ffff0000", {}, {"rax": 0x37F}),  # fxsave [rdi+32]; FCW
    "sse": ("0f58c1 0f57c0", {}, {"xmm": 0}),  # addps; xorps
    "sse2": ("660fefc0 660f76c0", {}, {"xmm": (1 << 128) - 1}),  # pxor; pcmpeqd
    "pni": ("f20f12c1", {}, {"xmm": 0x17161514131211101716151413121110}),  # movddup xmm0,xmm1
    "pclmulqdq": ("660f3a44c100", {}, {"xmm": None}),
    "ssse3": ("660f3800c0", {}, {"xmm": 0x0F0E0D0C0B0A09080706050403020100}),  # pshufb xmm0,xmm0: the identity
    "cx16": (
        "480fc70f",
        {"rax": 0x0706050403020100, "rdx": 0x0F0E0D0C0B0A0908, "rbx": 5, "rcx": 6},
        {"mem0": 5, "mem1": 6},
    ),
    "sse4_1": ("660f3817c0 0f92c0 0fb6c0", {}, {"rax": 1}),  # ptest xmm0,xmm0; setc
    "sse4_2": ("f20f38f0c3", {"rax": 0, "rbx": 0x61}, {"rax": 0x93AD1061}),  # crc32c of "a", no inversions
    "movbe": ("0f38f007", {}, {"rax": 0x00010203}),
    "popcnt": ("f3480fb8c3", {"rbx": 0xF0F1}, {"rax": 9}),
    "aes": ("660f38dcc1", {}, {"xmm": None}),
    "fsgsbase": ("f3480faed3 f3480faec0", {"rbx": 0x123456789}, {"rax": 0x123456789}),  # wrfsbase; rdfsbase
    "nx": ("b9800000c0 0f32 2500080000", {}, {"rax": 0x800}),  # EFER.NXE
    "rdtscp": ("0f01f9 89c8", {}, {"rax": 0x77}),  # ECX = TSC_AUX
    "lahf_lm": ("31c0 9f c1e808", {}, {"rax": 0x46}),  # xor eax,eax: ZF PF; lahf
}

_SHOWN_BY = {
    "pse36": "test_pse36",
    "sep": "test_sep",
    "smep": "test_smep",
    "syscall": "test_syscall_and_long_mode",
    "lm": "test_syscall_and_long_mode",
    "nonstop_tsc": "test_the_tsc_goes_on",
}
"""Bits that one program cannot show, and the test that does."""

_BESIDE_THE_HOST: dict[str, dict[str, str]] = {
    "sse": {
        "addps": "0f58c1", "subps": "0f5cc1", "mulps": "0f59c1", "minps": "0f5dc1", "maxps": "0f5fc1",
        "sqrtss": "f30f51c1", "andps": "0f54c1", "andnps": "0f55c1", "orps": "0f56c1", "xorps": "0f57c1",
        "unpcklps": "0f14c1", "unpckhps": "0f15c1", "movhlps": "0f12c1", "movlhps": "0f16c1", "cmpltps": "0fc2c101",
        "shufps $0x1b": "0fc6c11b",
    },
    "sse2": {
        "paddq": "660fd4c1", "psubq": "660ffbc1", "pmuludq": "660ff4c1", "pshufd $0x4e": "660f70c14e",
        "pshuflw $0x1b": "f20f70c11b", "pshufhw $0xb1": "f30f70c1b1", "pslldq $3": "660f73f803",
        "psrldq $5": "660f73d805", "punpcklqdq": "660f6cc1", "addpd": "660f58c1", "mulpd": "660f59c1",
        "maxpd": "660f5fc1", "sqrtpd": "660f51c1", "unpckhpd": "660f15c1", "cvtdq2pd": "f30fe6c1",
        "cvtps2pd": "0f5ac1", "cvttpd2dq": "660fe6c1", "movq": "f30f7ec1", "pcmpeqb": "660f74c1",
        "pcmpgtw": "660f65c1", "packsswb": "660f63c1", "packuswb": "660f67c1", "pmaddwd": "660ff5c1",
        "pavgb": "660fe0c1", "pmulhuw": "660fe4c1", "psadbw": "660ff6c1", "pxor": "660fefc1", "pandn": "660fdfc1",
        "shufpd $1": "660fc6c101",
    },
    "pni": {
        "addsubps": "f20fd0c1", "addsubpd": "660fd0c1", "haddps": "f20f7cc1", "haddpd": "660f7cc1",
        "hsubps": "f20f7dc1", "hsubpd": "660f7dc1", "movddup": "f20f12c1", "movshdup": "f30f16c1",
        "movsldup": "f30f12c1",
    },
    "ssse3": {
        "pshufb": "660f3800c1", "pabsb": "660f381cc1", "pabsw": "660f381dc1", "pabsd": "660f381ec1",
        "phaddw": "660f3801c1", "phaddd": "660f3802c1", "phaddsw": "660f3803c1", "phsubw": "660f3805c1",
        "phsubd": "660f3806c1", "pmaddubsw": "660f3804c1", "pmulhrsw": "660f380bc1", "psignb": "660f3808c1",
        "psignw": "660f3809c1", "psignd": "660f380ac1", "palignr $7": "660f3a0fc107",
    },
    "sse4_1": {
        "pmulld": "660f3840c1", "pmuldq": "660f3828c1", "pminsb": "660f3838c1", "pmaxsb": "660f383cc1",
        "pminuw": "660f383ac1", "pmaxuw": "660f383ec1", "pminud": "660f383bc1", "pmaxsd": "660f383dc1",
        "pcmpeqq": "660f3829c1", "packusdw": "660f382bc1", "pmovsxbw": "660f3820c1", "pmovsxbq": "660f3822c1",
        "pmovzxwd": "660f3833c1", "pmovzxdq": "660f3835c1", "phminposuw": "660f3841c1",
        "pblendw $0x5a": "660f3a0ec15a", "blendps $5": "660f3a0cc105", "blendpd $2": "660f3a0dc102",
        "pblendvb": "660f3810d1660f6fc2", "blendvps": "660f3814d1660f6fc2", "blendvpd": "660f3815d1660f6fc2",
        "roundps $1": "660f3a08c101", "roundpd $2": "660f3a09c102", "roundss $3": "660f3a0ac103",
        "dpps $0x7f": "660f3a40c17f", "dppd $0x31": "660f3a41c131", "mpsadbw $5": "660f3a42c105",
        "insertps $0x4a": "660f3a21c14a", "ptest": "660f3817c1",
    },
    "sse4_2": {
        "pcmpgtq": "660f3837c1", "pcmpistrm $0x0c": "660f3a62c10c", "pcmpestrm $0x18": "660f3a60c118",
        "pcmpistri $0x0d": "660f3a63c10d",
    },
    "aes": {
        "aesenc": "660f38dcc1", "aesenclast": "660f38ddc1", "aesdec": "660f38dec1", "aesdeclast": "660f38dfc1",
        "aesimc": "660f38dbc1", "aeskeygenassist $0x1b": "660f3adfc11b",
    },
    "pclmulqdq": {
        "pclmulqdq $0": "660f3a44c100", "pclmulqdq $1": "660f3a44c101", "pclmulqdq $16": "660f3a44c110",
        "pclmulqdq $17": "660f3a44c111",
    },
}  # fmt: skip

_LOAD = bytes.fromhex("f30f6f07 f30f6f4f10")  # movdqu xmm0,[rdi]; movdqu xmm1,[rdi+16]


def test_all_presented_bits_are_covered() -> None:
    """Of the capability, and of the contract that is made of it: what that adds is the VMM's own promise."""
    capability = cpuid.capability(2_000_000, 39)
    presented = {item.name for item in features_of(capability)}
    assert presented == {*_EXECUTED, *_SHOWN_BY}
    assert all(callable(globals()[test]) for test in _SHOWN_BY.values())
    added = features_of(make_contract(capability)) - features_of(capability)
    assert added <= FREE_FEATURES


def host_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def operands(name: str, rng: random.Random) -> bytes:
    """Two vectors that suit the instruction: numbers for arithmetic on floating point (NaNs are chosen differently by
    different processors), anything for all others."""
    word = name.split()[0]
    if word in ("cvtps2pd", "haddps", "hsubps", "addsubps") or word.endswith(("ps", "ss")):
        return struct.pack("<8f", *(rng.uniform(-1000, 1000) for _ in range(8)))
    if word in ("cvttpd2dq", "haddpd", "hsubpd", "addsubpd") or word.endswith("pd"):
        return struct.pack("<4d", *(rng.uniform(-1000, 1000) for _ in range(4)))
    return rng.randbytes(32)


@pytest.mark.parametrize("feature", list(_BESIDE_THE_HOST))
def test_vector_instructions_beside_the_host(
    machine: Bench, native: Callable[[bytes, bytearray], None], feature: str
) -> None:
    if feature not in host_flags():
        pytest.skip(f"this host's processor has no {feature}")
    rng = random.Random(feature)
    # movdqu xmm0,[rdi]; movdqu xmm1,[rdi+16]; movdqa xmm2,xmm0; mov eax,5; mov edx,9; xor ecx,ecx
    head = bytes.fromhex("f30f6f07 f30f6f4f10 660f6fd0 b805000000 ba09000000 31c9")
    # movdqu [rdi+32],xmm0; mov [rdi+48],rcx; pushfq; pop rax; mov [rdi+56],rax
    tail = bytes.fromhex("f30f7f4720 48894f30 9c58 48894738")
    for name, instruction in _BESIDE_THE_HOST[feature].items():
        code = head + bytes.fromhex(instruction) + tail
        for _ in range(4):
            data = bytearray(operands(name, rng) + bytes(32))
            machine.memory.write(DATA, bytes(data))
            assert machine.execute(code + b"\xf4", machine.state(rdi=DATA)).reason is ExitReason.HALTED
            assert machine.records() == [], f"{name} faults"
            native(code, data)
            seen = machine.memory.read(DATA + 32, 32)
            assert seen[:24] == data[32:56], name
            assert (seen[24] ^ data[56]) & 0x41 == 0, f"{name}: carry and zero"


@pytest.fixture(scope="module")
def machine() -> Bench:
    return Bench(engine.load())


@pytest.mark.parametrize("feature", sorted(_EXECUTED))
def test_feature(machine: Bench, feature: str) -> None:
    text, before, after = _EXECUTED[feature]
    body = bytes.fromhex(text)
    machine.memory.write(DATA, bytes(range(32)))
    state = machine.state(rdi=DATA, r15=CODE + len(_LOAD) + len(body), **before)
    cr4 = state.cr4 | (1 << 16 if feature == "fsgsbase" else 0)
    state = attrs.evolve(state, cr4=cr4, msrs={**state.msrs, 0xC0000103: 0x77})
    result = machine.execute(_LOAD + body + b"\xf4", state)
    assert result.reason is ExitReason.HALTED
    assert machine.records() == [], "the instruction faults"
    found = machine.vcpu.save()
    for name, value in after.items():
        if name == "xmm":
            assert value is None or int.from_bytes(found.xsave[160:176], "little") == value
        elif name.startswith("mem"):
            offset = DATA + 8 * int(name[3:])
            assert int.from_bytes(machine.memory.read(offset, 8), "little") == value
        else:
            assert found.registers[name] == value, name


def test_sep(bench: Bench) -> None:
    # ecx = SYSENTER_CS, _ESP, _EIP in turn: 8, 0x1f000, the hlt that follows the ud2; sysenter; ud2; hlt
    program = "31d2 b974010000 b808000000 0f30 ffc1 b800f00100 0f30 ffc1 b8{:08x} 0f30 0f34 0f0b f4"
    raw = program.format(int.from_bytes((CODE + 36).to_bytes(4, "little")))
    assert bench.execute(bytes.fromhex(raw), bench.state()).reason is ExitReason.HALTED
    assert bench.records() == []
    assert bench.vcpu.save().rip == CODE + 37


def test_pse36(machine: Bench) -> None:
    """A 4 MiB page in 32-bit paging that lies above 4 GiB: an access to it arrives at the bus with that address."""
    seen: list[int] = []

    class Handler:
        def io_read(self, offset: int, size: int) -> int:
            seen.append(offset)
            return 0x1234_5678

        def io_write(self, offset: int, size: int, value: int) -> None: ...

    machine.bus.claim_mmio("above 4 GiB", 0x3_0040_0000, 0x1000, Handler())
    directory = 0x3F_0000
    # 0 to 4 MiB as it is; 4 to 8 MiB at 0x3_0040_0000: physical bits 32 to 35 are bits 13 to 16 of the entry.
    machine.memory.write(directory, struct.pack("<II", 0x83, 0x0040_0000 | 3 << 13 | 0x83))
    state = machine.state()
    flat = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
    segments = {**dict.fromkeys(state.segments, flat), "cs": Segment(8, 0, 0xFFFF_FFFF, 0xC09B)}
    state = attrs.evolve(state, segments=segments, efer=0, cr0=0x8000_0011, cr4=0x10, cr3=directory)
    assert machine.execute(bytes.fromhex("a110004000 f4"), state).reason is ExitReason.HALTED  # mov eax,[0x400010]
    assert machine.vcpu.save().registers["rax"] == 0x1234_5678
    assert seen == [0x10]


def test_syscall_and_long_mode(machine: Bench) -> None:
    """SYSCALL from 64-bit code in ring 3 arrives at LSTAR in ring 0, and SYSRET goes back; R15 is a 64-bit register."""
    code = bytes.fromhex("49bf0123456789abcdef 0f05")  # mov r15, imm64; syscall
    assert machine.execute(code, machine.state(user=True, rflags=0x203)).reason is ExitReason.HALTED
    state = machine.vcpu.save()
    assert (state.registers["rcx"], state.registers["r11"]) == (CODE + len(code), 0x203)
    assert state.registers["r15"] == 0xEFCD_AB89_6745_2301
    assert state.segments["cs"].selector & 3 == 0
    back = attrs.evolve(state, rip=CODE + 0x100, halted=False, registers={**state.registers, "rcx": CODE + 0x200})
    machine.memory.write(CODE + 0x200, b"\x0f\x05")
    machine.execute(b"\x48\x0f\x07", back)  # sysretq, and SYSCALL again
    assert machine.vcpu.save().registers["rcx"] == CODE + 0x202


def test_the_tsc_goes_on(machine: Bench) -> None:
    """At one rate, while the guest waits in HLT and while it does not run."""
    machine.execute(bytes.fromhex("0f31 f4"))
    first, before = machine.vcpu.save().registers, machine.vcpu.read_tsc()
    assert machine.vcpu.read_tsc() > before
    machine.execute(bytes.fromhex("0f31 f4"), attrs.evolve(machine.state(), tsc=machine.vcpu.read_tsc()))
    second = machine.vcpu.save().registers
    assert second["rdx"] << 32 | second["rax"] > first["rdx"] << 32 | first["rax"]


@pytest.mark.parametrize(
    ("address", "vector"), [(0x0000_7FFF_FFFF_F000, 14), (0xFFFF_8000_0000_0000, 14), (0x0000_8000_0000_0000, 13)]
)
def test_linear_addresses_have_48_bits(machine: Bench, address: int, vector: int) -> None:
    """Canonical ones without a page fault as pages do; others as addresses do."""
    state = machine.state(rbx=address, r15=CODE + 3)
    assert machine.execute(bytes.fromhex("488b03 f4"), state).reason is ExitReason.HALTED
    assert [record.vector for record in machine.records()] == [vector]


def test_smep(machine: Bench) -> None:
    """All pages of this guest are the user's: with CR4.SMEP, CPL 0 can fetch no instruction, nor any handler's."""
    result = machine.execute(bytes.fromhex("0f20e0 480d00001000 0f22e0 f4"), machine.state())
    assert result.reason is ExitReason.SHUTDOWN


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "name"),
    [
        (1, "edx", 7, "MCE"),
        (1, "edx", 9, "APIC"),
        (1, "edx", 12, "MTRR"),
        (1, "edx", 14, "MCA"),
        (1, "ecx", 3, "MONITOR"),
        (1, "ecx", 17, "PCID"),
        (1, "ecx", 26, "XSAVE"),
        (1, "ecx", 27, "OSXSAVE"),
        (1, "ecx", 28, "AVX"),
        (7, "ebx", 5, "AVX2"),
        (7, "ebx", 29, "SHA"),
    ],
)
def test_not_presented(leaf: int, register: str, bit: int, name: str) -> None:
    registers = cpuid.capability(2_000_000, 39).lookup(leaf, 0)
    assert not getattr(registers, register) >> bit & 1, name


def test_the_tsc_rate_survives_linux_arithmetic() -> None:
    for khz in (1_000_000, 2_445_440, 5_000_000):
        leaf = cpuid.capability(khz, 39).lookup(0x15, 0)
        crystal_khz = leaf.ecx // 1000
        assert crystal_khz * leaf.ebx < 1 << 32
        assert abs(crystal_khz * leaf.ebx // leaf.eax - khz) <= 1
