"""Who has the machine: the decisions of a handover, without I/O.

`states.TABLE` says which message may follow which. This module says what each side *does* with the machine at which
point, in which order it does it, and what it knows when it is interrupted anywhere, by a lost message, by a failing
disk or by its own death. `vmf.teleport.custodian` carries the deeds out; tests explore every interleaving of both
sides with the tables below, not with a model of them.

Theory of operation. Each state has at most one *deed*, done on entering it; its end comes back as DONE or FAILED. So
"interrupted" can only mean: before the deed, or after it. What a deed leaves behind survives the process: a *note*
(a small file for each teleport), the storage lease, bytes on the wire. After a death only notes and lease are left, and
`recovered_source` and `recovered_target` say what they mean.

What makes two running machines impossible:

1. The source notes "handed over" before HANDOVER leaves; from that note on it runs the machine only after RESUME.
2. The target notes "promised" before it takes any RAM, so it knows every teleport for which READY was said.
3. Asked for a teleport (`TargetEvent.ASKED`), the target says NEVER only together with forgetting it: the same step
   voids the session, and a HANDOVER that comes later finds nobody. So NEVER is final, and only NEVER (or the lease)
   permits RESUME.
4. Who opens the media has taken the lease, which only one side can (`Deed.TAKE_LEASE` fails for the other).

What makes a lost machine improbable: the source lets go of RAM only when the target said that it runs, or when a person
says so.

The lease. A machine whose writable media carry leases implements `vmf.teleport.seam.KeepsLeases`; for others both
deeds succeed at once. `vmf.storage.lease` has its rules, `vmf.machine.storage` the steps of both deeds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from attrs import frozen

from vmf.teleport.protocol import messages as m


class Deed(enum.Enum):
    """What a side does. The value says it to people."""

    # Source.
    NOTE_OFFERED = "note that a teleport begins"
    STOP_GUEST = "stop the guest"
    NOTE_HANDED_OVER = "note that the machine is handed over"
    PASS_LEASE = "flush and close the media, pass their lease on"
    SEND_HANDOVER = "send HANDOVER"
    NOTE_GONE = "note that the machine is elsewhere"
    ERASE_NOTE = "erase the note"
    # Target.
    NOTE_PROMISED = "note the teleport that is promised"
    RESTORE = "restore the machine"
    SEND_READY = "send READY"
    NOTE_TAKEN = "note that the machine is taken over"
    SEND_RUNNING = "send RUNNING"
    DISCARD = "discard what arrived"
    # Both.
    TAKE_LEASE = "take the lease of the media and open them"
    RUN_GUEST = "let the guest run (or stay paused, as its user wanted)"


class Note(enum.Enum):
    """What is written down of one teleport, at either side."""

    NONE = "none"
    OFFERED = "offered"
    """Source: under way, not handed over."""
    HANDED_OVER = "handed-over"
    """Source: HANDOVER may have been sent."""
    GONE = "gone"
    """Source: it runs at the target, or somebody decided that it shall not go on here."""
    PROMISED = "promised"
    """Target: may arrive, has not."""
    TAKEN = "taken"
    """Target: it arrived, and the guest may have run."""


class SourceCustody(enum.Enum):
    """How the source has the machine."""

    HOLDS = "holds"
    OFFERING = "offering"
    OFFERED = "offered"
    STOPPING = "stopping"
    STOPPED = "stopped"
    MARKING = "marking"
    PASSING = "passing"
    COMMITTED = "committed"
    UNCERTAIN = "uncertain"
    RETAKING = "retaking"
    RESUMING = "resuming"
    CLEARING = "clearing"
    LEAVING = "leaving"
    GONE = "gone"
    # Without a process.
    ORPHANED = "orphaned"
    """Its process died after the handover: RAM is lost here, and it may run there. It must not start by itself."""
    FORGETTING = "forgetting"
    FREE = "free"
    """Without a process and without a handover in doubt: it can be started."""


class SourceEvent(enum.Enum):
    DONE = "done"
    FAILED = "failed"
    BEGIN = "begin"
    """The check passed; RAM is about to go."""
    PAUSE = "pause"
    """The last round is due."""
    READY = "ready"
    """The target has everything and waits for one word."""
    RUNNING = "running"
    """The target says that it runs."""
    LOST = "lost"
    """The session ended: connection, cancel, error, anything."""
    RESUME = "resume"
    """It shall go on here; only after `may_resume`."""
    DISCARD = "discard"
    """It shall not go on here; only after `may_discard`."""


class TargetCustody(enum.Enum):
    """How the target has the machine."""

    WAITING = "waiting"
    PROMISING = "promising"
    PROMISED = "promised"
    RESTORING = "restoring"
    READYING = "readying"
    READY = "ready"
    TAKING = "taking"
    NOTING = "noting"
    STARTING = "starting"
    ANSWERING = "answering"
    TAKEN = "taken"
    """It runs here; the source may not know yet, so who asks is answered."""
    SETTLED = "settled"
    """It runs here, and the source knows."""
    BROKEN = "broken"
    """It was taken over, but cannot run: nobody else may have it, a person has to look."""
    VOID = "void"
    """Somebody was told that it never arrived; so it must not arrive any more."""
    DROPPING = "dropping"


class TargetEvent(enum.Enum):
    DONE = "done"
    FAILED = "failed"
    BEGIN = "begin"
    STATE = "state"
    HANDOVER = "handover"
    CONFIRMED = "confirmed"
    """DONE came: the source knows that it runs here."""
    LOST = "lost"
    ASKED = "asked"
    """Somebody asked for this teleport by its id."""


S, T, D = SourceCustody, TargetCustody, Deed
_SE, _TE = SourceEvent, TargetEvent

SOURCE: Mapping[tuple[SourceCustody, SourceEvent], SourceCustody] = {
    (S.HOLDS, _SE.BEGIN): S.OFFERING,
    (S.HOLDS, _SE.LOST): S.HOLDS,
    (S.OFFERING, _SE.DONE): S.OFFERED,
    (S.OFFERING, _SE.FAILED): S.CLEARING,
    (S.OFFERED, _SE.PAUSE): S.STOPPING,
    (S.OFFERED, _SE.LOST): S.CLEARING,
    (S.STOPPING, _SE.DONE): S.STOPPED,
    (S.STOPPING, _SE.FAILED): S.RESUMING,
    (S.STOPPED, _SE.READY): S.MARKING,
    (S.STOPPED, _SE.LOST): S.RESUMING,
    (S.MARKING, _SE.DONE): S.PASSING,
    (S.MARKING, _SE.FAILED): S.RESUMING,  # nothing was sent
    (S.PASSING, _SE.DONE): S.COMMITTED,
    (S.PASSING, _SE.FAILED): S.RETAKING,  # nothing was sent; but part of the lease may be passed
    (S.COMMITTED, _SE.DONE): S.COMMITTED,
    (S.COMMITTED, _SE.FAILED): S.UNCERTAIN,  # it may have left all the same
    (S.COMMITTED, _SE.RUNNING): S.LEAVING,
    (S.COMMITTED, _SE.LOST): S.UNCERTAIN,
    (S.UNCERTAIN, _SE.LOST): S.UNCERTAIN,
    (S.UNCERTAIN, _SE.RESUME): S.RETAKING,
    (S.UNCERTAIN, _SE.DISCARD): S.LEAVING,
    (S.RETAKING, _SE.DONE): S.RESUMING,
    (S.RETAKING, _SE.FAILED): S.UNCERTAIN,
    (S.RESUMING, _SE.DONE): S.CLEARING,
    (S.RESUMING, _SE.FAILED): S.CLEARING,  # ours all the same, and a person is told
    (S.CLEARING, _SE.DONE): S.HOLDS,
    (S.CLEARING, _SE.FAILED): S.HOLDS,
    (S.LEAVING, _SE.DONE): S.GONE,
    (S.LEAVING, _SE.FAILED): S.GONE,
    (S.GONE, _SE.LOST): S.GONE,
    (S.ORPHANED, _SE.DISCARD): S.FORGETTING,
    (S.FORGETTING, _SE.DONE): S.FREE,
    (S.FORGETTING, _SE.FAILED): S.ORPHANED,
}
"""(state, event) -> next state, at the source. Whatever is not here is a bug of the caller."""

SOURCE_DEEDS: Mapping[SourceCustody, Deed] = {
    S.OFFERING: D.NOTE_OFFERED,
    S.STOPPING: D.STOP_GUEST,
    S.MARKING: D.NOTE_HANDED_OVER,
    S.PASSING: D.PASS_LEASE,
    S.RETAKING: D.TAKE_LEASE,
    S.RESUMING: D.RUN_GUEST,
    S.CLEARING: D.ERASE_NOTE,
    S.LEAVING: D.NOTE_GONE,
    S.FORGETTING: D.NOTE_GONE,
}
"""What is done on entering a state. COMMITTED is entered twice, so its deed is in `source_step`."""

TARGET: Mapping[tuple[TargetCustody, TargetEvent], TargetCustody] = {
    (T.WAITING, _TE.BEGIN): T.PROMISING,
    (T.WAITING, _TE.LOST): T.WAITING,
    (T.PROMISING, _TE.DONE): T.PROMISED,
    (T.PROMISING, _TE.FAILED): T.DROPPING,
    (T.PROMISED, _TE.STATE): T.RESTORING,
    (T.PROMISED, _TE.LOST): T.DROPPING,
    (T.RESTORING, _TE.DONE): T.READYING,
    (T.RESTORING, _TE.FAILED): T.DROPPING,
    (T.READYING, _TE.DONE): T.READY,
    (T.READYING, _TE.FAILED): T.DROPPING,
    (T.READY, _TE.HANDOVER): T.TAKING,
    (T.READY, _TE.LOST): T.DROPPING,
    (T.TAKING, _TE.DONE): T.NOTING,
    (T.TAKING, _TE.FAILED): T.DROPPING,  # the lease went elsewhere: so did the machine
    (T.NOTING, _TE.DONE): T.STARTING,
    (T.NOTING, _TE.FAILED): T.STARTING,  # a full disk; the process itself remembers
    (T.STARTING, _TE.DONE): T.ANSWERING,
    (T.STARTING, _TE.FAILED): T.BROKEN,
    (T.ANSWERING, _TE.DONE): T.TAKEN,
    (T.ANSWERING, _TE.FAILED): T.TAKEN,
    (T.TAKEN, _TE.CONFIRMED): T.SETTLED,
    (T.TAKEN, _TE.LOST): T.TAKEN,
    (T.SETTLED, _TE.LOST): T.SETTLED,
    (T.BROKEN, _TE.LOST): T.BROKEN,
    # A voided session ends at its next event, whatever that is.
    (T.VOID, _TE.DONE): T.DROPPING,
    (T.VOID, _TE.FAILED): T.DROPPING,
    (T.VOID, _TE.STATE): T.DROPPING,
    (T.VOID, _TE.HANDOVER): T.DROPPING,
    (T.VOID, _TE.LOST): T.DROPPING,
    (T.DROPPING, _TE.DONE): T.WAITING,
    (T.DROPPING, _TE.FAILED): T.WAITING,
    # Asked at any moment, from another thread.
    (T.PROMISING, _TE.ASKED): T.VOID,
    (T.PROMISED, _TE.ASKED): T.VOID,
    (T.RESTORING, _TE.ASKED): T.VOID,
    (T.READYING, _TE.ASKED): T.VOID,
    (T.READY, _TE.ASKED): T.VOID,
    **{
        (state, _TE.ASKED): state
        for state in (
            T.WAITING, T.TAKING, T.NOTING, T.STARTING, T.ANSWERING, T.TAKEN, T.SETTLED, T.BROKEN, T.VOID, T.DROPPING,
        )
    },
}  # fmt: skip
"""(state, event) -> next state, at the target."""

TARGET_DEEDS: Mapping[TargetCustody, Deed] = {
    T.PROMISING: D.NOTE_PROMISED,
    T.RESTORING: D.RESTORE,
    T.READYING: D.SEND_READY,
    T.TAKING: D.TAKE_LEASE,
    T.NOTING: D.NOTE_TAKEN,
    T.STARTING: D.RUN_GUEST,
    T.ANSWERING: D.SEND_RUNNING,
    T.DROPPING: D.DISCARD,
}

SOURCE_SENDS: Mapping[type[m.Message], SourceCustody] = {
    m.Begin: S.OFFERED,
    m.Paused: S.STOPPED,
    m.State: S.STOPPED,
    m.Handover: S.COMMITTED,
    m.Done: S.GONE,
}
"""The state in which the source may send a message; others do not depend on it."""
TARGET_SENDS: Mapping[type[m.Message], TargetCustody] = {m.Ready: T.READYING, m.Running: T.ANSWERING}
SOURCE_HEARS: Mapping[type[m.Message], SourceEvent] = {m.Ready: _SE.READY, m.Running: _SE.RUNNING}
"""The event that a received message is."""
TARGET_HEARS: Mapping[type[m.Message], TargetEvent] = {
    m.Begin: _TE.BEGIN,
    m.State: _TE.STATE,
    m.Handover: _TE.HANDOVER,
    m.Done: _TE.CONFIRMED,
}

SOURCE_OWNS = frozenset({
    S.HOLDS, S.OFFERING, S.OFFERED, S.STOPPING, S.STOPPED, S.MARKING, S.PASSING, S.RESUMING, S.CLEARING,
})  # fmt: skip
"""States in which the machine is the source's without doubt."""
TARGET_OWNS = frozenset({T.NOTING, T.STARTING, T.ANSWERING, T.TAKEN, T.SETTLED, T.BROKEN})
"""States in which the machine is the target's: the session is not undone any more, whatever happens to it."""


