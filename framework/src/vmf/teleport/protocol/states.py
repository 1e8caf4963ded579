"""The state machine of a teleport: one table, the same for both sides.

Each side holds a phase and moves it with every message that it sends or receives, and with `LOST`: the channel was
cut, the peer died, fell silent or sent rubbish, or this side gave up without being able to say so. Except for
CANCEL, ERROR, PING and PONG the conversation is half-duplex: in every phase it is known whose turn it is, so the
phases of both sides never differ by more than the messages that are under way.

A message that belongs to a feature is in the table like any other; `Connection` lets it pass only when WELCOME named
the feature.

Who runs follows from the phase alone (`SOURCE_OUTCOME`, `TARGET_RUNS`):

- The source may run the machine until it has *sent* HANDOVER, in whatever way the session ends before that.
- The target may run it from the moment it has *received* HANDOVER.
- From READY on the target has no way to say no; so whatever the source hears (or does not hear) after HANDOVER can
  only be RUNNING or nothing. Nothing means UNCERTAIN: it may run there, so it must not run here.

What each side does with the machine in these phases, and how an uncertain source finds out, is
`vmf.teleport.protocol.handover`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from attrs import frozen

from vmf.teleport.protocol import messages as m


class Role(enum.Enum):
    SOURCE = "source"
    TARGET = "target"

    @property
    def other(self) -> Role:
        return Role.TARGET if self is Role.SOURCE else Role.SOURCE


class Phase(enum.Enum):
    """Named after what happens next."""

    HELLO = "hello"
    WELCOME = "welcome"
    AUTHENTICATE = "authenticate"
    AUTHENTICATING = "authenticating"
    OFFER = "offer"
    INQUIRE = "inquire"
    INQUIRED = "inquired"
    LOCATE = "locate"
    LOCATED = "located"
    CHECK = "check"
    NOTED = "noted"
    CHECKED = "checked"
    PRECOPY = "precopy"
    ROUND = "round"
    PAUSE = "pause"
    RESTORE = "restore"
    READY = "ready"
    HANDOVER = "handover"
    RUNNING = "running"
    # Of an additional channel.
    JOINING = "joining"
    LINK = "link"
    # Final phases.
    DONE = "done"
    CHECK_DONE = "check-done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNCERTAIN = "uncertain"


class Lost(enum.Enum):
    """The event of `TABLE` that is no message."""

    LOST = "lost"


LOST = Lost.LOST
SOURCE, TARGET = Role.SOURCE, Role.TARGET
P = Phase

Event = type[m.Message] | Lost

# phase             who       says                  leads to
_CONVERSATION: tuple[tuple[Phase, Role, type[m.Message], Phase], ...] = (
    (P.HELLO,          SOURCE, m.Hello,         P.WELCOME),
    (P.WELCOME,        TARGET, m.Welcome,       P.AUTHENTICATE),
    (P.AUTHENTICATE,   SOURCE, m.Authenticate,  P.AUTHENTICATING),
    (P.AUTHENTICATING, TARGET, m.Challenge,     P.AUTHENTICATE),
    (P.AUTHENTICATING, TARGET, m.Authenticated, P.OFFER),
    (P.OFFER,          SOURCE, m.Inquire,       P.INQUIRE),
    (P.INQUIRE,        TARGET, m.Capabilities,  P.INQUIRED),
    (P.INQUIRED,       SOURCE, m.Bye,           P.CHECK_DONE),
    (P.OFFER,          SOURCE, m.Locate,        P.LOCATE),
    (P.LOCATE,         TARGET, m.Located,       P.LOCATED),
    (P.LOCATED,        SOURCE, m.Bye,           P.CHECK_DONE),
    (P.OFFER,          SOURCE, m.Offer,         P.CHECK),
    (P.CHECK,          TARGET, m.Notes,         P.NOTED),
    (P.CHECK,          TARGET, m.Checked,       P.CHECKED),
    (P.NOTED,          TARGET, m.Checked,       P.CHECKED),
    (P.CHECKED,        SOURCE, m.Bye,           P.CHECK_DONE),
    (P.CHECKED,        SOURCE, m.Begin,         P.PRECOPY),
    (P.PRECOPY,        SOURCE, m.Pages,         P.PRECOPY),
    (P.PRECOPY,        SOURCE, m.Zeros,         P.PRECOPY),
    (P.PRECOPY,        SOURCE, m.RoundEnd,      P.ROUND),
    (P.ROUND,          TARGET, m.RoundAck,      P.PRECOPY),
    (P.PRECOPY,        SOURCE, m.Paused,        P.PAUSE),
    (P.PAUSE,          SOURCE, m.Pages,         P.PAUSE),
    (P.PAUSE,          SOURCE, m.Zeros,         P.PAUSE),
    (P.PAUSE,          SOURCE, m.State,         P.RESTORE),
    (P.RESTORE,        TARGET, m.Ready,         P.READY),
    (P.READY,          SOURCE, m.Handover,      P.HANDOVER),
    (P.HANDOVER,       TARGET, m.Running,       P.RUNNING),
    (P.RUNNING,        SOURCE, m.Done,          P.DONE),
    # An additional channel carries pages only. It decides nothing: what came over it is counted, and a teleport some
    # of whose bytes did not arrive fails.
    (P.HELLO,          SOURCE, m.Join,          P.JOINING),
    (P.JOINING,        TARGET, m.Joined,        P.LINK),
    (P.LINK,           SOURCE, m.Pages,         P.LINK),
)  # fmt: skip

BEFORE_READY = (
    P.HELLO, P.JOINING, P.LINK, P.WELCOME, P.AUTHENTICATE, P.AUTHENTICATING, P.OFFER, P.INQUIRE, P.INQUIRED,
    P.LOCATE, P.LOCATED, P.CHECK, P.NOTED, P.CHECKED, P.PRECOPY, P.ROUND, P.PAUSE, P.RESTORE,
)  # fmt: skip
"""Both sides may end the session with CANCEL or ERROR."""
TALKING = (
    P.CHECK, P.NOTED, P.CHECKED, P.PRECOPY, P.ROUND, P.PAUSE, P.RESTORE, P.READY, P.HANDOVER, P.RUNNING,
)  # fmt: skip
"""PING and PONG are legal."""
FINAL = frozenset({P.DONE, P.CHECK_DONE, P.CANCELLED, P.FAILED, P.UNCERTAIN})


def _build() -> dict[tuple[Phase, Role, Event], Phase]:
    table: dict[tuple[Phase, Role, Event], Phase] = {}
    for phase, who, says, to in _CONVERSATION:
        table[phase, who, says] = to
    for phase in BEFORE_READY:
        for who in Role:
            table[phase, who, m.Cancel] = P.CANCELLED
            table[phase, who, m.Error] = P.FAILED
            table[phase, who, LOST] = P.FAILED
    # After READY the source alone decides: it may still cancel, the target may not.
    table[P.READY, SOURCE, m.Cancel] = P.CANCELLED
    table[P.READY, SOURCE, m.Error] = P.FAILED
    table[P.READY, SOURCE, LOST] = P.FAILED
    table[P.READY, TARGET, LOST] = P.FAILED
    # After HANDOVER the source cannot know, until it hears RUNNING; the target runs, whatever happens to the channel.
    table[P.HANDOVER, SOURCE, LOST] = P.UNCERTAIN
    table[P.HANDOVER, TARGET, LOST] = P.DONE
    table[P.RUNNING, SOURCE, LOST] = P.DONE
    table[P.RUNNING, TARGET, LOST] = P.DONE
    for phase in TALKING:
        for who in Role:
            table[phase, who, m.Ping] = phase
            table[phase, who, m.Pong] = phase
    return table


TABLE = _build()
"""(phase, who says or notices it, what) -> next phase. Whatever is not here is illegal."""


class SourceOutcome(enum.Enum):
    """What became of the machine, as the source knows it."""

    RUNS_HERE = "source"
    """Nothing was handed over: the source has it, running or paused as before."""
    RUNS_THERE = "target"
    """The target said that it runs it."""
    UNCERTAIN = "uncertain"
    """HANDOVER was sent and no answer came: it stays paused here until somebody who knows resolves it."""


SOURCE_OUTCOME = {
    **dict.fromkeys((*BEFORE_READY, P.READY), SourceOutcome.RUNS_HERE),
    P.CHECK_DONE: SourceOutcome.RUNS_HERE,
    P.CANCELLED: SourceOutcome.RUNS_HERE,
    P.FAILED: SourceOutcome.RUNS_HERE,
    P.HANDOVER: SourceOutcome.UNCERTAIN,
    P.UNCERTAIN: SourceOutcome.UNCERTAIN,
    P.RUNNING: SourceOutcome.RUNS_THERE,
    P.DONE: SourceOutcome.RUNS_THERE,
}
"""What a source whose session stands (or ended) in this phase knows."""

TARGET_RUNS = frozenset({P.HANDOVER, P.RUNNING, P.DONE})
"""Phases in which the target owns the machine."""


@frozen
class Step:
    """One line of the table, for people."""

    phase: Phase
    who: Role
    event: str
    to: Phase


def conversation() -> Iterator[Step]:
    """The table without what is legal everywhere (CANCEL, ERROR, PING, PONG)."""
    for phase, who, says, to in _CONVERSATION:
        yield Step(phase, who, says.word(), to)


def render_mermaid() -> str:
    """The state diagram of the documentation, generated from the table."""
    edges: dict[tuple[str, str], list[str]] = {}

    def edge(phase: Phase, to: Phase, label: str) -> None:
        labels = edges.setdefault((phase.name, to.name), [])
        if label not in labels:
            labels.append(label)

    for step in conversation():
        edge(step.phase, step.to, f"{step.who.value}: {step.event}")
    for (phase, who, event), to in TABLE.items():
        if event is LOST and to is not P.FAILED:
            edge(phase, to, f"{who.value}: lost")
    lines = ["stateDiagram-v2", "    [*] --> HELLO"]
    lines += [f"    {phase} --> {to} : {', '.join(labels)}" for (phase, to), labels in edges.items()]
    lines += [f"    {phase.name} --> [*]" for phase in Phase if phase in FINAL - {P.CANCELLED, P.FAILED}]
    return "\n".join(lines)


def render_table() -> str:
    """The same as a Markdown table."""
    lines = ["| phase | who | says | leads to |", "|---|---|---|---|"]
    lines += [f"| {s.phase.name} | {s.who.value} | {s.event} | {s.to.name} |" for s in conversation()]
    first, last = BEFORE_READY[0].name, BEFORE_READY[-1].name
    lines += [
        f"| {first} … {last} | either | CANCEL | CANCELLED |",
        f"| {first} … {last} | either | ERROR, or lost | FAILED |",
        "| READY | source | CANCEL | CANCELLED |",
        "| READY | source | ERROR, or lost | FAILED |",
        "| READY | target | lost | FAILED |",
    ]
    lines += [
        f"| {phase.name} | {who.value} | lost | {to.name} |"
        for (phase, who, event), to in TABLE.items()
        if event is LOST and phase not in (*BEFORE_READY, P.READY)
    ]
    lines += [f"| {TALKING[0].name} … {TALKING[-1].name} | either | PING, PONG | (stays) |"]
    return "\n".join(lines)


def render_limits() -> str:
    """Type numbers, fields and longest bodies as a Markdown table."""
    import attrs

    lines = ["| type | message | fields | longest body, bytes |", "|---|---|---|---|"]
    for kind in m.MESSAGES:
        fields = ", ".join(f"`{attribute.name}`" for attribute in attrs.fields(kind)) or "(none)"
        lines.append(f"| {kind.TYPE} | {kind.word()} | {fields} | {kind.LIMIT} |")
    return "\n".join(lines)
