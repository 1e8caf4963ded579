"""Signals of the process that runs a machine, from the moment that it has one until its end is recorded."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from vmf.control import terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_REQUEST_S = 0.3
"""Signals that follow the first one so soon are no second request: a closing terminal sends SIGHUP twice, a supervisor
SIGTERM beside the terminal's SIGINT."""


class SignalPipe:
    """While inside, signals arrive in a pipe as their numbers, one byte each. Main thread; elsewhere it is just a pipe.

    `signal.set_wakeup_fd` writes them where the signal arrives. A handler in Python would write them when the main
    thread next runs Python code, and a second signal, which the kernel may give to another thread, does not wake it.
    """

    def __init__(self) -> None:
        self.reader, self.writer = -1, -1
        self._main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._winding_up: float | None = None

    def __enter__(self) -> Self:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        if self._main:
            self._wakeup_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup, or a shell's background job: whoever started us wants it so
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._main:
            signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.reader)
        os.close(self.writer)

    def wind_up(self) -> None:
        """The machine has ended, and the pipe is not read any more: a signal ends the process at once.

        Not one of the same instant as that which ended the machine: that would leave it "aborted".
        """
        self._winding_up = time.monotonic()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._winding_up is not None and time.monotonic() >= self._winding_up + SAME_REQUEST_S:
            end_at_once(number)


def end_at_once(number: int) -> NoReturn:
    """End the process as by that signal, but with the terminal restored."""
    terminal.restore()
    os._exit(128 + number)
