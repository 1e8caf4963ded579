"""The state of one host: which machines are defined, and where their processes keep sockets, pid files and logs.

`VMF_HOME` selects it; without it, definitions live in the user's data directory and sockets in the user's runtime
directory. Two homes are two hosts, as far as vmf is concerned.

    machines/NAME/machine.toml   the definition, replaced atomically, 0600 in 0700
    machines/NAME/last.json      how the last run ended
    machines/NAME/logs/          console.log (serial output) and vmm.log of the last runs
    run/NAME/                    control.sock, console.sock, console-live.sock, pid, lock of the process that runs it

Who runs: a machine's process holds a kernel lock on `run/NAME/lock` for its whole life, so two cannot start, and
writes `pid` with its start time and boot, so that a reused process id is never taken for it. A `pid` file whose
process is gone means that it died without cleaning up: the machine is "aborted".

Writers of definitions hold `machines/.lock`; readers need no lock, because a definition is replaced by rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from vmf import directories
from vmf.errors import ConfigError, InvalidStateError, NotFoundError, VmfError
from vmf.machine import config as configuration
from vmf.machine.config import MachineConfig

LOCK_SECONDS = 10.0


class HomeError(VmfError):
    """The home directory cannot be used: read-only, full, or not ours."""

    code = "home"


@frozen
class MachinePaths:
    """Where everything of one machine is."""

    definition: Path
    last: Path
    logs: Path
    console_log: Path
    vmm_log: Path
    runtime: Path
    control_socket: Path
    console_socket: Path
    console_live_socket: Path
    pid: Path
    lock: Path
    snapshots: Path


@frozen
class ProcessRecord:
    """The process that runs a machine. `start_ticks` and `boot_id` tell it from a later one of the same number."""

    pid: int
    start_ticks: int
    boot_id: str

    def alive(self) -> bool:
        """Whether exactly that process still exists (and is not just waiting to be reaped)."""
        return self.boot_id == boot_id() and _start_ticks(self.pid) == self.start_ticks


class Home:
    """One host's machines."""

    def __init__(self, data: Path, runtime: Path) -> None:
        self.data = data
        self.runtime = runtime

    @classmethod
    def default(cls) -> Home:
        """The home that `VMF_HOME` names, else the user's own."""
        root = directories.chosen_home()
        if root is not None:
            return cls(root, root / "run")
        data, base = directories.data_directory(), directories.runtime_base()
        return cls(data, data / "run" if base is None else base / directories.NAME)

    # -- paths

    def paths(self, name: str) -> MachinePaths:
        """Raises ConfigError when `name` cannot be a machine's name (so no path leaves the home)."""
        configuration.check_name(name)
        own, run = self.data / "machines" / name, self.runtime / name
        return MachinePaths(
            definition=own / "machine.toml",
            last=own / "last.json",
            logs=own / "logs",
            console_log=own / "logs" / "console.log",
            vmm_log=own / "logs" / "vmm.log",
            runtime=run,
            control_socket=run / "control.sock",
            console_socket=run / "console.sock",
            console_live_socket=run / "console-live.sock",
            pid=run / "pid",
            lock=run / "lock",
            snapshots=own / "snapshots",
        )

    # -- definitions

    def names(self) -> list[str]:
        """The machines that are defined, sorted."""
        try:
            with os.scandir(self.data / "machines") as entries:
                found = [each.name for each in entries if configuration.NAME_PATTERN.fullmatch(each.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explained(error, self.data / "machines") from error
        return sorted(name for name in found if self.paths(name).definition.is_file())

    def load(self, name: str) -> MachineConfig:
        """Raises NotFoundError, or ConfigError naming file and key."""
        path = self.paths(name).definition
        try:
            config = configuration.load(path)
        except FileNotFoundError:
            raise self._not_found(name) from None
        if config.name != name:
            raise ConfigError(
                f'{path}: name = "{config.name}" does not agree with its directory.', f'Write name = "{name}".'
            )
        return config

    def create(self, config: MachineConfig) -> None:
        """Define a new machine. Raises ConfigError when the name is taken."""
        with self._locked():
            path = self.paths(config.name).definition
            if path.exists():
                raise ConfigError(
                    f"There is a machine '{config.name}' already.",
                    f"Choose another name, or remove it with `vmf unregistervm {config.name} --delete`.",
                )
            self._write(config)

    def update(self, name: str, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        """Replace a definition by what `change` makes of it; refuses while the machine runs."""
        with self._locked():
            old = self.load(name)
            self._refuse_running(name, "modified")
            new = change(old)
            if new.name != name:
                raise ConfigError(f"The name of machine '{name}' cannot be changed.", "Create another machine.")
            self._write(new)
            return new

    def unregister(self, name: str, *, delete: bool = False) -> Path | None:
        """Forget a machine; with `delete` its definition and logs too, else the definition is kept aside.

        Returns where the definition was kept. Images and kernels are never touched.
        """
        with self._locked():
            paths = self.paths(name)
            if not paths.definition.exists():
                raise self._not_found(name)
            self._refuse_running(name, "unregistered")
            kept = paths.definition.with_name("machine.toml.unregistered")
            try:
                if delete:
                    # The definition first: a removal that is cut short leaves no half machine behind.
                    paths.definition.unlink()
                    shutil.rmtree(paths.definition.parent)
                else:
                    os.replace(paths.definition, kept)
                shutil.rmtree(paths.runtime, ignore_errors=True)
            except OSError as error:
                raise explained(error, paths.definition.parent) from error
            return None if delete else kept

    def _refuse_running(self, name: str, action: str) -> None:
        if self.process(name) is not None:
            raise InvalidStateError(
                f"Machine '{name}' is running and cannot be {action}.", f"First: vmf controlvm {name} poweroff"
            )

    def _not_found(self, name: str) -> NotFoundError:
        import difflib

        known = self.names()
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {close[0]}?" if close else f"Create it with `vmf createvm {name} ...`."
        return NotFoundError(f"There is no machine '{name}' in {self.data}.", remedy)

    def _write(self, config: MachineConfig) -> None:
        path = self.paths(config.name).definition
        text = configuration.dump(config)
        private_directory(path.parent.parent)
        new = not path.parent.exists()
        private_directory(path.parent)
        try:
            write_atomically(path, text)
        except HomeError:
            if new:  # no half machine behind
                with suppress(OSError):
                    path.parent.rmdir()
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import filelock

        directory = self.data / "machines"
        private_directory(directory)
        lock = filelock.FileLock(directory / ".lock", timeout=LOCK_SECONDS, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise HomeError(
                f"Another vmf command has kept {directory} locked for {LOCK_SECONDS:.0f} seconds.", "Try again."
            ) from None
        except OSError as error:
            raise explained(error, directory) from error
        try:
            yield
        finally:
            lock.release()

    # -- processes

    def process(self, name: str) -> ProcessRecord | None:
        """The living process that runs the machine, or None."""
        record = self._record(name)
        return record if record is not None and record.alive() else None

    def aborted(self, name: str) -> bool:
        """Whether the machine's last process died without cleaning up."""
        record = self._record(name)
        return record is not None and not record.alive()

    def running(self) -> list[str]:
        """The machines that have a living process, sorted."""
        return [name for name in self.names() if self.process(name) is not None]

    def last_run(self, name: str) -> dict[str, Any]:
        """What the last run left behind: {"state", "detail", "at" (seconds since the epoch)}, or {}."""
        try:
            found = json.loads(self.paths(name).last.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def resting_state(self, name: str) -> str:
        """The state of a machine that has no process: "poweredoff", "aborted", "teleported", "failed" or "uncertain".

        The last: it was handed over to another host, which did not confirm it.
        """
        if (self.paths(name).definition.parent / "teleports").exists():
            from vmf.machine.journal import in_doubt, left

            if in_doubt(self, name) is not None:
                return "uncertain"
            if self.aborted(name) and left(self, name):
                return "teleported"  # its process died just when it was about to end
        if self.aborted(name):
            return "aborted"
        return str(self.last_run(name).get("state", "poweredoff"))

    def _record(self, name: str) -> ProcessRecord | None:
        try:
            fields = json.loads(self.paths(name).pid.read_text("utf-8"))
            return ProcessRecord(int(fields["pid"]), int(fields["start_ticks"]), str(fields["boot_id"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            # Cut short by a crash of the host: nobody we know runs it.
            return ProcessRecord(0, -1, "")

    @contextmanager
    def own(self, name: str) -> Iterator[MachinePaths]:
        """Be the process that runs the machine: take its lock, recover stale sockets, write the pid file.

        Raises InvalidStateError when another process runs it. Leaving the context cleans up.
        """
        paths = self.paths(name)
        private_directory(self.runtime)
        private_directory(paths.runtime)
        private_directory(paths.logs)
        try:
            descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise explained(error, paths.lock) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                record = self._record(name)
                by = f" (process {record.pid})" if record is not None and record.pid else ""
                raise InvalidStateError(
                    f"Machine '{name}' is running already{by}.", f"See `vmf showvminfo {name}`."
                ) from None
            if self.aborted(name) and (state := self.resting_state(name)) != "uncertain":
                self.record_end(name, state)  # told by the traces that go now; a doubt is in the journal
            sockets = (paths.control_socket, paths.console_socket, paths.console_live_socket)
            for stale in sockets:
                stale.unlink(missing_ok=True)
            pid = os.getpid()
            record = ProcessRecord(pid, _start_ticks(pid) or 0, boot_id())
            write_atomically(paths.pid, json.dumps(attrs.asdict(record)))
            try:
                yield paths
            finally:
                for ours in (*sockets, paths.pid):
                    ours.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def record_end(self, name: str, state: str, detail: str = "") -> None:
        """Remember how a run ended, for `showvminfo`."""
        ended = {"state": state, "detail": detail, "at": int(time.time())}
        write_atomically(self.paths(name).last, json.dumps(ended))


def private_directory(path: Path) -> None:
    """Make sure of a directory that only we can enter. Raises HomeError when it is somebody else's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            remedy = "Set VMF_HOME to a directory of your own."
            raise HomeError(f"{path} belongs to user {status.st_uid}, not to you.", remedy)
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise explained(error, path) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old or the new one, complete. Mode 0600."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise explained(error, path) from error


def explained(error: OSError, path: Path) -> HomeError:
    """What the system said about a file, for people."""
    place = "Set VMF_HOME to a directory that you can write to."
    remedies = {
        errno.EROFS: ("is on a read-only file system", place),
        errno.EACCES: ("cannot be written: permission denied", place),
        errno.EPERM: ("cannot be written: not permitted", place),
        errno.ENOSPC: ("cannot be written: the disk is full", "Free some space and try again; nothing was changed."),
        errno.EDQUOT: (
            "cannot be written: your quota is used up",
            "Free some space and try again; nothing was changed.",
        ),
        errno.ENOTDIR: ("cannot be made: something on its path is not a directory", place),
        errno.EEXIST: ("is there, but is not a directory", place),
    }
    reason, remedy = remedies.get(error.errno or 0, (f"cannot be used: {error.strerror or error}", place))
    return HomeError(f"{path} {reason}.", remedy)


def boot_id() -> str:
    """Names the time since the host's last start; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """When the process started (proc(5), /proc/PID/stat field 22, clock ticks since boot); None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name, in parentheses, may contain anything.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])
