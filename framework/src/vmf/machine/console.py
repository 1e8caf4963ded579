"""The serial console between the guest and whoever is attached.

Output fans out to listeners on the vCPU thread: a listener must not block. Input waits here until the serial port has
room for it; what the guest has not taken yet travels with a teleport, so that no typed byte is lost. While the machine
is neither here nor there yet no input is taken (`hold_input`): its sender keeps it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmf.machine.listeners import tell

MAX_PENDING_INPUT = 1 << 20
SCROLLBACK = 64 << 10

Listener = Callable[[bytes], None]


class SerialConsole:
    """The machine's end of its first serial port."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: tuple[Listener, ...] = ()
        self._scrollback = bytearray()
        self._pending = bytearray()
        self._held = False

    # -- output

    def output(self, data: bytes) -> None:
        """The guest wrote `data` (vCPU thread)."""
        with self._lock:
            self._scrollback += data
            if len(self._scrollback) > 2 * SCROLLBACK:
                del self._scrollback[:-SCROLLBACK]
            listeners = self._listeners
        for failed in tell("the console", listeners, data):
            self._remove(failed)  # it would fail at every byte

    def add_listener(self, listener: Listener, *, replay: bool = False) -> Callable[[], None]:
        """Call `listener` with every piece of output from now on, on the vCPU thread; returns its remover.

        One that raises is logged and not called again.

        With `replay` it first gets, on this thread, the last `SCROLLBACK` bytes, with nothing lost or doubled between.
        """
        with self._lock:
            if replay and self._scrollback:
                listener(bytes(self._scrollback[-SCROLLBACK:]))
            self._listeners = (*self._listeners, listener)

        return lambda: self._remove(listener)

    def _remove(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

    def scrollback(self) -> bytes:
        """The last `SCROLLBACK` bytes of output."""
        with self._lock:
            return bytes(self._scrollback[-SCROLLBACK:])

    # -- input

    def type(self, data: bytes) -> int:
        """Queue input for the guest from any thread; how many bytes were taken.

        All, unless a megabyte waits or input is held; the caller keeps the rest.
        """
        with self._lock:
            if self._held:
                return 0
            room = max(0, MAX_PENDING_INPUT - len(self._pending))
            self._pending += data[:room]
            return min(room, len(data))

    @property
    def has_input(self) -> bool:
        return bool(self._pending)

    def feed(self, accept: Callable[[bytes], int]) -> None:
        """Offer the waiting input to the serial port (vCPU thread)."""
        with self._lock:
            waiting = bytes(self._pending[:4096])
        taken = accept(waiting) if waiting else 0
        if taken:
            with self._lock:
                del self._pending[:taken]

    def pending_input(self) -> bytes:
        with self._lock:
            return bytes(self._pending)

    def set_pending_input(self, data: bytes) -> None:
        """Restore what a teleport brought, before anything typed here in the meantime."""
        with self._lock:
            self._pending[:0] = data

    def hold_input(self) -> None:
        """Take no input from now on: what would be taken could no longer travel, or does not belong here yet."""
        with self._lock:
            self._held = True

    def accept_input(self) -> None:
        """Take input again."""
        with self._lock:
            self._held = False

    def drop_input(self) -> None:
        """Forget what waits: the machine that it was typed for has gone."""
        with self._lock:
            self._pending.clear()
