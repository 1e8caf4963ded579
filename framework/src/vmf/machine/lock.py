"""The lock of one machine: who runs or changes it, told by what cannot vanish while that process lives.

Theory of operation. A machine's directory, the one with `machine.toml`, is locked in two ways by the process
that runs or changes the machine, for exactly as long:

- the directory itself, by flock(2): it reaches every process on this host, in whatever namespace or container, and no
  deletion of a file in it undoes it. To be seen without being disturbed (a test of a flock is to take it), the holder
  has a shared record lock on the directory, too.
- the file `lock` in it, by an open file description lock (fcntl(2), F_OFD_SETLK): on NFS and SMB the server keeps it,
  so it reaches other hosts.

The kernel frees both however the process ends. The file also says who it is: host, boot, process, and where its
sockets are. Process ids are for messages only. A process that ends in order empties the file, so a text in a file
that is not locked tells that its writer died. If that one was on another host, and the directory is on a file system
that hosts share, the text may just as well mean that locks do not reach this far (NFS `nolock`, sshfs) or that the
host is cut off: then a person has to decide (`vmf unlockvm`).

A process of a vmf that did not have this lock yet is found by the flock that it has on `lock` in its runtime
directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, frozen

from vmf import host, record_locks
from vmf.errors import InvalidStateError
from vmf.machine.files import HomeError
from vmf.reading import read_record

FILE = "lock"
RUN = "run"
"""What `Holder.doing` says of the process that runs the machine."""
BRIEF = ("modify", "unregister")
"""Of a command that has the lock for moments, for which others wait."""
WAIT_S = 10.0
"""For such a command."""
NAMELESS_S = 1.0
"""For a process that has not said yet what it does: it may be such a command."""
_POLL_S = 0.01
_UNNAMED_S = 0.2
"""Between its locking and its writing who it is a process is held up for moments only."""
_BYTE = 1 << 61
"""The byte that is locked, far behind the text: SMB's locks keep others from reading what they cover."""
_NO_LOCKS = record_locks.NO_LOCKS | {errno.EBADF}
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""How the lock's file is opened to look at it: where something else lies in its place, that must not be waited for."""
_NO_FILE = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO})
"""What opening something else tells: a directory, a symbolic link, a socket."""


class NoLocks(Exception):
    """The file system of a machine's directory has no locks at all."""


class Held(Exception):
    """Another process has the machine's lock."""


@frozen
class Holder:
    """The process that has, or had, a machine's lock.

    Attributes:
        doing: "run", or what it changes.
        pid: as its own PID namespace numbers it; 0 when it is not known.
        namespace: of that number.
        host, machine_id, boot_id: where it runs.
        shared: it saw the directory on a file system that hosts share.
        runtime: the directory with its sockets, "" when it has none.
        since_ns: when it began, by the clock of the directory's file system.
        uuid: of the machine.
        fate: why it ended without giving the lock back, where it could still say so.
    """

    doing: str = RUN
    pid: int = 0
    namespace: int = 0
    host: str = ""
    machine_id: str = ""
    boot_id: str = ""
    shared: bool = False
    runtime: str = ""
    since_ns: int = 0
    uuid: str = ""
    fate: str = ""

    @classmethod
    def this_process(cls, doing: str, **details: Any) -> Holder:
        return cls(
            doing=doing,
            pid=os.getpid(),
            namespace=host.pid_namespace(),
            host=host.host_name(),
            machine_id=host.machine_id(),
            boot_id=host.boot_id(),
            **details,
        )

    @property
    def same_boot(self) -> bool:
        """It is, or was, a process of the kernel that runs here."""
        return bool(self.boot_id) and self.boot_id == host.boot_id()

    @property
    def same_host(self) -> bool:
        """It is, or was, a process of this host, perhaps before its last start."""
        return host.is_this(self.host, self.machine_id, self.boot_id)

    @property
    def where(self) -> str:
        """For messages: "process 17", with what makes the number meaningful elsewhere; "" when nothing is known."""
        if not self.pid:
            return ""
        text = f"process {self.pid}"
        if not self.same_host:
            return f"{text} on host {printable(self.host)}"
        return text if self.namespace in (0, host.pid_namespace()) else f"{text} of another PID namespace"


@frozen
class Sight:
    """What can be seen of a machine's lock.

    Attributes:
        locked: a process has it.
        holder: who has it, or who had it and did not end in order; None when there is none, or none known.
        shared: hosts share the directory's file system.
    """

    locked: bool
    holder: Holder | None
    shared: bool = False

    @property
    def running(self) -> Holder | None:
        """The process that runs the machine."""
        if not self.locked:
            return None
        holder = self.holder or Holder()  # its file was deleted: it writes it again
        return holder if holder.doing == RUN else None

    @property
    def left(self) -> Holder | None:
        """Who ran the machine and died."""
        return self.holder if not self.locked and self.holder is not None and self.holder.doing == RUN else None

    @property
    def elsewhere(self) -> Holder | None:
        """Who ran the machine on another host, and may run it still: nothing here can tell."""
        left = self.left
        return left if left is not None and not left.same_host and (self.shared or left.shared) else None


