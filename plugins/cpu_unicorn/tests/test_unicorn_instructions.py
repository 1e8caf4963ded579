"""Every CPUID bit that is presented is executed; what is not presented is not relied upon."""

from __future__ import annotations

import attrs
import pytest

from vmf.cpu.backend import ExitReason
from vmf_cpu_unicorn import cpuid, engine
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, Bench

# Feature: (instructions, registers before, what is expected after). RDI points to the bytes 00 to 1f, whose halves
# are loaded into XMM0 and XMM1. Expected are registers, "xmm" for XMM0, "mem0" and "mem1" for words at RDI.
_EXECUTED: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
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
    "pse36": ("90", {}, {}),  # 4 MiB pages above 4 GiB, outside of 64-bit mode: nothing to execute here
    "clflush": ("0fae3f", {}, {}),
    "mmx": ("0f6f07 0f6f4f08 0ffdc1 0f7e07 0f77", {}, {"mem0": 0x07060504_0E0C0A08}),
    "fxsr": ("0fae4720 488b4720 25ffff0000", {}, {"rax": 0x37F}),  # fxsave [rdi+32]; FCW
    "sse": ("0f58c1 0f57c0", {}, {"xmm": 0}),  # addps; xorps
    "sse2": ("660fefc0 660f76c0", {}, {"xmm": (1 << 128) - 1}),  # pxor; pcmpeqd
    "sse3": ("f20f12c1", {}, {"xmm": 0x17161514131211101716151413121110}),  # movddup xmm0,xmm1
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
    "smep": ("90", {}, {}),  # test_smep
    "syscall": ("90", {}, {}),  # test_unicorn_gate.py
    "nx": ("b9800000c0 0f32 2500080000", {}, {"rax": 0x800}),  # EFER.NXE
    "rdtscp": ("0f01f9 89c8", {}, {"rax": 0x77}),  # ECX = TSC_AUX
    "lm": ("90", {}, {}),  # this test runs in it
    "lahf_lm": ("31c0 9f c1e808", {}, {"rax": 0x46}),  # xor eax,eax: ZF PF; lahf
}

_PRESENTED = {
    **cpuid.FEATURES_1_EDX,
    **cpuid.FEATURES_1_ECX,
    **cpuid.FEATURES_7_EBX,
    **cpuid.FEATURES_80000001_EDX,
    **cpuid.FEATURES_80000001_ECX,
}

_LOAD = bytes.fromhex("f30f6f07 f30f6f4f10")  # movdqu xmm0,[rdi]; movdqu xmm1,[rdi+16]


def test_all_presented_bits_are_covered() -> None:
    assert set(_EXECUTED) == set(_PRESENTED)


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


def test_smep(machine: Bench) -> None:
    """All pages of this guest are the user's: with CR4.SMEP, CPL 0 can fetch no instruction, nor any handler's."""
    result = machine.execute(bytes.fromhex("0f20e0 480d00001000 0f22e0 f4"), machine.state())
    assert result.reason is ExitReason.SHUTDOWN


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "name"),
    [
        (1, "edx", 7, "MCE"),
        (1, "edx", 9, "APIC"),
        (1, "edx", 11, "SEP"),
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
