"""Keeps a machine's process findable for as long as it lives.

Its sockets are in a directory that others clean up: systemd removes the user's runtime directory at logout, people
delete what looks stale. So the process looks every `INTERVAL_S` whether they and the file of the machine's lock are
there still (four calls of stat(2)), and makes again what is gone, elsewhere if it must: the lock says where they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from vmf.errors import VmfError
from vmf.machine.home import Tenure

log = logging.getLogger("vmf.keeper")

INTERVAL_S = 2.0


class Reachable(Protocol):
    """A server with sockets in a directory."""

    def in_place(self) -> bool:
        """Whether clients that look there find its sockets."""

    def move(self, runtime: Path) -> None:
        """Listen on new sockets there. Raises ControlError, and then the old ones are as they were."""


class Keeper:
    """Watches from its own thread while inside."""

    def __init__(self, tenure: Tenure, control: Reachable, console: Reachable, lost: Callable[[], None]) -> None:
        """`lost` is called once when another host has taken the machine over (`vmf unlockvm` there)."""
        self._tenure = tenure
        self._servers = (control, console)
        self._lost: Callable[[], None] | None = lost
        self._ended = threading.Event()
        self._troubled = False
        self._thread = threading.Thread(target=self._run, name="vmf-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            try:
                self.look()
                self._troubled = False
            except (OSError, VmfError) as error:
                if not self._troubled:  # once, not every two seconds
                    log.warning("The machine cannot be reached: %s", error)
                self._troubled = True

    def look(self) -> None:
        """Make again what is gone. Raises OSError or VmfError when that does not work now."""
        if self._lost is not None and not self._tenure.renew():
            log.error("The machine's lock is another process's now: the guest stands still.")
            lost, self._lost = self._lost, None
            lost()
        if all(server.in_place() for server in self._servers):
            return
        self._tenure.settle()
        for server in self._servers:
            server.move(self._tenure.paths.runtime)
        log.warning("The machine's sockets were gone; it has new ones in %s.", self._tenure.paths.runtime)