def source_step(state: SourceCustody, event: SourceEvent) -> tuple[SourceCustody, Deed | None]:
    """The next state and what to do in it. Raises KeyError for an event that cannot happen there."""
    to = SOURCE[state, event]
    if to is S.COMMITTED:
        return to, D.SEND_HANDOVER if state is S.PASSING else None
    return to, SOURCE_DEEDS.get(to)


def target_step(state: TargetCustody, event: TargetEvent) -> tuple[TargetCustody, Deed | None]:
    """The next state and what to do in it; ASKED never asks for a deed. Raises KeyError as `source_step`."""
    to = TARGET[state, event]
    return to, None if event is _TE.ASKED else TARGET_DEEDS.get(to)


# After a death


def recovered_source(note: Note, same_boot: bool = True) -> SourceCustody:
    """What a source without a process is, from the note that it left.

    `same_boot`: the host was not restarted since. NOTE_HANDED_OVER is not flushed to the disk (the guest stands still
    while it is written), so after a power failure the older note may be the one that is found.
    """
    in_doubt = note is Note.HANDED_OVER or (note is Note.OFFERED and not same_boot)
    return S.ORPHANED if in_doubt else S.FREE


def recovered_target(note: Note) -> Answer:
    """What a target that has no session of that teleport says, from the note that it finds.

    TAKEN: it did arrive, in a process that has ended. Whether it runs here now, the caller knows better.
    """
    return {Note.PROMISED: Answer.NEVER, Note.TAKEN: Answer.ENDED}.get(note, Answer.UNKNOWN)


