"""32-bit programs in a 64-bit Linux guest: SYSENTER on an Intel CPU, SYSCALL on an AMD one, INT 0x80 on both, before
and after teleports and with each of the Unicorn backend's gates."""

from __future__ import annotations

import re

import pytest
from attrs import evolve

from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.testing.hosts import Host

pytestmark = pytest.mark.linux

HOPS = 3


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_32_bit_programs_run_and_go_on_after_teleports(
    hosts: tuple[Host, Host], entry32: MachineConfig, vendor: str
) -> None:
    _run_and_teleport(hosts, evolve(entry32, cpuid=CpuidConfig(vendor=vendor)), HOPS)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_32_bit_programs_without_a_compiler(hosts: tuple[Host, Host], entry32: MachineConfig, vendor: str) -> None:
    for host in hosts:
        host.environment["VMF_UNICORN_GATE"] = "python"
    _run_and_teleport(hosts, evolve(entry32, cpuid=CpuidConfig(vendor=vendor)), 1)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_32_bit_threads(hosts: tuple[Host, Host], threads32: MachineConfig, vendor: str) -> None:
    """Calls through the vDSO without a pause, while the guest's clock ends slices: none is hidden by a stop."""
    host, _ = hosts
    host.define(evolve(threads32, cpuid=CpuidConfig(vendor=vendor)))
    host.start("box")
    heard = host.wait_for_output("box", b"the command ended with status", 120)
    with host.client("box") as client:
        client.power_off()
    assert b"entry32 threads done" in heard
    assert b"ended with status 0" in heard
    assert b"WRONG" not in heard
    assert b"segfault" not in heard


def _run_and_teleport(hosts: tuple[Host, Host], machine: MachineConfig, hops: int) -> None:
    source, target = hosts
    for host in hosts:
        host.define(machine)
    source.start("box")
    heard = source.wait_for_output("box", b"entry32 5\r", 120)
    for _ in range(hops):
        port = target.wait("box")
        with source.client("box") as client:
            client.teleport("127.0.0.1", port)
        source.wait_gone("box")
        heard += source.output("box")
        last = max(int(number) for number in re.findall(rb"entry32 (\d+)\r", heard))
        source, target = target, source
        heard += source.wait_for_output("box", b"entry32 %d\r" % (last + 5), 60)
    with source.client("box") as client:
        client.power_off()
    assert b"WRONG" not in heard
    assert b"segfault" not in heard
    assert b"protection fault" not in heard
