"""What the process that runs a machine has of its home: the machine's lock, and a directory for its sockets.

The directory is the one of the machine's name in the user's runtime directory, usually. Two homes may share that (two
data directories, say), each with a machine of that name: so a process locks the directory of its sockets, and takes
the spare one, in its own data directory, when another process has it or when it cannot be made.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

import attrs
from attrs import frozen

from vmf.machine import lock as locks
from vmf.machine.files import HomeError, explained, private_directory
from vmf.machine.lock import Holder, MachineLock


@frozen
class MachinePaths:
    """Where everything of one machine is."""

    directory: Path
    definition: Path
    lock: Path
    last: Path
    logs: Path
    console_log: Path
    vmm_log: Path
    snapshots: Path
    runtime: Path

    @property
    def control_socket(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def console_socket(self) -> Path:
        return self.runtime / "console.sock"

    @property
    def console_live_socket(self) -> Path:
        return self.runtime / "console-live.sock"

    @property
    def console_client_socket(self) -> Path:
        return self.runtime / "console-client.sock"

    @property
    def sockets(self) -> tuple[Path, ...]:
        return self.control_socket, self.console_socket, self.console_live_socket, self.console_client_socket

    def at(self, runtime: Path) -> MachinePaths:
        """With the sockets in another directory."""
        return attrs.evolve(self, runtime=runtime)


class Tenure:
    """The life of one process as the one that runs a machine."""

    def __init__(self, lock: MachineLock, paths: MachinePaths, spare_runtime: Path, uuid: str) -> None:
        self.paths = paths
        self._lock = lock
        self._runtimes = (paths.runtime, spare_runtime)
        self._room = -1
        """The directory of the sockets, locked."""
        self._holder = Holder.this_process(locks.RUN, uuid=uuid)

    def settle(self) -> None:
        """Make and lock a directory for the sockets, and say in the machine's lock where it is. Raises HomeError."""
        self.close()
        usual, spare = self._runtimes
        try:
            self._room = _locked_directory(usual)
            self.paths = self.paths.at(usual)
        except (HomeError, locks.Held):
            self._room = _locked_directory(spare)  # free: the machine's own lock is ours
            self.paths = self.paths.at(spare)
        try:
            self._holder = self._lock.write(attrs.evolve(self._holder, runtime=str(self.paths.runtime)))
        except OSError as error:
            raise explained(error, self.paths.lock) from error

    def clear_sockets(self) -> None:
        """Delete what lies where the sockets are to be, or were."""
        if self._room >= 0:
            for path in self.paths.sockets:
                with suppress(OSError):  # what cannot be deleted is told when the socket is made
                    path.unlink(missing_ok=True)

    def renew(self) -> bool:
        """Make the lock's file again if it was deleted; False when another host has the machine now."""
        return self._lock.renew(self._holder)

    def note_fate(self, fate: str) -> None:
        """Why this process is about to end without giving its lock back, for people; best effort."""
        with suppress(OSError):
            self._lock.write(attrs.evolve(self._holder, fate=fate))

    def close(self) -> None:
        """Give the directory of the sockets back; idempotent."""
        room, self._room = self._room, -1
        if room >= 0:
            os.close(room)


def _locked_directory(path: Path) -> int:
    """A descriptor that keeps it locked. Raises HomeError, or Held when another process has it."""
    private_directory(path.parent)
    private_directory(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise explained(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise locks.Held from None
    except OSError:
        pass  # a file system without locks: as it was before there was this one
    return descriptor
