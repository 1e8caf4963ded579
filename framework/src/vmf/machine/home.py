"""The state of one host: which machines are defined, and where their processes keep sockets and logs.

`VMF_HOME` selects it; without it, definitions live in the user's data directory and sockets in the user's runtime
directory. Two homes are two hosts, as far as vmf is concerned.

    machines/NAME/machine.toml   the definition, replaced atomically, 0600 in 0700
    machines/NAME/identity.json  which machine the directory belongs to: see `vmf.machine.identity`
    machines/NAME/lock           who runs or changes it: see `vmf.machine.lock`
    machines/NAME/last.json      how the last run ended
    machines/NAME/logs/          console.log (serial output) and vmm.log of the last runs
    unregistered/NAME.TIME.UUID  the directory of a machine that was unregistered: see `vmf.machine.shelf`
    run/NAME/                    control.sock and the consoles' sockets of the process that runs it

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
import uuid as uuidlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from vmf import directories
from vmf.errors import ConfigError, NotFoundError
from vmf.machine import config as configuration
from vmf.machine import death, identity, shelf
from vmf.machine import lock as locks
from vmf.machine.config import MachineConfig
from vmf.machine.files import HomeError as HomeError
from vmf.machine.files import explained as explained
from vmf.machine.files import private_directory as private_directory
from vmf.machine.files import write_atomically as write_atomically
from vmf.machine.identity import Owner
from vmf.machine.lock import Holder, MachineLock, Sight
from vmf.machine.tenure import MachinePaths as MachinePaths
from vmf.machine.tenure import Tenure as Tenure
from vmf.reading import read_record, read_text

LOCK_SECONDS = 10.0
ENDS = ("poweredoff", "aborted", "teleported", "failed")
"""How a run may end."""


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
        return sorted(name for name in found if self._is_defined(name))

    def _is_defined(self, name: str) -> bool:
        """Whether a definition is there, be it unreadable or a link to a place that is not mounted."""
        return os.path.lexists(self.paths(name).definition)

    def load(self, name: str) -> MachineConfig:
        """Raises NotFoundError, or ConfigError naming file and key. A definition without a UUID gets one."""
        path = self.paths(name).definition
        try:
            config = configuration.load(path)
            if not identity.uuid_in(path):
                config = self._identified(path, config)
        except FileNotFoundError:  # at any moment: another command may have unregistered it
            if path.is_symlink():
                raise ConfigError(
                    f"{path} is a link to {os.readlink(path)}, which is not there.", "Mount it, or make the link anew."
                ) from None
            raise self._not_found(name) from None
        if config.name != name:
            raise ConfigError(
                f'{path}: name = "{config.name}" does not agree with its directory.',
                f"Is it a copy? `vmf modifyvm {name} --uuid new` makes it a machine of its own. "
                f'Was it renamed? Write name = "{name}".',
            )
        return config

    def _identified(self, path: Path, config: MachineConfig) -> MachineConfig:
        """With a UUID that stays: it is the same machine at every look. For a definition that was written by hand."""
        if config.name == path.parent.name:
            with suppress(HomeError), self._locked():
                if not identity.uuid_in(path):
                    write_atomically(path, f'uuid = "{config.uuid}"\n{read_text(path)}')
        return configuration.load(path)

    def create(self, config: MachineConfig) -> Path | None:
        """Define a new machine. Raises ConfigError when the name is taken.

        Returns where the remains of an earlier machine of that name were set aside; None when there were none.
        """
        with self._locked():
            if self._is_defined(config.name):
                raise ConfigError(
                    f"There is a machine '{config.name}' already.",
                    f"Choose another name, or remove it with `vmf unregistervm {config.name} --delete`.",
                )
            aside = shelf.clear(self, config.name)
            self.write(config)
            return aside

    def update(self, name: str, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        """Replace a definition by what `change` makes of it; refuses while the machine runs."""
        self.load(name)  # before the lock, which it may need itself
        with self._locked(), self.changing(name, "modify", "modified"):
            old = self.load(name)
            new = change(old)
            if new.name != name:
                raise ConfigError(f"The name of machine '{name}' cannot be changed.", "Create another machine.")
            self.write(new)
            return new

    def unregister(self, name: str, *, delete: bool = False) -> Path | None:
        """Forget a machine: set its directory aside, or delete it. Images and kernels are never touched.

        Returns where its directory is now, or, with `delete`, what was in it and is of other machines; None for
        nothing. Raises InvalidStateError when it runs, or when deleting it would lose a guest's memory or a doubt.
        """
        with self._locked(), self.changing(name, "unregister", "unregistered", strict=False) as paths:
            if delete:
                shelf.refuse_loss(self, name)
            place = shelf.set_aside(self, paths.directory, name, identity.uuid_in(paths.definition))
            shutil.rmtree(paths.runtime, ignore_errors=True)
            return shelf.delete(self, place) if delete else place

    def register(self, path: Path, name: str | None = None) -> MachineConfig:
        """Bring back a machine that was set aside, or take a definition file. Raises VmfError."""
        with self._locked():
            return shelf.bring_back(self, path, name)

    def reidentify(self, name: str, *, new: bool) -> MachineConfig:
        """Settle whose a directory is that was copied: a new machine's, or the machine's itself from now on.

        Raises InvalidStateError when it runs, when the other one is still here, or when a machine that is no copy would
        lose its snapshots or a doubt.
        """
        with self._locked(), self._taken(name, "modified", strict=False):
            paths = self.paths(name)
            old = configuration.load(paths.definition)
            source, twins = identity.original(paths.directory, old.uuid), self.twins(name, old.uuid)
            if new:
                if source is None and not twins:
                    shelf.refuse_orphans(self, name)
                config = attrs.evolve(old, name=name, uuid=str(uuidlib.uuid4()))
            else:
                identity.refuse_both(name, paths.directory, source, twins)
                config = attrs.evolve(old, name=name)
            self.write(config, adopt=not new)
            return config

    def twins(self, name: str, uuid: str) -> list[str]:
        """Other machines of this home with that UUID."""
        return [each for each in self.names() if each != name and identity.uuid_in(self.paths(each).definition) == uuid]

    def _not_found(self, name: str) -> NotFoundError:
        import difflib

        known = self.names()
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {close[0]}?" if close else f"Create it with `vmf createvm {name} ...`."
        return NotFoundError(f"There is no machine '{name}' in {self.data}.", remedy)

    def write(self, config: MachineConfig, *, identify: bool = True, adopt: bool = True) -> None:
        """Replace or make a definition, whatever there is; only with the home locked. Raises HomeError.

        `identify`: the directory is that machine's from now on; `adopt`: with what an earlier vmf left in it.
        """
        path = self.paths(config.name).definition
        text = configuration.dump(config)
        private_directory(path.parent.parent)
        new = not path.parent.exists()
        private_directory(path.parent)
        try:
            if new and identify:
                identity.write(path.parent, config.uuid)
            write_atomically(path, text)
            if identify:
                identity.write(path.parent, config.uuid, adopt=adopt)
        except HomeError:
            if new:  # no half machine behind
                shutil.rmtree(path.parent, ignore_errors=True)
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
            found = read_record(self.paths(name).last)
        except (OSError, ValueError):
            return {}
        paths = self.paths(name)
        own = Owner.of(paths.directory).owns(paths.last, found.get("uuid"))
        return found if own else {}

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
        state = self.last_run(name).get("state")
        return state if state in ENDS else "poweredoff"

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
            tenure = Tenure(lock, paths, self.data / "run" / name, identity.uuid_in(paths.definition))
            try:
                tenure.settle()
                tenure.clear_sockets()
                yield tenure
            finally:
                tenure.clear_sockets()
                tenure.close()

    @contextmanager
    def changing(self, name: str, doing: str, action: str = "", *, strict: bool = True) -> Iterator[MachinePaths]:
        """Have the lock of a machine that does not run, so that it is not started while it is changed.

        `doing` is what others are told meanwhile, `action` what a running one "cannot be"; `strict` refuses a copy.
        Raises InvalidStateError.
        """
        with self._taken(name, action, strict=strict) as lock:
            with suppress(OSError):  # on a full disk, say: only others' messages are poorer for it
                lock.write(Holder.this_process(doing, runtime=str(self.paths(name).runtime)))
            yield self.paths(name)

    @contextmanager
    def _taken(self, name: str, action: str = "", *, strict: bool = True) -> Iterator[MachineLock]:
        """The machine's lock; `strict`: not of a copy."""
        paths = self.paths(name)
        if not self._is_defined(name):
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
        except FileNotFoundError:
            raise self._not_found(name) from None
        except OSError as error:
            raise explained(error, paths.lock) from error
        seen = lock.sight()
        if not self._is_defined(name):  # it was unregistered between our looking and our locking
            lock.abandon()
            raise self._not_found(name)
        if seen.elsewhere is not None:
            lock.abandon()
            raise locks.refusal_elsewhere(name, seen.elsewhere)
        try:
            if seen.left is not None and (state := self._resting_state(name, seen)) != "uncertain":
                self.record_end(name, state, death.explain(seen.left, paths.vmm_log))  # a doubt is in the journal
            with suppress(OSError):
                (paths.runtime / "pid").unlink()  # of an earlier vmf
            if strict:
                self._claim(name)
        except BaseException:
            lock.abandon()
            raise
        try:
            yield lock
        finally:
            lock.release()

    def _claim(self, name: str) -> None:
        """Make sure that the directory is the machine's own. With its lock."""
        directory = self.paths(name).directory
        uuid = identity.uuid_in(self.paths(name).definition)
        if uuid:  # else `load` says what is wrong
            identity.refuse_copy(name, directory, uuid, self.twins(name, uuid))
            identity.write(directory, uuid)

    def unlock(self, name: str) -> None:
        """A person says that the process that ran the machine on another host is gone for good.

        Raises InvalidStateError when it runs on this host.
        """
        paths = self.paths(name)
        if not self._is_defined(name):
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
        paths = self.paths(name)
        uuid = identity.uuid_in(paths.definition)
        ended = {"state": state, "detail": detail, "at": int(time.time()), "uuid": uuid}
        write_atomically(paths.last, json.dumps(ended))
