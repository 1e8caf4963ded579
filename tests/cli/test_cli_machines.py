"""Running machines through the command: the specification's procedure and what can go wrong with it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmf.machine.home import Home

COMMAND = [sys.executable, "-c", "from vmf.cli import main; main()"]


@pytest.fixture
def machines(vmf: Any, image: Path) -> None:
    """Machines "source" and "target" as the specification wants them."""
    for name in ("source", "target"):
        vmf("createvm", name, "--memory", 16, "--image", image, "--cpu-backend", "unicorn")
    vmf("modifyvm", "target", "--teleporter", "on", "--teleporter-port", 0, "--teleporter-address", "localhost")


def state(vmf: Any, name: str) -> str:
    return str(json.loads(vmf("showvminfo", name, "--json").stdout)["state"])


def wait_state(vmf: Any, name: str, wanted: str) -> None:
    deadline = time.monotonic() + 60
    while (now := state(vmf, name)) != wanted:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


@contextmanager
def foreground(environment: dict[str, str], *arguments: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_the_whole_procedure(vmf: Any, machines: None) -> None:
    target = json.loads(vmf("startvm", "target", "--detach", "--json").stdout)
    assert target["state"] == "teleportingin"
    port = target["address"].rpartition(":")[2]
    assert "running" in vmf("startvm", "source", "--detach").stdout
    assert "already" in vmf("startvm", "source", "--detach", status=1).stderr
    running = json.loads(vmf("list", "runningvms", "--json").stdout)
    assert {each["name"]: each["state"] for each in running} == {"source": "running", "target": "teleportingin"}
    assert vmf("console", "source", text_in="hello\n").stdout == "R\nhello\n"
    assert vmf("console", "source", "--no-scrollback", text_in="live").stdout == "live"

    moved = vmf("controlvm", "source", "teleport", "--host", "localhost", "--port", port)
    assert "teleport: precopy" in moved.stdout
    assert "runs on localhost now" in moved.stdout
    assert "downtime:" in moved.stdout
    assert state(vmf, "source") == "teleported"
    assert state(vmf, "target") == "running"
    assert vmf("console", "target", text_in="still here").stdout.endswith("still here")

    for verb, after in (("pause", "paused"), ("resume", "running"), ("reset", "running")):
        vmf("controlvm", "target", verb)
        assert state(vmf, "target") == after
    assert "cannot be resumed" in vmf("controlvm", "target", "resume", status=1).stderr
    assert "is running" in vmf("unregistervm", "target", status=1).stderr
    assert "is running" in vmf("modifyvm", "target", "--memory", 5, status=1).stderr
    vmf("controlvm", "target", "poweroff")
    assert state(vmf, "target") == "poweredoff"
    vmf("startvm", "source", "--detach")
    vmf("controlvm", "source", "poweroff")
    vmf("startvm", "source", "--detach")


def test_teleport_answers_programs_in_json(vmf: Any, machines: None) -> None:
    port = json.loads(vmf("startvm", "target", "--detach", "--json").stdout)["address"].rpartition(":")[2]
    vmf("startvm", "source", "--detach")
    done = vmf(
        *("controlvm", "source", "teleport", "--host", "localhost", "--port", port, "--json", "--progress", "json")
    )
    *events, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress"}
    assert "precopy" in [event["phase"] for event in events]
    assert summary["downtime_ns"] > 0


def test_different_hardware_is_refused_and_the_source_goes_on(vmf: Any, machines: None) -> None:
    vmf("modifyvm", "target", "--memory", 32)
    port = json.loads(vmf("startvm", "target", "--detach", "--json").stdout)["address"].rpartition(":")[2]
    vmf("startvm", "source", "--detach")
    done = vmf("controlvm", "source", "teleport", "--host", "localhost", "--port", port, status=1)
    assert done.stderr.startswith("vmf: error: ")
    assert "16 MiB at the source, 32 MiB at the target" in done.stderr
    assert state(vmf, "source") == "running"
    assert state(vmf, "target") == "teleportingin"
    nobody = vmf("controlvm", "source", "teleport", "--host", "localhost", "--port", 1, status=1)
    assert "nobody listens" in nobody.stderr
    assert state(vmf, "source") == "running"
    assert "no teleport" in vmf("controlvm", "source", "teleport", "--cancel").stdout


def test_port_in_use(vmf: Any, machines: None, environment: dict[str, str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        vmf("modifyvm", "target", "--teleporter-port", port, "--teleporter-address", "127.0.0.1")
        done = vmf("startvm", "target", "--detach", status=1)
    assert str(port) in done.stderr
    assert state(vmf, "target") == "poweredoff"


def test_foreground_runs_until_the_guest_powers_off(vmf: Any, machines: None, environment: dict[str, str]) -> None:
    with foreground(environment, "startvm", "source") as child:
        assert child.stdout is not None
        assert "is running" in child.stdout.readline()
        vmf("console", "source", text_in="q")
        out, err = child.communicate(timeout=20)
        assert (child.returncode, err) == (0, "")
        assert "powered off" in out


def test_foreground_ctrl_c_powers_off(vmf: Any, machines: None, environment: dict[str, str]) -> None:
    with foreground(environment, "startvm", "source") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
        assert child.returncode == 0
        assert "powering off" in err
        assert "powered off" in out
    assert state(vmf, "source") == "poweredoff"


def test_foreground_target_shows_waiting_and_arrival(vmf: Any, machines: None, environment: dict[str, str]) -> None:
    with foreground(environment, "startvm", "target") as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert "waits for a teleport at tcp:" in line
        port = line.split("tcp:")[1].split()[0].rstrip(".").rpartition(":")[2]
        vmf("startvm", "source", "--detach")
        vmf("controlvm", "source", "teleport", "--host", "localhost", "--port", port)
        lines = []
        while "is running" not in (line := child.stdout.readline()):
            assert line, lines
            lines.append(line)
        text = "".join(lines)
        assert "teleport: " in text
        assert "downtime:" in text


def test_killed_machine_is_aborted(vmf: Any, machines: None, home: Home) -> None:
    vmf("startvm", "source", "--detach")
    record = home.process("source")
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    wait_state(vmf, "source", "aborted")
    assert "aborted" in vmf("list", "vms").stdout
    assert "lack of memory" in vmf("showvminfo", "source").stdout
    assert "aborted" in vmf("controlvm", "source", "pause", status=1).stderr
    vmf("startvm", "source", "--detach")
    assert state(vmf, "source") == "running"


def test_on_a_terminal_the_teleport_is_drawn(vmf: Any, machines: None, environment: dict[str, str]) -> None:
    port = json.loads(vmf("startvm", "target", "--detach", "--json").stdout)["address"].rpartition(":")[2]
    vmf("startvm", "source", "--detach")
    master, slave = pty.openpty()
    arguments = ("controlvm", "source", "teleport", "--host", "localhost", "--port", port)
    child = subprocess.Popen([*COMMAND, *arguments], env=environment | {"TERM": "xterm"}, stdout=slave, stdin=slave)
    os.close(slave)
    seen = b""
    while select.select([master], [], [], 30)[0]:
        try:
            seen += os.read(master, 65536)
        except OSError:
            break
    os.close(master)
    assert child.wait(60) == 0
    assert b"\x1b[" in seen
    assert b"phase" in seen
    assert "┌".encode() in seen
    assert b"runs on localhost now" in seen
