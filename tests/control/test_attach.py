"""`vmf console` at terminals and pipes: input that is not taken, endings of every kind, the terminal's mode."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmf.control.attach import Attached, AttachEnd, attach, connect, detach_key_name, parse_detach_key
from vmf.control.console import MAX_CLIENTS, ConsoleServer
from vmf.control.reach import CONSOLE_CLIENT, reach
from vmf.control.signals import SAME_REQUEST_S
from vmf.errors import ControlError, InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.home import Home


def settled(home: Home, text: bytes) -> None:
    """Wait until the console has seen `text`, which the fake machine echoes."""
    deadline = time.monotonic() + 60
    while text not in home.paths("vm").console_log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class AtTerminal:
    """`vmf console`'s program, or another one, on a terminal of its own with job control."""

    def __init__(self, home: Home, *options: str, command: list[str] | None = None) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        command = command or [sys.executable, "-m", "vmf.cli", "console", "vm", *options]
        # A session leader that holds the terminal, with the program as a job in the foreground: as under a shell.
        leader = (
            "import fcntl, os, signal, subprocess, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n"
            "child = subprocess.Popen(sys.argv[3:], process_group=0, restore_signals=True,\n"
            "    preexec_fn=lambda: (os.tcsetpgrp(0, os.getpgrp()), signal.signal(signal.SIGTTOU, signal.SIG_DFL)))\n"
            "print(child.pid, file=open(int(sys.argv[1]), 'w'), flush=True)\n"
            "child.wait()\n"
            "print(child.returncode, file=open(int(sys.argv[2]), 'w'), flush=True)\n"
        )
        self._pid_reader, pid_writer = os.pipe()
        self._status_reader, status_writer = os.pipe()

        self.process = subprocess.Popen(
            [sys.executable, "-c", leader, str(pid_writer), str(status_writer), *command],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            pass_fds=(pid_writer, status_writer),
            env={**os.environ, "VMF_HOME": str(home.data)},
        )
        os.close(pid_writer)
        os.close(status_writer)
        with open(self._pid_reader) as reader:
            self.pid = int(reader.readline())
        self.seen = b""

    def __enter__(self) -> AtTerminal:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in (self.pid, self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        for descriptor in (self.master, self.slave, self._status_reader):
            os.close(descriptor)

    def wait(self, text: bytes, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self.master, 65536)

    def type(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.master, view[:1000]) :]

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def until(self, raw: bool) -> None:
        deadline = time.monotonic() + 60
        while self.is_raw is not raw:
            assert time.monotonic() < deadline, f"the terminal is {'' if self.is_raw else 'not '}raw"
            time.sleep(0.02)

    def status(self) -> int:
        """The program's exit status; minus the signal that ended it."""
        while not select.select([self._status_reader], [], [], 0)[0]:  # its last words must find room
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        said = os.read(self._status_reader, 100)
        assert said, self.seen
        return int(said)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """One that the command line finds by VMF_HOME."""
    made = Home(tmp_path, tmp_path / "run")
    made.create(MachineConfig(name="vm", memory_mib=1))
    return made


@pytest.fixture
def attached(home: Home, console: ConsoleServer, machine: Any) -> Iterator[AtTerminal]:
    machine.print(b"ready")
    with AtTerminal(home) as at:
        at.wait(b"ready")
        at.until(raw=True)
        yield at


def test_keys_go_to_the_guest_and_the_detach_key_detaches(home: Home, attached: AtTerminal) -> None:
    assert b"Ctrl-] detaches" in attached.seen
    attached.type(b"\x03abc\x1d")  # Ctrl-C is the guest's
    assert attached.status() == 0
    assert b"Detached; the machine goes on." in attached.seen
    settled(home, b"\x03abc")
    assert termios.tcgetattr(attached.slave) == attached.before


def test_another_detach_key(home: Home, console: ConsoleServer, machine: Any) -> None:
    machine.print(b"ready")
    with AtTerminal(home, "--escape", "^T") as at:
        at.wait(b"ready")
        assert b"Ctrl-T detaches" in at.seen
        at.type(b"a\x1db\x14")
        assert at.status() == 0
    settled(home, b"a\x1db")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_restores_the_terminal(attached: AtTerminal, number: signal.Signals) -> None:
    os.kill(attached.pid, number)
    assert attached.status() == {
        signal.SIGQUIT: -signal.SIGQUIT,  # with its core
        signal.SIGINT: 130,
    }.get(number, 128 + number)
    assert termios.tcgetattr(attached.slave) == attached.before


