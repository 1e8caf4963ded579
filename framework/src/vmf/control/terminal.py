"""A terminal in raw mode, restored however the program ends or stops.

Theory of operation. Raw mode is set by one thread (that of `vmf startvm --console`, or the main one) and undone by
whichever comes first: the end of the `with` block, a signal's handler, the interpreter's end, or `restore` before
`os._exit`. So `restore` is idempotent and takes no lock: a handler may interrupt it anywhere. It works in the
background, too, where changing a terminal would stop the process (SIGTTOU).

A handler restores first and ends the program after that: a second signal may come at any moment, also while the first
one unwinds the stack. SIGTSTP gives the terminal back, stops the process with SIGSTOP, and takes the terminal again
when the process is continued in the foreground; continued in the background, it takes it at the SIGCONT of `fg`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import termios
import threading
import tty
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_raw: dict[int, list[Any]] = {}
"""Descriptors of terminals that are in raw mode, or will be when the process is continued, and their modes before."""


def restore(*, forget: bool = True) -> None:
    """Give every terminal its mode back. Idempotent; from any thread and handler.

    Args:
        forget: False when raw mode is to be set again (`_take_again`).
    """
    for descriptor, before in list(_raw.items()):
        with contextlib.suppress(termios.error, OSError):  # it has gone
            _set_mode(descriptor, before)
        if forget:
            _raw.pop(descriptor, None)


def _set_mode(descriptor: int, mode: list[Any]) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, mode)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _take_again() -> None:
    for descriptor in list(_raw):
        with contextlib.suppress(termios.error, OSError):
            if os.tcgetpgrp(descriptor) == os.getpgrp():
                tty.setraw(descriptor, termios.TCSANOW)


def _stop(_number: int, _frame: FrameType | None) -> None:
    restore(forget=False)
    os.kill(os.getpid(), signal.SIGSTOP)
    _take_again()


def _continued(_number: int, _frame: FrameType | None) -> None:
    _take_again()


def _end(number: int, _frame: FrameType | None) -> None:
    restore()
    raise SystemExit(128 + number)


def _end_with_core(number: int, _frame: FrameType | None) -> None:
    """As the signal does by itself, after the terminal has its mode back."""
    restore()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """The terminal is in raw mode inside."""
    _raw[descriptor] = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        if (before := _raw.get(descriptor)) is not None:
            with contextlib.suppress(termios.error, OSError):
                _set_mode(descriptor, before)
            _raw.pop(descriptor, None)


@contextlib.contextmanager
def signals_restore(ending: Sequence[signal.Signals] = ENDING) -> Iterator[int]:
    """Inside, signals that stop or end the process restore the terminal first. Main thread; elsewhere nothing changes.

    Gives a descriptor that becomes readable when a signal has come. What waits has to wait for that, too: Python runs
    a handler between two of its instructions, and a signal that comes just before a system call begins to wait does
    not end that wait.

    Args:
        ending: those that end it; the others are the caller's.
    """
    handlers: dict[signal.Signals, Any] = {}
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wakeup_before: int | None = None
    if threading.current_thread() is threading.main_thread():
        wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        wanted = {
            signal.SIGTSTP: _stop,
            signal.SIGCONT: _continued,
            **{number: _end_with_core if number is signal.SIGQUIT else _end for number in ending},
        }
        for number, handler in wanted.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell without job control
                handlers[number] = signal.signal(number, handler)
    try:
        yield reader
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)
        if wakeup_before is not None:
            signal.set_wakeup_fd(wakeup_before)
        os.close(reader)
        os.close(writer)


atexit.register(restore)
