"""Machines that were unregistered, kept whole: `unregistered/NAME.TIME.UUID` in the home's data directory.

A machine's directory is set aside as it is, with its snapshots, its journal and its logs, by one rename to a name that
is not taken. So a new machine of that name finds nothing of the earlier one, and the earlier one can come back.

Every function here is called with the home locked.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from vmf.errors import ConfigError, InvalidStateError, NotFoundError
from vmf.machine import config as configuration
from vmf.machine import identity
from vmf.machine import lock as locks
from vmf.machine.files import HomeError, explained, private_directory
from vmf.machine.identity import DEFINITION, EARLIER

if TYPE_CHECKING:
    from vmf.machine.config import MachineConfig
    from vmf.machine.home import Home

FOLDER = "unregistered"


def directories(home: Home) -> list[Path]:
    """Of every machine that was set aside."""
    try:
        return sorted(path for path in (home.data / FOLDER).iterdir() if path.is_dir())
    except OSError:
        return []


def set_aside(home: Home, directory: Path, name: str, uuid: str) -> Path:
    """Move a machine's directory out of the way; where it is now. Raises HomeError."""
    shelf = home.data / FOLDER
    private_directory(shelf)
    stem = f"{name}.{time.strftime('%Y%m%dT%H%M%S')}" + (f".{uuid[:8]}" if uuid else "")
    place, number = shelf / stem, 1
    while os.path.lexists(place):
        number += 1
        place = shelf / f"{stem}.{number}"
    try:
        if directory.is_symlink():  # the link is ours, what it names stays where it is
            os.symlink(os.path.realpath(directory), place)
            directory.unlink()
        else:
            os.rename(directory, place)
    except OSError as error:
        raise explained(error, directory) from error
    return place


def clear(home: Home, name: str) -> Path | None:
    """Set aside what lies where machine `name` is to be, and is none; where that is now, None for nothing.

    Raises InvalidStateError when a process still has it.
    """
    paths = home.paths(name)
    directory = paths.directory
    try:
        left = sorted(os.listdir(directory))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explained(error, directory) from error
    if [each for each in left if each != locks.FILE] == []:
        return None
    if locks.look(directory, paths.runtime).locked:
        raise InvalidStateError(
            f"There is a process at work in {directory}, where machine '{name}' is to be.",
            "Its definition was removed: end that process, or put its definition back.",
        )
    kept = identity.read(directory)
    return set_aside(home, directory, name, kept.uuid if kept is not None else "")


def refuse_loss(home: Home, name: str) -> None:
    """Raise InvalidStateError when deleting a machine would lose more than a machine that is switched off."""
    from vmf.machine.journal import in_doubt, refuse_unreadable
    from vmf.machine.snapshot_store import SnapshotStore

    refuse_unreadable(home, name)
    entry = in_doubt(home, name)
    if entry is not None:
        raise InvalidStateError(
            f"Machine '{name}' was handed over to {entry.peer}, which did not confirm that: with it the note would be "
            "deleted that keeps it from running twice.",
            f"First resolve that teleport: `vmf controlvm {name} teleport --status`. Or unregister it without "
            "--delete, which keeps everything.",
        )
    store = SnapshotStore(name, home.paths(name).snapshots)
    if restoring := store.restoring():
        raise InvalidStateError(
            f"Putting machine '{name}' back to snapshot '{restoring}' was cut short: without that snapshot its disks, "
            "which are partly written, would be lost.",
            f"Put it back once more: `vmf snapshot {name} restore {restoring}`. Or unregister it without --delete, "
            "which keeps everything.",
        )
    if resuming := store.resuming():
        raise InvalidStateError(
            f"The next start of machine '{name}' continues from snapshot '{resuming}': the memory of the guest, which "
            "has not been switched off, would be lost.",
            f"Give that up first: `vmf snapshot {name} discard-state`. Or unregister it without --delete, which keeps "
            "everything.",
        )


