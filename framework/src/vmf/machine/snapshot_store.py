"""Where the snapshots of one machine are, and which one its next start continues from."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, frozen

from vmf.errors import ConfigError, InvalidStateError, NotFoundError, StateError, VmfError
from vmf.machine.config import NAME_PATTERN
from vmf.machine.home import HomeError, explained, private_directory, write_atomically
from vmf.machine.identity import Owner
from vmf.reading import read_record

FORMAT = 1
_PARTIAL = ".partial-"
DAMAGED = "damaged"
UNKNOWN = "?"
"""The snapshot that is being put back, where its note cannot be read; no snapshot is called that."""


@frozen
class FileInfo:
    """One file of a snapshot: bytes, and what `vmf.storage.sparse.digest` says of it."""

    size: int
    digest: str


def _files(plain: Any) -> dict[str, FileInfo]:
    return {str(name): each if isinstance(each, FileInfo) else FileInfo(**each) for name, each in dict(plain).items()}


@frozen
class SnapshotInfo:
    """One snapshot.

    Attributes:
        name: unique among those of the machine.
        description: free text.
        taken: seconds since the epoch.
        state: of the machine then: "running", "paused" or "poweredoff".
        memory_mib: of the machine then.
        disks: port to size of the disk, bytes.
        files: what each of its files held when it was taken; empty for one of a vmf that did not note that.
    """

    name: str
    description: str
    taken: int
    state: str
    memory_mib: int
    disks: Mapping[str, int]
    files: Mapping[str, FileInfo] = field(factory=dict, converter=_files)

    @property
    def has_state(self) -> bool:
        return self.state != "poweredoff"


def _info(name: str, plain: dict[str, Any]) -> SnapshotInfo:
    """What `snapshot.json` says, under the name that its directory has. Raises ValueError, TypeError, KeyError."""
    info = SnapshotInfo(**plain | {"name": name})
    numbers = {"taken": info.taken, "memory_mib": info.memory_mib, **info.disks}
    numbers |= {file: noted.size for file, noted in info.files.items()}
    wrong = [key for key, value in numbers.items() if type(value) is not int or value < 0]
    texts = {"description": info.description}
    texts |= {file: noted.digest for file, noted in info.files.items()}
    wrong += [key for key, value in texts.items() if not isinstance(value, str)]
    wrong += [f"disk {port}" for port in info.disks if not port.isdecimal()]
    if info.state not in ("running", "paused", "poweredoff"):
        wrong.append("its state")
    if wrong:
        raise ValueError(f"what it says of {', '.join(wrong)} makes no sense")
    return info


class SnapshotStore:
    """The snapshots of one machine, in a directory; `resume` beside it says which one the next start goes on from."""

    def __init__(self, machine: str, directory: Path) -> None:
        self.machine = machine
        self.directory = directory
        self._resume = directory.parent / "resume.json"
        self._restoring = directory.parent / "restoring.json"
        self._owner = Owner.of(directory.parent)

    def names(self) -> list[str]:
        """Oldest first; quick."""
        return [each.name for each in self.list()]

    def list(self) -> list[SnapshotInfo]:
        """Oldest first. One that cannot be read is among them, as "damaged", with the reason as its description.

        Raises HomeError when the directory cannot be read.
        """
        try:
            found = [entry for entry in os.listdir(self.directory) if NAME_PATTERN.fullmatch(entry)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explained(error, self.directory) from error
        own = [name for name in found if self._is_own(name)]
        return sorted((self._look(name) for name in own), key=lambda each: (each.taken, each.name))

    def _is_own(self, name: str) -> bool:
        """Whether a snapshot is of this machine; one that cannot be read is, and `get` says what is wrong."""
        path = self.path(name) / "snapshot.json"
        try:
            return self._owner.owns(path, read_record(path).get("uuid"))
        except (OSError, ValueError):
            return True

    def _look(self, name: str) -> SnapshotInfo:
        try:
            return self.get(name)
        except VmfError as error:
            return SnapshotInfo(name, error.message, 0, DAMAGED, 0, {})

    def get(self, name: str) -> SnapshotInfo:
        """Raises NotFoundError, or StateError when it cannot be read."""
        path = self.path(name) / "snapshot.json"
        try:
            plain = read_record(path)
            if not self._owner.owns(path, stamp := plain.pop("uuid", None)):
                raise NotFoundError(
                    f"the snapshot '{name}' in {self.directory} is of another machine"
                    + (f" (UUID {stamp})." if stamp else ", which was unregistered."),
                    f"`vmf showvminfo {self.machine}` lists what is not its own.",
                )
            if plain.pop("format") != FORMAT:
                raise StateError(f"snapshot {name} was made by a newer vmf.", "Use that one.")
            return _info(name, plain)
        except FileNotFoundError:
            known = ", ".join(entry.name for entry in self.list()) if path.parent.parent.exists() else ""
            raise NotFoundError(
                f"machine '{self.machine}' has no snapshot '{name}'.",
                f"It has {known}." if known else f"Take one with `vmf snapshot {self.machine} take {name}`.",
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StateError(f"{path} cannot be read: {_said(error)}.", "Delete that snapshot.") from error

    def path(self, name: str) -> Path:
        if not NAME_PATTERN.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a snapshot's name.",
                "Use 1 to 64 of the characters A-Z a-z 0-9 . _ - beginning with a letter or digit.",
            )
        return self.directory / name

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A directory to fill; it becomes the snapshot `name` when the block ends well, and vanishes otherwise."""
        final = self.path(name)
        if final.exists():
            raise ConfigError(
                f"machine '{self.machine}' has a snapshot '{name}' already.",
                f"Choose another name, or delete it: `vmf snapshot {self.machine} delete {name}`.",
            )
        private_directory(self.directory)
        self.sweep()
        partial = self.directory / f"{_PARTIAL}{secrets.token_hex(4)}"
        private_directory(partial)
        try:
            yield partial
            os.rename(partial, final)
            sync_directory(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise HomeError(
                f"the snapshot '{name}' cannot be written: {error.strerror or error}.",
                f"Is there room in {self.directory}? Nothing was changed.",
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def sweep(self) -> None:
        """Delete what a process that was killed left of a snapshot that it took. Only with the machine's lock."""
        for stale in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Raises NotFoundError; InvalidStateError when the next start, or a restore that was cut short, needs it.

        One that cannot be read is deleted, too.
        """
        if not self.path(name).is_dir() or not self._is_own(name):
            self.get(name)
        if self.restoring() == name:
            raise InvalidStateError(
                f"the snapshot '{name}' is needed: putting machine '{self.machine}' back to it was cut short.",
                f"Do that first: `vmf snapshot {self.machine} restore {name}`.",
            )
        if self.resuming() == name:
            raise InvalidStateError(
                f"the next start of machine '{self.machine}' continues from snapshot '{name}'.",
                f"Start it first, or give that state up with `vmf snapshot {self.machine} discard-state`.",
            )
        doomed = self.directory / f"{_PARTIAL}{secrets.token_hex(4)}"
        os.rename(self.path(name), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    # -- going on from one

    def resuming(self) -> str:
        """The snapshot that the next start goes on from; "" for a plain boot."""
        return str(self.resume_note().get("snapshot", ""))

    def resume_note(self) -> dict[str, Any]:
        try:
            note = read_record(self._resume)
            if not isinstance(note.get("snapshot"), str) or not isinstance(note.get("generations"), dict):
                raise ValueError("what it says makes no sense")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StateError(
                f"{self._resume} cannot be read: {_said(error)}.", f"Run `vmf snapshot {self.machine} discard-state`."
            ) from error
        return note if self._owner.owns(self._resume, note.get("uuid")) else {}

    def note_resume(self, name: str, generations: Mapping[str, int]) -> None:
        note = {"uuid": self._owner.uuid, "snapshot": name, "generations": dict(generations)}
        write_atomically(self._resume, json.dumps(note))

    def forget_resume(self) -> bool:
        """The next start boots; False when it would have anyway."""
        return _unlink(self._resume)

    # -- a restore under way, or cut short

    def restoring(self) -> str:
        """The snapshot that is being put back, or whose putting back was cut short: the disks are neither one thing
        nor the other. "" when there is none."""
        try:
            note = read_record(self._restoring)
            own = self._owner.owns(self._restoring, note.get("uuid"))
            return str(note["snapshot"] or UNKNOWN) if own else ""
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError):
            return UNKNOWN  # the note is there, whatever became of its content

    def note_restoring(self, name: str) -> None:
        """Durably: from here on the disks are not to be used."""
        write_atomically(self._restoring, json.dumps({"uuid": self._owner.uuid, "snapshot": name}))

    def forget_restoring(self) -> bool:
        """The disks are whole (again); False when they were."""
        if not _unlink(self._restoring):
            return False
        sync_directory(self._restoring.parent)
        return True

    def refuse_half_restored(self, action: str) -> None:
        """Raise InvalidStateError while a restore that was cut short has left the disks half written."""
        if self.restoring():
            raise self._half_restored(action)

    def _half_restored(self, action: str) -> InvalidStateError:
        name = self.restoring()
        which, again = (f"snapshot '{name}'", name) if name != UNKNOWN else ("a snapshot", "SNAPSHOT")
        return InvalidStateError(
            f"machine '{self.machine}' cannot be {action}: putting it back to {which} was cut short, and its"
            f" disks are partly written.",
            f"Put it back once more: `vmf snapshot {self.machine} restore {again}` (or another snapshot). If you have"
            f" replaced its disks yourself: `vmf snapshot {self.machine} discard-state --force`.",
        )


def _unlink(path: Path) -> bool:
    """False when there was none. Raises HomeError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise explained(error, path) from error
    return True


def _said(error: Exception) -> str:
    """What is wrong with a file whose name the message has already."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def write_durably(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
