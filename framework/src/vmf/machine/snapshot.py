"""Snapshots of one machine: what it was at one moment, to go back to.

A snapshot is a directory with a description (`snapshot.json`), a copy of every writable disk (`disk-PORT.img`), and, of
a machine that had not been switched off, its state: vCPU, clock and devices (`state.cbor`) and RAM (`ram.img`, a sparse
file of the flat mapping). It is made under another name and renamed when everything in it is durable, so there are
whole snapshots only.

The guest stands still while one is taken, and does not notice: its time stands still, too. Disks are copied by
sharing blocks where the file system can (btrfs, XFS), which takes no time; elsewhere the copy takes as long as the disk
is full.

Going back is for a machine that is switched off. The disks are put back at once. A state with RAM is only noted
(`resume.json`), and the next start goes on from it, exactly once. Between the two nothing may write to the disks, so
the note names the lease's generation of each: a start that finds another one refuses.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from vmf.device.base import Payload
from vmf.errors import ConfigError, InvalidStateError, NotFoundError, StateError
from vmf.machine.config import NAME_PATTERN, MachineConfig
from vmf.machine.home import HomeError, private_directory, write_atomically
from vmf.machine.states import MachineState
from vmf.machine.storage import MachineStorage
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.teleport.protocol import codec

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.plugins.bridge import PluginRegistry

FORMAT = 1
STEP = 16 << 20
_PARTIAL = ".partial-"
ProgressListener = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all)."""


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
    """

    name: str
    description: str
    taken: int
    state: str
    memory_mib: int
    disks: Mapping[str, int]

    @property
    def has_state(self) -> bool:
        return self.state != "poweredoff"


class SnapshotStore:
    """The snapshots of one machine, in a directory; `resume` beside it says which one the next start goes on from."""

    def __init__(self, machine: str, directory: Path) -> None:
        self.machine = machine
        self.directory = directory
        self._resume = directory.parent / "resume.json"

    def names(self) -> list[str]:
        """Oldest first; quick."""
        return [each.name for each in self.list()]

    def list(self) -> list[SnapshotInfo]:
        """Oldest first."""
        try:
            found = [entry for entry in os.listdir(self.directory) if NAME_PATTERN.fullmatch(entry)]
        except FileNotFoundError:
            return []
        return sorted((self.get(name) for name in found), key=lambda each: (each.taken, each.name))

    def get(self, name: str) -> SnapshotInfo:
        """Raises NotFoundError, or StateError when it cannot be read."""
        path = self.path(name) / "snapshot.json"
        try:
            plain = json.loads(path.read_text("utf-8"))
            if plain.pop("format") != FORMAT:
                raise StateError(f"snapshot {name} was made by a newer vmf.", "Use that one.")
            return SnapshotInfo(**plain)
        except FileNotFoundError:
            known = ", ".join(entry.name for entry in self.list()) if path.parent.parent.exists() else ""
            raise NotFoundError(
                f"machine '{self.machine}' has no snapshot '{name}'.",
                f"It has {known}." if known else f"Take one with `vmf snapshot {self.machine} take {name}`.",
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StateError(f"{path} cannot be read: {error}.", "Delete that snapshot.") from error

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
        for stale in self.directory.glob(f"{_PARTIAL}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        partial = self.directory / f"{_PARTIAL}{secrets.token_hex(4)}"
        private_directory(partial)
        try:
            yield partial
            os.rename(partial, final)
            _sync_directory(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise HomeError(
                f"the snapshot '{name}' cannot be written: {error.strerror or error}.",
                f"Is there room in {self.directory}? Nothing was changed.",
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def delete(self, name: str) -> None:
        """Raises NotFoundError; InvalidStateError when the next start needs it."""
        self.get(name)
        if self.resuming() == name:
            raise InvalidStateError(
                f"the next start of machine '{self.machine}' goes on from snapshot '{name}'.",
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
            note = json.loads(self._resume.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StateError(
                f"{self._resume} cannot be read: {error}.", f"Run `vmf snapshot {self.machine} discard-state`."
            ) from error
        return note if isinstance(note, dict) else {}

    def note_resume(self, name: str, generations: Mapping[str, int]) -> None:
        write_atomically(self._resume, json.dumps({"snapshot": name, "generations": dict(generations)}))

    def forget_resume(self) -> bool:
        """The next start boots; False when it would have anyway."""
        try:
            self._resume.unlink()
        except FileNotFoundError:
            return False
        return True


# -- taking --------------------------------------------------------------------------------------------------


def take(
    machine: Machine, store: SnapshotStore, name: str, description: str = "", progress: ProgressListener | None = None
) -> SnapshotInfo:
    """Of a running or paused machine, which stands still meanwhile and then goes on. Holds its operation lock."""
    with machine.operation:
        before = machine.state
        if before not in (MachineState.RUNNING, MachineState.PAUSED):
            raise machine.illegal("snapshotted", "running or paused")
        machine.tracing.refuse("snapshotted")
        with store.new(name) as directory:
            hardware, running = machine.hardware, before is MachineState.RUNNING
            machine.storage.flush()  # most of it while the guest still runs
            if running:
                hardware.halt(freeze_time=True)
            try:
                payloads = hardware.save()  # nothing is in flight from here on
                _write_state(machine, directory, payloads)
                _write_ram(hardware.memory, directory / "ram.img", progress)
                machine.storage.flush()
                disks = _copy_disks(machine.storage, directory, progress)
            finally:
                if running:
                    hardware.run()
            return _finish(directory, name, description, before.value, machine.config, disks)


def take_stopped(
    config: MachineConfig,
    registry: PluginRegistry,
    store: SnapshotStore,
    name: str,
    description: str = "",
    progress: ProgressListener | None = None,
) -> SnapshotInfo:
    """Of a machine that is switched off. Its disks are held meanwhile, so that nobody writes them."""
    if store.resuming():
        raise InvalidStateError(
            f"the next start of machine '{config.name}' goes on from snapshot '{store.resuming()}'.",
            "That snapshot is its state already; start it first.",
        )
    with store.new(name) as directory, _holding(config, registry) as storage:
        disks = _copy_disks(storage, directory, progress)
        return _finish(directory, name, description, "poweredoff", config, disks)


@contextmanager
def _holding(config: MachineConfig, registry: PluginRegistry) -> Iterator[MachineStorage]:
    storage = MachineStorage(config, registry, lambda _error: None)
    storage.open()
    try:
        yield storage
    finally:
        storage.close()


def _write_state(machine: Machine, directory: Path, payloads: list[Payload]) -> None:
    from vmf.machine.teleport_view import TeleportView

    plain = {
        "description": TeleportView(machine).describe_hardware(),
        "payloads": [[each.kind, each.version, each.instance, dict(each.body)] for each in payloads],
    }
    _write_durably(directory / "state.cbor", codec.encode(plain))


def _write_ram(memory: GuestMemory, path: Path, progress: ProgressListener | None) -> None:
    ranges = memory.touched_ranges().tolist()
    total = sum(end - first for first, end in ranges) * PAGE_SIZE
    done = 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, memory.size)
        for first, end in ranges:
            at, stop = first * PAGE_SIZE, end * PAGE_SIZE
            while at < stop:
                count = os.pwrite(descriptor, memory.buffer[at : min(at + STEP, stop)], at)
                at += count
                done += count
                if progress is not None:
                    progress("memory", done, total)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_disks(storage: MachineStorage, directory: Path, progress: ProgressListener | None) -> dict[str, int]:
    disks = {}
    for slot in storage.slots:
        if not slot.writable or slot.driver is None:
            continue  # what the guest cannot write need not be put back
        label = slot.label

        def told(done: int, total: int, label: str = label) -> None:
            if progress is not None:
                progress(label, done, total)

        slot.driver.copy(slot.config.medium, str(directory / f"disk-{slot.config.port}.img"), told)
        disks[str(slot.config.port)] = slot.drive.size
    return disks


def _finish(
    directory: Path, name: str, description: str, state: str, config: MachineConfig, disks: Mapping[str, int]
) -> SnapshotInfo:
    info = SnapshotInfo(name, description, int(time.time()), state, config.memory_mib, disks)
    plain = {"format": FORMAT, **attrs.asdict(info)}
    _write_durably(directory / "snapshot.json", json.dumps(plain, indent=2).encode())
    _sync_directory(directory)
    return info


# -- going back ----------------------------------------------------------------------------------------------


def restore(
    config: MachineConfig,
    registry: PluginRegistry,
    store: SnapshotStore,
    name: str,
    progress: ProgressListener | None = None,
) -> SnapshotInfo:
    """Put a machine that is switched off back to a snapshot. What its disks held since then is lost.

    Raises VmfError; when it was broken off while a disk was written, run it again.
    """
    info = store.get(name)
    directory = store.path(name)
    wanted = {str(drive.port): drive for drive in config.drives if drive.writable}
    if set(wanted) != set(info.disks):
        raise StateError(
            f"snapshot '{name}' has disks at the ports {', '.join(info.disks) or '(none)'}, and machine '{config.name}'"
            f" has writable ones at {', '.join(wanted) or '(none)'}.",
            "Attach them as they were then (`vmf storageattach`).",
        )
    store.forget_resume()
    with _holding(config, registry) as storage:
        for slot in storage.slots:
            if slot.writable:
                size = info.disks[str(slot.config.port)]
                if slot.drive.size != size:
                    raise StateError(
                        f"the {slot.label} has {slot.drive.size} bytes, and had {size} when the snapshot was taken.",
                        "Attach the image that it had then.",
                    )
        for slot in storage.slots:
            if slot.writable:
                _put_back(storage, slot.config.port, directory / f"disk-{slot.config.port}.img", progress)
        storage.flush()
        generations = _generations(storage)
    if info.has_state:
        store.note_resume(name, generations)
    return info


def _put_back(storage: MachineStorage, port: int, copy: Path, progress: ProgressListener | None) -> None:
    drive = next(each for each in storage.drives if each.port == port)
    with copy.open("rb", buffering=0) as file:
        drive.write_zeroes(0, drive.size)
        block = bytearray(STEP)
        for at, length in _data(file.fileno(), drive.size):
            view = memoryview(block)[:length]
            if os.preadv(file.fileno(), [view], at) != length:
                raise StateError(f"{copy} is cut short.", "This snapshot is damaged.")
            drive.writev(at, [view])
            if progress is not None:
                progress(f"drive at port {port}", at + length, drive.size)


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: (offset, length), at most STEP bytes each."""
    at = 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:
            return  # only a hole is left
        end = min(os.lseek(descriptor, at, os.SEEK_HOLE), size)
        while at < end:
            length = min(STEP, end - at)
            yield at, length
            at += length


