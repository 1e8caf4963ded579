"""`--cpu-backend auto`: the most preferred backend that can honour the machine's contract, and the reasons told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from attrs import evolve

from vmf.cpu.backend import Availability, CpuBackend, Vcpu, VcpuEnvironment
from vmf.cpuid.contract import make_contract, without
from vmf.cpuid.features import BY_NAME, features_of, names, with_features
from vmf.cpuid.layout import with_vendor
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable, ConfigError, ContractOverridden, StateError
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.teleport_view import TeleportView
from vmf.plugins.bridge import PluginRegistry
from vmf.testing import guests


class Fast(CpuBackend):
    """Unicorn that says it is an AMD host's hardware, and is preferred; a test spoils something about it."""

    name = "fast"
    preference = 100

    def __init__(self, real: CpuBackend) -> None:
        self.real = real
        self.capability = with_vendor(without(real.cpuid_capability(), "aes"), "AuthenticAMD")
        self.khz = real.tsc_khz()
        self.here = Availability(True)
        self.made: list[Any] = []
        self.shown: CpuidTable | None = None
        self.refusal = ""

    def availability(self) -> Availability:
        return self.here

    def cpuid_capability(self) -> CpuidTable:
        return self.capability

    def tsc_khz(self) -> int:
        return self.khz

    def create_vcpu(self, environment: VcpuEnvironment) -> Vcpu:
        vcpu: Any = self.real.create_vcpu(evolve(environment, tsc_khz=self.real.tsc_khz()))
        self.made.append(vcpu)
        if self.shown is not None:
            vcpu.read_cpuid = lambda: self.shown
        if self.refusal:

            def restore(state: object) -> None:
                raise StateError(self.refusal)

            vcpu.restore = restore
        made: Vcpu = vcpu
        return made


@pytest.fixture
def registry() -> PluginRegistry:
    return PluginRegistry()


@pytest.fixture
def fast(registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch) -> Fast:
    slow = registry.cpu_backend("unicorn")
    backend = Fast(slow)
    both: dict[str, CpuBackend] = {"fast": backend, "unicorn": slow}
    monkeypatch.setattr(registry, "cpu_backend", both.__getitem__)
    monkeypatch.setattr(registry, "cpu_backends", lambda: [backend, slow])
    return backend


@pytest.fixture
def config() -> MachineConfig:
    return MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest())


@pytest.fixture
def machines(registry: PluginRegistry) -> Iterator[list[Machine]]:
    made: list[Machine] = []
    yield made
    for machine in made:
        machine.close()


def started(machines: list[Machine], config: MachineConfig, registry: PluginRegistry) -> Machine:
    machines.append(Machine(config, registry))
    machines[-1].start(paused=True)
    return machines[-1]


def used(machine: Machine) -> str:
    name: str = machine.info()["cpu_backend_used"]
    return name


def test_the_preferred_one_when_it_suits(
    fast: Fast, registry: PluginRegistry, config: MachineConfig, machines: list[Machine]
) -> None:
    machine = started(machines, config, registry)
    assert used(machine) == "fast"
    assert machine.hardware.cpuid.vendor == "AuthenticAMD"
    assert machine.backend_choice.startswith("fast chosen; the most preferred")


def test_one_that_does_not_work_here_is_passed_over_with_its_reason(
    fast: Fast, registry: PluginRegistry, config: MachineConfig, machines: list[Machine]
) -> None:
    fast.here = Availability(False, "no such device.", "Load the module.")
    machine = started(machines, config, registry)
    assert used(machine) == "unicorn"
    assert machine.backend_choice == "unicorn chosen; fast cannot be used here: no such device"
    assert fast.made == []


@pytest.mark.parametrize(
    ("cpuid", "reason"),
    [(CpuidConfig(set=("aes",)), "CPU feature aes"), (CpuidConfig(vendor="GenuineIntel"), "CPU vendor GenuineIntel")],
    ids=["feature", "vendor"],
)
def test_the_definition_decides(
    fast: Fast,
    registry: PluginRegistry,
    config: MachineConfig,
    machines: list[Machine],
    cpuid: CpuidConfig,
    reason: str,
) -> None:
    machine = started(machines, evolve(config, cpuid=cpuid), registry)
    assert used(machine) == "unicorn"
    assert f"fast does not suit this machine: {reason}" in machine.backend_choice
    assert machine.hardware.cpuid.vendor == "GenuineIntel"
    machine.close()
    # Asked for by name it is refused with the same reason, and nothing else is taken in its place.
    with pytest.raises(ConfigError, match=reason):
        started(machines, evolve(config, cpuid=cpuid, cpu_backend="fast"), registry)


