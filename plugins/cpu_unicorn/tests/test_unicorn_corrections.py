"""What the engine by itself accepts or computes wrong, corrected by the C extension; CMPXCHG also beside the host."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable

import attrs
import pytest

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import AR_DB, AR_LONG, MSR_IA32_SYSENTER_CS, MSR_LSTAR
from vmf.cpuid.contract import make_contract
from vmf_cpu_unicorn import corrections, cpuid, engine
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, KERNEL_CS, SYSCALL_ENTRY, Bench

pytest.importorskip("vmf_cpu_unicorn._corrections", reason="the C extension was not built")

_UD, _GP, _DB = 6, 13, 1


@pytest.fixture
def corrected(make_bench: Callable[..., Bench]) -> Callable[..., Bench]:
    """Makes benches, which must be corrected."""
    if os.environ.get(corrections.CORRECTIONS_VARIABLE) == "engine":
        pytest.skip(f"{corrections.CORRECTIONS_VARIABLE} turns the corrections off")

    def make(**options: object) -> Bench:
        made = make_bench(**options)
        assert made.vcpu.corrected
        return made

    return make


def faults(bench: Bench, text: str, head: str = "", **registers: int) -> list[tuple[int, int, int]]:
    """(vector, error code, RIP from the instruction on) of an instruction that stands behind others in its block."""
    first, raw = bytes.fromhex(head), bytes.fromhex(text)
    end = CODE + len(first) + len(raw)
    result = bench.execute(first + raw + b"\xf4", bench.state(r15=end, **{"rdi": DATA, "rsp": 0x1F000, **registers}))
    assert result.reason is ExitReason.HALTED
    return [(r.vector, r.error, r.rip - CODE - len(first)) for r in bench.records()]


# ---- encodings -----------------------------------------------------------------------------------------------------

UNDEFINED = {
    "lock test [rdi],ebx": "f0851f",
    "lock test al,1": "f0a801",
    "lock mov [rdi],ebx": "f0891f",
    "lock mov ebx,[rdi]": "f08b1f",
    "lock mov rax,imm64": "f048b88877665544332211",
    "lock bt [rdi],ebx": "f00fa31f",
    "lock bt [rdi],4": "f00fba2704",
    "lock cmp [rdi],ebx": "f0391f",
    "lock cmp [rdi],1": "f0833f01",
    "lock add eax,1 (accumulator)": "f083c001",
    "lock add ebx,[rdi]": "f0031f",
    "lock xchg eax,ebx": "f087c3",
    "lock cmpxchg ecx,ebx": "f00fb1d9",
    "lock inc ecx": "f0ffc1",
    "lock push [rdi]": "f0ff37",
    "lock mul [rdi]": "f0f727",
    "lock shl [rdi],1": "f0d127",
    "lock nop": "f090",
    "lock movaps xmm0,[rdi]": "f00f2807",
    "lock after a prefix": "66f0891f",
    "lock before rex": "f048891f",
    "pop [rdi], /1": "8f0f",
    "8f /1 with a register": "8fc8",
    "lock 8f /1": "f08f0f",
    "mov byte [rdi], /1": "c60f05",
    "mov dword ecx, /2": "c7d105000000",
    "movmskps of memory": "0f5007",
    "movnti with a prefix": "660fc307",
    "movdq2q of memory": "f20fd607",
    "maskmovq of memory": "0ff707",
    "psrlw of memory": "0f711701",
    "movbe ecx,eax": "0f38f0c8",
    "movbe eax,rcx": "480f38f1c8",
}


@pytest.mark.parametrize("name", UNDEFINED)
@pytest.mark.parametrize("head", ["", "90 90 ffc0"], ids=["first", "behind others"])
def test_undefined(corrected: Callable[..., Bench], name: str, head: str) -> None:
    assert faults(corrected(), UNDEFINED[name], head) == [(_UD, 0, 0)]


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_on_the_host_too(native: Callable[[bytes, bytearray], None], name: str) -> None:
    """The table above is the processor's: each raises SIGILL in a child process."""
    pid = os.fork()
    if not pid:
        try:
            native(bytes.fromhex(UNDEFINED[name]), bytearray(64))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == 4


