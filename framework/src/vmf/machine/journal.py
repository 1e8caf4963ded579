"""The teleports of one machine, in files of its home: `machines/NAME/teleports/ID.json`.

A file is made by rename (old or new, complete) and flushed. What changes later is its note alone, a few bytes of fixed
length, written in place with one call: no space is needed for it, so a disk that filled up meanwhile cannot get in the
way of a handover, and it takes microseconds while the guest stands still. A reader that meets a half-written note reads
again; should a host lose its power right then, an unreadable note counts as the one that is more careful.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from attrs import evolve

from vmf import host
from vmf.machine import home as homes
from vmf.machine import shelf
from vmf.machine.home import Home
from vmf.machine.identity import Owner
from vmf.reading import read_record, read_text
from vmf.teleport.journal import Entry, Testimony
from vmf.teleport.protocol import handover
from vmf.teleport.protocol.handover import Answer, Note, SourceCustody
from vmf.teleport.protocol.states import Role
from vmf.transport.base import Address

TELEPORTS = "teleports"
KEPT = 64
"""Settled teleports of a machine that are remembered; older ones are UNKNOWN to whoever asks."""
_WIDTH = 12
"""Of the note, padded."""
_MARK = '{"note": "'
_OFFSET = len(_MARK)
_SETTLED = (Note.GONE, Note.TAKEN, Note.PROMISED)
_SECRET = ("password",)


class FileJournal:
    """Implements `vmf.teleport.journal.Journal`."""

    def __init__(self, home: Home, name: str) -> None:
        self._home = home
        self._name = name
        self._directory = directory_of(home, name)

    def begin(self, entry: Entry) -> None:
        homes.private_directory(self._directory)
        owner = Owner.of(self._directory.parent)
        homes.write_atomically(self._path(entry.teleport_id), _format(evolve(entry, uuid=owner.uuid)))
        self._prune()

    def mark(self, teleport_id: bytes, note: Note) -> None:
        path = self._path(teleport_id)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, note.value.ljust(_WIDTH).encode(), _OFFSET)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise homes.explained(error, path) from error

    def flush(self, teleport_id: bytes) -> None:
        path = self._path(teleport_id)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise homes.explained(error, path) from error
        if self.note(teleport_id) is Note.TAKEN:
            # The machine is here: whatever became of its earlier teleports from here, it came back.
            for other, entry in _own_entries(self._home, self._name):
                if entry.role is Role.SOURCE and entry.note in (Note.OFFERED, Note.HANDED_OVER):
                    with contextlib.suppress(OSError):
                        other.unlink()

    def erase(self, teleport_id: bytes) -> None:
        path = self._path(teleport_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise homes.explained(error, path) from error

    def note(self, teleport_id: bytes) -> Note:
        entry = _read(self._path(teleport_id))
        return Note.NONE if entry is None else entry.note

    def testify(self, teleport_id: bytes) -> Testimony:
        """What this home knows of a teleport: any of its machines, so that whichever one listens can answer.

        Also those that were unregistered: that they ran here stays true.
        """
        for name in [self._name, *(each for each in self._home.names() if each != self._name)]:
            entry = _read(directory_of(self._home, name) / f"{teleport_id.hex()}.json")
            if entry is None or entry.role is not Role.TARGET:
                continue
            if name == self._name or self._home.process(name) is None:
                answer = handover.recovered_target(entry.note)
                return Testimony(answer, name, self._fate(name) if answer is Answer.ENDED else "")
            # Another machine of this home, in a process of its own, which may be at it this very moment.
            if entry.note is Note.TAKEN:
                return Testimony(Answer.RUNS, name)
            return Testimony(Answer.UNKNOWN, name, f"Machine '{name}' on that host knows it; ask at its own port.")
        for directory in shelf.directories(self._home):
            entry = _read(directory / TELEPORTS / f"{teleport_id.hex()}.json")
            if entry is not None and entry.role is Role.TARGET:
                answer = handover.recovered_target(entry.note)
                return Testimony(answer, self._name, "The machine that knows it was unregistered there.")
        return Testimony(Answer.UNKNOWN)

    def _fate(self, name: str) -> str:
        if name == self._name:
            return "It ran there in a process that has ended."
        return f"Machine '{name}' is {self._home.resting_state(name)} there."

    def _path(self, teleport_id: bytes) -> Path:
        return self._directory / f"{teleport_id.hex()}.json"

    def _prune(self) -> None:
        """Keep the newest of those that nobody waits for."""
        entries = [(entry.since, path) for path, entry in _entries(self._directory) if entry.note in _SETTLED]
        for _, path in sorted(entries)[:-KEPT]:
            with contextlib.suppress(OSError):
                path.unlink()


def directory_of(home: Home, name: str) -> Path:
    """Where a machine's teleports are written down."""
    return home.paths(name).directory / TELEPORTS


