"""Attach a terminal, or a pair of pipes, to a machine's console.

On a terminal every key goes to the guest, except Ctrl-], which detaches; the terminal's mode is restored however this
ends. From a pipe all bytes go to the guest as they are; when the pipe ends, output is still shown until it has been
silent for a while.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import socket
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType

from vmf.control.reach import CONSOLE, CONSOLE_LIVE, reach
from vmf.machine.home import Home

DETACH_KEY = b"\x1d"
"""Ctrl-]"""


class AttachEnd(enum.Enum):
    """Why attaching ended."""

    DETACHED = "detached"
    """Ctrl-], or the end of piped input."""
    ENDED = "ended"
    """The machine's process ended the console."""


def connect(home: Home, name: str, *, scrollback: bool = True) -> socket.socket:
    """A connection to the console. Raises NotFoundError, InvalidStateError when the machine does not run."""
    return reach(home, name, CONSOLE if scrollback else CONSOLE_LIVE)


def attach(connection: socket.socket, stdin: int, stdout: int, *, linger: float = 1.0) -> AttachEnd:
    """Shuttle bytes between two descriptors and the console until one side ends.

    Args:
        linger: after the end of piped input, seconds of silence after which to detach.
    """
    is_terminal = os.isatty(stdin)
    with connection, _raw(stdin) if is_terminal else contextlib.nullcontext():
        reading = [stdin, connection.fileno()]
        while True:
            ended = stdin not in reading
            ready, _, _ = select.select(reading, [], [], linger if ended else None)
            if not ready:
                return AttachEnd.DETACHED
            if connection.fileno() in ready:
                try:
                    data = connection.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return AttachEnd.ENDED
                _write_all(stdout, data)
            if stdin in ready:
                typed = os.read(stdin, 4096)
                detach = is_terminal and (not typed or DETACH_KEY in typed)
                if detach:
                    typed = typed.partition(DETACH_KEY)[0]
                elif not typed:
                    reading.remove(stdin)
                try:
                    connection.sendall(typed)
                except (BrokenPipeError, ConnectionResetError):
                    return AttachEnd.ENDED
                if detach:
                    return AttachEnd.DETACHED


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # A terminal shared with somebody who made it non-blocking.
            select.select([], [descriptor], [])


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Raw mode, restored at the end; signals that end the process come as SystemExit meanwhile."""
    before = termios.tcgetattr(terminal)
    handlers = {}

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.signal(number, leave)
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