LOCKED = {
    "add": ("f0011f", 0x0F0E0D0C + 5), "or": ("f0091f", 0x0F0E0D0C | 5), "sub": ("f0291f", 0x0F0E0D0C - 5),
    "xor": ("f0311f", 0x0F0E0D0C ^ 5), "and": ("f0211f", 0x0F0E0D0C & 5), "adc imm8": ("f0831701", 0x0F0E0D0D),
    "sbb imm8": ("f0831f01", 0x0F0E0D0B), "inc": ("f0ff07", 0x0F0E0D0D), "dec": ("f0ff0f", 0x0F0E0D0B),
    "not": ("f0f717", 0xF0F1F2F3), "neg": ("f0f71f", 0x1_0000_0000 - 0x0F0E0D0C), "xchg": ("f0871f", 5),
    "xadd": ("f00fc11f", 0x0F0E0D0C + 5), "bts": ("f00fab1f", 0x0F0E0D0C | 1 << 5),
    "btr imm8": ("f00fba3702", 0x0F0E0D08),
    "btc imm8": ("f00fba3f01", 0x0F0E0D0E),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKED)
def test_what_takes_lock_still_does(corrected: Callable[..., Bench], name: str) -> None:
    bench = corrected()
    bench.memory.write(DATA, struct.pack("<Q", 0x0F0E0D0C))
    text, expected = LOCKED[name]
    assert faults(bench, text, rbx=5) == []
    assert struct.unpack("<I", bench.memory.read(DATA, 4)) == (expected,)


def test_changed_code_is_seen_behind_an_undefined_instruction(corrected: Callable[..., Bench]) -> None:
    """The whole instruction, not the two bytes that the engine is shown, belongs to the block."""
    bench = corrected()
    text = "f048b88877665544332211"  # lock mov rax,imm64
    assert faults(bench, text) == [(_UD, 0, 0)]
    # The guest makes a NOP of the first byte, LOCK, and what is left is an instruction.
    raw = bytes.fromhex("f0b905000000")  # lock mov ecx,5
    fix = bytes.fromhex("c6042500000000 90".replace(" ", ""))  # mov byte [disp32],0x90
    fix = fix[:3] + struct.pack("<I", CODE + 8) + fix[7:]
    assert len(fix) == 8
    result = bench.execute(fix + raw + b"\xf4", bench.state())
    assert result.reason is ExitReason.HALTED
    assert bench.records() == []
    assert bench.vcpu.save().registers["rcx"] == 5


def test_int1(corrected: Callable[..., Bench], gate: str) -> None:
    if gate != "native":
        pytest.skip("the gate without a compiler gives #UD: docs/explanation/engine-deviations.md")
    assert faults(corrected(), "f1") == [(_DB, 0, 1)]
    assert faults(corrected(), "66f1", "90") == [(_DB, 0, 2)]
    assert faults(corrected(), "f0f1") == [(_UD, 0, 0)]


# ---- CMPXCHG ---------------------------------------------------------------------------------------------------------

_HIGH_A, _HIGH_B, _HIGH_C = 0xAAAA_5555 << 32, 0xBBBB_6666 << 32, 0xCCCC_7777 << 32
CMPXCHG = {
    "memory": "0fb15f08", "lock memory": "f00fb15f08", "memory, eax": "0fb14708", "lock memory, eax": "f00fb14708",
    "register": "0fb1d9", "register, eax": "0fb1c1", "eax, register": "0fb1d8", "register itself": "0fb1db",
    "r8d, ebx": "410fb1d8", "memory, 8 bits": "0fb05f08", "16 bits": "660fb1d9", "64 bits": "480fb1d9",
}  # fmt: skip


@pytest.mark.parametrize("name", CMPXCHG)
def test_cmpxchg_as_on_the_host(
    corrected: Callable[..., Bench], native: Callable[[bytes, bytearray], None], name: str
) -> None:
    """All registers concerned, memory and flags, for comparisons that succeed and fail."""
    bench = corrected()
    # push rbx; rax, rbx, rcx, r8 from [rdi+16..]; the instruction twice; back to [rdi+16..]; flags; pop rbx
    head = bytes.fromhex("53 488b4710 488b5f18 488b4f20 4c8b4728")
    tail = bytes.fromhex("48894710 48895f18 48894f20 4c894728 9c58 48894730 5b")
    program = head + bytes.fromhex(CMPXCHG[name]) + tail
    for there, accumulator in itertools.product((7, 0x8000_0000, 0xFFFF_FFFF), repeat=2):
        data = struct.pack(
            "<8Q", 0, _HIGH_C | there, _HIGH_A | accumulator, _HIGH_B | 9, _HIGH_C | there, _HIGH_B | there, 0, 0
        )
        host = bytearray(data)
        native(program, host)
        bench.memory.write(DATA, data)
        assert bench.execute(program + b"\xf4", bench.state(rdi=DATA)).reason is ExitReason.HALTED
        guest = bytearray(bench.memory.read(DATA, len(data)))
        for flags in (host, guest):
            flags[48:56] = (int.from_bytes(flags[48:56], "little") & 0x8D5).to_bytes(8, "little")
        assert struct.unpack("<8Q", guest) == struct.unpack("<8Q", host), f"{there:#x} {accumulator:#x}"


