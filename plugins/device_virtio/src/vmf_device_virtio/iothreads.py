"""Threads that wait for storage, so that the vCPU does not.

Jobs go in on the vCPU thread and come back there, finished, in any order: the threads gather finished ones, and post
a single callable for all that are there when it runs. The threads start with the first job.

Coming back costs the guest: it is stopped, told by an interrupt, and looks at what there is. So a single thread that
has quick jobs waits with the news while the guest is busy and more jobs are there, until half of what is under way is
done.

A job holds views of guest RAM. So whoever wants RAM for itself (a reset, a pause, the end) waits with `drain`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from vmf.errors import StateError

QUICK_NS = 500_000
"""A job that takes no longer was no real I/O, and the next one will not be either: news may wait for that."""
TOGETHER_MAX = 8
"""Finished jobs that are told together at the latest."""
DRAIN_SECONDS = 10.0
"""How long a pause, a reset or a handover waits for storage that does not answer."""
END_SECONDS = 5.0
"""And how long the end of the machine does, before what is under way is given up."""
ABORT_SECONDS = 1.0
"""For requests that are given up to come back."""


class Job(Protocol):
    def run(self) -> None:
        """On an I/O thread; never raises."""


J = TypeVar("J", bound=Job)


class IoThreads(Generic[J]):
    """The threads of one device. All methods are the vCPU thread's."""

    def __init__(
        self,
        name: str,
        count: int,
        post: Callable[[Callable[[], None]], None],
        finished: Callable[[list[J]], None],
        guest_waits: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            post: runs a callable on the vCPU thread soon.
            finished: gets the finished jobs there.
            guest_waits: whether the guest has nothing to do until something is posted. For a single thread; given, some
                quick jobs may be told of together.
        """
        assert guest_waits is None or count == 1, "who waits with the news must be the one that does the next job"
        self._name = name
        self._count = count
        self._post = post
        self._finished = finished
        self._guest_waits = guest_waits
        self._jobs: queue.SimpleQueue[tuple[J, ...] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[J] = queue.SimpleQueue()
        self._posted = False
        self._threads: list[threading.Thread] = []
        self.under_way = 0
        """Jobs that have not come back."""

    def submit(self, *jobs: J) -> None:
        """Have the jobs done, one after the other by one thread, and told together."""
        if len(self._threads) <= self.under_way and len(self._threads) < self._count:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self.under_way += len(jobs)
        self._jobs.put(jobs)

    def _work(self) -> None:
        get, put = self._jobs.get, self._done.put
        while (jobs := get()) is not None:
            began = time.perf_counter_ns()
            for job in jobs:
                job.run()
                put(job)
            del job, jobs  # their views are guest RAM
            if self._may_wait(time.perf_counter_ns() - began):
                continue
            # The other order in `_collect`: whatever is put after this was seen true is found there.
            if not self._posted:
                self._posted = True
                self._post(self._collect)

    def _may_wait(self, took_ns: int) -> bool:
        """Whether the news of what is done is better told with what is done next."""
        if self._guest_waits is None or self._jobs.empty() or took_ns > QUICK_NS:
            return False
        return 2 * self._done.qsize() < min(self.under_way, 2 * TOGETHER_MAX) and not self._guest_waits()

    def _collect(self) -> None:
        self._posted = False
        jobs = []
        while not self._done.empty():
            jobs.append(self._done.get_nowait())
        if jobs:
            self.under_way -= len(jobs)
            self._finished(jobs)

    def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Wait until every job has come back. Raises StateError when storage does not answer in time."""
        end = time.monotonic() + seconds
        while self.under_way:
            try:
                job = self._done.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty:
                raise StateError(
                    f"{self._name}: {self.under_way} requests to its storage have had no answer for {seconds:.0f} s.",
                    "Look after the storage; the machine continues meanwhile.",
                ) from None
            self.under_way -= 1
            self._finished([job])

    def close(self) -> None:
        """End the threads once they have nothing to do; idempotent."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads.clear()
