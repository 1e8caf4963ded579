"""What a machine says beforehand of its state is what it saves, and another version is refused by the check."""

from __future__ import annotations

import threading

import pytest

import vmf
from vmf.errors import TeleportBlocked
from vmf.machine.states import MachineState
from vmf.testing.guests import builtin_guest


def config(name: str) -> vmf.MachineConfig:
    return vmf.MachineConfig(name=name, memory_mib=16, image=builtin_guest(), cpu_backend="unicorn")


def test_what_is_said_is_what_is_saved() -> None:
    with vmf.Machine(config("a")) as machine:
        machine.start(paused=True)
        saved = [(payload.kind, payload.version, payload.instance) for payload in machine.hardware.save()]
        assert machine.hardware.payload_kinds() == saved
        assert len(saved) > 5


def test_another_version_of_a_device_is_refused_before_anything_moves() -> None:
    with vmf.Machine(config("a")) as source, vmf.Machine(config("a")) as target:
        source.start()
        address = target.listen("127.0.0.1", 0)
        device = next(device for device in target.hardware.devices if device.kind == "pc.uart16550")
        here = device.VERSION
        device.VERSION = here + 1

        def wait() -> None:
            with pytest.raises(vmf.VmfError):
                target.wait_for_teleport()

        thread = threading.Thread(target=wait)
        thread.start()
        blockers = source.check_teleport(address.host, address.port)
        assert [(each.field, each.source, each.target) for each in blockers] == [
            ("state of pc.uart16550", f"version {here}", f"version {here + 1}")
        ]
        with pytest.raises(TeleportBlocked, match="uart16550"):
            source.teleport(address.host, address.port)
        assert source.state is MachineState.RUNNING
        target.cancel_teleport(wait=True)
        thread.join()