def in_doubt(home: Home, name: str) -> Entry | None:
    """The handover of a machine *without a process* whose end nobody knows; None when it may simply be started."""
    for _, entry in _own_entries(home, name):
        if entry.role is Role.SOURCE:
            state = handover.recovered_source(entry.note, entry.same_boot)
            if state is SourceCustody.ORPHANED:
                return entry
    return None


def refuse_unreadable(home: Home, name: str) -> None:
    """Raise HomeError when a note cannot be read: whether the machine was handed over is then not known."""
    directory = directory_of(home, name)
    path = directory
    try:
        for each in sorted(os.listdir(directory)):
            path = directory / each
            if path.suffix == ".json":
                with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
                    read_text(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise homes.HomeError(
            f"{path} cannot be read: {error.strerror}. It notes a teleport of machine '{name}', which may run there.",
            "Make it readable. Only if the machine runs nowhere else, delete it.",
        ) from error


def left(home: Home, name: str, began: int) -> bool:
    """Whether a machine whose process died had gone to another host before: that process noted it.

    `began`: when that process had begun, by the clock of the file system.
    """
    try:
        return any(
            entry.role is Role.SOURCE and entry.note is Note.GONE and path.stat().st_mtime_ns >= began
            for path, entry in _own_entries(home, name)
        )
    except OSError:
        return False


def clear_interrupted(home: Home, name: str) -> None:
    """Erase the notes of teleports out that a process of this machine did not live to end, and that are in no doubt."""
    for path, entry in _own_entries(home, name):
        if entry.role is Role.SOURCE and entry.note is Note.OFFERED and entry.same_boot:
            with contextlib.suppress(OSError):
                path.unlink()


def _own_entries(home: Home, name: str) -> list[tuple[Path, Entry]]:
    """Those of the machine that is defined, and of no other one that had its name."""
    directory = directory_of(home, name)
    found = _entries(directory)
    owner = Owner.of(directory.parent) if found else None
    return [(path, entry) for path, entry in found if owner is not None and owner.owns(path, entry.uuid)]


def _entries(directory: Path) -> list[tuple[Path, Entry]]:
    try:
        paths = sorted(directory.glob("*.json"))
    except OSError:
        return []
    found = [(path, _read(path)) for path in paths]
    return [(path, entry) for path, entry in found if entry is not None]


def _format(entry: Entry) -> str:
    peer = entry.peer
    options = {key: value for key, value in peer.options.items() if isinstance(value, str) and key not in _SECRET}
    rest = {
        "id": entry.teleport_id.hex(),
        "role": entry.role.value,
        "peer": {"scheme": peer.scheme, "host": peer.host, "port": peer.port, "options": options},
        "since": entry.since,
        "uuid": entry.uuid,
        "boot_id": host.boot_id(),
    }
    return f'{_MARK}{entry.note.value.ljust(_WIDTH)}", {json.dumps(rest)[1:]}\n'


def _read(path: Path) -> Entry | None:
    """None when there is no such file, or none that says anything."""
    entry = None
    for _ in range(5):
        try:
            fields = read_record(path)
            note = fields["note"].strip()
            entry = _entry(fields, Note.HANDED_OVER if fields["role"] == Role.SOURCE.value else Note.TAKEN)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        try:
            return _entry(fields, Note(note))
        except ValueError:
            time.sleep(0.001)  # it is being written
    return entry  # the careful reading


def _entry(fields: dict[str, Any], note: Note) -> Entry:
    peer = fields["peer"]
    address = Address(str(peer["scheme"]), str(peer["host"]), int(peer["port"]), dict(peer["options"]))
    identifier, role = bytes.fromhex(fields["id"]), Role(fields["role"])
    same_boot, uuid = fields["boot_id"] == host.boot_id(), str(fields.get("uuid", ""))
    return Entry(identifier, role, note, address, int(fields["since"]), same_boot, uuid)
