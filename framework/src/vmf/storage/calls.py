"""Calls into storage that may never return.

A server that was stopped, a network that swallows everything or a hung NFS mount can hold a call for ever, and no call
in such a state can be interrupted from within the process. So whoever must not wait for ever lets a `Caller` make the
call: a thread of its own does, one call after the other, and who asked for it waits as long as is bearable.

What is given up is *abandoned*: its thread lives on (it is a daemon, so it does not keep the process), ends with the
call, and is counted in `abandoned`. While a call is stuck, the caller's later ones wait behind it and are dropped when
they are given up: nothing is done late that its owner has given up, except for `eventually`, which is for cleaning up.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vmf.errors import StorageTimeout

log = logging.getLogger(__name__)

T = TypeVar("T")
CALL_SECONDS = 10.0
"""How long one call that looks at storage, opens, flushes or changes a lease may take inside an operation."""
LOOK_SECONDS = 0.05
REMEDY = "Look after the storage (its server, the network, the mount). What was asked for can be tried again then."

_counting = threading.Lock()
_abandoned: dict[int, str] = {}


def abandoned() -> list[str]:
    """What the calls are that were given up and have not returned yet."""
    with _counting:
        return list(_abandoned.values())


class _Job(Generic[T]):
    def __init__(self, what: str, function: Callable[[], T], late: Callable[[T], None] | None) -> None:
        self.what = what
        self.done = threading.Event()
        self.result: T
        self.error: BaseException | None = None
        self._function = function
        self._late = late
        self._lock = threading.Lock()
        self._given_up = self._running = False

    def give_up(self) -> None:
        """Drop it if it has not begun; count it as abandoned if it has."""
        with self._lock:
            self._given_up = True
            if self._running and not self.done.is_set():
                with _counting:
                    _abandoned[id(self)] = self.what

    def run(self) -> None:
        with self._lock:
            if self._given_up:
                return
            self._running = True
        try:
            self.result = self._function()
        except BaseException as error:  # noqa: BLE001 - raised again at the caller
            self.error = error
        with self._lock:
            self.done.set()
            late = self._given_up
        if late:
            with _counting:
                _abandoned.pop(id(self), None)
            log.debug("A call that was given up has returned: %s.", self.what)
            if self.error is None and self._late is not None:
                with contextlib.suppress(Exception):  # nobody is left to tell
                    self._late(self.result)


class Caller:
    """Makes the calls that concern one thing (`name`, for messages), one after the other, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        weakref.finalize(self, self._jobs.put, None)

    def call(
        self,
        what: str,
        function: Callable[[], T],
        *,
        seconds: float | None = CALL_SECONDS,
        look: Callable[[], None] | None = None,
        late: Callable[[T], None] | None = None,
        grace: float = 0.0,
    ) -> T:
        """Its result, or what it raised.

        Args:
            what: is done, for the message: "flushing".
            look: called every `LOOK_SECONDS` meanwhile; what it raises gives the call up (somebody cancelled).
            late: gets the result of a call that returned after it was given up.
            grace: wait so many more seconds for the end of a call that is given up.

        Raises StorageTimeout after `seconds` (None: never).
        """
        job = self._submit(what, function, late)
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while True:
                left = LOOK_SECONDS if end is None else end - time.monotonic()
                if job.done.wait(max(0.0, left if look is None and end is not None else min(left, LOOK_SECONDS))):
                    break
                if look is not None:
                    look()
                if end is not None and time.monotonic() >= end:
                    raise StorageTimeout(f"{self.name} has not answered for {seconds:g} s ({what}).", REMEDY)
        except BaseException:
            job.give_up()
            job.done.wait(grace)
            raise
        if job.error is not None:
            raise job.error
        return job.result

    def eventually(self, what: str, function: Callable[[], None]) -> threading.Event:
        """Have it done when everything before has returned, however late; the event says when. Errors are logged."""

        def run() -> None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 - nobody waits for it
                log.warning("%s: %s: %s", self.name, what, error)

        return self._submit(what, run, None).done

    def close(self) -> None:
        """End the thread when everything has returned; idempotent. Another call starts it again."""
        with self._starting:
            if self._thread is not None:
                self._jobs.put(None)
                self._thread = None

    def _submit(self, what: str, function: Callable[[], T], late: Callable[[T], None] | None) -> _Job[T]:
        job = _Job(f"{self.name} ({what})", function, late)
        with self._starting:
            self._jobs.put(job)
            if self._thread is None:
                # Not a method of ours: a caller that is dropped must not be kept by its own thread.
                self._thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=f"storage of {self.name}", daemon=True
                )
                self._thread.start()
        return job


def _work(jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job


def bounded(
    name: str,
    what: str,
    function: Callable[[], T],
    *,
    seconds: float | None = CALL_SECONDS,
    look: Callable[[], None] | None = None,
    late: Callable[[T], None] | None = None,
    grace: float = 0.0,
) -> T:
    """One call, as `Caller.call`."""
    caller = Caller(name)
    try:
        return caller.call(what, function, seconds=seconds, look=look, late=late, grace=grace)
    finally:
        caller.close()
