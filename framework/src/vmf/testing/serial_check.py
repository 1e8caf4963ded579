"""Judges what a self-checking guest printed on its serial line, on all its hosts together.

Both guests (`guest/selfcheck.c` and the bare-metal `guest/demo.S`) print lines "tick N C" in which C is a checksum
over all numbers so far: a lost, repeated or altered byte leaves a line that is not the next one. `check` takes the
concatenated output of the hosts, in the order in which the machine ran on them, and gives everything that is wrong.
"""

from __future__ import annotations

import re

from attrs import field, frozen

_TICK = re.compile(r"tick (\d+) ([0-9a-f]{8})")
_STOPPED_IN_A_TIMER = re.compile(r"\[ *\d+\.\d+\] hrtimer: interrupt took \d+ ns")
"""Linux says so once, when a handover (or a busy host) happens to stop it inside its timer interrupt. It is right."""
_CLOCK = re.compile(r"clock (\d+) (\d+)")
_STATUS = re.compile(r"selfcheck: (ok|FAILED) rounds=(\d+) least=(\d+) errors=(\d+)")
_KERNEL = re.compile(
    r"soft lockup|hard LOCKUP|clocksource.*unstable|Marking clocksource|BUG:|WARNING: CPU|Call Trace|rcu.*stall|"
    r"Oops|Kernel panic|general protection|segfault|hung_task|blocked for more than|invalid opcode|spurious|"
    r"TSC .*unstable|stuck for|Out of memory|sched: RT throttling|Corrupt"
)


@frozen
class SerialReport:
    """What was found. Every list holds lines for people; all are empty for a good run.

    Attributes:
        ticks: good tick lines.
        rounds: rounds of all workers by the last status line; 0 when there was none.
        lost: gaps, cut and altered lines.
        repeated: lines that came again.
        mismatches: what the guest itself found wrong, and failed status lines.
        backward: clocks that went back.
        complaints: of the guest's kernel.
        clocks: (CLOCK_MONOTONIC, CLOCK_REALTIME) in nanoseconds, as printed.
    """

    ticks: int = 0
    rounds: int = 0
    lost: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()
    clocks: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def problems(self) -> tuple[str, ...]:
        """All that is wrong, each with its kind."""
        return tuple(
            f"{kind}: {line}"
            for kind in ("lost", "repeated", "mismatches", "backward", "complaints")
            for line in getattr(self, kind)
        )

    @property
    def ok(self) -> bool:
        """Something was printed, and nothing is wrong."""
        return self.ticks > 0 and not self.problems


def next_checksum(checksum: int, tick: int) -> int:
    """The checksum after `tick`."""
    return (checksum * 1664525 + 1013904223 + tick) & 0xFFFF_FFFF


def check(output: bytes, whole: bool = True) -> SerialReport:
    """Judge the output; everything before the first line "tick 1 ..." is looked at for kernel complaints only.

    The last line may be cut. With `whole` false the output may begin at any tick (its checksum is then believed).
    """
    lines = output.decode("latin-1").replace("\r", "").split("\n")[:-1]
    lost: list[str] = []
    repeated: list[str] = []
    mismatches: list[str] = []
    backward: list[str] = []
    complaints: list[str] = []
    clocks: list[tuple[int, int]] = []
    number = checksum = ticks = rounds = 0
    begun = False
    for line in lines:
        if _KERNEL.search(line):
            complaints.append(line)
        elif match := _TICK.fullmatch(line):
            tick, value = int(match[1]), int(match[2], 16)
            if not begun:
                begun = True
                if whole and tick != 1:
                    lost.append(f"the first tick is {tick}")
                if whole and tick == 1 and value != next_checksum(0, 1):
                    lost.append(f"tick 1 has checksum {value:08x}")
            elif tick <= number:
                repeated.append(f"tick {tick} after tick {number}")
            elif tick > number + 1:
                lost.append(f"ticks {number + 1} to {tick - 1}")
            elif value != next_checksum(checksum, tick):
                lost.append(f"tick {tick} has checksum {value:08x} instead of {next_checksum(checksum, tick):08x}")
            number, checksum, ticks = tick, value, ticks + 1
        elif match := _CLOCK.fullmatch(line):
            clock = int(match[1]), int(match[2])
            for index, name in enumerate(("CLOCK_MONOTONIC", "CLOCK_REALTIME")):
                if clocks and clock[index] < clocks[-1][index]:
                    backward.append(f"{name} by {clocks[-1][index] - clock[index]} ns")
            clocks.append(clock)
        elif match := _STATUS.fullmatch(line):
            if int(match[2]) < rounds:
                mismatches.append(f"rounds went back: {line}")
            rounds = int(match[2])
            if match[1] != "ok" or match[4] != "0":
                mismatches.append(line)
        elif "went back" in line and "MISMATCH" in line:
            backward.append(line)
        elif "MISMATCH" in line:
            mismatches.append(line)
        elif begun and not line.startswith("echo: ") and not _STOPPED_IN_A_TIMER.fullmatch(line):
            lost.append(f"not a line of the guest: {line!r}")
    return SerialReport(
        ticks,
        rounds,
        tuple(lost),
        tuple(repeated),
        tuple(mismatches),
        tuple(backward),
        tuple(complaints),
        tuple(clocks),
    )
