"""Plugins and a teleport's check: settings that differ, checks that take long, states that cannot be restored."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmf.control import client
from vmf.errors import MachineError, TeleportBlocked, TeleportCancelled, TeleportError, VmfError
from vmf.machine import operations, teleporter
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.states import MachineState
from vmf.plugins import hooks
from vmf.plugins.bridge import PluginRegistry
from vmf.teleport import target as target_module
from vmf.transport.base import Address

LOOP = bytes.fromhex("ebfe")

DEVICE = """
from vmf.plugins import hookimpl
from vmf.device.base import Device, Payload
vmf_api_version = 1

class Thing(Device):
    kind = "test.thing"
    def __init__(self, environment):
        self.options = dict(environment.options)
        environment.bus.claim_mmio(self.kind, self.options.get("base", 0xF000_0000), 0x1000, self)
    def io_read(self, offset, size): return 7
    def io_write(self, offset, size, value): pass
    def reset(self): pass
    def save(self): return Payload(self.kind, 1, {})
    def restore(self, payload): pass

@hookimpl
def vmf_create_device(environment):
    return [Thing(environment)]
"""

CHECK = """
import time
from vmf.plugins import hookimpl
vmf_api_version = 1

@hookimpl
def vmf_preflight_check(name, role, description):
    if role == "{role}":
        time.sleep({seconds})
    return []
"""


@contextmanager
def pair(tmp_path: Path, here: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[Machine, Machine, Address]]:
    """A running machine, one that waits, and where; with these options of the device."""
    image = tmp_path / "loop.img"
    image.write_bytes(LOOP)

    def config(options: dict[str, Any]) -> MachineConfig:
        return MachineConfig(
            name="m",
            memory_mib=4,
            image=image,
            cpu_backend="unicorn",
            devices=("pc", "thing"),
            device_options={"thing": options} if options else {},
        )

    with ExitStack() as stack:
        source = stack.enter_context(Machine(config(here), PluginRegistry()))
        target = stack.enter_context(Machine(config(there), PluginRegistry()))
        source.start()
        where = target.listen("127.0.0.1", 0)

        def wait() -> None:
            try:
                target.wait_for_teleport()
            except VmfError:
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        stack.callback(thread.join, 60)
        stack.callback(target.cancel_teleport)
        yield source, target, where


@pytest.mark.parametrize(
    ("here", "there", "fields"),
    [
        ({}, {}, []),
        ({"colour": "red"}, {"colour": "red"}, []),
        ({"colour": "red"}, {"colour": "blue"}, [("device test.thing: option colour", "red", "blue")]),
        ({"colour": "red"}, {}, [("device test.thing: option colour", "red", "not given")]),
        ({"on": True}, {"on": 1}, [("device test.thing: option on", "on", "1")]),
        (
            {},
            {"base": 0xF010_0000},
            [
                ("device test.thing: option base", "not given", str(0xF010_0000)),
                ("device test.thing: addresses", "0xf0000000-0xf0000fff", "0xf0100000-0xf0100fff"),
            ],
        ),
    ],
)
def test_what_the_guest_would_find_otherwise_is_a_blocker(
    make_plugin: Any, tmp_path: Path, here: dict[str, Any], there: dict[str, Any], fields: list[tuple[str, ...]]
) -> None:
    make_plugin("device", "thing", DEVICE)
    with pair(tmp_path, here, there) as (source, _target, where):
        found = source.check_teleport(where.host, where.port)
        assert [(each.field, each.source, each.target) for each in found] == fields
        assert all("device_options" in each.remedy for each in found)
        assert source.state is MachineState.RUNNING


def test_a_blocker_of_the_targets_device_is_the_targets(make_plugin: Any, tmp_path: Path) -> None:
    make_plugin("device", "thing", DEVICE)
    with pair(tmp_path, {}, {}) as (source, target, where):
        target.hardware.devices[-1].migration_blocker = lambda: "it has a cable in it"  # type: ignore[method-assign]
        (found,) = source.check_teleport(where.host, where.port)
        assert (found.field, found.source, found.target) == ("device test.thing", "-", "it has a cable in it")


def test_a_state_that_cannot_be_restored_is_named_and_the_machine_stays(make_plugin: Any, tmp_path: Path) -> None:
    make_plugin("device", "thing", DEVICE, distribution="culprit")
    with pair(tmp_path, {}, {}) as (source, target, where):

        def fails(_payload: object) -> None:
            raise ZeroDivisionError("no place")

        target.hardware.devices[-1]._target.restore = fails  # type: ignore[attr-defined]
        with pytest.raises(TeleportError, match=r"device plugin 'thing' \(of culprit 1\.0\) failed in restore"):
            source.teleport(where.host, where.port)
        assert source.state is MachineState.RUNNING
        assert target.state is MachineState.TELEPORTING_IN


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A target that waits less long for the source than the check takes."""

    def shorten() -> None:
        options = functools.partial(target_module.TargetOptions, handshake_timeout_s=0.5, keepalive_s=0.2)
        monkeypatch.setattr(target_module, "TargetOptions", options)

    return shorten


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_check_that_takes_long_is_waited_for(
    make_plugin: Any, tmp_path: Path, impatient: Callable[[], None], role: str
) -> None:
    make_plugin("device", "thing", DEVICE)
    make_plugin("hooks", "slow", CHECK.format(role=role, seconds=2))
    impatient()
    with pair(tmp_path, {}, {}) as (source, target, where):
        assert source.check_teleport(where.host, where.port) == ()
        told: list[str] = []
        source.teleport(where.host, where.port, progress=lambda event: told.append(event.message))
        target.wait_for(MachineState.RUNNING, timeout=60)
    waiting = [text for text in told if text.startswith("checking: waiting for the hooks plugin 'slow'")]
    assert len(waiting) == (1 if role == "source" else 0)


