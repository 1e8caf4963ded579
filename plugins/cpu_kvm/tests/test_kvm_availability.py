"""What the backend says of this host, and what it presents."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from vmf.cpu.backend import CpuBackend
from vmf.cpuid import features_of, make_contract
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import BackendUnavailable
from vmf.plugins.bridge import PluginRegistry

vmf_cpu_kvm_host = pytest.importorskip("vmf_cpu_kvm.host")
from vmf_cpu_kvm import abi, backend, cpuid, host, selftest  # noqa: E402
from vmf_cpu_kvm.convert import XsaveLayout  # noqa: E402


def test_plugin_loads() -> None:
    loaded = PluginRegistry().cpu_backend("kvm")
    assert loaded.preference == 100
    assert loaded.availability() is not None


def test_no_device_node(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="does not exist") as caught:
        host.open_device(str(tmp_path / "kvm"))
    assert "modprobe" in caught.value.remedy or "firmware" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "seteuid"), reason="cannot drop privileges")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.write_text("")
    path.chmod(0)
    for parent in (tmp_path, *tmp_path.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(BackendUnavailable, match="may not open") as caught:
            host.open_device(str(path))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    assert "group" in caught.value.message
    assert "kvm" in caught.value.remedy


def test_not_kvm() -> None:
    with pytest.raises(BackendUnavailable, match="not KVM"):
        host.open_device("/dev/null")


def test_not_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    refusing = backend.KvmBackend()
    here = refusing.availability()
    assert not here.usable
    assert "aarch64" in here.reason
    assert "unicorn" in here.remedy
    with pytest.raises(BackendUnavailable):
        refusing.tsc_khz()


def test_old_api_and_missing_capability(kvm: CpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "API_VERSION", 13)
    with pytest.raises(BackendUnavailable, match="version 12"):
        host.open_device()
    monkeypatch.undo()
    monkeypatch.setattr(host, "REQUIRED", {60000: "KVM_CAP_IMAGINARY"})
    with pytest.raises(BackendUnavailable, match="KVM_CAP_IMAGINARY"):
        host.open_device()


def test_judged_by_behaviour_and_cached(kvm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(backend.TRUST_VARIABLE)
    monkeypatch.delenv("VMF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = backend.KvmBackend().availability()
    problems = selftest.run_selftest(kvm._device, kvm._open())
    assert first.usable == (not problems)
    print(f"self-test: {problems or 'passed'}")
    for problem in problems:
        assert problem in first.reason
    if problems:
        assert backend.TRUST_VARIABLE in first.remedy
    monkeypatch.setattr(selftest, "run_selftest", lambda *_: pytest.fail("not from the cache"))
    again = backend.KvmBackend().availability()
    assert (again.usable, again.reason) == (first.usable, first.reason)
    kept = tmp_path / "vmf" / "kvm-selftest.json"
    kept.write_text("nonsense")
    monkeypatch.setattr(selftest, "run_selftest", lambda *_: ["it smells"])
    assert "it smells" in backend.KvmBackend().availability().reason
    monkeypatch.setenv(backend.TRUST_VARIABLE, "1")
    assert backend.KvmBackend().availability().usable


def test_untrusted_vcpu_is_refused(kvm: CpuBackend, pvm: bool, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pvm:
        pytest.skip("this KVM passes its self-test")
    monkeypatch.delenv(backend.TRUST_VARIABLE)
    with pytest.raises(BackendUnavailable, match="contract"):
        kit.Rig(backend.KvmBackend(), tsc_khz=kvm.tsc_khz())


def test_capability_promises_nothing_of_what_the_machine_lacks(kvm: CpuBackend) -> None:
    capability = kvm.cpuid_capability()
    names = {item.name for item in features_of(capability)}
    assert {"fpu", "tsc", "msr", "cx8", "sse2", "syscall", "lm", "nx"} <= names
    assert not names & {"apic", "x2apic", "tsc_deadline_timer", "monitor", "mtrr", "mce", "mca", "vmx", "svm", "ht"}
    assert "osxsave" not in names
    assert not [leaf for leaf, _ in capability.entries if 0x40000000 <= leaf < 0x80000000]
    khz = kvm.tsc_khz()
    told = capability.lookup(0x15, 0)
    assert 0 <= khz * 1000 - told.ecx * told.ebx // told.eax < told.ebx  # the ratio is greater on an emulated host
    assert kvm.tsc_khz_supported(khz)
    assert not kvm.tsc_khz_supported(0)


def test_contract_is_presented_by_kvm_and_read_by_the_guest(make_rig: Any, kvm: Any, kit: Any, pvm: bool) -> None:
    """Level by level: what the guest's CPUID instruction says is the contract."""
    if pvm:
        pytest.skip("this KVM overrides masked CPUID bits (its self-test says so)")
    for level in range(5):
        contract = make_contract(kvm.cpuid_capability(), level)
        rig = make_rig(contract=contract)
        leaves = list(contract.entries)
        rig.load(selftest.CODE)
        rig.memory.write(0x11000, b"".join(x.to_bytes(4, "little") for leaf in leaves for x in leaf))
        rig.vcpu.restore(
            kit.changed(
                rig.vcpu.save(), rip=0x10008, registers={**rig.registers(), "rbp": len(leaves), "rsp": kit.STACK_TOP}
            )
        )
        rig.run_to_halt()
        seen = selftest._dumped(rig.memory, 0x12000, leaves)
        assert cpuid.overridden(contract, seen) == []


