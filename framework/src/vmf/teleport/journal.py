"""What each side writes down of its teleports, so that it is known after a death: see `vmf.teleport.protocol.handover`.

`MemoryJournal` is for machines that live and die with their program; `vmf.machine.journal` keeps files for machines
that have a home.
"""

from __future__ import annotations

import time
from typing import Protocol

from attrs import evolve, field, frozen

from vmf.teleport.protocol import handover
from vmf.teleport.protocol.handover import Answer, Note
from vmf.teleport.protocol.states import Role
from vmf.transport.base import Address


@frozen
class Entry:
    """One teleport.

    Attributes:
        teleport_id: by which both sides know it.
        role: which side this is.
        note: how far it went.
        peer: the other side, as this side reached it (or, at the target, saw it).
        since: when it began, seconds since the epoch.
        same_boot: the host was not restarted since.
        uuid: of the machine on this side; "" where that does not matter.
    """

    teleport_id: bytes
    role: Role
    note: Note
    peer: Address
    since: int = field(factory=lambda: int(time.time()))
    same_boot: bool = True
    uuid: str = ""


@frozen
class Testimony:
    """What a target says of a teleport.

    Attributes:
        answer: the word that decides.
        machine: which machine it was, "" when unknown.
        detail: one line for people, or "".
    """

    answer: Answer
    machine: str = ""
    detail: str = ""


class Journal(Protocol):
    """One machine's teleports. Errors are VmfErrors that name the file."""

    def begin(self, entry: Entry) -> None:
        """Write down a new teleport, so that it survives a power failure."""

    def mark(self, teleport_id: bytes, note: Note) -> None:
        """Change the note, so that it survives this process; quickly, because the guest stands still meanwhile."""

    def flush(self, teleport_id: bytes) -> None:
        """Make what `mark` wrote survive a power failure, too."""

    def erase(self, teleport_id: bytes) -> None:
        """As if it had not been."""

    def note(self, teleport_id: bytes) -> Note:
        """The note of a teleport of this machine; NONE when it is not known."""

    def testify(self, teleport_id: bytes) -> Testimony:
        """What is known here of a teleport that is not this process's own."""


class MemoryJournal:
    """Forgets with the process."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self.entries: dict[bytes, Entry] = {}

    def begin(self, entry: Entry) -> None:
        self.entries[entry.teleport_id] = entry

    def mark(self, teleport_id: bytes, note: Note) -> None:
        self.entries[teleport_id] = evolve(self.entries[teleport_id], note=note)

    def flush(self, teleport_id: bytes) -> None:
        pass

    def erase(self, teleport_id: bytes) -> None:
        self.entries.pop(teleport_id, None)

    def note(self, teleport_id: bytes) -> Note:
        entry = self.entries.get(teleport_id)
        return Note.NONE if entry is None else entry.note

    def testify(self, teleport_id: bytes) -> Testimony:
        answer = handover.recovered_target(self.note(teleport_id))
        return Testimony(answer, "" if answer is Answer.UNKNOWN else self._machine)
