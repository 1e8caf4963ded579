"""The built-in guest on the machine it is for."""

from __future__ import annotations

import pytest

import vmf
from vmf.machine.machine import wait_until
from vmf.testing.guests import builtin_guest
from vmf.testing.serial_check import check


@pytest.mark.parametrize("memory_mib", [2, 64])
def test_it_ticks_checks_itself_and_answers(memory_mib: int) -> None:
    config = vmf.MachineConfig(name="guest", memory_mib=memory_mib, image=str(builtin_guest()), cpu_backend="unicorn")
    with vmf.Machine(config, vmf.PluginRegistry()) as machine:
        machine.start()
        assert wait_until(lambda: b"errors=" in machine.console.scrollback(), 60)
        machine.hardware.type(b"hello, guest\r")
        assert wait_until(lambda: b"echo: hello, guest\r\n" in machine.console.scrollback(), 60)
        assert wait_until(lambda: machine.console.scrollback().count(b"errors=") >= 2, 60)
        report = check(machine.console.scrollback())
    assert report.ok, report.problems
    assert report.rounds > 0