def look(directory: Path, runtime: Path) -> Sight:
    """What the lock says; disturbs no other process. `runtime`: where one of an earlier vmf would have its lock."""
    end = time.monotonic() + _UNNAMED_S
    while True:
        seen = _look_at_both(directory, runtime)
        if not seen.locked or seen.holder is not None or time.monotonic() > end:
            return seen
        time.sleep(_POLL_S)


def _look_at_both(directory: Path, runtime: Path) -> Sight:
    seen = _look(directory)
    return seen if seen.locked or seen.holder is not None else _look_earlier(runtime, seen)


def _look(directory: Path) -> Sight:
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return Sight(False, None)
    try:
        shared, locked, holder = host.is_shared(folder), _is_locked(folder), None
        with contextlib.suppress(OSError):
            file = os.open(FILE, _LOOK, dir_fd=folder)
            try:
                # The text first: when it is then found unlocked, its writer cannot have ended in order meanwhile.
                holder = _read(file)
                locked = locked or _is_locked(file)
                if holder is not None and not locked:
                    holder = _read(file)
            finally:
                os.close(file)
        return Sight(locked, holder, shared)
    finally:
        os.close(folder)


def _look_earlier(runtime: Path, seen: Sight) -> Sight:
    """A process of a vmf that kept lock and process id in its runtime directory."""
    try:
        fields, since = read_record(runtime / "pid"), (runtime / "pid").stat().st_mtime_ns
        pid, boot = int(fields["pid"]), str(fields["boot_id"])
        holder = Holder(pid=pid, boot_id=boot, runtime=str(runtime), since_ns=since)
    except OSError:  # there is none, or no such directory, or it is another user's
        return seen
    except (ValueError, KeyError, TypeError):
        holder = Holder()
    try:
        file = os.open(runtime / "lock", _LOOK)
    except OSError:
        return evolve(seen, holder=holder)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return evolve(seen, locked=True, holder=holder)
    finally:
        os.close(file)
    return evolve(seen, holder=holder)


class MachineLock:
    """A machine's lock, held by this object until `release`."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        """Take it. Raises Held, NoLocks, OSError; HomeError when its file is no file."""
        self._file = -1
        self._path = directory / FILE
        self._earlier: Holder | None = None
        self._folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reach = self._lock_folder()
            if not os.path.samestat(os.stat(directory), os.fstat(self._folder)):
                raise Held  # by who moved it away between our opening and our locking
            self._file, reaches_far = self._lock_file()
            if not (reach or reaches_far):
                raise NoLocks(str(directory))
            if _read(self._file) is None:
                earlier = _look_earlier(runtime, Sight(False, None))
                if earlier.locked:
                    raise Held
                self._earlier = earlier.holder
        except BaseException:
            self.abandon()
            raise
        self.shared = host.is_shared(self._folder)

    def _lock_folder(self) -> bool:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Held from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        with contextlib.suppress(OSError):  # then only the file's lock is seen
            record_locks.lock(self._folder, _BYTE, exclusive=False)
        return True

    def _lock_file(self) -> tuple[int, bool]:
        """The file's descriptor, and whether it could be locked."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            try:
                file = os.open(FILE, flags, 0o600, dir_fd=self._folder)
            except OSError as error:
                if error.errno in _NO_FILE:
                    raise self._no_file() from None
                raise
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    os.close(file)
                    raise self._no_file()
                if not record_locks.lock(file, _BYTE, exclusive=True):
                    raise Held
                if self._in_place(file):
                    return file, True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return file, False
                os.close(file)
                raise
            except Held:
                os.close(file)
                raise
            os.close(file)  # it was deleted between our opening and our locking

    def _no_file(self) -> HomeError:
        return HomeError(f"{self._path} is a link, a directory or a pipe, not a file.", "Delete it: vmf makes it anew.")

    def _in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(FILE, dir_fd=self._folder, follow_symlinks=False), os.fstat(file))
        except OSError:
            return False

    def sight(self) -> Sight:
        """What was left there by who had it before."""
        return Sight(False, self._earlier or _read(self._file), self.shared)

    def write(self, holder: Holder) -> Holder:
        """Say who has it, durably; what was said, with `since_ns` filled in. Raises OSError."""
        holder = evolve(holder, shared=self.shared)
        if not holder.since_ns:
            self._put(holder)
            holder = evolve(holder, since_ns=os.fstat(self._file).st_mtime_ns)
        self._put(holder)
        os.fsync(self._file)
        return holder

    def _read_anew(self) -> Holder | None:
        """On NFS a host looks at the server when a file is opened."""
        file = os.open(FILE, _LOOK, dir_fd=self._folder)
        try:
            return _read(file)
        finally:
            os.close(file)

    def _put(self, holder: Holder) -> None:
        # In place, as the lock is on this very file. A reader that meets half of it reads again.
        line = json.dumps(attrs.asdict(holder)).encode() + b"\n"
        os.pwrite(self._file, line, 0)
        os.ftruncate(self._file, len(line))

    def renew(self, holder: Holder) -> bool:
        """Make sure that the file is there and says who has the lock; False when another process has it now.

        Raises OSError. That may be so after `break_lock` on another host.
        """
        if self._in_place(self._file):
            found = self._read_anew()
            if found is not None and found.pid and found != evolve(holder, shared=self.shared):
                return False
            if found is None or not found.pid:
                self.write(holder)
            return True
        try:
            file, _ = self._lock_file()
        except Held:
            return False
        before, self._file = self._file, file
        os.close(before)
        self.write(holder)
        return True

    def release(self) -> None:
        """This process ended in order."""
        with contextlib.suppress(OSError):  # of a full disk, say: that it is unlocked says nearly as much
            os.ftruncate(self._file, 0)
        self.abandon()

    def abandon(self) -> None:
        """Give it back with what was left there before."""
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._folder = -1