def test_who_asks_for_a_check_waits_as_long_as_it_may_take() -> None:
    assert teleporter.CHECK_TIMEOUT > hooks.CHECK_SECONDS
    longest = hooks.CHECK_SECONDS + teleporter.CONNECT_TIMEOUT + teleporter.CHECK_TIMEOUT
    assert longest < client.CHECK_ANSWER_SECONDS


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_check_that_takes_too_long_is_a_blocker_that_names_it(
    make_plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    make_plugin("device", "thing", DEVICE)
    make_plugin("hooks", "slow", CHECK.format(role=role, seconds=30), distribution="culprit")
    monkeypatch.setattr(hooks, "CHECK_SECONDS", 0.3)
    with pair(tmp_path, {}, {}) as (source, _target, where):
        (found,) = source.check_teleport(where.host, where.port)
        assert found.field == "preflight check 'slow'"
        own, other = (found.source, found.target) if role == "source" else (found.target, found.source)
        assert "hooks plugin 'slow' (of culprit 1.0) has not answered its hook vmf_preflight_check" in own
        assert other == "-"
        with pytest.raises(TeleportBlocked, match="culprit"):
            source.teleport(where.host, where.port)
        assert source.state is MachineState.RUNNING


def test_a_cancel_and_a_time_limit_end_the_wait_for_a_check(make_plugin: Any, tmp_path: Path) -> None:
    make_plugin("device", "thing", DEVICE)
    make_plugin("hooks", "slow", CHECK.format(role="source", seconds=40))
    with pair(tmp_path, {}, {}) as (source, _target, where):
        began = time.monotonic()
        with pytest.raises(TeleportError, match=r"did not complete within the 0\.3 s"):
            source.teleport(where.host, where.port, timeout_s=0.3)
        threading.Timer(0.3, source.cancel_teleport).start()
        with pytest.raises(TeleportCancelled):
            source.teleport(where.host, where.port)
        assert time.monotonic() - began < 30, "not as long as the check takes"
        assert source.state is MachineState.RUNNING


def test_a_start_that_does_not_end_names_the_plugin(
    make_plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = DEVICE.replace("return [Thing", "import time; time.sleep(4); return [Thing")
    make_plugin("device", "thing", code, distribution="culprit")
    monkeypatch.setattr(operations, "CANCEL_SECONDS", 0.1)
    image = tmp_path / "loop.img"
    image.write_bytes(LOOP)
    config = MachineConfig(name="m", memory_mib=4, image=image, cpu_backend="unicorn", devices=("pc", "thing"))
    with Machine(config, PluginRegistry()) as machine:
        start = threading.Thread(target=lambda: machine.start(paused=True))
        start.start()
        said = ""
        while start.is_alive() and "culprit" not in said:
            try:
                machine.operation.cancel(wait=True)
            except MachineError as error:
                said = str(error)
        start.join()
    assert "does not end: it waits for the device plugin 'thing' (of culprit 1.0) in its hook vmf_create_device" in said
