"""Sockets that somebody deletes come back, at another place if they must; who is attached stays attached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmf.control.client import ControlClient
from vmf.control.console import ConsoleServer
from vmf.control.keeper import Keeper
from vmf.control.reach import CONSOLE, Unreachable, reach
from vmf.control.server import ControlServer
from vmf.machine.home import Home, Tenure


class Served:
    """A machine's servers in this process."""

    def __init__(self, tenure: Tenure, machine: object) -> None:
        paths = tenure.paths
        self.lost: list[str] = []
        self.control = ControlServer(machine, paths.control_socket)  # type: ignore[arg-type]
        self.console = ConsoleServer(machine.console_write, paths)  # type: ignore[attr-defined]
        self.control.start()
        self.console.start()
        self.keeper = Keeper(tenure, self.control, self.console, lambda: self.lost.append("lost"))

    def close(self) -> None:
        self.control.close()
        self.console.close()


@pytest.mark.parametrize("gone", ["directory", "one socket", "replaced"])
def test_sockets_come_back(home: Home, machine: object, gone: str) -> None:
    with home.tenure("vm") as tenure:
        served = Served(tenure, machine)
        try:
            with ControlClient.of(home, "vm") as before, reach(home, "vm", CONSOLE) as attached:
                if gone == "directory":
                    shutil.rmtree(home.runtime)
                else:
                    tenure.paths.control_socket.unlink()
                if gone == "replaced":
                    tenure.paths.control_socket.touch()
                with pytest.raises(Unreachable, match="is running, but cannot be reached") as caught:
                    ControlClient.of(home, "vm")
                assert "kill " in caught.value.remedy
                served.keeper.look()
                with ControlClient.of(home, "vm") as after:
                    assert after.info()["state"] == before.info()["state"]
                attached.settimeout(60)
                with reach(home, "vm", CONSOLE) as second:
                    second.settimeout(60)
                    served.console.output(b"hello")
                    assert second.recv(5) == attached.recv(5) == b"hello"
        finally:
            served.close()
    assert not tenure.paths.control_socket.exists()


def test_another_directory_when_the_usual_one_is_gone_for_good(home: Home, machine: object, tmp_path: Path) -> None:
    """As after a logout: the user's runtime directory cannot be made again."""
    base = tmp_path / "user"
    elsewhere = Home(home.data, base / "vmf")
    base.mkdir()
    with elsewhere.tenure("vm") as tenure:
        served = Served(tenure, machine)
        try:
            shutil.rmtree(base)
            base.touch()  # nothing can be made in it
            served.keeper.look()
            assert tenure.paths.runtime == home.data / "run" / "vm"
            for view in (home, elsewhere, Home(home.data, tmp_path / "third")):
                with ControlClient.of(view, "vm") as client:
                    assert client.info()["name"] == "vm"
        finally:
            served.close()
    assert list((home.data / "run" / "vm").iterdir()) == []


def test_who_lost_the_lock_is_told_once(home: Home, machine: object) -> None:
    import os

    from vmf import record_locks
    from vmf.machine import lock as locks

    with home.tenure("vm") as tenure:
        served = Served(tenure, machine)
        path = home.paths("vm").lock
        path.unlink()
        path.touch()
        other = os.open(path, os.O_RDWR)
        try:
            assert record_locks.lock(other, locks._BYTE, exclusive=True)
            served.keeper.look()
            served.keeper.look()
            assert served.lost == ["lost"]
        finally:
            os.close(other)
            served.close()


def test_two_homes_with_one_runtime_directory(home: Home, machine: object, fake_class: type, tmp_path: Path) -> None:
    """Two data directories of one user, each with a machine of that name: neither takes the other's sockets."""
    from vmf.machine.config import MachineConfig

    other = Home(tmp_path / "second", home.runtime)
    other.create(MachineConfig(name="vm", memory_mib=2))
    with home.tenure("vm") as first, other.tenure("vm") as second:
        assert second.paths.runtime == other.data / "run" / "vm"
        here, there = Served(first, machine), Served(second, fake_class("second"))
        try:
            here.keeper.look()
            there.keeper.look()
            for view, name in ((home, "vm"), (other, "second")):
                with ControlClient.of(view, "vm") as client:
                    assert client.info()["name"] == name
        finally:
            here.close()
            there.close()
    with other.tenure("vm") as alone:
        assert alone.paths.runtime == home.runtime / "vm"


@pytest.mark.parametrize("damage", ["deleted", "broken"])
def test_a_running_machine_is_reached_whatever_became_of_its_definition(
    home: Home, server: ControlServer, damage: str
) -> None:
    path = home.paths("vm").definition
    if damage == "deleted":
        path.unlink()
    else:
        path.write_text("broken = [")
    with ControlClient.of(home, "vm") as client:
        assert client.info()["state"] == "running"
