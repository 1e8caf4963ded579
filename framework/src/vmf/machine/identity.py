"""Whose a machine's directory is, and whose each file in it is: a machine's identity is its UUID, not its name.

Everything that lies beside a definition says which machine it is of, in a key "uuid". What is of another machine (its
definition was replaced by hand, say) has no part in any decision; `strangers` tells people of it.

`identity.json` says the same of the directory: which machine, where it was, and under which inode number. A directory
that was copied brings the file along, and its own place contradicts it. So one that finds its original elsewhere, or
was made on another host, is a copy, and does not start before a person has said which of the two is the machine
(`vmf modifyvm NAME --uuid new|keep`): else two of it could run. One whose original has gone was moved.

What an earlier vmf left has neither. There only `vmf unregistervm` mixed two machines in one directory, and it left
`machine.toml.unregistered` behind, which changed (its ctime) at that moment: what is older is of that earlier machine,
everything else of the one that is defined. `identity.json` then keeps the names of what was taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from vmf import host
from vmf.errors import InvalidStateError
from vmf.machine.files import write_atomically
from vmf.reading import read_record, read_text

FILE = "identity.json"
DEFINITION = "machine.toml"
EARLIER = "machine.toml.unregistered"
"""What an earlier vmf called the definition of a machine that it forgot."""
_ALONE = ("resume.json", "restoring.json", "last.json")
_MANY = ("teleports/*.json", "snapshots/*/snapshot.json")


@frozen
class Identity:
    """What `identity.json` says.

    Attributes:
        uuid: of the machine.
        directory: where it was, without symbolic links.
        inode: of the directory.
        host, machine_id, boot_id: where that was written.
        adopted: files of this machine, below the directory, that bear no UUID.
    """

    uuid: str
    directory: str = ""
    inode: int = 0
    host: str = ""
    machine_id: str = ""
    boot_id: str = ""
    adopted: tuple[str, ...] = ()

    @property
    def same_host(self) -> bool:
        return host.is_this(self.host, self.machine_id, self.boot_id)


@frozen
class Owner:
    """The machine of a directory, for asking whose its files are."""

    directory: Path
    uuid: str
    adopted: frozenset[str] = frozenset()

    @classmethod
    def of(cls, directory: Path) -> Owner:
        """As definition and identity say; disturbs nothing."""
        uuid = uuid_in(directory / DEFINITION)
        kept = read(directory)
        if kept is not None:
            return cls(directory, uuid, frozenset(kept.adopted) if kept.uuid == uuid else frozenset())
        return cls(directory, uuid, frozenset(_adoptable(directory)))

    def owns(self, path: Path, stamp: Any) -> bool:
        """Whether a file in the directory that bears the UUID `stamp` is of this machine.

        While the definition itself cannot be read everything counts: a doubt, say, must not vanish meanwhile.
        """
        if not self.uuid:
            return True
        if isinstance(stamp, str) and stamp:
            return stamp == self.uuid
        return str(path.relative_to(self.directory)) in self.adopted


def uuid_in(definition: Path) -> str:
    """The UUID of a definition; "" when it has none, or cannot be read."""
    try:
        found = tomllib.loads(read_text(definition)).get("uuid")
    except (OSError, ValueError):
        return ""
    return found if isinstance(found, str) else ""


def read(directory: Path) -> Identity | None:
    """None when there is none, or none that says anything."""
    try:
        fields = read_record(directory / FILE)
        known = {each.name: fields[each.name] for each in attrs.fields(Identity) if each.name in fields}
        return Identity(**known | {"adopted": tuple(map(str, known.get("adopted", ())))})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(directory: Path, uuid: str, *, adopt: bool = True) -> None:
    """Say that the directory is that machine's, here; `adopt`: with what an earlier vmf wrote. Raises HomeError."""
    before = read(directory)
    owner = Owner.of(directory)
    adopted = tuple(sorted(owner.adopted)) if adopt and owner.uuid == uuid else ()
    fresh = Identity(
        uuid=uuid,
        directory=os.path.realpath(directory),
        inode=directory.stat().st_ino,
        host=host.host_name(),
        machine_id=host.machine_id(),
        boot_id=host.boot_id(),
        adopted=adopted,
    )
    if before is None or attrs.evolve(before, boot_id=fresh.boot_id) != fresh:
        write_atomically(directory / FILE, json.dumps(attrs.asdict(fresh), indent=2) + "\n")