def _generations(storage: MachineStorage) -> dict[str, int]:
    return {
        str(slot.config.port): slot.lease.generation
        for slot in storage.slots
        if slot.lease is not None and slot.lease.held
    }


def resume(machine: Machine, store: SnapshotStore) -> bool:
    """At the start of a machine, with its disks open: go on from the snapshot that is noted; False when none is.

    Leaves the machine assembled and stopped, as after `power_on`. Raises VmfError.
    """
    note = store.resume_note()
    name = str(note.get("snapshot", ""))
    if not name:
        return False
    for port, generation in _generations(machine.storage).items():
        if note.get("generations", {}).get(port) != generation - 1:
            raise StateError(
                f"the disk at port {port} was used since machine '{machine.name}' was put back to snapshot '{name}':"
                " going on from that memory would destroy its file system.",
                f"Put it back once more (`vmf snapshot {machine.name} restore {name}`), or boot it"
                f" (`vmf snapshot {machine.name} discard-state`).",
            )
    try:
        _bring_back(machine, name, store.path(name))
    except BaseException:
        # Nothing was written to the disks: the next try finds them as they are.
        store.note_resume(name, _generations(machine.storage))
        raise
    return True


def _bring_back(machine: Machine, name: str, directory: Path) -> None:
    """Memory, vCPU and devices as they were. Raises StateError."""
    try:
        plain = codec.decode((directory / "state.cbor").read_bytes())
        description = plain["description"]
        payloads = [Payload(kind, version, body, instance) for kind, version, instance, body in plain["payloads"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"snapshot '{name}' cannot be read: {error}.", "It is damaged; delete it.") from error
    _plug(machine, name, description)
    _read_ram(machine.hardware.memory, directory / "ram.img")
    machine.hardware.restore(payloads)


def _plug(machine: Machine, name: str, description: Mapping[str, Any]) -> None:
    """Assemble the hardware as it was. Raises StateError naming every difference."""
    from vmf.machine.teleport_view import TeleportView

    machine.assemble()
    found = TeleportView(machine).check_saved(description)
    if found:
        said = " ".join(f"{each.field}: {each.source} then, {each.target} now." for each in found)
        raise StateError(
            f"machine '{machine.name}' cannot go on from snapshot '{name}': {said}",
            f"Change it back, or boot it: `vmf snapshot {machine.name} discard-state`.",
        )


def _read_ram(memory: GuestMemory, path: Path) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != memory.size:
                raise StateError(f"{path} has not the size of the machine's memory.", "This snapshot is damaged.")
            for at, length in _data(file.fileno(), memory.size):
                if os.preadv(file.fileno(), [memory.buffer[at : at + length]], at) != length:
                    raise StateError(f"{path} is cut short.", "This snapshot is damaged.")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.", "This snapshot is damaged.") from error


# -- files ---------------------------------------------------------------------------------------------------


def _write_durably(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "SnapshotInfo",
    "SnapshotStore",
    "restore",
    "resume",
    "take",
    "take_stopped",
]
