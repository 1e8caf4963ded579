"""The judge of serial output must see every lost, repeated and altered byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.testing.serial_check import check, next_checksum


def output(ticks: int, crlf: bool = True) -> bytes:
    """What a healthy guest prints."""
    checksum = 0
    lines = ["[    0.000000] Linux version 6.1", "vmf: init is running"]
    for tick in range(1, ticks + 1):
        checksum = next_checksum(checksum, tick)
        lines.append(f"tick {tick} {checksum:08x}")
        if tick % 4 == 0:
            lines.append(f"clock {tick * 10**9} {10**18 + tick * 10**9}")
            lines.append(f"selfcheck: ok rounds={tick * 10} least={tick} errors=0")
    return ("\r\n" if crlf else "\n").join([*lines, ""]).encode()


GOOD = output(40)
FIRST = GOOD.index(b"tick 1 ")
LAST = GOOD.rindex(b"tick 40")


@pytest.mark.parametrize("crlf", [True, False])
def test_a_good_run_is_good(crlf: bool) -> None:
    report = check(output(40, crlf))
    assert report.ok
    assert report.problems == ()
    assert report.ticks == 40
    assert report.rounds == 400
    assert len(report.clocks) == 10
    assert check(GOOD + b"tick 41 00").ok, "the last line may be cut"


def test_silence_is_not_good() -> None:
    assert not check(b"").ok
    assert not check(b"vmf: init is running\r\n").ok


def ignorable(removed: bytes) -> bool:
    return removed.strip(b"\r") == b""


@given(st.integers(FIRST, LAST - 1), st.integers(1, 60))
def test_lost_bytes_are_seen(at: int, number: int) -> None:
    number = min(number, LAST - at)
    removed = GOOD[at : at + number]
    report = check(GOOD[:at] + GOOD[at + number :])
    lines = set(GOOD.split(b"\r\n"))
    if ignorable(removed):
        return  # a carriage return carries nothing
    after = [line for line in (GOOD[:at] + GOOD[at + number :]).split(b"\r\n") if line not in lines]
    ticks_gone = [line for line in lines if line.startswith(b"tick") and line not in GOOD[:at] + GOOD[at + number :]]
    if not after and not ticks_gone:
        return  # whole clock or status lines are gone, which are not numbered
    if after and all(line.startswith((b"clock ", b"selfcheck: ok")) for line in after) and not ticks_gone:
        return  # digits inside a clock or status line
    assert not report.ok


@given(st.integers(FIRST, LAST - 1), st.integers(1, 80))
def test_repeated_ticks_are_seen(at: int, number: int) -> None:
    number = min(number, LAST - at)
    again = GOOD[at : at + number]
    if b"tick" not in again:
        return
    assert not check(GOOD[: at + number] + again + GOOD[at + number :]).ok


@given(st.integers(1, 40), st.integers(0, 14), st.binary(min_size=1, max_size=1))
def test_altered_tick_lines_are_seen(tick: int, offset: int, byte: bytes) -> None:
    start = GOOD.index(b"tick %d " % tick)
    length = GOOD.index(b"\r", start) - start
    at = start + offset % length
    changed = GOOD[:at] + byte + GOOD[at + 1 :]
    if changed.replace(b"\r", b"") != GOOD.replace(b"\r", b""):
        assert not check(changed).ok


def inserted(line: bytes) -> bytes:
    return GOOD.replace(b"tick 20 ", line + b"\r\ntick 20 ")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"MISMATCH x87 1 instead of 2", "mismatches"),
        (b"selfcheck: FAILED rounds=900 least=1 errors=2", "mismatches"),
        (b"MISMATCH clocks CLOCK_MONOTONIC went back by 12 ns", "backward"),
        (b"clock 1 2", "backward"),
        (b"[   33.2] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!", "complaints"),
        (b"[   33.2] clocksource: timekeeping watchdog: Marking clocksource 'tsc' as unstable", "complaints"),
        (b"[   33.2] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks", "complaints"),
        (b"[   33.2] Call Trace:", "complaints"),
        (b"ick 19 1234", "lost"),
    ],
)
def test_each_kind_of_trouble(line: bytes, kind: str) -> None:
    report = check(inserted(line))
    assert getattr(report, kind)
    assert not report.ok
    assert any(problem.startswith(kind) for problem in report.problems)


def test_echoed_input_is_no_trouble() -> None:
    assert check(inserted(b"echo: hello")).ok


def test_a_part_of_the_output() -> None:
    tail = GOOD[GOOD.index(b"tick 17 ") :]
    assert not check(tail).ok
    assert check(tail, whole=False).ok
