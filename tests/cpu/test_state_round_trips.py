"""The neutral state through the bundled backends: what is restored is saved again, bit for bit, on each and across.

Unicorn works everywhere. KVM joins in where /dev/kvm is: trusted, since what is asked here is what its ioctls keep,
not what its guests are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.cpu.backend import CpuBackend, Vcpu, VcpuEnvironment
from vmf.cpu.state import PendingEvents, VcpuState
from vmf.cpuid.contract import make_contract
from vmf.cpuid.layout import with_vendor
from vmf.cpuid.negotiate import negotiate
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable, PluginError, StateError
from vmf.machine import switch
from vmf.machine.bus import Bus
from vmf.memory.guest import MIB, GuestMemory
from vmf.plugins.bridge import PluginRegistry
from vmf.testing.vcpu_states import MODES, comparable, vcpu_states

unhurried = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


class NoInterrupts:
    def pending(self) -> bool:
        return False

    def acknowledge(self) -> int:
        return 0xFF


class Party:
    """One vCPU of a backend for a contract, and what states it can be asked to hold."""

    def __init__(self, backend: CpuBackend, contract: CpuidTable, tsc_khz: int, memory: GuestMemory) -> None:
        self.name = backend.name
        self.contract, self.tsc_khz = contract, tsc_khz
        self.vcpu: Vcpu = backend.create_vcpu(VcpuEnvironment(memory, Bus(), NoInterrupts(), contract, tsc_khz))
        self.states = self._states()

    def _states(self) -> st.SearchStrategy[VcpuState]:
        """All legal ones, but: the pagetable KVM has no interrupt shadow and no 32-bit paging, and says so when it is
        given them; AMD processors clear the x87 pointers."""
        fresh = self.vcpu.save()

        def holds(**changes: Any) -> bool:
            state = attrs.evolve(fresh, **changes)
            try:
                self.vcpu.restore(state)
            except StateError:
                return False
            assert comparable(self.vcpu.save()) == comparable(state)
            return True

        shadow = holds(events=PendingEvents(interrupt_shadow=2))
        paging = holds(cr0=0x80000011)
        modes = tuple(mode for mode in MODES if paging or mode != "paged")
        return vcpu_states(self.contract, self.tsc_khz, shadow=shadow, modes=modes, x87_pointers=self.name == "unicorn")

    def round_trip(self, state: VcpuState) -> VcpuState:
        self.vcpu.restore(state)
        found = self.vcpu.save()
        for field in attrs.fields(VcpuState):
            wanted, got = (getattr(comparable(each), field.name) for each in (state, found))
            assert got == wanted, f"{self.name}: {field.name}"
        switch.verify(state, found, self.name)
        return found


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(2 * MIB)
    yield made
    made.close()


@pytest.fixture(scope="module")
def unicorn_backend() -> CpuBackend:
    return PluginRegistry().choose_cpu_backend("unicorn")


@pytest.fixture(scope="module")
def kvm_backend() -> Iterator[CpuBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMF_KVM_TRUST", "1")
        try:
            yield PluginRegistry().choose_cpu_backend("kvm")
        except (BackendUnavailable, PluginError) as error:
            pytest.skip(f"no KVM here: {error}")


@pytest.fixture(scope="module", params=["GenuineIntel", "AuthenticAMD"])
def unicorn(request: pytest.FixtureRequest, unicorn_backend: CpuBackend, memory: GuestMemory) -> Iterator[Party]:
    contract = make_contract(with_vendor(unicorn_backend.cpuid_capability(), request.param))
    party = Party(unicorn_backend, contract, unicorn_backend.tsc_khz(), memory)
    yield party
    party.vcpu.close()


@pytest.fixture(scope="module")
def kvm(kvm_backend: CpuBackend, memory: GuestMemory) -> Iterator[Party]:
    contract = make_contract(kvm_backend.cpuid_capability())
    party = Party(kvm_backend, contract, kvm_backend.tsc_khz(), memory)
    yield party
    party.vcpu.close()


@pytest.fixture(scope="module")
def both(kvm_backend: CpuBackend, unicorn_backend: CpuBackend, memory: GuestMemory) -> Iterator[tuple[Party, Party]]:
    """KVM and Unicorn for a contract that suits both."""
    contract = make_contract(negotiate([kvm_backend.cpuid_capability(), unicorn_backend.cpuid_capability()]).table)
    khz = kvm_backend.tsc_khz()
    made = Party(kvm_backend, contract, khz, memory), Party(unicorn_backend, contract, khz, memory)
    yield made
    for party in made:
        party.vcpu.close()


@unhurried
@given(data=st.data())
def test_unicorn_gives_every_legal_state_back(unicorn: Party, data: st.DataObject) -> None:
    unicorn.round_trip(data.draw(unicorn.states))


@unhurried
@given(data=st.data())
def test_kvm_gives_every_legal_state_back(kvm: Party, data: st.DataObject) -> None:
    kvm.round_trip(data.draw(kvm.states))


@unhurried
@given(data=st.data())
def test_a_state_goes_from_kvm_to_unicorn_and_back(both: tuple[Party, Party], data: st.DataObject) -> None:
    kvm, unicorn = both
    state = data.draw(kvm.states)
    back = kvm.round_trip(unicorn.round_trip(kvm.round_trip(state)))
    assert comparable(back) == comparable(state)
