"""Masked CPUID really is masked: guests on cpu_kvm at every portability level execute CPUID and tell what they got.

    python3 cpuid_levels.py [--levels 0,1,2,3,4,vbox-1,vbox-2,vbox-3] [--linux 0,1,2,3,4,vbox-1,vbox-2]

At each of `--levels` a bare-metal guest executes CPUID in ring 0 for every leaf of any level's contract and writes what
it got to its serial port; at each of `--linux` a program under stock Debian does so in ring 3, and /proc/cpuinfo is
read. Both are compared with the machine's contract, register by register: a leaf or a bit that the contract has not
must not be seen. Then that the levels are nested. VirtualBox's level 3 must be refused, as no x86-64 system can run
without SSE2.

Executing what a bit promises is another matter: QEMU does not let KVM in the lab keep XCR0 (see README.md), so Linux
is told `noxsave` at the levels that show XSAVE (0, 1 and 2). CPUID is the same with and without.

Runs in the lab, and on other hosts with hardware KVM.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

from attrs import evolve
from boot_debian import SPARING

import vmf
from vmf.cpuid.compare import diff
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import CpuidError, features_of, names
from vmf.cpuid.levels import restrict
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.machine.config import CpuidConfig
from vmf.machine.machine import wait_until
from vmf.testing.guests import linux_guest

LEVELS = "0,1,2,3,4,vbox-1,vbox-2,vbox-3"
LINUX = "0,1,2,3,4,vbox-1,vbox-2"
SLOWDOWN = int(os.environ.get("VMF_LAB_SLOWDOWN", "1"))

# lea r12, [rip+table]; mov r13d, [r12]; add r12, 4; sub rsp, 16
# again: mov eax, [r12]; mov ecx, [r12+4]; cpuid; mov [rsp], eax; [rsp+4], ebx; [rsp+8], ecx; [rsp+12], edx
BARE = bytes.fromhex(
    "4c8d2540000000458b2c244983c4044883ec10418b0424418b4c24040fa2890424895c2404894c2408895424"
    # mov rsi, rsp; mov ecx, 16; mov dx, 0x3f8; rep outsb; add r12, 8; dec r13d; jnz again; hlt; table:
    "0c4889e6b91000000066baf803f36e4983c40841ffcd75cff4ebfd"
)
PROGRAM = bytes.fromhex(
    "4c8d254c000000458b2c244983c4044883ec10418b0424418b4c24040fa2890424895c2404894c2408895424"
    # write(1, rsp, 16); add r12, 8; dec r13d; jnz again; exit(0); table:
    "0cb801000000bf010000004889e6ba100000000f054983c40841ffcd75c9b83c00000031ff0f05"
)

Leaves = list[tuple[int, int]]


def with_table(code: bytes, leaves: Leaves) -> bytes:
    return code + struct.pack("<I", len(leaves)) + b"".join(struct.pack("<II", *leaf) for leaf in leaves)


def elf(code: bytes) -> bytes:
    """A static ELF64 executable of one segment (System V ABI, chapter 4)."""
    base, header = 0x400000, 64 + 56
    return (
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, header + len(code), header + len(code), 0x1000)
        + code
    )


def table_of(answers: list[tuple[int, ...]], leaves: Leaves) -> CpuidTable:
    return CpuidTable({leaf: CpuidRegisters(*answer) for leaf, answer in zip(leaves, answers, strict=True)})


def run(config: vmf.MachineConfig, registry: vmf.PluginRegistry, done: re.Pattern[bytes], seconds: float) -> bytes:
    """Boot, wait for what ends the output, switch off; the output."""
    output = bytearray()
    with vmf.Machine(config, registry) as machine:
        machine.console.add_listener(output.extend)
        machine.start()
        wait_until(lambda: bool(done.search(output) or machine.failure), seconds)
        if not done.search(output):
            raise SystemExit(f"--- FAILED: {machine.failure or 'no answer'}; {bytes(output[-800:])!r}")
    return bytes(output)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--levels", default=LEVELS)
    parser.add_argument("--linux", default=LINUX)
    parser.add_argument("--timeout", type=float, default=180, help="for a boot; seconds")
    options = parser.parse_args()
    registry = vmf.PluginRegistry()
    backend = registry.cpu_backend("kvm")
    widest = backend.cpuid_capability()
    leaves = sorted({leaf for level in LINUX.split(",") for leaf in make_contract(widest, level).entries})
    wrong = 0
    seen: dict[str, CpuidTable] = {}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "cpuid")
        image.write_bytes(with_table(BARE, leaves))
        # The guest's output is binary: all of it is there when it is long enough.
        complete = re.compile(b"(?s).{%d}" % (16 * len(leaves)))
        config = vmf.MachineConfig(name="cpuid", memory_mib=16, image=image, cpu_backend="kvm")
        for level in filter(None, options.levels.split(",")):
            config = evolve(config, cpuid=CpuidConfig(portability_level=level))
            try:
                output = run(config, registry, complete, options.timeout)
            except CpuidError as error:
                print(f"level {level}: refused: {error}")
                wrong += level != "vbox-3"  # nothing that is x86-64 runs without SSE2
                continue
            seen[level] = table_of(list(struct.iter_unpack("<4I", output)), leaves)
            wrong += judge(f"level {level}, ring 0", level, seen[level], widest)
    wrong += nested(seen)
    guest = linux_guest(None, {"bin/cpuid": elf(with_table(PROGRAM, leaves))})
    config = vmf.MachineConfig(
        name="cpuid", memory_mib=128, kernel=guest.kernel, initrd=guest.initrd, cpu_backend="kvm"
    )
    for level in filter(None, options.linux.split(",")):
        began = time.monotonic()
        xsave = level in ("0", "1", "2")
        extra = f"tsc_early_khz={backend.tsc_khz()} {SPARING}{' noxsave' if xsave else ''}"
        config = evolve(config, cmdline=f"{guest.cmdline} {extra}", cpuid=CpuidConfig(portability_level=level))
        output = ask_linux(config, registry, options.timeout)
        lines = re.findall(rb"(?m)^ ((?:[0-9a-f]{8} ?){4})\r?$", output)
        answers = [tuple(int(word, 16) for word in line.split()) for line in lines]
        if len(answers) != len(leaves):
            print(f"--- FAILED: {len(answers)} answers to {len(leaves)} leaves: {output[-2000:]!r}")
            return 1
        wrong += judge(f"level {level}, Debian, ring 3", level, table_of(answers, leaves), widest)
        flags = re.search(rb"flags\s*: ([^\r\n]*)", output)
        print(f"    /proc/cpuinfo: {flags[1].decode() if flags else '?'}")
        print(f"    {(time.monotonic() - began) * SLOWDOWN:.1f} s", flush=True)
    print("--- FAILED" if wrong else "--- masked CPUID is masked")
    return 1 if wrong else 0


def ask_linux(config: vmf.MachineConfig, registry: vmf.PluginRegistry, seconds: float) -> bytes:
    """Boot to a shell, let it run the program and print what the kernel found; all of the output."""
    output = bytearray()
    with vmf.Machine(config, registry) as machine:
        machine.console.add_listener(output.extend)
        machine.start()
        for words, typed in (
            (b"# ", b"cpuid | od -v -An -t x4; grep -m1 flags /proc/cpuinfo; echo that is $((6*7))\n"),
            (b"that is 42", b""),
        ):
            wait_until(lambda words=words: words in output or bool(machine.failure), seconds)
            if words not in output:
                raise SystemExit(f"--- FAILED: {machine.failure or 'no answer'}; {bytes(output[-800:])!r}")
            machine.type(typed)
    return bytes(output)


def judge(what: str, level: str, table: CpuidTable, widest: CpuidTable) -> int:
    """Compare what a guest saw with what its level lets through; the number of differences."""
    contract = make_contract(widest, level)
    differences = diff(contract, table)
    present, masked = features_of(table), features_of(widest) - features_of(table)
    print(f"{what}: {len(present)} features, {len(masked)} of the host's are masked, {len(differences)} differences")
    for difference in differences:
        print(f"    WRONG: {difference}")
    leaked = present - restrict(features_of(widest), level) - features_of(contract)
    if leaked:
        print(f"    LEAKED: {' '.join(names(leaked))}")
    return len(differences) + len(leaked)


def nested(seen: dict[str, CpuidTable]) -> int:
    """What each level hides beyond the one before it, as the guests saw it; how many levels are not nested."""
    wrong = 0
    for series in (["0", "1", "2", "3", "4"], ["0", "vbox-1", "vbox-2", "vbox-3"]):
        levels = [level for level in series if level in seen]
        for before, after in itertools.pairwise(levels):
            more, less = features_of(seen[before]), features_of(seen[after])
            print(
                f"from level {before} to {after} the guest loses: {' '.join(sorted(names(more - less))) or 'nothing'}"
            )
            if extra := {item for item in less - more if item.name != "hypervisor"}:
                print(f"    WRONG: and gets {' '.join(names(extra))}")
                wrong += 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
