"""Ctrl-C, SIGTERM or SIGHUP during something long: they cancel that, not just the command.

The first signal cancels, and the command waits until nothing is left of what it began; the second gives up waiting. A
command that is killed outright (SIGKILL) cannot do that; `vmf.control.server` says what becomes of its work then.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from vmf.control.client import ControlClient

if TYPE_CHECKING:
    from vmf.machine.home import Home

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cancelling:
    """While inside, the first signal cancels and the second gives up waiting for that."""

    def __init__(self, what: str, cancel: Callable[[], bool]) -> None:
        """`cancel` asks whoever does it to end, on a thread of its own; False when it is too late."""
        self._what = what
        self._cancel = cancel
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    @classmethod
    def of(cls, where: Home, name: str, what: str, cancel: Callable[[ControlClient], bool]) -> Cancelling:
        """For what a machine's process does; `cancel` gets a connection of its own."""

        def ask() -> bool:
            with ControlClient.of(where, name) as machine:
                return cancel(machine)

        return cls(what, ask)

    def __enter__(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: whoever started us wants it so
                self._before[number] = signal.signal(number, self._interrupted)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # Straight to the descriptor: the interrupted code may be inside Python's own buffered output.
        _tell(f"\nvmf: cancelling the {self._what} ...\n")
        threading.Thread(target=self._ask, name="vmf-cancel", daemon=True).start()

    def _ask(self) -> None:
        try:
            if not self._cancel():
                _tell("vmf: too late to cancel\n")
        except Exception as error:  # noqa: BLE001 - the main thread shows what becomes of it
            _tell(f"vmf: cannot cancel: {error}\n")


def _tell(text: str) -> None:
    try:
        os.write(2, text.encode())
    except OSError:
        pass  # the terminal has gone (SIGHUP): what matters is that it is cancelled