def test_cmpxchg_many_in_one_block(corrected: Callable[..., Bench]) -> None:
    """A spin lock's: taken, found taken, released; the upper halves tell which succeeded."""
    bench = corrected()
    bench.memory.write(DATA, bytes(64))
    # mov rax,imm64 before each: lock cmpxchg [rdi],ebx; save rax
    load, compare = "48b8 00000000 aaaaaaaa", "f00fb11f"
    program = (
        "".join(f"{load} {compare} 488947{8 * n:02x}" for n in (1, 2)) + "c70700000000" + load + compare + "48894718"
    )
    assert faults(bench, program, rbx=0x77) == []
    high = 0xAAAA_AAAA << 32
    assert struct.unpack("<4Q", bench.memory.read(DATA, 32)) == (0x77, high, 0x77, high)


# ---- alignment -------------------------------------------------------------------------------------------------------

_ALIGNED_OPERANDS = {
    "movaps load": "0f2807", "movaps store": "0f2907", "movapd load": "660f2807", "movdqa load": "660f6f07",
    "movdqa store": "660f7f07", "movntps": "0f2b07", "movntdq": "660fe707", "movntdqa": "660f382a07",
    "addps": "0f5807", "mulpd": "660f5907", "pxor": "660fef07", "pshufb": "660f380007", "pcmpeqb": "660f7407",
    "pshufd": "660f700700", "unpcklps": "0f1407", "cmpps": "0fc20700", "shufps": "0fc60700", "palignr": "660f3a0f0701",
    "aesenc": "660f38dc07", "sqrtps": "0f5107", "haddps": "f20f7c07",
}  # fmt: skip
_ANY_OPERANDS = {
    "movups load": "0f1007", "movups store": "0f1107", "movupd": "660f1007", "movdqu load": "f30f6f07",
    "movdqu store": "f30f7f07", "lddqu": "f20ff007", "pcmpistri": "660f3a630700", "pcmpestrm": "660f3a600700",
    "movss": "f30f1007", "movlps": "0f1207", "movhps": "0f1607", "movq": "f30f7e07", "paddq mm": "0fd407",
    "addss": "f30f5807", "pmovzxbw": "660f383007", "cvtps2pd": "0f5a07", "movsd store": "f20f1107",
    "movddup": "f20f1207",
    "fld": "db2f", "mov": "488b07", "cmpxchg": "480fb11f", "shld": "480fa41f03",
}  # fmt: skip


@pytest.mark.parametrize("name", _ALIGNED_OPERANDS)
def test_an_operand_of_16_bytes_must_be_aligned(corrected: Callable[..., Bench], name: str) -> None:
    bench = corrected()
    bench.memory.write(DATA, bytes(range(64)))
    for offset in (1, 4, 8, 15):
        assert faults(bench, _ALIGNED_OPERANDS[name], "90", rdi=DATA + offset) == [(_GP, 0, 0)]
    assert bench.memory.read(DATA, 64) == bytes(range(64)), "nothing was written"
    assert faults(bench, _ALIGNED_OPERANDS[name], "90", rdi=DATA + 16) == []


@pytest.mark.parametrize("name", _ANY_OPERANDS)
def test_other_operands_may_lie_anywhere(corrected: Callable[..., Bench], name: str) -> None:
    bench = corrected()
    for offset in (0, 1, 8, 15):
        assert faults(bench, _ANY_OPERANDS[name], "90", rdi=DATA + offset) == []


