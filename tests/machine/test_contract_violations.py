"""What a target cannot honour is refused by name, with the level that would have avoided it and the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attrs import evolve

from vmf.cpu import codec
from vmf.cpu.state import GENERAL_REGISTERS, VcpuState
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import BY_NAME, features_of, with_features
from vmf.cpuid.layout import ADDRESS_LEAF, with_vendor
from vmf.cpuid.levels import LEVELS
from vmf.cpuid.table import CpuidTable
from vmf.errors import StateError, TeleportBlocked
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.teleport_view import TeleportView
from vmf.teleport.check import Blocker
from vmf.testing import guests
from vmf.testing.cpuid_tables import MILAN, SKYLAKE_SP


@pytest.fixture(scope="module")
def target() -> Iterator[Machine]:
    """Waits on Unicorn."""
    config = MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest(), cpu_backend="unicorn")
    with Machine(config) as machine:
        machine.listen("127.0.0.1", 0)
        yield machine


Check = Callable[..., list[Blocker]]


@pytest.fixture
def check(target: Machine) -> Check:
    """What the target says to a machine with that contract."""

    def ask(contract: CpuidTable, level: str = "0", **cpu: Any) -> list[Blocker]:
        described = dict(TeleportView(target).describe())
        khz = target.hardware.backend.tsc_khz()
        described["cpu"] = {"tsc_khz": khz, "cpuid": contract.to_wire(), "level": level, **cpu}
        return list(TeleportView(target).check(described))

    return ask


def own(target: Machine) -> CpuidTable:
    return make_contract(target.hardware.backend.cpuid_capability(), tsc_khz=target.hardware.backend.tsc_khz())


def test_a_machine_of_a_suitable_contract_is_welcome(check: Check, target: Machine) -> None:
    assert check(own(target)) == []
    assert check(with_vendor(own(target), "AuthenticAMD")) == []


@pytest.mark.parametrize("host", [SKYLAKE_SP, MILAN], ids=["skylake", "milan"])
def test_an_avx2_machine_does_not_go_to_unicorn(check: Check, host: CpuidTable) -> None:
    found = check(make_contract(host))
    by_field = {blocker.field: blocker for blocker in found}
    avx2 = by_field["CPU feature avx2"]
    assert (avx2.source, avx2.target) == ("present", "absent")
    assert (
        "Power the machine off, run `vmf modifyvm box --cpuid-portability-level 3`, and start it again." in avx2.remedy
    )
    named = {field.removeprefix("CPU feature ") for field in by_field if field.startswith("CPU feature ")}
    ours = {item.name for item in features_of(make_contract(host))}
    assert named <= ours
    # The level that is named is the right one, and one less would not have been enough.
    assert check(make_contract(host, 3), "3") == []
    assert "CPU feature avx2" in {blocker.field for blocker in check(make_contract(host, 2), "2")}


@pytest.mark.parametrize("name", ["avx512f", "avx2", "fma", "bmi1", "movbe", "popcnt", "sse4_2", "pni"])
def test_the_level_named_is_the_lowest_that_leaves_the_feature_out(target: Machine, name: str) -> None:
    from vmf.cpuid.compare import compare

    capability = make_contract(SKYLAKE_SP)
    poorer = with_features(capability, features_of(capability) - {BY_NAME[name]})
    (found,) = [item for item in compare(capability, poorer, machine="box") if item.field == f"CPU feature {name}"]
    assert found.level is not None
    assert BY_NAME[name] not in (LEVELS[found.level].allowed or ())
    lower = LEVELS[found.level - 1].allowed
    assert lower is None or BY_NAME[name] in lower
    assert f"vmf modifyvm box --cpuid-portability-level {found.level}" in found.remedy


def test_another_vendor(target: Machine, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    backend = target.hardware.backend
    amd = with_vendor(backend.cpuid_capability(), "AuthenticAMD")
    contract = own(target)
    monkeypatch.setattr(type(backend), "cpuid_capability", lambda self: amd)
    (found,) = check(contract)
    assert (found.field, found.source, found.target) == ("CPU vendor", "GenuineIntel", "AuthenticAMD")
    assert "No portability level hides the vendor" in found.remedy


@pytest.mark.parametrize(("bits", "remedy"), [(46, "--cpuid-portability-level 1"), (52, "--cpuid-portability-level 1")])
def test_more_address_bits_than_the_target_has(check: Check, target: Machine, bits: int, remedy: str) -> None:
    contract = own(target)
    wider = {**contract.entries, (ADDRESS_LEAF, 0): evolve(contract.lookup(ADDRESS_LEAF, 0), eax=48 << 8 | bits)}
    (found,) = check(CpuidTable(wider))
    assert (found.field, found.source, found.target) == ("physical address width", f"{bits} bits", "39 bits")
    assert remedy in found.remedy


def test_another_tsc_rate(check: Check, target: Machine) -> None:
    khz = target.hardware.backend.tsc_khz()
    (found,) = check(own(target), tsc_khz=khz + khz // 100)
    assert (found.field, found.source, found.target) == ("TSC rate", f"{khz + khz // 100} kHz", f"{khz} kHz")
    assert "No portability level hides the TSC rate" in found.remedy
    assert check(own(target), tsc_khz=khz + khz // 10_000) == []


def test_a_backend_that_overrides_masked_bits(target: Machine, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    contract = make_contract(target.hardware.backend.cpuid_capability(), 4)
    shown = with_features(contract, features_of(contract) | {BY_NAME["sse4_2"], BY_NAME["popcnt"]})
    real = target.hardware.backend.create_vcpu

    def create(environment: Any) -> Any:
        vcpu: Any = real(environment)
        vcpu.read_cpuid = lambda: shown
        return vcpu

    monkeypatch.setattr(target.hardware.backend, "create_vcpu", create)
    found = check(contract, "4")
    assert [blocker.field for blocker in found] == ["CPU feature sse4_2", "CPU feature popcnt"]
    assert {(blocker.source, blocker.target) for blocker in found} == {("hidden", "present")}
    assert "--cpuid-set popcnt" in found[1].remedy
    assert "--cpu-backend" in found[1].remedy


def state(target: Machine, **changes: Any) -> VcpuState:
    khz = target.hardware.backend.tsc_khz()
    return VcpuState(registers=dict.fromkeys(GENERAL_REGISTERS, 0), tsc_khz=khz, **changes)


def test_a_state_that_the_target_cannot_hold(check: Check, target: Machine) -> None:
    """A guest under a debugger, with a watchpoint: Unicorn would not raise it."""
    fine = state(target)
    assert check(own(target), state=codec.to_plain(fine)) == []
    watched = state(target, dr=(0x601040, 0, 0, 0, 0xFFFF0FF0, 0x402 | 1 << 16))
    (found,) = check(own(target), state=codec.to_plain(watched))
    assert found.field == "vCPU state"
    assert "writes of data at 0x601040" in found.target
    assert "gdb" in found.remedy
    unknown = state(target, msrs={**fine.msrs, 0x48: 1})
    (found,) = check(own(target), state=codec.to_plain(unknown))
    assert "MSR 0x48" in found.target
    (found,) = check(own(target), state={"rip": 5})
    assert (found.field, found.source) == ("CPU", "unreadable")


def test_a_source_asks_with_its_present_state(target: Machine) -> None:
    """Over the wire: the check of a running machine whose guest has a watchpoint."""
    config = evolve(target.config, name="there")
    with Machine(target.config) as source, Machine(config) as waits:
        source.start(paused=True)
        hardware = source.hardware
        armed = evolve(hardware.vcpu.save(), dr=(0x1000, 0, 0, 0, 0xFFFF0FF0, 0x402))  # on an instruction: it works
        hardware.thread.call(lambda: hardware.vcpu.restore(armed))
        address = waits.listen("127.0.0.1", 0)
        import threading

        thread = threading.Thread(target=_wait, args=(waits,), daemon=True)
        thread.start()
        assert source.check_teleport("127.0.0.1", address.port) == ()
        hardware.thread.call(lambda: setattr(hardware.vcpu, "save", lambda: evolve(armed, cr4=armed.cr4 | 1 << 18)))
        (found,) = source.check_teleport("127.0.0.1", address.port)
        assert found.field == "vCPU state"
        assert "cr4" in found.target
        with pytest.raises(TeleportBlocked, match="cr4"):
            source.teleport("127.0.0.1", address.port)
        assert source.state.value == "paused"

        refusals = 0

        def refuse() -> VcpuState:
            nonlocal refusals
            refusals += 1
            if refusals > enough:
                return armed
            raise StateError("vCPU state: the guest is in the middle of it.", "Wait.")

        hardware.thread.call(lambda: setattr(hardware.vcpu, "save", refuse))
        enough = 2  # it passes
        assert source.check_teleport("127.0.0.1", address.port) == ()
        refusals, enough = 0, 1000
        (found,) = source.check_teleport("127.0.0.1", address.port)
        assert (found.field, found.source) == ("vCPU state", "the guest is in the middle of it")
        assert found.remedy == "Wait."
        waits.cancel_teleport(wait=True)
        thread.join(20)


def _wait(machine: Machine) -> None:
    from vmf.errors import TeleportError

    with pytest.raises(TeleportError):
        machine.wait_for_teleport()