def test_many_signals_restore_the_terminal(attached: AtTerminal) -> None:
    for _ in range(20):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(attached.pid, number)
    attached.status()
    assert termios.tcgetattr(attached.slave) == attached.before


def test_a_stopped_console_gives_the_terminal_back_and_takes_it_again(home: Home, attached: AtTerminal) -> None:
    for _ in range(2):
        os.kill(attached.pid, signal.SIGTSTP)
        attached.until(raw=False)
        assert termios.tcgetattr(attached.slave) == attached.before
        os.kill(attached.pid, signal.SIGCONT)
        attached.until(raw=True)
    attached.type(b"after\x1d")
    assert attached.status() == 0
    settled(home, b"after")


def test_a_paste_that_the_guest_does_not_take_leaves_the_detach_key_working(attached: AtTerminal, machine: Any) -> None:
    machine.room = 1000
    attached.type(b"x" * (5 << 20))
    attached.type(b"\x1d")
    assert attached.status() == 1
    assert b"5241880 bytes typed were not delivered: detached" in attached.seen
    assert termios.tcgetattr(attached.slave) == attached.before


def test_a_terminal_that_stands_still_leaves_the_detach_key_working(attached: AtTerminal, machine: Any) -> None:
    for _ in range(100):
        machine.print(b"output without end " * 1000)
    time.sleep(0.5)
    attached.type(b"\x1d")
    deadline = time.monotonic() + 60
    while attached.is_raw:  # nothing of the output has been read
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_of_the_machine_says_why_and_what_was_not_delivered(
    attached: AtTerminal, console: ConsoleServer, machine: Any
) -> None:
    machine.room = 4
    attached.type(b"taken, not taken")
    attached.wait(b"take")
    console.close("teleported")
    assert attached.status() == 1
    assert b"Machine 'vm' runs on another host now." in attached.seen
    assert b"12 bytes typed were not delivered" in attached.seen


# -- pipes and the API


def run(home: Home, typed: bytes, out: Path, **keywords: Any) -> Attached:
    source = out.with_name("in")
    source.write_bytes(typed)
    with source.open("rb") as stdin, out.open("wb") as stdout:
        return attach(connect(home, "vm"), stdin.fileno(), stdout.fileno(), **keywords)


def test_not_running(home: Home) -> None:
    with pytest.raises(InvalidStateError, match="not running"):
        connect(home, "vm")


def test_pipes_detach_after_silence(home: Home, console: ConsoleServer, machine: Any, tmp_path: Path) -> None:
    machine.print(b"prompt> ")
    settled(home, b"> ")
    assert run(home, b"ctrl-] \x1d is data in a pipe", tmp_path / "out", linger=0.3) == Attached(AttachEnd.DETACHED)
    assert (tmp_path / "out").read_bytes() == b"prompt> ctrl-] \x1d is data in a pipe"