def test_one_that_overrides_masked_bits_is_passed_over(
    fast: Fast, registry: PluginRegistry, config: MachineConfig, machines: list[Machine]
) -> None:
    contract = make_contract(fast.capability, 4, tsc_khz=fast.khz)
    fast.shown = with_features(contract, features_of(contract) | {BY_NAME["popcnt"]})
    wanted = evolve(config, cpuid=CpuidConfig("4"))
    machine = started(machines, wanted, registry)
    assert used(machine) == "unicorn"
    assert "fast does not suit this machine" in machine.backend_choice
    assert "popcnt hidden, presented present" in machine.backend_choice
    assert "popcnt" not in names(features_of(machine.hardware.cpuid))
    machine.close()
    with pytest.raises(ContractOverridden, match="popcnt") as caught:
        started(machines, evolve(wanted, cpu_backend="fast"), registry)
    assert "--cpuid-set popcnt" in caught.value.remedy


def test_when_nobody_suits_all_reasons_are_told(
    fast: Fast, registry: PluginRegistry, config: MachineConfig, machines: list[Machine]
) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        started(machines, evolve(config, cpuid=CpuidConfig(set=("avx2",))), registry)
    text = str(caught.value)
    assert text.count("CPU feature avx2 (CPUID.7H.0:EBX[5]) cannot be set") == 2
    for name in ("fast", "unicorn"):
        assert f"{name}: " in text
    assert machines[-1].state.value == "poweredoff"


def test_a_target_takes_the_backend_that_suits_who_comes(
    fast: Fast, registry: PluginRegistry, config: MachineConfig, machines: list[Machine]
) -> None:
    """The source is Intel, the target's preferred backend AMD; and then one that cannot hold the vCPU's state."""
    source = started(machines, evolve(config, cpu_backend="unicorn"), registry)
    target = Machine(evolve(config, name="there"), registry)
    machines.append(target)
    target.listen("127.0.0.1", 0)
    assert used(target) == "fast"
    description = TeleportView(source).describe()
    assert TeleportView(target).check(description) == []
    assert used(target) == "unicorn"
    assert "fast does not suit this machine: CPU vendor GenuineIntel, not AuthenticAMD" in target.backend_choice

    fast.capability = registry.cpu_backend("unicorn").cpuid_capability()
    assert TeleportView(target).check(description) == []
    assert used(target) == "fast"

    fast.refusal = "vCPU state: DR7 is not to this engine's liking."
    assert TeleportView(target).check(description) == []
    assert used(target) == "unicorn"

    # A target whose backend was named says what is wrong instead.
    named = Machine(evolve(config, name="named", cpu_backend="fast"), registry)
    machines.append(named)
    named.listen("127.0.0.1", 0)
    (blocker,) = TeleportView(named).check(description)
    assert blocker.field == "vCPU state"
    assert "DR7 is not to this engine's liking" in blocker.target
    assert "--cpu-backend" in blocker.remedy


def test_a_vendor_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="AuthenticIntel"):
        CpuidConfig(vendor="AuthenticIntel") and MachineConfig(
            name="box", memory_mib=32, cpuid=CpuidConfig(vendor="AuthenticIntel")
        )


def test_a_move_to_an_emulator_names_the_page_about_it(
    registry: PluginRegistry, fast: Fast, config: MachineConfig
) -> None:
    with Machine(config, registry=registry) as machine:
        machine.start()
        there = machine.switch_backend("unicorn")
        again = machine.switch_backend("unicorn")
        back = machine.switch_backend("fast")
        assert (there.before, there.after) == ("fast", "unicorn")
        assert ["engine-deviations.md" in note for note in there.notes] == [True]
        assert again.notes == back.notes == ()
        machine.switch_backend("unicorn")
        view = TeleportView(machine)
        own = view.describe()
        assert view.notes(own) == []
        assert view.notes({**own, "cpu": {**own["cpu"], "backend": "kvm"}}) == list(there.notes)
        old = {key: value for key, value in own["cpu"].items() if key != "backend"}
        assert view.notes({**own, "cpu": old}) == list(there.notes)  # a source that does not say it