def original(directory: Path, uuid: str) -> Identity | None:
    """What this directory was copied from; None when it is no copy of a machine's directory."""
    kept = read(directory)
    if kept is None or kept.uuid != uuid:
        return None
    status = directory.stat()
    with _opened(directory) as descriptor:
        same_inode = host.keeps_numbers(descriptor) and status.st_ino == kept.inode
        could_tell = host.keeps_numbers(descriptor)
    if kept.directory == os.path.realpath(directory):
        return None if kept.same_host or same_inode or not could_tell else kept
    if _is_another(Path(kept.directory), status, uuid):
        return kept
    return None if kept.same_host or same_inode else kept


def refuse_copy(name: str, directory: Path, uuid: str, twins: list[str]) -> None:
    """Raise InvalidStateError when running this directory's machine could make two of it.

    `twins`: other machines of the home with the same UUID.
    """
    source = original(directory, uuid)
    if source is not None:
        where = source.directory + ("" if source.same_host else f" on host {_printable(source.host)}")
    elif twins and read(directory) is None:
        where = f"machine '{twins[0]}'"  # which of the two is the copy cannot be told
    else:
        return
    raise InvalidStateError(
        f"Machine '{name}' has the UUID {uuid} of {_printable(where)}, of which its directory is a copy: the same "
        "machine must not run twice.",
        f"To make it a machine of its own: `vmf modifyvm {name} --uuid new`. If the other one is gone, and this is the "
        f"machine now: `vmf modifyvm {name} --uuid keep`.",
    )


def refuse_both(name: str, directory: Path, source: Identity | None, twins: list[str]) -> None:
    """Raise InvalidStateError when what `original` found, or a machine with the same UUID, is still there."""
    other = ""
    if twins:
        other = f"machine '{twins[0]}'"
    elif source is not None and _is_another(Path(source.directory), directory.stat(), source.uuid):
        other = source.directory
    if other:
        raise InvalidStateError(
            f"{_printable(other)} is there still, with the UUID of machine '{name}': both could run.",
            f"Unregister that one first, or make this one a machine of its own: `vmf modifyvm {name} --uuid new`.",
        )


def strangers(directory: Path) -> list[Path]:
    """What lies in a machine's directory and is of another machine."""
    owner = Owner.of(directory)
    found = [path for path, stamp in _stamped(directory) if not owner.owns(path, stamp)]
    earlier = directory / EARLIER
    return sorted([*found, *([earlier] if earlier.exists() else [])])


def _stamped(directory: Path) -> Iterator[tuple[Path, Any]]:
    """Every file that bears a UUID, with what it bears."""
    for path in (*(directory / name for name in _ALONE), *(path for many in _MANY for path in directory.glob(many))):
        try:
            stamp = read_record(path).get("uuid")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            stamp = None
        yield path, stamp


def _adoptable(directory: Path) -> list[str]:
    """What an earlier vmf wrote for the machine that is defined now."""
    forgotten_at = 0
    with contextlib.suppress(OSError):
        forgotten_at = (directory / EARLIER).stat().st_ctime_ns
    names = []
    for path, stamp in _stamped(directory):
        with contextlib.suppress(OSError):
            if not stamp and path.stat().st_mtime_ns > forgotten_at:
                names.append(str(path.relative_to(directory)))
    return names


def _is_another(place: Path, ours: os.stat_result, uuid: str) -> bool:
    """Whether the machine is in another directory, too."""
    try:
        if os.path.samestat(place.stat(), ours):
            return False  # this one, by another path
        return uuid_in(place / DEFINITION) == uuid
    except PermissionError:
        return True  # it is there, and not ours to look into
    except OSError:
        return False


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:400]