def test_avx_state_moves(make_rig: Any, kvm: Any, kit: Any) -> None:
    """YMM registers, where the contract has them: VADDPS on registers that were restored, result saved."""
    contract = make_contract(kvm.cpuid_capability())
    if "avx" not in {item.name for item in features_of(contract)}:
        pytest.skip("this host's KVM does not present AVX")
    one, two = make_rig(contract=contract), make_rig(contract=contract)
    code = b"\xc5\xfc\x10\x0c\x25\x00\x00\x02\x00\xf4\xc5\xfc\x11\x0c\x25\x20\x00\x02\x00\xf4"
    # vmovups ymm1, [0x20000]; hlt; vmovups [0x20020], ymm1; hlt
    for rig in (one, two):
        rig.load(code)
    one.memory.write(0x20000, bytes(range(1, 33)))
    one.vcpu.restore(kit.changed(one.vcpu.save(), xcr0=7, cr4=0x40620))
    one.run_to_halt()
    state = one.vcpu.save()
    assert len(state.xsave) >= 832
    two.vcpu.restore(kit.changed(state, halted=False))
    two.run_to_halt()
    assert two.memory.read(0x20020, 32) == bytes(range(1, 33))


def test_misplaced_xsave_component_is_refused() -> None:
    table = CpuidTable({(0xD, 0): CpuidRegisters(0x203, 840, 840, 0), (0xD, 9): CpuidRegisters(8, 832, 0, 0)})
    assert cpuid.misplaced_components(table, XsaveLayout({9: (832, 8)})) == []
    (text,) = cpuid.misplaced_components(table, XsaveLayout({9: (2688, 8)}))
    assert re.search("pkru.*832.*2688", text)


def test_layout_of_the_kernels_structures() -> None:
    """Against sizes in <linux/kvm.h>, which the ioctl numbers carry."""
    sizes = {
        abi.GET_REGS: 144, abi.GET_SREGS: 312, abi.GET_SREGS2: 320, abi.GET_VCPU_EVENTS: 64, abi.GET_DEBUGREGS: 128,
        abi.GET_XCRS: 392, abi.GET_XSAVE: 4096, abi.ENABLE_CAPABILITY: 104, abi.SET_USER_MEMORY_REGION: 32,
    }  # fmt: skip
    assert {request >> 16 & 0x3FFF for request in sizes} == set(sizes.values())
    assert all(request >> 16 & 0x3FFF == size for request, size in sizes.items())
    assert abi.SEGMENT.size == 24


def test_tsc_rate_that_cannot_be_given_is_refused(make_rig: Any, kvm: CpuBackend) -> None:
    from vmf.errors import StateError

    khz = kvm.tsc_khz() // 2
    if kvm.tsc_khz_supported(khz):
        rig = make_rig(tsc_khz=khz)
        first = rig.vcpu.read_tsc()
        import time

        time.sleep(0.1)
        assert 0.05 < (rig.vcpu.read_tsc() - first) / (khz * 1000) < 1
        return
    with pytest.raises(StateError, match=f"{khz} kHz"):
        make_rig(tsc_khz=khz)
