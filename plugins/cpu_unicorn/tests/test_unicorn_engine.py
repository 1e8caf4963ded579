"""The engine's binding, its self-test, and the refusals."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmf.errors import BackendUnavailable
from vmf_cpu_unicorn import engine, gates, selftest, sure_hooks, thunks, tsc
from vmf_cpu_unicorn.backend import UnicornBackend

x86_const = pytest.importorskip("unicorn.x86_const")


def test_constants_are_those_of_the_binding() -> None:
    assert engine.CPU_MODEL_DENVERTON == x86_const.UC_CPU_X86_DENVERTON
    assert sure_hooks.INSN_CPUID == x86_const.UC_X86_INS_CPUID
    assert sure_hooks.INSN_SYSENTER == x86_const.UC_X86_INS_SYSENTER
    assert engine.INSN_IN == x86_const.UC_X86_INS_IN
    assert engine.INSN_OUT == x86_const.UC_X86_INS_OUT
    assert engine.INSN_SYSCALL == x86_const.UC_X86_INS_SYSCALL


def test_usable_here() -> None:
    available = UnicornBackend().availability()
    assert available.usable, available
    assert available.version.startswith("2.1.4")


def test_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.1")
    engine.load.cache_clear()
    try:
        available = UnicornBackend().availability()
    finally:
        engine.load.cache_clear()
    assert not available.usable
    assert "2.0.1" in available.reason
    assert "pip install unicorn==2.1.4" in available.remedy


def test_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    engine.load.cache_clear()
    try:
        available = UnicornBackend().availability()
    finally:
        engine.load.cache_clear()
    assert not available.usable
    assert "not installed" in available.reason


def test_other_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.platform, "machine", lambda: "aarch64")
    engine.load.cache_clear()
    try:
        available = UnicornBackend().availability()
    finally:
        engine.load.cache_clear()
    assert not available.usable
    assert "aarch64" in available.reason


@pytest.mark.parametrize("name", ["UC_NO_EXIT_REQUEST", "HFLAGS", "XMM", "EFER", "TR", "DR", "FPREGS", "PAT"])
def test_self_test_notices_a_wrong_offset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(selftest.at, name, getattr(selftest.at, name) + 8)
    if name == "PAT":
        monkeypatch.setitem(selftest._MSR_OFFSETS, 0x277, selftest.at.PAT)
    if name == "EFER":
        monkeypatch.setitem(selftest._MSR_OFFSETS, selftest._EFER, selftest.at.EFER)
    with pytest.raises(engine.BackendUnavailable, match="lies elsewhere"):
        selftest.verify.__wrapped__(engine.load())


def test_gate_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gates.GATE_VARIABLE, "python")
    assert gates.chosen_gate() == "python"
    monkeypatch.setenv(gates.GATE_VARIABLE, "rust")
    with pytest.raises(engine.BackendUnavailable, match="rust"):
        gates.chosen_gate()


def test_without_the_native_gate_the_other_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gates.GATE_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vmf_cpu_unicorn._gate", None)
    assert gates.chosen_gate() == "python"
    monkeypatch.setenv(gates.GATE_VARIABLE, "native")
    with pytest.raises(engine.BackendUnavailable, match="not built"):
        gates.chosen_gate()


def test_importing_the_plugin_loads_nothing_heavy() -> None:
    program = (
        "import sys, vmf_cpu_unicorn.plugin\n"
        "heavy = {'unicorn', 'numpy', 'ctypes', 'vmf_cpu_unicorn.backend'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_thunks_are_what_they_say() -> None:
    capstone = pytest.importorskip("capstone")
    assembler = thunks.assemble()
    code = assembler.code()
    listing = list(capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, 0))
    assert sum(instruction.size for instruction in listing) == len(code)
    starts = {instruction.address for instruction in listing}
    assert set(assembler.labels.values()) <= starts
    text = [f"{instruction.mnemonic} {instruction.op_str}".strip() for instruction in listing]
    assert text[:3] == [
        "mov rax, qword ptr [rdx + 8]",
        "test dword ptr [rax + 0x150c], 0xffffffff",
        f"je {assembler.labels['deliver']:#x}",
    ]
    assert text[-1] == "jmp qword ptr [rcx + 0x50]"
    targets = {int(op.split()[1], 16) for op in text if op.startswith("j") and op.split()[1].startswith("0x")}
    assert targets <= starts


def test_tsc_rate_is_stable() -> None:
    assert tsc.host_tsc_khz() == tsc.host_tsc_khz()
    first, begin = tsc.host_tsc(), time.monotonic_ns()
    time.sleep(0.05)
    rate = (tsc.host_tsc() - first) * 1e6 / (time.monotonic_ns() - begin)
    assert abs(rate - tsc.host_tsc_khz()) < tsc.host_tsc_khz() * 0.01


@pytest.mark.parametrize("kept", ["", "nonsense", "1", "99999999"])
def test_a_kept_tsc_rate_that_cannot_be_is_measured_again(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tsc.host_tsc_khz()
    monkeypatch.setenv("VMF_CACHE", str(tmp_path))
    tsc.host_tsc_khz.cache_clear()
    place = tsc._cache_file()
    assert place is not None
    place.write_text(kept)
    try:
        assert abs(tsc.host_tsc_khz() - right) < right / 1000
        assert abs(int(place.read_text()) - right) < right / 1000
    finally:
        tsc.host_tsc_khz.cache_clear()


def test_an_engine_without_room_is_not_asked() -> None:
    """It would end the process: it says "Could not allocate dynamic translator buffer" and calls exit."""
    engine.require_room(1 << 20)
    with pytest.raises(BackendUnavailable, match="needs 4294967296 MiB of memory of its own"):
        engine.require_room(1 << 52)