def refuse_orphans(home: Home, name: str) -> None:
    """Raise InvalidStateError when a machine that is no copy would not own its snapshots under another UUID."""
    from vmf.machine.snapshot_store import SnapshotStore

    refuse_loss(home, name)
    snapshots = SnapshotStore(name, home.paths(name).snapshots).names()
    if snapshots:
        raise InvalidStateError(
            f"Machine '{name}' is no copy, and under another UUID its snapshots ({', '.join(snapshots)}) would not be "
            "its own.",
            f"Delete them first: `vmf snapshot {name} delete {snapshots[0]}`.",
        )


def delete(home: Home, place: Path) -> Path | None:
    """Delete a machine that was set aside. What is of other machines is kept; where, None for nothing."""
    others = identity.strangers(place)
    kept = None
    try:
        if others:
            kept = place.with_name(f"{place.name}.others")
            private_directory(kept)
            for path in others:
                if path.name == "snapshot.json":
                    path = path.parent
                target = kept / path.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, target)
        shutil.rmtree(os.path.realpath(place))
        if place.is_symlink():
            place.unlink()
    except OSError as error:
        raise explained(error, place) from error
    return kept


def bring_back(home: Home, path: Path, name: str | None) -> MachineConfig:
    """Make a machine of a directory that was set aside, or of a definition. Raises VmfError, and nothing happened."""
    if not path.exists():
        raise NotFoundError(f"There is no {path}.", f"What was unregistered is in {home.data / FOLDER}.")
    source = path
    if path.is_dir():
        source = next((each for each in (path / DEFINITION, path / EARLIER) if each.exists()), path / DEFINITION)
    try:
        found = configuration.load(source)
    except FileNotFoundError:
        raise NotFoundError(f"{path} has no {DEFINITION}: it is no machine's directory.") from None
    config = attrs.evolve(found, name=name or found.name)
    target = home.paths(config.name).directory
    if os.path.lexists(target / DEFINITION):
        raise ConfigError(f"There is a machine '{config.name}' already.", "Give this one another name: `--name NAME`.")
    twins = home.twins(config.name, config.uuid)
    if twins:
        raise ConfigError(
            f"Machine '{twins[0]}' has the UUID {config.uuid} as well: it is the same machine.",
            f"Unregister that one first, or make it another machine: `vmf modifyvm {twins[0]} --uuid new`.",
        )
    if path.is_dir():
        _move_in(home, path, source, target, config)
    else:
        clear(home, config.name)
        home.write(config)
    return config


def _move_in(home: Home, path: Path, source: Path, target: Path, config: MachineConfig) -> None:
    paths = home.paths(config.name)
    try:
        lock = locks.MachineLock(path, paths.runtime)
    except locks.Held:
        raise InvalidStateError(f"There is a process at work in {path}.", "End it first.") from None
    except (OSError, locks.NoLocks) as error:
        raise explained(error if isinstance(error, OSError) else OSError(), path) from error
    moved = os.path.realpath(path) != os.path.realpath(target)
    try:
        if moved:
            clear(home, config.name)
            if target.exists():  # it holds nothing but a lock's file
                shutil.rmtree(target)
            private_directory(target.parent)
            os.rename(path, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise HomeError(
                f"{path} is on another file system than {target.parent}.",
                f"Copy it: `cp -a {path} {target}`, then `vmf modifyvm {config.name} --uuid keep`.",
            ) from error
        raise explained(error, path) from error
    finally:
        lock.abandon()
    if source.name == EARLIER:
        os.rename(target / EARLIER, target / DEFINITION)
    try:
        # Its identity stays as it is: should this be a copy, its next start says so.
        home.write(config, identify=False)
    except HomeError:  # a full disk, say: all is where it was
        if source.name == EARLIER:
            os.rename(target / DEFINITION, target / EARLIER)
        if moved:
            os.rename(target, path)
        raise