def test_an_aligned_store_to_a_page_of_code_drops_it(corrected: Callable[..., Bench]) -> None:
    """_stores.c and the demand for alignment together: changed code is seen."""
    bench = corrected()
    patch = bytes.fromhex("b907000000 f4").ljust(16, b"\x90")  # mov ecx,7; hlt
    bench.memory.write(DATA, patch)
    target = CODE + 0x40
    bench.memory.write(target, bytes.fromhex("ffc1 c3").ljust(16, b"\x90"))  # inc ecx; ret
    # call target; movdqa xmm0,[rsi]; movdqa [rdi],xmm0; jmp target
    code = b"\xe8" + struct.pack("<i", 0x40 - 5) + bytes.fromhex("660f6f06 660f7f07") + b"\xe9"
    code += struct.pack("<i", 0x40 - len(code) - 4)
    assert bench.execute(code, bench.state(rdi=target, rsi=DATA)).reason is ExitReason.HALTED
    assert bench.vcpu.save().registers["rcx"] == 7


# ---- MSRs and control registers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0x12345678, 0x3A, 0x48, 0x802, 0x4B564D00, 0x40000000, 0xC0010015, 0xC0000085])
@pytest.mark.parametrize("text", ["0f32", "0f30"], ids=["rdmsr", "wrmsr"])
def test_an_msr_that_is_not_there(corrected: Callable[..., Bench], index: int, text: str) -> None:
    assert faults(corrected(), text, "90", rcx=index) == [(_GP, 0, 0)]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *(
            (index, 0x8000_0000_0000)
            for index in (0x175, 0x176, 0xC0000082, 0xC0000083, *range(0xC0000100, 0xC0000103))
        ),
        (0xC0000103, 1 << 32),
        (0xC0000080, 0xD01 | 1 << 12),  # EFER.SVME
        (0xC0000080, 0xC01),  # LME off while paging
        (0x277, 0x0207_0406_0007_0406),  # PAT: types 2 and 3 do not exist
        (0x2FF, 0x1000),
        (0x250, 0x0606_0606_0706_0606),
        (0x201, 1 << 40 | 0x800),
    ],
)
def test_a_value_that_an_msr_cannot_hold(corrected: Callable[..., Bench], index: int, value: int) -> None:
    bench = corrected()
    assert faults(bench, "0f30", rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32) == [(_GP, 0, 0)]
    assert bench.vcpu.save().efer == 0xD01


def test_amds_msrs(corrected: Callable[..., Bench]) -> None:
    bench = corrected(vendor="AuthenticAMD")
    assert faults(bench, "0f32", rcx=0xC0010015) == []
    assert bench.vcpu.save().registers["rax"] == 1 << 24
    assert faults(bench, "0f30", rcx=0x175, rax=5, rdx=0xFFFF_8000) == []
    assert bench.vcpu.save().msrs[0x175] == 5
    assert faults(bench, "0f32", rcx=0x17) == [(_GP, 0, 0)]


def test_the_tsc_as_an_msr(corrected: Callable[..., Bench]) -> None:
    bench = corrected()
    # wrmsr; rdmsr; hlt
    assert faults(bench, "0f30 0f32", rcx=0x10, rax=5, rdx=0x1000) == []
    state = bench.vcpu.save()
    assert state.registers["rdx"] == 0x1000
    assert 0x1000_0000_0005 < state.tsc < 0x1001_0000_0000


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CR0 bit 32", "0f22c0", 1 << 32 | 0x8001_0033),
        ("CR0 paging without protection", "0f22c0", 0x8001_0032),
        ("CR0 NW without CD", "0f22c0", 0xA001_0033),
        ("CR0 paging off in 64-bit mode", "0f22c0", 0x0001_0033),
        ("CR3 beyond the address width", "0f22d8", 1 << 39 | 0x1000),
        ("CR3 bit 63", "0f22d8", 1 << 63 | 0x1000),
        ("CR4 PAE off in long mode", "0f22e0", 0x600),
        ("CR8", "440f22c0", 0x10),
        *(
            (f"CR4 bit {bit}", "0f22e0", 1 << bit | 0x620)
            for bit in (6, 11, 12, 13, 14, 15, 17, 18, 19, 21, 22, 31, 32)
        ),
    ],
)
def test_a_value_that_a_control_register_cannot_hold(
    corrected: Callable[..., Bench], name: str, text: str, value: int
) -> None:
    bench = corrected()
    before = bench.state()
    assert faults(bench, text, "90", rax=value) == [(_GP, 0, 0)], name
    after = bench.vcpu.save()
    assert (after.cr0, after.cr3, after.cr4, after.cr8) == (before.cr0, before.cr3, before.cr4, 0)


