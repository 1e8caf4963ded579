"""Ctrl-C during something long that the machine's process does: it cancels that, not just the command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from vmf.control.client import ControlClient

if TYPE_CHECKING:
    from vmf.machine.home import Home


class Cancelling:
    """While inside, the first Ctrl-C cancels and the second gives up waiting for that."""

    def __init__(self, where: Home, name: str, what: str, cancel: Callable[[ControlClient], bool]) -> None:
        """`cancel` asks the machine to, on a connection of its own; False when it is too late."""
        self._home = where
        self._name = name
        self._what = what
        self._cancel = cancel
        self._asked = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._interrupted)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # Straight to the descriptor: the interrupted code may be inside Python's own buffered output.
        os.write(2, f"\nvmf: cancelling the {self._what} ...\n".encode())
        threading.Thread(target=self._ask, name="vmf-cancel", daemon=True).start()

    def _ask(self) -> None:
        try:
            with ControlClient.of(self._home, self._name) as machine:
                cancelled = self._cancel(machine)
            if not cancelled:
                os.write(2, b"vmf: too late to cancel\n")
        except Exception as error:  # noqa: BLE001 - the main thread shows what becomes of it
            os.write(2, f"vmf: cannot cancel: {error}\n".encode())
