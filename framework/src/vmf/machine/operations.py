"""The operations on one machine: one at a time, each with an end, the long ones to be seen and cancelled.

`Operations` is the lock that every operation which changes a machine holds (`with machine.operation:`). It is never
waited for without an end. Operations that can take longer than a moment are *long*: they say what they do and how far
they are, anybody can cancel them from any thread, and whoever wants the lock meanwhile is told so at once.

A long operation looks at `check` between its steps; what can block inside of a step (writing to a hung file system,
say) runs by `Operation.run` on a thread that is abandoned when the operation is cancelled.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from vmf.errors import InvalidStateError, MachineError, OperationCancelled
from vmf.plugins.containment import where
from vmf.storage.calls import bounded

T = TypeVar("T")
LOCK_SECONDS = 60.0
"""How long an operation waits for another one that is not long."""
LONG_LOCK_SECONDS = 0.25
"""And for a long one: that may be about to end."""
GRACE_SECONDS = 2.0
"""For a step of a cancelled operation to end by itself, before its thread is abandoned."""
CANCEL_SECONDS = 30.0
"""How long a cancelled operation may take to end."""

ProgressListener = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


class Operation:
    """A long operation under way. `check` and `run` on its own thread, the rest on any.

    Attributes:
        what: it does, for people: "the snapshot 's1'".
        thread: that does it.
    """

    def __init__(self, name: str, what: str) -> None:
        self._machine = name
        self.what = what
        self.ended = threading.Event()
        self.thread = threading.current_thread()
        self._cancelled = threading.Event()
        self._reason = ""
        self._progress: tuple[str, int, int] = ("", 0, 0)
        self._began = time.monotonic()

    def cancel(self, reason: str = "") -> bool:
        """Have it end soon; `reason` is a clause for people, "" for a plain request. False when it has ended."""
        self._reason = self._reason or reason
        self._cancelled.set()
        return not self.ended.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked it to end."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raises OperationCancelled once somebody has cancelled it."""
        if self._cancelled.is_set():
            why = f": {self._reason}" if self._reason else ""
            raise OperationCancelled(f"{self.what} of machine '{self._machine}' was cancelled{why}.")

    def run(self, step: Callable[[], T]) -> T:
        """Do a step that may block; its thread is abandoned when the operation is cancelled. Raises what it does."""
        return bounded(self._machine, self.what, step, seconds=None, look=self.check, grace=GRACE_SECONDS)

    def observed(self, progress: ProgressListener | None) -> ProgressListener:
        """A listener that notes how far it is, raises OperationCancelled once it is cancelled, and passes on."""

        def told(what: str, done: int, total: int) -> None:
            self.check()
            self._progress = (what, done, total)
            if progress is not None:
                progress(what, done, total)

        return told

    def describe(self) -> dict[str, Any]:
        """Plain data, for programs."""
        what, done, total = self._progress
        seconds = round(time.monotonic() - self._began, 1)
        return {"what": self.what, "step": what, "done": done, "total": total, "seconds": seconds}

    def __str__(self) -> str:
        """A clause for people: "the snapshot 's1' is under way for 12 s (memory, 40 %)"."""
        what, done, total = self._progress
        part = f" ({what}, {100 * done // total} %)" if what and total else ""
        return f"{self.what} is under way for {time.monotonic() - self._began:.0f} s{part}"


class Operations:
    """One machine's operations. As a context manager it is their lock, which the holding thread may take again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._changing = threading.Lock()
        self._long: Operation | None = None

    def __enter__(self) -> Operations:
        if not self._lock.acquire(timeout=LONG_LOCK_SECONDS) and not self._wait():
            found = self._long
            raise InvalidStateError(
                f"machine {self._name} is busy: {found or 'another operation does not end'}.",
                f"Wait for it, or cancel it with `vmf controlvm {self._name} cancel`."
                if found is not None
                else "Try again; see its vmm.log.",
            )
        return self

    def _wait(self) -> bool:
        """For what is not long; whether we have the lock."""
        end = time.monotonic() + LOCK_SECONDS
        while self._long is None and time.monotonic() < end:
            if self._lock.acquire(timeout=LONG_LOCK_SECONDS):
                return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @contextmanager
    def long(self, what: str) -> Iterator[Operation]:
        """While inside, a long operation is under way (it takes the lock itself, for as long as it needs it).

        Raises InvalidStateError when there is one already.
        """
        operation = Operation(self._name, what)
        with self._changing:
            if self._long is not None:
                raise InvalidStateError(
                    f"machine {self._name} is busy: {self._long}.",
                    f"Wait for it, or cancel it with `vmf controlvm {self._name} cancel`.",
                )
            self._long = operation
        try:
            yield operation
        finally:
            self._long = None
            operation.ended.set()

    def wait_long(self) -> None:
        """Until no long operation is under way."""
        while (operation := self._long) is not None:
            operation.ended.wait(LOCK_SECONDS)

    @property
    def under_way(self) -> Operation | None:
        """The long operation under way."""
        return self._long

    def cancel(self, *, wait: bool, reason: str = "") -> str:
        """Cancel the long operation under way; what it was, "" when there was none.

        Raises MachineError when it does not end (only if `wait`).
        """
        operation = self._long
        if operation is None:
            return ""
        operation.cancel(reason)
        if wait and not operation.ended.wait(CANCEL_SECONDS):
            place = where(operation.thread)
            raise MachineError(
                f"machine {self._name}: {operation}, and does not end{f': it waits for {place}' if place else ''}.",
                f"Send SIGTERM twice to its process to end it at once (kill {os.getpid()}).",
            )
        return operation.what
