"""Handovers between processes that are killed, or stopped and woken up, at any moment: never two writers.

Each process is a machine's storage without a machine. Both sides reach for the lease at once, one of them is hit at a
random time; then everybody who lives tries to write, and what the image holds must be the one winner's.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmf.plugins.bridge import PluginRegistry
from vmf.storage.media import lease_of

PROCESS = """
import sys
from vmf.errors import VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.plugins.bridge import PluginRegistry
name, disk = sys.argv[1:3]
drives = (DriveConfig(port=0, medium=disk), DriveConfig(port=1, medium=disk + ".2"))
storage = MachineStorage(MachineConfig(name=name, memory_mib=16, drives=drives), PluginRegistry(), lambda error: None)
print("ready", flush=True)
for line in sys.stdin:
    verb, argument = line.split()
    try:
        if verb == "open":
            storage.open()
        elif verb == "pass":
            storage.pass_leases(argument)
        elif verb == "take":
            storage.take_leases(argument)
        else:
            for drive in storage.drives:
                drive.writev(0, [memoryview(argument.encode().ljust(512))])
                drive.flush()
        print("ok", flush=True)
    except VmfError as error:
        print(type(error).__name__, str(error), flush=True)
"""


class Process:
    """One side."""

    def __init__(self, name: str, disk: Path) -> None:
        self.name = name
        self._child = subprocess.Popen(
            [sys.executable, "-c", PROCESS, name, str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.answer() == "ready"

    def say(self, verb: str, argument: str = "-") -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{verb} {argument}\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # killed

    def answer(self) -> str:
        """ "" when it is dead."""
        assert self._child.stdout is not None
        return self._child.stdout.readline().rstrip("\n")

    def do(self, verb: str, argument: str = "-") -> str:
        self.say(verb, argument)
        return self.answer()

    def hit(self, number: int) -> None:
        os.kill(self._child.pid, number)
        if number == signal.SIGKILL:
            self._child.wait(20)

    def end(self) -> None:
        self._child.kill()
        self._child.wait(20)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


@pytest.mark.parametrize("seed", range(3))
def test_at_most_one_writer(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    registry = PluginRegistry()
    disk = tmp_path / "disk"
    for name in (str(disk), f"{disk}.2"):
        registry.storage("file").create(name, 1 << 20)
    owner = Process("m0", disk)
    assert owner.do("open") == "ok"
    told = []
    for round_ in range(1, 6):
        teleport = f"{round_:032x}"
        other = Process(f"m{round_}", disk)
        action = dice.choice([signal.SIGKILL, signal.SIGSTOP])
        victim = dice.choice([owner, other])
        delay = dice.random() * 0.012
        owner.say("pass", teleport)
        if dice.random() < 0.5:  # HANDOVER comes after that; or the victim is hit while it passes
            passed = owner.answer()
            assert passed == "ok"
            owner.say("take", teleport)  # the source gave up waiting at the very moment
        other.say("take", teleport)
        time.sleep(delay)
        victim.hit(action)
        if action == signal.SIGSTOP:
            time.sleep(0.05)
            victim.hit(signal.SIGCONT)
        answers = {side.name: side.answer() for side in (owner, other)}
        written = [side for side in (owner, other) if side.do("write", f"{side.name}:{round_}") == "ok"]
        told.append((action.name, victim.name, answers, [side.name for side in written]))
        assert len(written) <= 1, told
        # A late "pass" of an owner that was not killed may still be on its way: whoever wrote must own both images.
        if written:
            (owner_now,) = written
            for name in (disk, Path(f"{disk}.2")):
                assert name.read_bytes()[:512].strip() == f"{owner_now.name}:{round_}".encode(), told
        # One command recovers: start a machine again. It is refused exactly while another one lives and holds it.
        heir = Process("heir", disk)
        answer = heir.do("open")
        lease = lease_of(registry, str(disk))
        assert lease.standing == "held", told
        assert (answer == "ok") == (not written), (answer, told)
        for side in (owner, other):
            if side not in written:
                assert side.do("write", "wrong") != "ok", told
        losers = {owner, other, heir} - set(written or [heir])
        for side in losers:
            side.end()
        owner = written[0] if written else heir
    owner.end()
