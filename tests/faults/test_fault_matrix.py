"""What breaks at any message of a teleport between two real processes, and what each side then has.

A cell is a fault at a message. The guest counts ticks on its console, so that two running copies show themselves even
when they ran side by side for a moment only: the same tick would come from both. After the fault every cell asks both
sides, checks the rule, and recovers with one command: `teleport --resolve`, or a start where nothing is in doubt.

The same over TLS: the proxy ends TLS at both sides, so that each process has a live TLS connection, and does its harm
to encrypted records.

The ordinary run has the cells around the handover and a few before; `VMF_FAULT_MATRIX=full` runs all of them over TCP,
and `VMF_FAULT_MATRIX=tls` all over TLS.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmf.errors import InvalidStateError, TeleportError, TeleportUncertain, VmfError
from vmf.machine import doubt
from vmf.machine.config import MachineConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.testing.faults import CONVERSATION, KINDS, Fault, FaultProxy
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

WHICH = os.environ.get("VMF_FAULT_MATRIX", "few")
FEW = (
    Fault("kill-source", "READY"),
    Fault("kill-source", "HANDOVER"),
    Fault("kill-source-after", "HANDOVER"),
    Fault("kill-target", "HANDOVER"),
    Fault("kill-target", "RUNNING"),
    Fault("cut", "HANDOVER"),
    Fault("cut", "RUNNING"),
    Fault("truncate", "STATE"),
    Fault("flip", "HANDOVER"),
    Fault("swap", "PAUSED"),
    Fault("duplicate", "HANDOVER"),
    Fault("drop", "HANDOVER"),
    Fault("delay", "RUNNING"),
)
FEW_TLS = (
    Fault("truncate", "HANDOVER"),
    Fault("cut", "RUNNING"),
    Fault("kill-source-after", "HANDOVER"),
    Fault("kill-target", "RUNNING"),
)
ALL = tuple(Fault(kind, name) for kind in KINDS if kind != "pass" for name in CONVERSATION)
CELLS = [
    *(("tcp", fault) for fault in {"few": FEW, "full": ALL}.get(WHICH, ())),
    *(("tls", fault) for fault in {"few": FEW_TLS, "tls": ALL}.get(WHICH, ())),
]
TICK = re.compile(rb"tick (\d+) [0-9a-f]{8}\r?\n")


class Cell:
    """One pair of hosts with the fault between them."""

    def __init__(self, source: Host, target: Host, proxy: FaultProxy) -> None:
        self.source, self.target, self.proxy = source, target, proxy
        self.died = ""
        proxy.kill = self.kill
        self.error: BaseException | None = None
        self.then: list[str] = []

    def kill(self, side: str) -> None:
        host = self.source if side == "source" else self.target
        self.died = side
        host.kill("box", signal.SIGKILL)
        host.wait_gone("box")

    def teleport(self) -> None:
        try:
            with self.source.client("box") as client:
                tls = self.proxy.tls
                options = {} if tls is None else {"tls_dir": str(self.source.directory / "tls")}
                client.teleport(
                    "127.0.0.1", self.proxy.port, transport="tcp" if tls is None else "tls", options=options
                )
        except VmfError as error:
            self.error = error

    @property
    def handed(self) -> bool:
        """HANDOVER left the source."""
        return ("source", "HANDOVER") in self.proxy.seen

    @property
    def asked_for(self) -> bool:
        """READY left the target: HANDOVER may have left the source, too, and have died with the connection."""
        return ("target", "READY") in self.proxy.seen

    def states(self) -> tuple[str, str]:
        return self.source.state("box"), self.target.state("box")

    def settle(self) -> tuple[str, str]:
        """Until neither side is in the middle of anything; both states. At no moment do both run."""
        end = time.monotonic() + 45
        while True:
            states = self.states()
            assert states != ("running", "running")
            if states[0] not in ("teleporting", "not answering") and states[1] != "not answering":
                # A target that is still busy with the lost session looks as if it waited; that is fine, too.
                return states
            assert time.monotonic() < end, f"{states} for ever"
            time.sleep(0.05)

    def ticks(self, host: Host) -> list[int]:
        return [int(number) for number in TICK.findall(host.output("box"))]

    def check_ticks(self) -> None:
        """No tick came from both, no tick twice, and only one of them goes on."""
        before = [len(self.ticks(host)) for host in (self.source, self.target)]
        time.sleep(0.25)
        here, there = self.ticks(self.source), self.ticks(self.target)
        assert not set(here) & set(there), "the same tick came from both sides"
        assert len(set(here)) == len(here)
        assert len(set(there)) == len(there)
        assert not (len(here) > before[0] and len(there) > before[1]), "both go on"

    def goes_on(self, host: Host) -> None:
        host.wait_for_more("box", timeout=60)

    # After the fault

    def judge(self) -> tuple[str, str]:
        """The rule."""
        source, target = self.settle()
        if not self.handed:
            assert target in ("teleportingin", "aborted"), f"the target is {target} before HANDOVER"
            if self.died == "source":
                assert source in ("aborted", "uncertain") if self.asked_for else source == "aborted"
                self.then += ["started anew"] if source == "aborted" else []
            else:
                assert source == "running" or (self.asked_for and source == "uncertain")
        else:
            if self.died == "target":
                assert target == "aborted"
            if self.died != "source":
                end = time.monotonic() + 45
                while source not in ("uncertain", "teleported") and time.monotonic() < end:
                    time.sleep(0.05)
                    source, target = self.states()
                assert source in ("uncertain", "teleported"), f"the source is {source} after HANDOVER"
                assert self.error is None or isinstance(self.error, TeleportUncertain)
                if source == "teleported" and self.died != "target":
                    assert target == "running"
            else:
                assert source in ("uncertain", "teleported")
        self.check_ticks()
        return source, target

    def recover(self, source: str, target: str) -> None:
        if source == "uncertain":
            if self.died == "source":
                self.recover_orphan()
            else:
                self.recover_doubt()
        elif source == "aborted":
            self.source.start("box")
            self.goes_on(self.source)
        elif source == "running":
            self.goes_on(self.source)
        elif target == "running":
            self.goes_on(self.target)
        if source == "teleported" and self.died == "source":
            with pytest.raises(InvalidStateError, match="is teleported: there is no teleport to resolve"):
                doubt.resolve_orphan(self.source.home, "box", "discard", PluginRegistry())
            assert self.source.state("box") == "teleported"
        self.check_more()

    def check_more(self) -> None:
        """Again, after the recovery."""
        assert self.states() != ("running", "running")

    def recover_doubt(self) -> None:
        with self.source.client("box") as client:
            status = client.teleport_status(ask=True)["doubt"]
            if self.died == "target":
                assert status["answer"] == "unreachable"
                with pytest.raises(TeleportError, match="cannot be asked"):
                    client.resolve_teleport("resume")
                # Its machine waits again, and reads what the dead process wrote down.
                self.proxy.target = wait(self.target, self.proxy.tls)
                status = client.teleport_status(ask=True)["doubt"]
                assert status["answer"] in ("never", "ended")
            self.then.append(f"asked: {status['answer']}")
            if status["answer"] == "runs":
                with pytest.raises(TeleportError, match="has the machine"):
                    client.resolve_teleport("resume")
                client.resolve_teleport("discard")
                self.then.append("discarded")
                self.source.wait_gone("box")
                assert self.source.state("box") == "teleported"
                self.goes_on(self.target)
                return
            if status["answer"] == "ended":
                with pytest.raises(TeleportError, match="goes back to the moment"):
                    client.resolve_teleport("resume")
            client.resolve_teleport("resume", force=status["answer"] == "ended")
            self.then.append("resumed" if status["answer"] == "never" else "resumed by force")
        self.goes_on(self.source)
        assert self.target.state("box") in ("teleportingin", "aborted")
        if status["answer"] == "never":
            assert check(self.source.output("box")).problems == ()

    def recover_orphan(self) -> None:
        with pytest.raises(InvalidStateError, match="may run there"):
            self.source.start("box")
        registry = PluginRegistry()
        status = doubt.describe_orphan(self.source.home, "box", registry)
        assert status is not None
        self.then.append(f"start refused, asked: {status['answer']}")
        with pytest.raises(InvalidStateError, match="memory ended with its process"):
            doubt.resolve_orphan(self.source.home, "box", "resume", registry)
        doubt.resolve_orphan(self.source.home, "box", "discard", registry)
        self.then.append("discarded")
        if status["answer"] == "runs":
            assert self.source.state("box") == "teleported"
            self.goes_on(self.target)
        else:
            assert status["answer"] == "never"
            self.source.start("box")
            self.goes_on(self.source)
            self.then.append("started anew")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        yield source, target


def wait(target: Host, tls: Path | None) -> int:
    """Have the machine wait there; its port."""
    return target.wait("box") if tls is None else target.wait("box", transport="tls", tls_dir=tls)


def certificates(source: Host, target: Host) -> Path:
    """Of both hosts; the target's directory, which the proxy uses as well."""
    directory = target.directory / "tls"
    for command in (
        ("tls", "init", "--name", "127.0.0.1"),
        ("tls", "issue", "127.0.0.1", "--out", str(directory)),
    ):
        done = source.vmf(*command)
        assert done.returncode == 0, done.stderr
    return directory


