"""Guests for whole-machine tests."""

from __future__ import annotations

import pytest

from vmf.machine.config import MachineConfig
from vmf.testing import guests


@pytest.fixture
def builtin() -> MachineConfig:
    """A machine with the built-in self-checking guest."""
    return MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest(), cpu_backend="unicorn")


@pytest.fixture
def selfcheck() -> MachineConfig:
    """A machine with Debian's kernel and the self-checking program."""
    try:
        guest = guests.selfcheck_guest("run -m 8 -r 32 -t 20")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return linux_machine(guest)


@pytest.fixture
def shell() -> MachineConfig:
    """A machine with Debian's kernel and a shell on the console."""
    try:
        guest = guests.linux_guest()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return linux_machine(guest)


@pytest.fixture
def entry32() -> MachineConfig:
    """A machine with Debian's kernel and the 32-bit program, which prints "entry32 N" some 50 times a second."""
    return _entry32("100000 20")


@pytest.fixture
def threads32() -> MachineConfig:
    """The same, with two threads that make 400,000 calls each before the three rounds, and an end."""
    return _entry32("3 1 400000")


def _entry32(arguments: str) -> MachineConfig:
    try:
        program = guests.entry32().require().read_bytes()
        guest = guests.linux_guest(f"/bin/entry32 {arguments}", {"bin/entry32": program})
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return linux_machine(guest)


def linux_machine(guest: guests.LinuxGuest) -> MachineConfig:
    return MachineConfig(
        name="box",
        memory_mib=128,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} loglevel=5",
        cpu_backend="unicorn",
    )
