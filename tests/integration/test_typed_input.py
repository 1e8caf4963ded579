"""What is typed at a Linux guest arrives once and in order: in long streams, and around handovers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time

import pytest
from attrs import evolve

import vmf
from vmf.errors import InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.states import MachineState
from vmf.testing.hosts import Host

pytestmark = pytest.mark.linux

HOPS = 3
PASTED = 150_000
"""More than Linux takes in 512 passes of its interrupt handler (131,072)."""


class Heard:
    """What a guest has written, wherever it ran."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._changed = threading.Condition()

    def __call__(self, data: bytes) -> None:
        with self._changed:
            self._said += data
            self._changed.notify_all()

    def wait(self, ending: bytes, start: int = 0) -> bytes:
        with self._changed:
            found = self._changed.wait_for(lambda: self._said.find(ending, start) >= 0, 120)
            assert found, bytes(self._said[-500:])
            return bytes(self._said[start:])


class Typist(threading.Thread):
    """Types numbered lines without pause at whichever machine takes them; what none takes is kept, as the API says."""

    def __init__(self, machine: vmf.Machine) -> None:
        super().__init__(daemon=True)
        self.machines = [machine]
        self.typed = bytearray()
        self.refused = 0
        self._ended = threading.Event()

    def run(self) -> None:
        number, rest = 0, b""
        while rest or not self._ended.is_set():
            if not rest:
                number += 1
                rest = b"line %06d\n" % number
            before = len(rest)
            for machine in self.machines:
                try:
                    taken = machine.type(rest)
                except InvalidStateError:
                    continue
                self.typed += rest[:taken]
                rest = rest[taken:]
            if len(rest) == before:
                self.refused += 1
            time.sleep(0.001)

    def end(self) -> bytes:
        self._ended.set()
        self.join(60)
        return bytes(self.typed)


def test_every_line_typed_through_several_handovers_arrives_once_and_in_order(shell: MachineConfig) -> None:
    heard = Heard()
    machine = vmf.Machine(shell)
    machine.console.add_listener(heard)
    try:
        machine.start()
        heard.wait(b"vmf#")
        machine.type(b"stty raw -echo; echo be''gin; exec cat\n")
        start = len(heard.wait(b"begin\n"))
        typist = Typist(machine)
        typist.start()
        with pytest.raises(vmf.VmfError):  # the machine stays, and takes input again
            machine.teleport("127.0.0.1", 1)
        for _ in range(HOPS):
            target = vmf.Machine(shell)
            target.console.add_listener(heard)
            address = target.listen("127.0.0.1", 0)
            assert target.type(b"too early") == 0
            typist.machines = [machine, target]
            waiting = threading.Thread(target=target.wait_for_teleport)
            waiting.start()
            time.sleep(0.2)
            machine.teleport(address.host, address.port)
            waiting.join()
            assert target.state is MachineState.RUNNING
            typist.machines = [target]
            machine.close()
            machine = target
        typed = typist.end()
        lines = typed.split(b"\n")
        assert lines[:-1] == [b"line %06d" % number for number in range(1, len(lines))]
        assert heard.wait(lines[-2] + b"\n", start) == typed
    finally:
        machine.close()


def test_input_is_taken_again_after_a_teleport_that_failed_at_the_very_end(shell: MachineConfig) -> None:
    """The target refuses what it is sent after the source has saved its state; the machine was paused."""
    with vmf.Machine(shell) as machine, vmf.Machine(evolve(shell, name="other")) as target:
        machine.start(paused=True)
        address = target.listen("127.0.0.1", 0)
        device = target.hardware.devices[0]

        def broken(payload: object) -> None:
            raise vmf.VmfError("no")

        device.restore = broken  # type: ignore[method-assign,assignment]

        def wait() -> None:
            with pytest.raises(vmf.VmfError):
                target.wait_for_teleport()

        waiting = threading.Thread(target=wait)
        waiting.start()
        with pytest.raises(vmf.VmfError):
            machine.teleport(address.host, address.port)
        assert machine.state is MachineState.PAUSED
        assert machine.type(b"again") == 5
        target.cancel_teleport(wait=True)
        waiting.join()


def console(host: Host, typed: bytes) -> None:
    """`vmf console` with piped input."""
    command = [sys.executable, "-m", "vmf.cli", "console", "box", "--no-scrollback", "--linger", "0.2"]
    subprocess.run(command, env=host.environment, input=typed, stdout=subprocess.DEVNULL, timeout=300, check=True)


def test_a_long_paste_through_the_console_arrives_whole_and_the_port_lives(
    hosts: tuple[Host, Host], shell: MachineConfig
) -> None:
    host, _ = hosts
    host.define(shell)
    host.start("box")
    host.wait_for_output("box", b"vmf#")
    data = b"".join(b"%062d\n" % number for number in range(PASTED // 63))
    console(host, b"stty raw -echo; echo rea''dy; head -c %d | sha256sum; stty sane\n" % len(data))
    host.wait_for_output("box", b"ready")
    console(host, data)
    assert hashlib.sha256(data).hexdigest().encode() in host.wait_for_output("box", b"  -\n", 120)
    console(host, b"echo still-$((6 * 7))\n")
    host.wait_for_output("box", b"still-42", 120)