def prepare(hosts: tuple[Host, Host], builtin: MachineConfig, tls: Path | None) -> int:
    """A running source and a waiting target; its port."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    with ThreadPoolExecutor() as both:
        started, port = both.submit(source.start, "box"), both.submit(wait, target, tls)
        started.result()
        source.wait_for_output("box", b"tick 2 ")
        return port.result()


def test_the_matrix_names_every_message(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    """An undisturbed teleport through the proxy says exactly what the matrix is about."""
    with FaultProxy(prepare(hosts, builtin, None)) as proxy:
        cell = Cell(*hosts, proxy)
        cell.teleport()
        assert cell.error is None
        assert {name for _, name in proxy.seen} - {"ZEROS"} == set(CONVERSATION)
        assert cell.judge() == ("teleported", "running")
        assert check(hosts[0].output("box") + hosts[1].output("box")).problems == ()


@pytest.mark.parametrize(("transport", "fault"), CELLS, ids=str)
def test_never_two(
    transport: str,
    fault: Fault,
    hosts: tuple[Host, Host],
    builtin: MachineConfig,
    record_property: Callable[[str, object], None],
) -> None:
    tls = certificates(*hosts) if transport == "tls" else None
    with FaultProxy(prepare(hosts, builtin, tls), fault, tls=tls) as proxy:
        cell = Cell(*hosts, proxy)
        cell.teleport()
        assert proxy.happened.wait(5), f"the fault did not happen; seen: {proxy.seen}"
        source, target = cell.judge()
        if fault.kind == "flip" and fault.message != "DONE":
            assert source != "teleported", "what was altered was taken"
        cell.recover(source, target)
        then = ", ".join(cell.then) or "goes on"
        record_property("matrix", (transport, fault.kind, fault.message, source, target, then))
