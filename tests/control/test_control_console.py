"""The console: replay without loss or doubling, several clients, lazy clients, the log."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vmf.control import sockets
from vmf.control.console import CLIENT_BACKLOG, MAX_CLIENTS, SCROLLBACK, ConsoleServer
from vmf.control.reach import CONSOLE, CONSOLE_LIVE, reach
from vmf.errors import InvalidStateError
from vmf.machine.home import Home


def read_until(connection: socket.socket, ending: bytes) -> bytes:
    connection.settimeout(10)
    found = b""
    while not found.endswith(ending):
        piece = connection.recv(65536)
        assert piece, found
        found += piece
    return found


def settled(home: Home, text: bytes) -> None:
    """Wait until the console thread has seen `text`."""
    deadline = time.monotonic() + 60
    while not home.paths("vm").console_log.read_bytes().endswith(text):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_replay_and_live(home: Home, console: ConsoleServer, machine: Any) -> None:
    machine.print(b"early")
    settled(home, b"early")
    with reach(home, "vm", CONSOLE) as replayed, reach(home, "vm", CONSOLE_LIVE) as live:
        assert read_until(replayed, b"early") == b"early"
        machine.print(b" late")
        assert read_until(replayed, b"late") == b" late"
        live.sendall(b"typed")
        assert read_until(live, b"typed") in (b" latetyped", b"typed")
        assert read_until(replayed, b"typed") == b"typed"


def test_scrollback_is_the_last_64_kib(home: Home, console: ConsoleServer, machine: Any) -> None:
    text = b"".join(b"%07d\n" % number for number in range(40_000))
    for at in range(0, len(text), 1000):
        machine.print(text[at : at + 1000])
    settled(home, text[-8:])
    with reach(home, "vm", CONSOLE) as client:
        assert read_until(client, text[-8:]) == text[-SCROLLBACK:]
    assert home.paths("vm").console_log.read_bytes() == text


def test_attaching_in_the_middle_loses_and_doubles_nothing(home: Home, console: ConsoleServer, machine: Any) -> None:
    stop = threading.Event()

    def talk() -> None:
        number = 0
        while not stop.is_set():
            machine.print(b"%d\n" % number)
            number += 1
            time.sleep(0.0002)

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        for _ in range(10):
            with reach(home, "vm", CONSOLE) as client:
                client.settimeout(10)
                seen = b""
                while seen.count(b"\n") < 300:
                    seen += client.recv(4096)
            numbers = [int(line) for line in seen.split(b"\n")[1:-1]]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    finally:
        stop.set()
        talker.join()


def test_lazy_client_loses_its_oldest_output_and_is_told(home: Home, console: ConsoleServer, machine: Any) -> None:
    with reach(home, "vm", CONSOLE) as lazy:
        time.sleep(0.1)
        began = time.monotonic()
        for number in range(8 * CLIENT_BACKLOG // 65536):
            machine.print(b"%06d" % number * (65536 // 6))
            time.sleep(0.002)
        machine.print(b"the end")
        assert time.monotonic() - began < 5
        settled(home, b"the end")
        seen = read_until(lazy, b"the end")
        assert b"bytes of output left out]" in seen
        assert len(seen) < 4 * CLIENT_BACKLOG


def test_input_waits_until_the_machine_has_room(home: Home, console: ConsoleServer, machine: Any) -> None:
    machine.room = 5
    with reach(home, "vm", CONSOLE) as client:
        client.sendall(b"hello, world")
        assert read_until(client, b"hello") == b"hello"
        time.sleep(0.2)
        machine.room = 100
        assert read_until(client, b"world") == b", world"


def test_what_was_typed_by_someone_who_left_at_once_arrives(home: Home, console: ConsoleServer, machine: Any) -> None:
    """As `printf 'poweroff\\n' | socat - UNIX:console.sock` does; the scrollback for it finds nobody any more."""
    machine.print(b"x" * 300_000 + b"end")
    settled(home, b"end")
    machine.room = 3
    with reach(home, "vm", CONSOLE) as brief:
        brief.sendall(b"abcdef")
    settled(home, b"endabc")
    machine.print(b"to nobody")  # which shows that nobody is there
    settled(home, b"to nobody")
    machine.room = 100
    deadline = time.monotonic() + 60
    while not console._log_path.read_bytes().endswith(b"abcto nobodydef"):  # the machine echoes
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_full_disk_does_not_stop_the_guest(
    home: Home, console: ConsoleServer, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if descriptor == console._log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with reach(home, "vm", CONSOLE) as client:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            machine.print(b"unlogged")
            assert read_until(client, b"unlogged")
        machine.print(b"on")
        assert read_until(client, b"on")


def test_previous_log_is_kept(home: Home, machine: Any) -> None:
    for text in (b"first", b"second"):
        with home.own("vm") as paths:
            console = ConsoleServer(machine.console_write, paths)
            console.start()
            console.output(text)
            console.close()
            console.output(b"ignored")
    assert paths.console_log.read_bytes() == b"second"
    assert paths.console_log.with_name("console.log.1").read_bytes() == b"first"


def test_not_running(home: Home) -> None:
    with pytest.raises(InvalidStateError, match="not running"):
        reach(home, "vm", CONSOLE)


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sockets.listen(path).close()
    assert path.exists()
    second = sockets.listen(path)
    sockets.connect(path).close()
    second.close()


def test_one_console_too_many_is_told_why(home: Home, console: ConsoleServer) -> None:
    held = [reach(home, "vm", CONSOLE_LIVE) for _ in range(MAX_CLIENTS)]
    try:
        with reach(home, "vm", CONSOLE_LIVE) as refused:
            refused.settimeout(20)
            assert b"32 consoles are attached to this machine already. Detach one of them." in refused.recv(4096)
            assert refused.recv(4096) == b""
    finally:
        for each in held:
            each.close()
    deadline = time.monotonic() + 60
    while True:  # their places are free again
        with reach(home, "vm", CONSOLE_LIVE) as again:
            again.settimeout(0.2)
            try:
                assert b"consoles are attached" in again.recv(4096)
            except TimeoutError:
                break
        assert time.monotonic() < deadline


def test_old_output_asks_the_terminal_nothing(home: Home, console: ConsoleServer, machine: Any) -> None:
    queries = b"\x1b[6n\x1b[c\x1b]11;?\x07\x1bP$qm\x1b\\"
    machine.print(b"a" + queries + b"\x1b[1mb\x1b[0m")
    settled(home, b"\x1b[0m")
    with reach(home, "vm", CONSOLE) as client:
        assert read_until(client, b"\x1b[0m") == b"a\x1b[1mb\x1b[0m"
        machine.print(queries)
        assert read_until(client, queries) == queries, "what the guest asks now is passed on"
