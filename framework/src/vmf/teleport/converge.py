"""When to stop the guest for the last round, and what to do when that never comes. Pure arithmetic, no clock.

Pre-copy sends all pages, then again and again those that the guest dirtied meanwhile. It converges when the link is
faster than the guest dirties pages: each round is then shorter than the one before. The guest is stopped when what
is left can be sent within the downtime goal. Reaching the goal is not the end of it: as long as another round makes
the expected downtime clearly smaller and costs little time, it is worth it.

If the rounds stop shrinking above the goal, the guest is throttled, step by step, up to 99 %.
"""

from __future__ import annotations

import enum

from attrs import define, field, frozen

THROTTLE_STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
DEFAULT_BANDWIDTH = 100e6
"""Bytes per second, assumed until enough was sent to know better."""
MIN_SAMPLE_BYTES = 1 << 20
"""Rounds below this measure latency, not bandwidth."""
FIXED_NS = 5_000_000
"""What a stop costs without any page: stop, save, restore, three messages."""
WORTH_IT = 0.75
"""Go on below the goal while a round shrinks the expected downtime at least to this fraction."""
GOOD_ENOUGH_NS = 2_000_000
"""A last round that takes no longer than this is not improved on."""
MAX_EXTRA_ROUNDS = 6
"""Rounds spent on improving a downtime that is already within the goal."""
STALLED = 0.9
"""A round that does not shrink below this fraction of the one before makes no progress."""


class Decision(enum.Enum):
    NEXT_ROUND = "next-round"
    STOP = "stop"


@frozen
class RoundStats:
    """One finished round.

    Attributes:
        sent_bytes: raw data that the target confirmed.
        sent_ns: time from the first byte to the confirmation.
        dirty_bytes: what the guest dirtied since the look at the dirty pages before this one.
        dirty_ns: time between these two looks.
    """

    sent_bytes: int
    sent_ns: int
    dirty_bytes: int
    dirty_ns: int


@define
class Convergence:
    """Judges after each round.

    Attributes:
        max_downtime_ns: the goal.
        bandwidth: bytes per second as measured (recent rounds weigh more), None before anything was.
        dirty_rate: bytes per second in the last round.
        expected_downtime_ns: were the guest stopped now.
        throttle: fraction to apply from now on.
        converging: None while it is too early to say.
    """

    max_downtime_ns: int
    bandwidth: float | None = None
    dirty_rate: float | None = None
    expected_downtime_ns: int | None = None
    throttle: float = 0.0
    converging: bool | None = None
    _previous_dirty: int | None = None
    _previous_expected: int | None = None
    _stalls: int = 0
    _extra: int = 0
    _step: int = field(default=0)

    def expect(self, dirty_bytes: int) -> int:
        """Downtime in ns if the guest stopped with so much left to send."""
        return FIXED_NS + int(dirty_bytes / (self.bandwidth or DEFAULT_BANDWIDTH) * 1e9)

    def eta_ns(self, remaining_bytes: int) -> int | None:
        """Time until the teleport is done, None when that is not in sight.

        With rate r of dirtying and bandwidth b the rounds are a geometric series of ratio r/b.
        """
        if self.bandwidth is None or self.bandwidth <= 0:
            return None
        ratio = (self.dirty_rate or 0.0) / self.bandwidth
        if ratio >= 0.95:
            return None
        return int(remaining_bytes / self.bandwidth / (1 - ratio) * 1e9) + FIXED_NS

    def judge(self, stats: RoundStats) -> Decision:
        """What to do after this round; sets the attributes."""
        if stats.sent_bytes >= MIN_SAMPLE_BYTES and stats.sent_ns > 0:
            rate = stats.sent_bytes / stats.sent_ns * 1e9
            self.bandwidth = rate if self.bandwidth is None else 0.3 * self.bandwidth + 0.7 * rate
        self.dirty_rate = stats.dirty_bytes / stats.dirty_ns * 1e9 if stats.dirty_ns > 0 else 0.0
        expected = self.expected_downtime_ns = self.expect(stats.dirty_bytes)
        previous_dirty, self._previous_dirty = self._previous_dirty, stats.dirty_bytes
        previous_expected, self._previous_expected = self._previous_expected, expected

        # The fixed part is an estimate that no further round improves: a goal below it must not go on for ever.
        rest = expected - FIXED_NS
        if rest <= max(self.max_downtime_ns - FIXED_NS, GOOD_ENOUGH_NS):
            self.converging = True
            shrinks = previous_expected is None or rest < WORTH_IT * (previous_expected - FIXED_NS)
            if rest <= GOOD_ENOUGH_NS or not shrinks or self._extra >= MAX_EXTRA_ROUNDS:
                return Decision.STOP
            self._extra += 1
            return Decision.NEXT_ROUND

        if previous_dirty is None or stats.dirty_bytes < STALLED * previous_dirty:
            # The first round says nothing: it took longest, so most was dirtied.
            self.converging = None if previous_dirty is None else True
            self._stalls = 0
            return Decision.NEXT_ROUND
        self.converging = False
        self._stalls += 1
        if self._stalls >= 2 and self._step < len(THROTTLE_STEPS) - 1:
            self._stalls = 0
            self._step += 1
            self.throttle = THROTTLE_STEPS[self._step]
        return Decision.NEXT_ROUND
