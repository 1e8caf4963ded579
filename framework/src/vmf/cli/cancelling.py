"""Ctrl-C, SIGTERM or SIGHUP during something long: they cancel that, not just the command.

The first signal cancels, and the command waits until nothing is left of what it began; the second gives up waiting. A
command that is killed outright (SIGKILL) cannot do that; `vmf.control.server` says what becomes of its work then.

Theory of operation. A handler in Python runs when the main thread next executes Python code: a signal that comes just
before that thread blocks in a system call would wait as long as the call does. So `signal.set_wakeup_fd` writes each
signal into a pipe, and a thread that reads the pipe cancels. To give up waiting, it interrupts the main thread, as
often as that takes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from vmf.control.client import ControlClient

if TYPE_CHECKING:
    from vmf.machine.home import Home

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_REQUEST_S = 0.3
"""Signals that follow the first one so soon are no second request: a closing terminal may send SIGHUP and SIGTERM."""
NOT_BEGUN_S = 2.0
"""How long cancelling is tried again: the signal may have come before the machine received what it shall cancel."""
_POKE_S = 0.05


class Cancelling:
    """While inside, the first signal cancels and the second gives up waiting for that. Main thread only."""

    def __init__(self, what: str, cancel: Callable[[], bool]) -> None:
        """`cancel` asks whoever does it to end, on a thread of its own; False when there is nothing to cancel (yet)."""
        self._what = what
        self._cancel = cancel
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._reader = self._writer = -1
        self._give_up = False
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vmf-signals", daemon=True)

    @classmethod
    def of(cls, where: Home, name: str, what: str, cancel: Callable[[ControlClient], bool]) -> Cancelling:
        """For what a machine's process does; `cancel` gets a connection of its own."""

        def ask() -> bool:
            with ControlClient.of(where, name) as machine:
                return cancel(machine)

        return cls(what, ask)

    def __enter__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: whoever started us wants it so
                self._before[number] = signal.signal(number, self._interrupted)
        self._watcher.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # the watcher reads the end of the pipe
        self._watcher.join()
        os.close(self._reader)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._give_up and not self._over.is_set():
            self._over.set()  # once: the thread's next attempt must not interrupt what cleans up
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first: float | None = None
        while numbers := os.read(self._reader, 64):
            for _ in (number for number in numbers if number in self._before):
                now = time.monotonic()
                if first is None:
                    first = now
                    _tell(f"\nvmf: cancelling the {self._what} ...\n")
                    threading.Thread(target=self._ask, name="vmf-cancel", daemon=True).start()
                elif now - first >= SAME_REQUEST_S and not self._give_up:
                    self._give_up = True
                    threading.Thread(target=self._poke, name="vmf-give-up", daemon=True).start()

    def _poke(self) -> None:
        """Interrupt the main thread's system call; one attempt may come just before it begins."""
        number = next(iter(self._before))
        while not self._over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            self._over.wait(_POKE_S)

    def _ask(self) -> None:
        end = time.monotonic() + NOT_BEGUN_S
        try:
            while not self._cancel():
                if self._over.wait(0.1):
                    return
                if time.monotonic() > end:
                    _tell("vmf: too late to cancel\n")
                    return
        except Exception as error:  # noqa: BLE001 - the main thread shows what becomes of it
            _tell(f"vmf: cannot cancel: {error}\n")


def _tell(text: str) -> None:
    # Straight to the descriptor: the main thread may be inside Python's own buffered output.
    try:
        os.write(2, text.encode())
    except OSError:
        pass  # the terminal has gone (SIGHUP): what matters is that it is cancelled
