"""The states of a machine and the legal transitions between them: one table, in the words of the specification."""

from __future__ import annotations

import enum

from vmf.errors import InvalidStateError


class MachineState(enum.Enum):
    """A machine's life. The values are what `showvminfo` prints."""

    POWERED_OFF = "poweredoff"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    TELEPORTING_IN = "teleportingin"
    """Waiting for, or receiving, a teleport."""
    TELEPORTING = "teleporting"
    TELEPORTING_PAUSED = "teleportingpausedvm"
    TELEPORTED = "teleported"
    """It runs on another host now."""
    UNCERTAIN = "uncertain"
    """The handover was sent and not confirmed: stopped here until somebody says who owns the machine."""
    FAILED = "failed"
    """The CPU backend or a device could not go on; the state is kept for inspection."""


_S = MachineState

TRANSITIONS: dict[MachineState, frozenset[MachineState]] = {
    _S.POWERED_OFF: frozenset({_S.STARTING, _S.TELEPORTING_IN}),
    _S.STARTING: frozenset({_S.RUNNING, _S.POWERED_OFF}),
    _S.TELEPORTING_IN: frozenset({_S.RUNNING, _S.PAUSED, _S.POWERED_OFF}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.TELEPORTING, _S.STOPPING, _S.FAILED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.TELEPORTING_PAUSED, _S.STOPPING, _S.FAILED}),
    _S.TELEPORTING: frozenset({_S.RUNNING, _S.TELEPORTED, _S.UNCERTAIN, _S.STOPPING, _S.FAILED}),
    _S.TELEPORTING_PAUSED: frozenset({_S.PAUSED, _S.TELEPORTED, _S.UNCERTAIN, _S.STOPPING, _S.FAILED}),
    _S.UNCERTAIN: frozenset({_S.RUNNING, _S.PAUSED, _S.TELEPORTED, _S.STOPPING}),
    _S.TELEPORTED: frozenset({_S.STOPPING}),
    _S.FAILED: frozenset({_S.RUNNING, _S.STOPPING, _S.TELEPORTED, _S.UNCERTAIN}),  # it failed after it was handed over
    _S.STOPPING: frozenset({_S.POWERED_OFF}),
}

RUNNABLE = frozenset({_S.RUNNING, _S.TELEPORTING})
"""States in which the vCPU executes."""

MAY_FAIL = RUNNABLE | {_S.PAUSED, _S.TELEPORTING_PAUSED}
"""States in which a device can fail: also what it finishes while the guest is paused runs on the vCPU thread."""


def check_transition(name: str, old: MachineState, new: MachineState) -> None:
    """Raise InvalidStateError unless `old` to `new` is in the table."""
    if new not in TRANSITIONS[old]:
        raise InvalidStateError(
            f"machine {name} is {old.value}; it cannot become {new.value} from there.",
            f"See `vmf showvminfo {name}`.",
        )