# Asking, and resolving


class Answer(enum.Enum):
    """What is known at the target of a teleport that the source is uncertain about."""

    RUNS = "runs"
    """The machine was taken over and is there (running, or paused by its user)."""
    ENDED = "ended"
    """It was taken over and is not there any more: powered off, crashed, or teleported on."""
    NEVER = "never"
    """It was not taken over, and will not be."""
    UNKNOWN = "unknown"
    """Who answers there knows nothing of this teleport: another host or machine, perhaps."""
    UNREACHABLE = "unreachable"
    """Nobody answers."""


def answer(state: TargetCustody, note: Note) -> Answer:
    """The target's answer, in the state *after* ASKED."""
    if state in (T.WAITING, T.VOID, T.DROPPING):
        # WAITING: no session; the note is of a session before, or of a process before. TAKING that failed never ran.
        return Answer.NEVER if state is not T.WAITING else recovered_target(note)
    return Answer.ENDED if state is T.BROKEN else Answer.RUNS


@frozen
class Verdict:
    """Whether something may be done without force, and what a person should know either way.

    Attributes:
        allowed: without force.
        why: one sentence.
        risk: what may happen when it is forced; "" when nothing can.
    """

    allowed: bool
    why: str
    risk: str = ""


_TWICE = "the machine may run twice, and two guests that write to the same disks or speak with the same address \
destroy each other's work"
_BACK = "the guest goes back to the moment of the handover, and everything it did at the target is undone for it alone"
_LOSS = "the guest's memory as of the handover is lost for good"


