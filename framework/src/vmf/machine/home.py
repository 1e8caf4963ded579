"""The state of one host: which machines are defined, and where their processes keep sockets and logs.

`VMF_HOME` selects it; without it, definitions live in the user's data directory and sockets in the user's runtime
directory. Two homes are two hosts, as far as vmf is concerned.

    machines/NAME/machine.toml   the definition, replaced atomically, 0600 in 0700
    machines/NAME/identity.json  which machine the directory belongs to: see `vmf.machine.identity`
    machines/NAME/lock           who runs or changes it: see `vmf.machine.lock`
    machines/NAME/last.json      how the last run ended
    machines/NAME/logs/          console.log (serial output) and vmm.log of the last runs
    unregistered/NAME.TIME.UUID  the directory of a machine that was unregistered: see `vmf.machine.shelf`
    run/NAME/                    control.sock, console.sock, console-live.sock of the process that runs it

Who runs: a machine's process holds the lock in the machine's directory for its whole life, and says there where its
sockets are. That lock is the only truth. What its writer did not clean up means that it died: the machine is "aborted".

Writers of definitions hold `machines/.lock` and the machine's lock; readers need none, because a definition is replaced
by rename.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from vmf import directories
from vmf.errors import ConfigError, NotFoundError
from vmf.machine import config as configuration
from vmf.machine import death
from vmf.machine import lock as locks
from vmf.machine.config import MachineConfig
from vmf.machine.files import HomeError as HomeError
from vmf.machine.files import explained as explained
from vmf.machine.files import private_directory as private_directory
from vmf.machine.files import write_atomically as write_atomically
from vmf.machine.lock import Holder, MachineLock, Sight

LOCK_SECONDS = 10.0


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
    def sockets(self) -> tuple[Path, Path, Path]:
        return self.control_socket, self.console_socket, self.console_live_socket

    def at(self, runtime: Path) -> MachinePaths:
        """With the sockets in another directory."""
        return attrs.evolve(self, runtime=runtime)


class Tenure:
    """What the process that runs a machine has of its home: the machine's lock, and a place for its sockets."""

    def __init__(self, lock: MachineLock, paths: MachinePaths, spare_runtime: Path) -> None:
        self.paths = paths
        self._lock = lock
        self._spare_runtime = spare_runtime
        self._holder = Holder.this_process(locks.RUN)

    def settle(self) -> None:
        """Make the directory of the sockets, and say in the lock where it is. Raises HomeError.

        The usual directory may be gone for good: the one of a user who has logged out, say. Then another one is used.
        """
        try:
            self._make(self.paths.runtime)
        except HomeError:
            if self.paths.runtime == self._spare_runtime:
                raise
            self._make(self._spare_runtime)
            self.paths = self.paths.at(self._spare_runtime)
        try:
            self._holder = self._lock.write(attrs.evolve(self._holder, runtime=str(self.paths.runtime)))
        except OSError as error:
            raise explained(error, self.paths.lock) from error

    @staticmethod
    def _make(runtime: Path) -> None:
        private_directory(runtime.parent)
        private_directory(runtime)

    def renew(self) -> bool:
        """Make the lock's file again if somebody has deleted it; False when another host has the machine now."""
        return self._lock.renew(self._holder)


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
        own = self.data / "machines" / name
        return MachinePaths(
            directory=own,
            definition=own / "machine.toml",
            last=own / "last.json",
            logs=own / "logs",
            console_log=own / "logs" / "console.log",
            vmm_log=own / "logs" / "vmm.log",
            runtime=self.runtime / name,
            lock=own / locks.FILE,
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
        with self._locked(), self.changing(name, "modify", "modified"):
            old = self.load(name)
            new = change(old)
            if new.name != name:
                raise ConfigError(f"The name of machine '{name}' cannot be changed.", "Create another machine.")
            self._write(new)
            return new

    def unregister(self, name: str, *, delete: bool = False) -> Path | None:
        """Forget a machine; with `delete` its definition and logs too, else the definition is kept aside.

        Returns where the definition was kept. Images and kernels are never touched.
        """
        with self._locked(), self.changing(name, "unregister", "unregistered") as paths:
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

    def sight(self, name: str) -> Sight:
        """What the machine's lock says."""
        paths = self.paths(name)
        return locks.look(paths.directory, paths.runtime)

    def process(self, name: str) -> Holder | None:
        """The process that runs the machine, or None."""
        return self.sight(name).running

    def aborted(self, name: str) -> bool:
        """Whether the machine's last process died without cleaning up."""
        return self.sight(name).left is not None

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
        """The state of a machine that has no process.

        "poweredoff", "aborted", "teleported" or "failed"; "uncertain": it was handed over to another host, which did
        not confirm it; "elsewhere": it was started on another host, and nothing here can tell whether it runs there.
        """
        return self._resting_state(name, self.sight(name))

    def _resting_state(self, name: str, seen: Sight) -> str:
        if seen.elsewhere is not None:
            return "elsewhere"
        if (self.paths(name).directory / "teleports").exists():
            from vmf.machine.journal import in_doubt, left

            if in_doubt(self, name) is not None:
                return "uncertain"
            if seen.left is not None and left(self, name, seen.left.since_ns):
                return "teleported"  # its process died just when it was about to end
        if seen.left is not None:
            return "aborted"
        return str(self.last_run(name).get("state", "poweredoff"))

    @contextmanager
    def own(self, name: str) -> Iterator[MachinePaths]:
        """Be the process that runs the machine: take its lock, recover stale sockets, say who and where.

        Raises InvalidStateError when another process has the machine. Leaving the context cleans up.
        """
        with self.tenure(name) as tenure:
            yield tenure.paths

    @contextmanager
    def tenure(self, name: str) -> Iterator[Tenure]:
        """As `own`, for a process that lasts: what it needs to be found for all that time."""
        paths = self.paths(name)
        with self._taken(name) as lock:
            private_directory(paths.logs)
            tenure = Tenure(lock, paths, self.data / "run" / name)
            tenure.settle()
            for stale in tenure.paths.sockets:
                stale.unlink(missing_ok=True)
            try:
                yield tenure
            finally:
                for ours in tenure.paths.sockets:
                    ours.unlink(missing_ok=True)

    @contextmanager
    def changing(self, name: str, doing: str, action: str = "") -> Iterator[MachinePaths]:
        """Have the lock of a machine that does not run, so that nobody starts it while it is changed.

        `doing` is what others are told meanwhile, `action` what a running one "cannot be". Raises InvalidStateError.
        """
        with self._taken(name, action) as lock:
            with suppress(OSError):  # on a full disk, say: only others' messages are poorer for it
                lock.write(Holder.this_process(doing))
            yield self.paths(name)

    @contextmanager
    def _taken(self, name: str, action: str = "") -> Iterator[MachineLock]:
        paths = self.paths(name)
        if not paths.definition.exists():
            raise self._not_found(name)
        try:
            lock = locks.take(paths.directory, paths.runtime)
        except locks.Held:
            raise locks.refusal(name, self.sight(name).holder, action) from None
        except locks.NoLocks:
            raise HomeError(
                f"{paths.directory} is on a file system without locks, so nothing keeps machine '{name}' from being "
                "started twice.",
                "Set VMF_HOME to a directory on a file system that has them.",
            ) from None
        except OSError as error:
            raise explained(error, paths.lock) from error
        seen = lock.sight()
        if seen.elsewhere is not None:
            lock.abandon()
            raise locks.refusal_elsewhere(name, seen.elsewhere)
        try:
            if seen.left is not None and (state := self._resting_state(name, seen)) != "uncertain":
                self.record_end(name, state, death.explain(seen.left, paths.vmm_log))  # a doubt is in the journal
            (paths.runtime / "pid").unlink(missing_ok=True)
        except BaseException:
            lock.abandon()
            raise
        try:
            yield lock
        finally:
            lock.release()

    def unlock(self, name: str) -> None:
        """A person says that the process that ran the machine on another host is gone for good.

        Raises InvalidStateError when it runs on this host.
        """
        paths = self.paths(name)
        if not paths.definition.exists():
            raise self._not_found(name)
        with self._locked():
            try:
                holder = locks.break_lock(paths.directory, paths.runtime)
            except locks.Held:
                raise locks.refusal(name, self.sight(name).holder, "unlocked") from None
            except OSError as error:
                raise explained(error, paths.lock) from error
            if holder is not None:
                self.record_end(name, "aborted", f"its process on host {locks.printable(holder.host)} was given up")

    def record_end(self, name: str, state: str, detail: str = "") -> None:
        """Remember how a run ended, for `showvminfo`."""
        ended = {"state": state, "detail": detail, "at": int(time.time())}
        write_atomically(self.paths(name).last, json.dumps(ended))