def take(directory: Path, runtime: Path) -> MachineLock:
    """The lock of the machine in `directory`; waits for a command that has it for moments. Raises Held, OSError."""
    began = time.monotonic()
    while True:
        try:
            return MachineLock(directory, runtime)
        except Held:
            seen, patience = _look_at_both(directory, runtime), WAIT_S
            if seen.locked and seen.holder is None:
                patience = NAMELESS_S
            elif seen.locked and seen.holder is not None and seen.holder.doing not in BRIEF:
                raise
            if time.monotonic() - began > patience:
                raise
            time.sleep(_POLL_S)


def break_lock(directory: Path, runtime: Path) -> Holder | None:
    """Take the lock from a process on another host; who had it, if any. Raises Held by one of this host."""
    try:
        lock = MachineLock(directory, runtime)
    except Held:
        holder = _look(directory).running
        if holder is None or holder.same_host or _is_locked_here(directory):
            raise
        # Its lock is on the file, at the server: on another file there is none. It finds out, and stands still.
        os.unlink(directory / FILE)
        lock = MachineLock(directory, runtime)
    else:
        holder = lock.sight().elsewhere
        if holder is None:
            lock.abandon()
            return None
    lock.release()
    return holder


def refusal(name: str, holder: Holder | None, action: str = "") -> InvalidStateError:
    """Why a machine cannot be started (or, by `action`, "modified", say): another process has its lock."""
    by = f" ({holder.where})" if holder is not None and holder.where else ""
    if holder is not None and holder.doing != RUN:
        return InvalidStateError(
            f"Another command is at work on machine '{name}'{by}: {holder.doing}.", "Wait until it has ended."
        )
    if action:
        return InvalidStateError(
            f"Machine '{name}' is running{by} and cannot be {action}.", f"First: vmf controlvm {name} poweroff"
        )
    return InvalidStateError(f"Machine '{name}' is running already{by}.", f"See `vmf showvminfo {name}`.")


def refusal_elsewhere(name: str, holder: Holder) -> InvalidStateError:
    """Why a machine cannot be started or changed: another host may run it."""
    return InvalidStateError(
        f"Machine '{name}' was started on host {printable(holder.host)} (process {holder.pid}) and has not ended there "
        "as far as can be seen here: that host may run it still.",
        f"Power it off there. If that process is gone for good: `vmf unlockvm {name}`.",
    )


def printable(text: str) -> str:
    """What another host wrote cannot move the cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)[:200]


def _is_locked_here(directory: Path) -> bool:
    """Whether a process of this kernel has the directory."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _is_locked(folder)
    finally:
        os.close(folder)


def _read(file: int) -> Holder | None:
    for _ in range(5):
        line, newline, _rest = os.pread(file, 1 << 16, 0).partition(b"\n")
        if not line and not newline:
            return None
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            fields = json.loads(line)
            known: dict[str, Any] = {each.name: type(each.default) for each in attrs.fields(Holder)}
            found: dict[str, Any] = {key: value for key, value in fields.items() if type(value) is known.get(key)}
            return Holder(**found)
        time.sleep(0.001)  # it is being written
    return Holder()  # cut short by a crash of the host


def _is_locked(descriptor: int) -> bool:
    try:
        return record_locks.is_locked(descriptor, _BYTE)
    except OSError:
        return False