def test_bits_of_cr0_that_are_not_writable(corrected: Callable[..., Bench]) -> None:
    """They stay 0; in a state they would be refused by every other backend."""
    bench = corrected()
    assert faults(bench, "0f22c0", rax=0x8001_0033 | 0x0FF0_0040) == []
    assert bench.vcpu.save().cr0 == 0x8001_0033


def test_cr4_has_the_bits_of_the_contract(make_bench: Callable[..., Bench], corrected: Callable[..., Bench]) -> None:
    """SMEP is in the capability, not in a contract of level 3."""
    bench = corrected()
    assert faults(bench, "0f22e0", rax=0x620 | 1 << 16) == []  # FSGSBASE
    narrow = make_contract(cpuid.capability(bench.environment.tsc_khz, 39), level=3)
    environment = attrs.evolve(bench.environment, cpuid=narrow)
    bench.vcpu.close()
    bench.vcpu = type(bench.vcpu)(engine.load(), environment, environment.tsc_khz)
    assert faults(bench, "0f22e0", rax=0x620 | 1 << 16) == [(_GP, 0, 0)]


def test_sysexit(corrected: Callable[..., Bench]) -> None:
    """To 32-bit code with the low halves of RCX and RDX; #GP for an address that is not canonical, and on AMD #UD."""
    bench = corrected()
    bench.memory.write(CODE + 0x80, bytes.fromhex("0f34"))  # sysenter

    def run(bench: Bench, text: str, **registers: int) -> None:
        state = bench.state(r15=CODE + 0x60, **registers)
        msrs = {**state.msrs, MSR_IA32_SYSENTER_CS: KERNEL_CS, 0x175: 0x1E000, 0x176: SYSCALL_ENTRY}
        bench.memory.write(CODE + 0x60, b"\xf4")
        bench.memory.write(CODE + 0x80, bytes.fromhex("89e0 0f34"))  # mov eax,esp; sysenter
        assert bench.execute(bytes.fromhex(text), attrs.evolve(state, msrs=msrs)).reason is ExitReason.HALTED

    run(bench, "0f35", rcx=0x5_0001_8000, rdx=0x7_0000_0000 | CODE + 0x80)
    assert bench.records() == []
    after = bench.vcpu.save()
    assert (after.rip, after.registers["rax"]) == (SYSCALL_ENTRY + 1, 0x18000)
    run(bench, "480f35", rcx=0x18000, rdx=1 << 47)
    assert [(r.vector, r.rip) for r in bench.records()] == [(_GP, CODE)]
    amd = corrected(vendor="AuthenticAMD")
    run(amd, "0f35", rcx=0x18000, rdx=CODE + 0x80)
    assert [(r.vector, r.rip) for r in amd.records()] == [(_UD, CODE)]


def test_lock_in_32_bit_code(corrected: Callable[..., Bench]) -> None:
    """0x40 is INC there, no prefix."""
    bench = corrected()
    state = bench.state(rdi=DATA, r15=CODE + 3, rbx=1)
    cs = state.segments["cs"]
    segments = {**state.segments, "cs": attrs.evolve(cs, access=cs.access & ~AR_LONG | AR_DB)}
    bench.execute(bytes.fromhex("f0891f f4"), attrs.evolve(state, segments=segments))  # lock mov [edi],ebx
    assert [(r.vector, r.rip) for r in bench.records()] == [(_UD, CODE)]
    bench.memory.write(DATA, bytes(8))
    bench.execute(bytes.fromhex("40 f0011f f4"), attrs.evolve(state, segments=segments))  # inc eax; lock add [edi],ebx
    assert bench.records() == []
    assert bench.memory.read(DATA, 4) == b"\1\0\0\0"
    assert MSR_LSTAR in state.msrs


def test_the_engine_by_itself_is_left_alone(corrected: Callable[..., Bench]) -> None:
    """An engine that is not attached, in the same process, does as it always did."""
    bench = corrected()
    corrections.detach(bench.vcpu._cpu)
    assert faults(bench, "0f284701") == []
    assert faults(bench, "0f32", rcx=0x12345678) == []
