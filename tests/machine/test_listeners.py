"""Listeners and progress callbacks of an embedding program that raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from vmf.machine.config import MachineConfig
from vmf.machine.console import SerialConsole
from vmf.machine.machine import Machine, wait_until
from vmf.machine.states import MachineState

CHATTERS = bytes.fromhex("66baf803b041eeebfd")
"""mov dx, 0x3f8; mov al, 'A'; out dx, al; again."""


def raising(kind: type[BaseException]) -> Callable[..., NoReturn]:
    def my_listener(*_: object) -> NoReturn:
        raise kind("mine")

    return my_listener


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_console_listener_that_raises_ends_neither_machine_nor_others(
    kind: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "guest.img"
    image.write_bytes(CHATTERS)
    heard = bytearray()
    with Machine(MachineConfig(name="m", memory_mib=4, image=image, cpu_backend="unicorn")) as machine:
        machine.console.add_listener(raising(kind))
        machine.console.add_listener(heard.extend)
        machine.start()
        assert wait_until(lambda: len(heard) > 1000, 60)
        assert machine.state is MachineState.RUNNING
    assert machine.state is MachineState.POWERED_OFF
    assert caplog.text.count("a listener to the console failed: ") == 1, "it is not called again"
    assert "my_listener" in caplog.text


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, GeneratorExit])
def test_a_state_listener_that_raises_changes_nothing(
    kind: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "guest.img"
    image.write_bytes(CHATTERS)
    states: list[MachineState] = []
    with Machine(MachineConfig(name="m", memory_mib=4, image=image, cpu_backend="unicorn")) as machine:
        machine.add_state_listener(raising(kind))
        machine.add_state_listener(lambda _old, new: states.append(new))
        machine.start()
        machine.pause()
        machine.resume()
        machine.close()
    assert [each.value for each in states] == ["starting", "running", "paused", "running", "stopping", "poweredoff"]
    assert "my_listener" in caplog.text


def test_ctrl_c_in_a_state_listener_is_the_users_and_close_ends_all_the_same(tmp_path: Path) -> None:
    image = tmp_path / "guest.img"
    image.write_bytes(CHATTERS)
    machine = Machine(MachineConfig(name="m", memory_mib=4, image=image, cpu_backend="unicorn"))
    machine.start()
    hardware = machine.hardware
    machine.add_state_listener(raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        machine.close()
    machine.close()
    assert machine.state is MachineState.POWERED_OFF
    assert hardware.devices == ()


def test_a_listener_that_removes_itself_while_another_fails(caplog: pytest.LogCaptureFixture) -> None:
    console, heard = SerialConsole(), bytearray()
    console.add_listener(raising(ValueError))
    console.add_listener(heard.extend)
    with caplog.at_level(logging.ERROR):
        console.output(b"a")
        console.output(b"b")
    assert heard == b"ab"
    assert len(caplog.records) == 1