def may_resume(answer: Answer, leased: bool = False) -> Verdict:
    """Whether an uncertain source may let the machine go on.

    `leased`: all its writable media carry leases, so that TAKE_LEASE decides where nobody can be asked.
    """
    if answer is Answer.NEVER:
        return Verdict(True, "The target says that the machine never arrived, and will not take it any more.")
    if answer is Answer.RUNS:
        return Verdict(False, "The target says that it has the machine.", _TWICE)
    if answer is Answer.ENDED:
        return Verdict(False, "The target says that the machine ran there, and that it ended or moved on.", _BACK)
    if leased:
        return Verdict(True, "The target cannot be asked; the lease of the media decides.")
    if answer is Answer.UNKNOWN:
        return Verdict(False, "Who answers at the target's address knows nothing of this teleport.", _TWICE)
    return Verdict(False, "The target does not answer, so the machine may run there.", _TWICE)


def may_discard(answer: Answer, orphaned: bool = False) -> Verdict:
    """Whether the machine here may be given up. `orphaned`: its process has died, so its RAM is lost already."""
    if answer is Answer.RUNS:
        return Verdict(True, "The target says that it has the machine.")
    if orphaned:
        if answer in (Answer.NEVER, Answer.ENDED):
            return Verdict(True, "The target does not have the machine, and its memory here ended with its process.")
        return Verdict(False, "The target cannot be asked, so the machine may run there.", _TWICE)
    why = {
        Answer.NEVER: "The target says that the machine never arrived: here is the only copy.",
        Answer.ENDED: "The target says that the machine ended or moved on: here is the last copy of its memory.",
        Answer.UNKNOWN: "Who answers at the target's address knows nothing of this teleport.",
        Answer.UNREACHABLE: "The target does not answer, so here may be the only copy.",
    }[answer]
    return Verdict(False, why, _LOSS)


