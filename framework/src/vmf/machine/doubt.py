"""A handover that nobody confirmed: what is known of it, what the target says, and how it is resolved.

While the source's process lives it holds the stopped machine (`Doubt`). When it has died, a note is left
(`vmf.machine.journal.in_doubt`), and the machine's memory is lost here; `describe` and `Finding` serve both.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from vmf.errors import InvalidStateError, TeleportInDoubt, TeleportUncertain, VmfError
from vmf.teleport.journal import Entry, Testimony
from vmf.teleport.protocol import handover
from vmf.teleport.protocol.handover import Answer, SourceCustody, SourceEvent, Verdict
from vmf.transport.base import Address

if TYPE_CHECKING:
    from vmf.machine.home import Home
    from vmf.machine.teleport_view import TeleportView
    from vmf.plugins.bridge import PluginRegistry
    from vmf.teleport.custodian import SourceCustodian

ASK_SECONDS = 5.0
"""For the target to take the connection, and longest silence then."""


@frozen
class Finding:
    """What asking the target gave.

    Attributes:
        testimony: its answer.
        peer: who was asked.
    """

    testimony: Testimony
    peer: Address

    @property
    def said(self) -> str:
        """One line for people."""
        sentences = {
            Answer.RUNS: f"{self.peer} says that it has the machine.",
            Answer.ENDED: f"{self.peer} says that the machine ran there and is not there any more.",
            Answer.NEVER: f"{self.peer} says that the machine never arrived, and will not take it any more.",
            Answer.UNKNOWN: f"{self.peer} knows nothing of this teleport.",
            Answer.UNREACHABLE: f"{self.peer} cannot be asked.",
        }
        return f"{sentences[self.testimony.answer]} {self.testimony.detail}".strip()

    def permit(self, verdict: Verdict, name: str, how: str, force: bool) -> None:
        """Raise TeleportInDoubt unless it may be done, or is forced; the error says what may happen."""
        if verdict.allowed or force:
            return
        raise TeleportInDoubt(
            f"machine {name} is not to {how} here: {self.said} If it did, {verdict.risk}.",
            f"Find out what became of it at the target; if you know better, "
            f"`vmf controlvm {name} teleport --resolve {how} --force`.",
        )


def ask(registry: PluginRegistry, name: str, peer: Address, teleport_id: bytes, password: str | None = None) -> Finding:
    """Ask the target; never raises for what it says or does not say."""
    from vmf.teleport.ask import ask_teleport

    try:
        channel = registry.transport(peer.scheme).connect(peer, ASK_SECONDS)
        try:
            testimony = ask_teleport(channel, name, teleport_id, ASK_SECONDS, password)
        finally:
            channel.close()
    except VmfError as error:
        testimony = Testimony(Answer.UNREACHABLE, "", str(error))
    return Finding(testimony, peer)


def describe(entry: Entry, finding: Finding | None, *, orphaned: bool, leased: bool = False) -> dict[str, Any]:
    """For people and programs: plain data. Without a finding only what is known here."""
    answer: dict[str, Any] = {
        "teleport_id": entry.teleport_id.hex(),
        "target": str(entry.peer),
        "phase": "handover",
        "since": entry.since,
        "seconds": max(0, int(time.time()) - entry.since),
        "process": "dead" if orphaned else "alive",
    }
    if finding is not None:
        said = finding.testimony
        discard = handover.may_discard(said.answer, orphaned)
        answer |= {
            "answer": said.answer.value,
            "asked": str(finding.peer),
            "said": finding.said,
            "discard": _plain(discard),
        }
        if not orphaned:
            answer["resume"] = _plain(handover.may_resume(said.answer, leased))
    return answer


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {"allowed": verdict.allowed, "why": verdict.why, "risk": verdict.risk}


@define
class Doubt:
    """A machine in this process that was handed over, stopped, and not confirmed.

    Attributes:
        entry: the teleport.
        why: what happened, one line.
        was_running: the guest ran before (else its user had paused it).
    """

    entry: Entry
    why: str
    was_running: bool
    _custodian: SourceCustodian
    _view: TeleportView
    _password: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, error: TeleportUncertain, peer: Address, was_running: bool, view: TeleportView, password: str | None
    ) -> Doubt:
        from vmf.teleport.protocol.handover import Note
        from vmf.teleport.protocol.states import Role

        entry = Entry(bytes.fromhex(error.teleport_id), Role.SOURCE, Note.HANDED_OVER, peer)
        return cls(entry, error.message, was_running, error.custodian, view, password)

    def ask(self, registry: PluginRegistry, name: str, peer: Address | None, password: str | None) -> Finding:
        """Ask the target, by default where and as it was reached before."""
        where = peer or self.entry.peer
        return ask(registry, name, where, self.entry.teleport_id, self._password if password is None else password)

    def resume(self) -> None:
        """It goes on here. Raises what kept it from doing so: then it stays in doubt (another has the lease, say)."""
        self._view.take_back()
        error = self._custodian.feed(SourceEvent.RESUME)
        if self._custodian.state is SourceCustody.UNCERTAIN:
            self._view.mark_handed_over()
            assert error is not None
        if error is not None:
            raise error

    def discard(self) -> None:
        """It is given up here."""
        self._custodian.feed(SourceEvent.DISCARD)


# Without a process


def describe_orphan(
    home: Home, name: str, registry: PluginRegistry | None, peer: Address | None = None, password: str | None = None
) -> dict[str, Any] | None:
    """As `Machine.teleport_in_doubt`, for a machine whose process has died; asks only with a registry."""
    from vmf.machine.journal import in_doubt

    entry = in_doubt(home, name)
    if entry is None:
        return None
    found = None if registry is None else ask(registry, name, peer or entry.peer, entry.teleport_id, password)
    why = f"the process of machine {name} ended after the handover, and the machine's memory here with it."
    return describe(entry, found, orphaned=True) | {"why": why}


def resolve_orphan(
    home: Home,
    name: str,
    how: str,
    registry: PluginRegistry,
    *,
    force: bool = False,
    peer: Address | None = None,
    password: str | None = None,
) -> str:
    """As `Machine.resolve_teleport`, for a machine whose process has died: it can only be discarded."""
    from vmf.machine.journal import FileJournal, in_doubt
    from vmf.teleport.protocol.handover import Note

    with home.changing(name, "resolve a teleport"):
        entry = in_doubt(home, name)
        if entry is None:
            raise InvalidStateError(
                f"machine {name} is {home.resting_state(name)}: there is no teleport to resolve.",
                f"See `vmf showvminfo {name}`.",
            )
        if how == "resume":
            raise InvalidStateError(
                f"machine {name} cannot go on here: its memory ended with its process, after the handover.",
                f"If it does not run at the target, `vmf controlvm {name} teleport --resolve discard`, then start it "
                f"anew with `vmf startvm {name}`.",
            )
        found = ask(registry, name, peer or entry.peer, entry.teleport_id, password)
        found.permit(handover.may_discard(found.testimony.answer, orphaned=True), name, "discard", force)
        journal = FileJournal(home, name)
        journal.mark(entry.teleport_id, Note.GONE)
        journal.flush(entry.teleport_id)
        state = "teleported" if found.testimony.answer is Answer.RUNS else "poweredoff"
        home.record_end(name, state)
    return f"{found.said} Machine '{name}' is {state} here; `vmf startvm {name}` would start it anew."


def refuse_in_doubt(home: Home, name: str) -> None:
    """Raise when starting the machine anew could make two of it: InvalidStateError; HomeError where none can tell."""
    from vmf.machine.journal import in_doubt, refuse_unreadable

    refuse_unreadable(home, name)
    entry = in_doubt(home, name)
    if entry is not None:
        raise InvalidStateError(
            f"machine {name} was handed over to {entry.peer}, and its process ended before the target confirmed that: "
            f"it may run there.",
            f"Ask with `vmf controlvm {name} teleport --status`; if it does not run there, "
            f"`vmf controlvm {name} teleport --resolve discard`.",
        )
