"""Jobs that come back together: only while the guest is busy, and never so that it waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from vmf_device_virtio import iothreads
from vmf_device_virtio.iothreads import IoThreads


class Job:
    """Says that it has begun, and ends when it is let."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def run(self) -> None:
        self.begun.set()
        assert self.go.wait(30)


class Side:
    """The vCPU thread's side."""

    def __init__(self) -> None:
        self.waits = False
        self.posts: queue.Queue[Callable[[], None]] = queue.Queue()
        self.told: list[list[Job]] = []
        self.threads: IoThreads[Job] = IoThreads("test", 1, self.posts.put, self.told.append, lambda: self.waits)

    def submit(self, count: int) -> list[Job]:
        jobs = [Job() for _ in range(count)]
        for job in jobs:
            self.threads.submit(job)
        return jobs

    def post(self) -> None:
        """Run what is posted next."""
        self.posts.get(timeout=30)()


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    monkeypatch.setattr(iothreads, "QUICK_NS", 60_000_000_000)  # whatever the test's machine is busy with
    made = Side()
    yield made
    made.threads.drain(30)
    made.threads.close()


def finish(job: Job, following: Job) -> None:
    """The job is done, and its thread is at the one behind it."""
    job.go.set()
    assert following.begun.wait(30)


def test_half_of_them_are_told_together_to_a_busy_guest(side: Side) -> None:
    jobs = side.submit(4)
    finish(jobs[0], jobs[1])
    assert side.posts.empty(), "a busy guest is not interrupted for one of four"
    finish(jobs[1], jobs[2])
    side.post()
    assert side.told == [jobs[:2]]
    jobs[2].go.set()
    jobs[3].go.set()


@pytest.mark.parametrize("why", ["the guest waits", "the job was slow"])
def test_it_is_told_at_once(side: Side, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """To a guest that has nothing to do; and when the next job, slow as well, would be waited for."""
    side.waits = why == "the guest waits"
    if why == "the job was slow":
        monkeypatch.setattr(iothreads, "QUICK_NS", 0)
    jobs = side.submit(4)
    finish(jobs[0], jobs[1])
    side.post()
    assert side.told == [jobs[:1]]
    for job in jobs:
        job.go.set()


def test_the_last_one_is_told_at_once(side: Side) -> None:
    (job,) = side.submit(1)
    job.go.set()
    side.post()
    assert side.told == [[job]]


def test_of_many_at_most_some_are_held_back(side: Side) -> None:
    jobs = side.submit(100)
    for n in range(iothreads.TOGETHER_MAX):
        assert side.posts.empty()
        finish(jobs[n], jobs[n + 1])
    side.post()
    assert side.told == [jobs[: iothreads.TOGETHER_MAX]]
    for job in jobs:
        job.go.set()


def test_drain_brings_back_what_was_held_back(side: Side) -> None:
    jobs = side.submit(4)
    finish(jobs[0], jobs[1])
    for job in jobs:
        job.go.set()
    side.threads.drain(30)
    assert sorted(id(job) for told in side.told for job in told) == sorted(map(id, jobs))
    assert side.threads.under_way == 0