def test_a_lot_arrives_whole(home: Home, console: ConsoleServer, machine: Any, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    assert run(home, data, tmp_path / "out", linger=0.3).undelivered == 0
    assert home.paths("vm").console_log.read_bytes() == data
    assert (tmp_path / "out").read_bytes() == data


def test_what_a_stuck_machine_did_not_take_is_told(
    home: Home, console: ConsoleServer, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf.control.attach.STUCK_SECONDS", 0.5)
    machine.room = 10
    assert run(home, bytes(10_000), tmp_path / "out", linger=0.1) == Attached(AttachEnd.DETACHED, "", 9_990)
    machine.room = 1 << 20
    time.sleep(0.3)
    assert home.paths("vm").console_log.read_bytes() == bytes(10), "what was told as not delivered is not delivered"


def test_input_waits_while_the_machine_takes_none(
    home: Home, console: ConsoleServer, machine: Any, tmp_path: Path
) -> None:
    """A handover that fails, say: it goes on here."""
    machine.room = 3
    threading.Timer(1, lambda: setattr(machine, "room", 1 << 20)).start()
    assert run(home, b"abcdef" * 10_000, tmp_path / "out", linger=0.3) == Attached(AttachEnd.DETACHED)
    assert home.paths("vm").console_log.read_bytes() == b"abcdef" * 10_000


def test_a_machine_that_ends_tells_how(home: Home, console: ConsoleServer, machine: Any, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    connection = connect(home, "vm")
    threading.Timer(0.2, console.close, ["poweredoff"]).start()
    with (tmp_path / "out").open("wb") as stdout:
        assert attach(connection, reader, stdout.fileno()) == Attached(AttachEnd.ENDED, "poweredoff")
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("stdin", ["/dev/zero", "/dev/null"])
def test_an_output_that_nobody_reads_ends_it(home: Home, console: ConsoleServer, machine: Any, stdin: str) -> None:
    machine.print(b"x" * 100)
    settled(home, b"x" * 100)
    machine.room = 0 if stdin == "/dev/zero" else 1 << 20
    with open(stdin, "rb") as source:
        child = subprocess.Popen(
            [sys.executable, "-m", "vmf.cli", "console", "vm", "--linger", "1000"],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "VMF_HOME": str(home.data)},
        )
    assert child.stdout is not None
    assert child.stdout.read(20) == b"x" * 20
    child.stdout.close()
    assert child.wait(60) == 128 + signal.SIGPIPE
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()


def test_an_output_that_takes_no_more_is_told(home: Home, console: ConsoleServer, machine: Any) -> None:
    machine.print(b"shown")
    settled(home, b"shown")
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m vmf.cli console vm --linger 1000 </dev/null >/dev/full"],
        stderr=subprocess.PIPE,
        timeout=60,
        env={**os.environ, "VMF_HOME": str(home.data)},
    )
    assert done.returncode == 74
    assert done.stderr.startswith(
        b"vmf: error: standard output cannot be written: No space left on device; the console"
    )
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("redirection", ["<&-", "</dev/null"])
def test_without_input(home: Home, console: ConsoleServer, machine: Any, redirection: str) -> None:
    machine.print(b"shown")
    settled(home, b"shown")
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m vmf.cli console vm --linger 0.3 {redirection}"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "VMF_HOME": str(home.data)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"shown", b"")


def test_a_refused_console_says_why(home: Home, console: ConsoleServer, tmp_path: Path) -> None:
    held = [reach(home, "vm", CONSOLE_CLIENT) for _ in range(MAX_CLIENTS)]
    try:
        with pytest.raises(ControlError, match="32 consoles are attached to this machine already") as caught:
            run(home, b"", tmp_path / "out")
        assert caught.value.remedy == "Detach one of them."
    finally:
        for each in held:
            each.close()


def test_detach_keys() -> None:
    keys = {"^]": b"\x1d", "^t": b"\x14", "^T": b"\x14", "^\\": b"\x1c", "~": b"~"}
    assert {text: parse_detach_key(text) for text in keys} == keys
    assert [detach_key_name(key) for key in (b"\x1d", b"\x14", b"~")] == ["Ctrl-]", "Ctrl-T", "~"]
    for text in ("", "^5", "ab", "é", "\n"):
        with pytest.raises(ValueError, match="is no detach key"):
            parse_detach_key(text)


# -- the machine's own process with its console


@pytest.fixture
def started(home: Home) -> Iterator[AtTerminal]:
    """`vmf startvm --console` of a machine that is no real one, on a terminal."""
    conftest = Path(__file__).with_name("conftest.py")
    program = (
        "import runpy, sys, vmf.control.process as process\n"
        "FakeMachine = runpy.run_path(sys.argv.pop(1))['FakeMachine']\n"
        "FakeMachine.power_off = lambda self: None\n"  # so that the second signal finds it
        "process._real_machine = lambda config, report: FakeMachine(config.name)\n"
        "from vmf.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, str(conftest), "startvm", "vm", "--console", "--escape", "^T"]
    with AtTerminal(home, command=command) as at:
        at.wait(b"Ctrl-T detaches")
        at.until(raw=True)
        yield at


def test_two_signals_to_a_machine_with_its_console_restore_the_terminal(started: AtTerminal) -> None:
    os.kill(started.pid, signal.SIGTERM)
    started.wait(b"once more to end at once")
    time.sleep(2 * SAME_REQUEST_S)
    os.kill(started.pid, signal.SIGTERM)
    assert started.status() == 128 + signal.SIGTERM
    assert termios.tcgetattr(started.slave) == started.before


def test_sigquit_to_a_machine_with_its_console_restores_the_terminal(started: AtTerminal) -> None:
    os.kill(started.pid, signal.SIGQUIT)
    assert started.status() == -signal.SIGQUIT
    assert termios.tcgetattr(started.slave) == started.before


def test_a_stopped_machine_with_its_console_gives_the_terminal_back(started: AtTerminal) -> None:
    os.kill(started.pid, signal.SIGTSTP)
    started.until(raw=False)
    os.kill(started.pid, signal.SIGCONT)
    started.until(raw=True)
    started.type(b"typed\x14")
    started.wait(b"Detached; the machine goes on.")
    assert termios.tcgetattr(started.slave) == started.before
