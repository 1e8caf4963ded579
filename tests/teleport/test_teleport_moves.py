"""Whole teleports of fake machines: contents, downtime, throttling, checks."""

from __future__ import annotations

import numpy as np
import pytest

from vmf.errors import TeleportBlocked, TeleportError
from vmf.memory.guest import PAGE_SIZE
from vmf.teleport.check import Blocker
from vmf.teleport.progress import ProgressEvent
from vmf.teleport.protocol import SourceOutcome

MIB = 1 << 20


def contents(machine) -> bytes:
    return bytes(machine.memory.buffer)


def fill(machine, seed: int = 7, fraction: float = 0.5) -> None:
    """Random pages in that fraction of RAM, zero pages that were touched in some of the rest."""
    rng = np.random.default_rng(seed)
    words = np.frombuffer(machine.memory.buffer, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
    for page in range(machine.memory.pages):
        dice = rng.random()
        if dice < fraction:
            words[page] = rng.integers(0, 1 << 63, PAGE_SIZE // 8, dtype=np.uint64)
        elif dice < fraction + 0.2:
            words[page] = 0


def test_an_idle_machine_arrives_whole(pair):
    source, target = pair.machine("a"), pair.machine("a2")
    fill(source)
    before = contents(source)
    source.start()
    waiting = pair.wait(target)
    summary = pair.teleport(source, waiting)
    arrived = waiting.wait_done()
    assert not source.runs
    assert target.runs
    assert contents(target) == before
    assert summary.outcome is SourceOutcome.RUNS_THERE
    assert summary.teleport_id == arrived.teleport_id
    assert summary.bytes == arrived.bytes == summary.pages * PAGE_SIZE
    assert 0 < summary.downtime_ns < 250_000_000
    parts = summary.downtime
    total = parts.stop + parts.scan + parts.send + parts.save + parts.ready + parts.handover + parts.resume
    assert abs(total - summary.downtime_ns) < 1_000_000
    assert target.elapsed_ns is not None
    assert 0 < target.elapsed_ns <= summary.downtime_ns + summary.clock_error_ns
    assert source.log[-3:] == ["save", "mark_handed_over", "mark_teleported"]


def test_a_writing_guest_loses_nothing(pair):
    source, target = pair.machine("a", rate=3000), pair.machine("a2", rate=3000)
    fill(source)
    source.start()
    waiting = pair.wait(target)
    target.delay["resume"] = 0.0
    stopped = {}
    save = source.save

    def saving():
        stopped["contents"] = contents(source)
        return save()

    source.save = saving
    resume = target.resume

    def resuming(stopped_at_ns, running):
        stopped["arrived"] = contents(target)
        return resume(stopped_at_ns, running)

    target.resume = resuming
    summary = pair.teleport(source, waiting)
    waiting.wait_done()
    assert stopped["arrived"] == stopped["contents"]
    assert summary.rounds >= 1
    assert source.counter <= target.counter


def test_a_paused_machine_stays_paused_and_its_time_stands_still(pair):
    source, target = pair.machine("a"), pair.machine("a2")
    fill(source)
    waiting = pair.wait(target)
    summary = pair.teleport(source, waiting)
    waiting.wait_done()
    assert not source.runs
    assert not target.runs
    assert summary.downtime_ns == 0
    assert target.elapsed_ns == 0


def test_there_and_back_many_times(pair):
    here, there = pair.machine("a", rate=2000), pair.machine("b", rate=2000)
    fill(here)
    here.start()
    for _ in range(6):
        there.discard_arrival()
        waiting = pair.wait(there)
        pair.teleport(here, waiting)
        waiting.wait_done()
        assert there.runs
        here, there = there, here


def test_every_blocker_is_named_at_once_and_the_source_goes_on(pair):
    source, target = pair.machine("a", 8 * MIB), pair.machine("a2", 4 * MIB)
    target.description["devices"] = [["fake", 0], ["extra", 0]]
    target.blockers = [Blocker("backup", "-", "running", "Wait until it is done.")]
    source.start()
    waiting = pair.wait(target)
    with pytest.raises(TeleportBlocked) as caught:
        pair.teleport(source, waiting)
    fields = [blocker.field for blocker in caught.value.blockers]
    assert fields == ["memory", "devices", "backup"], "each difference once"
    assert "3 reasons" in str(caught.value)
    assert "vmf modifyvm a2 --memory 8" in str(caught.value)
    assert source.runs
    assert "stop" not in source.log
    waiting.wait_failure()
    assert waiting.waits


def test_what_the_target_notes_reaches_the_user_at_the_source(pair):
    source, target = pair.machine("a"), pair.machine("a2")
    target.said = ["It is another processor there.", "x" * 5000]
    waiting = pair.wait(target)
    summary = pair.teleport(source, waiting, check_only=True)
    assert summary.notes[0] == "It is another processor there."
    assert len(summary.notes[1]) == 1000
    assert summary.outcome is SourceOutcome.RUNS_HERE
    source.start()
    assert pair.teleport(source, waiting).notes == summary.notes
    waiting.wait_done()
    assert target.runs


def test_a_source_that_does_not_know_notes_gets_none(pair, monkeypatch):
    source, target = pair.machine("a"), pair.machine("a2")
    target.said = ["It is another processor there."]
    monkeypatch.setattr("vmf.teleport.protocol.messages.FEATURES", ("capabilities", "whereabouts"))
    source.start()
    waiting = pair.wait(target)
    assert pair.teleport(source, waiting).notes == ()
    waiting.wait_done()
    assert target.runs


def test_check_only_moves_nothing(pair):
    source, target = pair.machine("a"), pair.machine("a2")
    fill(source)
    source.start()
    waiting = pair.wait(target)
    summary = pair.teleport(source, waiting, check_only=True)
    assert summary.outcome is SourceOutcome.RUNS_HERE
    assert summary.bytes == 0
    assert source.runs
    # ... and the same target takes the machine afterwards.
    pair.teleport(source, waiting)
    waiting.wait_done()
    assert target.runs


def slow_link(channel, bytes_per_second: float) -> None:
    import time

    began = time.monotonic()

    def pace(sent: int) -> None:
        ahead = sent / bytes_per_second - (time.monotonic() - began)
        if ahead > 0:
            time.sleep(ahead)

    channel.on_send = pace


def test_a_guest_that_writes_faster_than_the_link_is_throttled(pair):
    source, target = pair.machine("a", 4 * MIB, rate=8000), pair.machine("a2", 4 * MIB)
    fill(source)
    source.start()
    waiting = pair.wait(target)
    channel = waiting.listener.connect()
    slow_link(channel, 4e6)  # an eighth of what the guest writes, so that it does on a busy host, too
    events: list[ProgressEvent] = []
    summary = pair.teleport(source, waiting, channel, progress=events.append, max_downtime_ms=50, timeout_s=60)
    waiting.wait_done()
    assert summary.throttle > 0
    assert any(event.converging is False for event in events)
    assert target.runs


def test_the_time_limit_ends_a_teleport_that_does_not_converge(pair):
    source, target = pair.machine("a", 4 * MIB, rate=8000), pair.machine("a2", 4 * MIB)
    fill(source)
    source.start()
    waiting = pair.wait(target)
    channel = waiting.listener.connect()
    slow_link(channel, 5e6)
    with pytest.raises(TeleportError, match=r"within the 1 s allowed.*--timeout"):
        pair.teleport(source, waiting, channel, max_downtime_ms=10, timeout_s=1)
    assert source.runs
    assert source.throttle == 0
    waiting.wait_failure()
    assert waiting.waits
    assert not target.memory.touched_ranges().size
