"""Memory that the machine's CPU cannot address."""

from __future__ import annotations

import subprocess
import sys

import pytest
from attrs import evolve

from vmf.cpuid.layout import ADDRESS_LEAF
from vmf.cpuid.table import CpuidTable
from vmf.errors import StateError
from vmf.machine.addressing import most_memory_mib, require_addressable
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.memory.guest import HIGH_RAM_BASE, LOW_RAM_LIMIT, MIB, GuestMemory
from vmf.plugins.bridge import PluginRegistry


def narrowed(table: CpuidTable, bits: int) -> CpuidTable:
    old = table.entries[ADDRESS_LEAF, 0]
    return CpuidTable({**table.entries, (ADDRESS_LEAF, 0): evolve(old, eax=old.eax & ~0xFF | bits)})


def unmapped(mib: int) -> GuestMemory:
    """Guest RAM of any size, of which only the layout is looked at."""
    made = GuestMemory.__new__(GuestMemory)
    made.size = mib * MIB
    made.regions = GuestMemory.layout(made.size)
    return made


@pytest.mark.parametrize("bits", [36, 39, 46, 52])
def test_the_most_memory_just_fits(bits: int) -> None:
    backend = PluginRegistry().choose_cpu_backend("unicorn")
    contract = narrowed(backend.cpuid_capability(), bits)
    most = most_memory_mib(bits)
    assert most * MIB + HIGH_RAM_BASE - LOW_RAM_LIMIT == 1 << bits
    require_addressable("m", unmapped(most), contract, backend)
    with pytest.raises(StateError, match=rf"{bits} bits of physical address, enough for {most} MiB") as caught:
        require_addressable("m", unmapped(most + 1), contract, backend)
    assert ("portability level 0" in caught.value.remedy) == (bits < 39)


def test_a_machine_is_refused_before_its_engine_is_asked() -> None:
    """520 GiB on Unicorn: one line that says what would fit, and nothing is left behind."""
    config = MachineConfig(name="big", memory_mib=520 << 10, cpu_backend="unicorn")
    machine = Machine(config, PluginRegistry())
    try:
        with pytest.raises(StateError, match=r"machine big has 532480 MiB .*enough for 523776 MiB"):
            machine.start()
    finally:
        machine.close()


def test_memory_that_the_host_does_not_give() -> None:
    """Under a limit on address space the reason and both remedies are one line. In a process of its own."""
    code = """
import resource, sys
from vmf.errors import MachineError
from vmf.memory.guest import GuestMemory
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    GuestMemory(8 << 30)
except MachineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot reserve 8192 MiB of guest RAM: Cannot allocate memory." in done.stdout, done.stderr
    assert "ulimit -v" in done.stdout
    assert done.stdout.count("\n") == 1