# For people


def render_outcomes() -> str:
    """What is known after an interrupted handover, and what may be done, as a Markdown table."""
    said = {
        Answer.RUNS: "it runs there",
        Answer.ENDED: "it ran there, and ended or moved on",
        Answer.NEVER: "it never arrived (and now never will)",
        Answer.UNKNOWN: "unknown teleport",
        Answer.UNREACHABLE: "(no answer)",
    }
    lines = [
        "| the target says | source alive: `resume` | source alive: `discard` | source's process died: `discard` |",
        "|---|---|---|---|",
    ]
    for each in Answer:
        verdicts = (may_resume(each), may_discard(each), may_discard(each, orphaned=True))
        lines.append(f"| {said[each]} | " + " | ".join("yes" if v.allowed else "only forced" for v in verdicts) + " |")
    return "\n".join(lines)


def render_custody() -> str:
    """Both tables as Markdown: what each side does, in order."""
    lines = ["| side | state | does | then | or, if it fails or the session is lost |", "|---|---|---|---|---|"]
    for state in S:
        ways = {event: to for (at, event), to in SOURCE.items() if at is state}
        deed = D.SEND_HANDOVER if state is S.COMMITTED else SOURCE_DEEDS.get(state)
        lines.append(_row("source", state.name, deed, {e.name: t.name for e, t in ways.items()}))
    for target in T:
        paths = {event: to for (at, event), to in TARGET.items() if at is target}
        lines.append(_row("target", target.name, TARGET_DEEDS.get(target), {e.name: t.name for e, t in paths.items()}))
    return "\n".join(lines)


def _row(side: str, state: str, deed: Deed | None, ways: Mapping[str, str]) -> str:
    bad = {"FAILED", "LOST"}
    then = ", ".join(to if name == "DONE" else f"{name}: {to}" for name, to in ways.items() if name not in bad)
    other = ", ".join(dict.fromkeys(to for name, to in ways.items() if name in bad))
    return f"| {side} | {state} | {deed.value if deed else ''} | {then} | {other} |"
