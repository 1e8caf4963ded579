"""The parts of a teleport that are arithmetic: convergence, clock offset, comparison, progress."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.teleport.check import Blocker, compare_descriptions, compare_payloads, show
from vmf.teleport.clocks import ClockOffset, clock_name
from vmf.teleport.converge import FIXED_NS, THROTTLE_STEPS, Convergence, Decision, RoundStats
from vmf.teleport.progress import Reporter
from vmf.teleport.protocol.runs import unpack_runs
from vmf.teleport.ram import RamSender

MS = 1_000_000
MIB = 1 << 20


def simulate(bandwidth: float, dirty_rate: float, ram: float, goal_ms: int, working_set: float, rounds: int = 200):
    """A guest that dirties at a rate, but never more than its working set per round."""
    judge = Convergence(goal_ms * MS)
    to_send = ram
    for number in range(1, rounds + 1):
        seconds = to_send / bandwidth + 0.001
        dirty = min(working_set, dirty_rate * (1 - judge.throttle) * seconds)
        stats = RoundStats(int(to_send), int(seconds * 1e9), int(dirty), int(seconds * 1e9))
        if judge.judge(stats) is Decision.STOP:
            return judge, number
        to_send = dirty
    return judge, None


def test_an_idle_guest_stops_after_one_round():
    judge, rounds = simulate(1e9, 0, 256 * MIB, 250, 256 * MIB)
    assert rounds == 1
    assert judge.throttle == 0


def test_a_moderate_guest_gets_a_downtime_far_below_the_goal():
    judge, rounds = simulate(1e9, 64 * MIB, 256 * MIB, 250, 256 * MIB)
    assert rounds is not None
    assert rounds <= 6
    assert judge.expected_downtime_ns < 20 * MS
    assert judge.throttle == 0


def test_a_small_hot_working_set_is_not_chased():
    """It is always dirty, but small enough for the goal: no endless rounds, no throttle."""
    judge, rounds = simulate(1e9, 4e9, 256 * MIB, 250, 32 * MIB)
    assert rounds is not None
    assert rounds <= 4
    assert judge.throttle == 0


def test_a_guest_faster_than_the_link_is_throttled_until_it_converges():
    judge, rounds = simulate(100e6, 300e6, 1024 * MIB, 250, 1024 * MIB)
    assert rounds is not None
    assert judge.throttle >= 0.6
    assert judge.converging


def test_an_impossible_goal_does_not_go_on_for_ever():
    _, rounds = simulate(1e9, 0, 64 * MIB, 0, 64 * MIB)
    assert rounds is not None


def test_throttle_ends_at_its_last_step():
    judge, rounds = simulate(1e6, 1e12, 64 * MIB, 1, 64 * MIB)
    assert rounds is None
    assert judge.throttle == THROTTLE_STEPS[-1] == 0.99
    assert judge.converging is False
    assert judge.eta_ns(MIB) is None


@given(
    st.integers(1, 1 << 36), st.floats(1e5, 1e11), st.integers(0, 1 << 36), st.integers(0, 5000)
)  # fmt: skip
def test_it_stops_only_within_the_goal(sent, bandwidth, dirty, goal_ms):
    judge = Convergence(goal_ms * MS)
    decision = judge.judge(RoundStats(sent, max(1, int(sent / bandwidth * 1e9)), dirty, MS))
    if decision is Decision.STOP:
        assert judge.expect(dirty) <= max(goal_ms * MS, FIXED_NS + 2 * MS)


@given(
    st.integers(-(10**15), 10**15), st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1)
)  # fmt: skip
def test_the_clock_error_is_a_bound(offset, trips):
    clocks = ClockOffset()
    now = 10**16
    for there, back in trips:
        clocks.add(now, now + there + offset, now + there + back)
        now += there + back + 1000
    estimate, error = clocks.best(now)
    assert abs(estimate - offset) <= error + 1


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1))
def test_a_shared_clock_is_not_estimated(trips):
    clocks = ClockOffset()
    clocks.shared = True
    now = 10**16
    for there, back in trips:
        clocks.add(now, now + there, now + there + back)
        now += there + back + 1000
    assert clocks.best(now) == (0, 0)


def test_a_clock_that_only_claims_to_be_shared_is_estimated():
    clocks = ClockOffset()
    clocks.shared = True
    clocks.add(10**16, 10**16 + 5 * MS, 10**16 + MS)  # answered after the answer had come
    offset, error = clocks.best(10**16)
    assert abs(offset - 5 * MS) <= error + 1


def test_a_clock_has_one_name_a_teleport():
    assert clock_name(b"1" * 16) == clock_name(b"1" * 16) != clock_name(b"2" * 16)
    assert len(clock_name(b"1" * 16)) <= 64


def test_an_old_clock_sample_loses_to_a_fresh_one():
    clocks = ClockOffset()
    clocks.add(0, 500, 10)
    clocks.add(10**12, 10**12 + 10**6, 10**12 + 2000)
    assert clocks.best(10**12 + 3000)[0] == 10**6 - 1000
    assert ClockOffset().best(5) == (0, 0)


def test_equal_descriptions_have_no_blocker():
    assert compare_descriptions("m", {"a": [1, (2, 3)], "b": {"c": True}}, {"b": {"c": True}, "a": (1, [2, 3])}) == []


def test_every_difference_has_a_name_and_a_remedy():
    source = {"memory_mib": 4096, "cpu": {"backend": "kvm", "x": 1}, "only": "here", "flag": True}
    target = {"memory_mib": 2048, "cpu": {"backend": "unicorn", "x": 1}, "flag": 1, "extra": None}
    found = compare_descriptions("web", source, target)
    assert [blocker.field for blocker in found] == ["memory", "CPU backend", "only", "flag", "extra"]
    assert found[0] == Blocker(
        "memory", "4096 MiB", "2048 MiB", "Set the target's memory with `vmf modifyvm web --memory 4096`."
    )
    assert (found[2].source, found[2].target) == ("here", "(missing)")
    assert all(blocker.remedy for blocker in found)


def test_a_hook_compares_its_field_its_own_way():
    found = compare_descriptions(
        "m", {"cpu": {"cpuid": [1]}}, {"cpu": {"cpuid": [2]}},
        {"cpu.cpuid": lambda a, b: [Blocker("cpu feature avx2", "present", "missing", f"{a} {b}")]},
    )  # fmt: skip
    assert [blocker.remedy for blocker in found] == ["[1] [2]"]


def test_remote_values_are_not_interpreted():
    (found,) = compare_descriptions("m", {"memory": "{name}\x1b[31m{0.__class__}"}, {"memory": 1})
    assert "\x1b" not in str(found)
    assert "{0.__class__}" in found.remedy


def test_show_is_short():
    assert len(show("x" * 1000)) == 80
    assert show([True, None, b"\x01"]) == "on, none, 01"


def test_payloads():
    assert compare_payloads((), (("a", 1, 0),)) == []
    assert compare_payloads((("a", 1, 0),), (("a", 1, 0),)) == []
    found = compare_payloads((("a", 2, 0), ("b", 1, 1)), (("a", 1, 0),))
    assert [(b.field, b.source, b.target) for b in found] == [
        ("state of a", "version 2", "version 1"),
        ("state of b #1", "version 1", "(missing)"),
    ]


def test_a_failing_listener_is_set_aside():
    calls = []

    def listener(event) -> None:
        calls.append(event)
        raise RuntimeError("broken watcher")

    reporter = Reporter("source", listener)
    reporter.phase("hello")
    reporter.phase("check")
    assert len(calls) == 1


class _Wire:
    """Counts what a `RamSender` says."""

    def __init__(self) -> None:
        self.pages: list[list[list[int]]] = []
        self.zeros: list[list[list[int]]] = []

    def send_pages(self, _round, runs, _base, ranges) -> int:
        self.pages.append(runs.tolist())
        return int(ranges[:, 1].sum())

    def send(self, message) -> None:
        self.zeros.append(unpack_runs(message.runs).tolist())


def test_only_zeros_in_the_place_of_something_are_mentioned():
    """A page that was zero whenever it was sent costs nothing, in any round."""
    memory = GuestMemory(64 * PAGE_SIZE, huge_pages=False)
    wire = _Wire()
    sender = RamSender(memory, wire, SimpleNamespace(needs_staging=False))
    memory.buffer[: 8 * PAGE_SIZE] = bytes(8 * PAGE_SIZE)
    memory.buffer[2 * PAGE_SIZE] = 1
    sender.send_round(1, np.array([[0, 8]], dtype=np.uint64), stopped=False)
    assert (wire.pages, wire.zeros) == ([[[2, 3]]], [])
    memory.buffer[2 * PAGE_SIZE] = 0
    sender.send_round(2, np.array([[0, 8]], dtype=np.uint64), stopped=False)
    assert (wire.pages, wire.zeros) == ([[[2, 3]]], [[[2, 3]]])
    sender.send_round(3, np.array([[0, 8]], dtype=np.uint64), stopped=True)
    assert (wire.pages, wire.zeros) == ([[[2, 3]]], [[[2, 3]]])
    memory.close()


def test_a_message_is_told_once():
    heard = []
    reporter = Reporter("source", lambda event: heard.append((event.phase, event.message)))
    reporter.phase("hello", message="the certificate expires in 3 days")
    reporter.phase("offer")
    reporter.update(message="told with the next event")  # too early to be told by itself
    reporter.phase("check")
    reporter.phase("precopy")
    assert heard == [
        ("hello", "the certificate expires in 3 days"),
        ("offer", ""),
        ("check", "told with the next event"),
        ("precopy", ""),
    ]
