"""Going back to a snapshot: putting the disks back, and starting a machine from its saved state.

Theory of operation. A disk is where its user wants it (a file with its lease, a block device, an export), so it is put
back in its place and cannot be exchanged at the end. Two things make that safe:

- everything in the snapshot is read, and its sizes and digests compared, before anything is written;
- `restoring.json` is there, durably, from before the first write until after the last flush. While it is, the machine
  does not start, wait for a teleport, or get another snapshot; only a restore that ends well removes it. After a
  failure the disks' leases are not given back either, so that other hosts do not take them for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vmf.device.base import Payload
from vmf.errors import OperationCancelled, StateError, VmfError
from vmf.machine.config import MachineConfig
from vmf.machine.operations import Operation, ProgressListener
from vmf.machine.snapshot_store import FileInfo, SnapshotInfo, SnapshotStore
from vmf.machine.snapshot_take import holding
from vmf.machine.storage import MachineStorage
from vmf.machine.storage_slot import Slot
from vmf.memory import pages
from vmf.memory.guest import MIB, PAGE_SIZE, GuestMemory
from vmf.reading import open_regular
from vmf.storage import sparse
from vmf.teleport.protocol import codec

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.plugins.bridge import PluginRegistry


CLEARED_AT_ONCE = 1 << 30
"""Bytes of a hole that are cleared before the next look at whether it was cancelled."""


def restore(
    config: MachineConfig,
    registry: PluginRegistry,
    store: SnapshotStore,
    name: str,
    progress: ProgressListener | None = None,
    operation: Operation | None = None,
) -> SnapshotInfo:
    """Put a machine that is switched off back to a snapshot. What its disks held since then is lost.

    `operation`: by which it can be cancelled. Raises VmfError; the message says so when disks are partly written: the
    machine then does not start until a restore has ended well.
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
    work = operation or Operation(config.name, f"putting back snapshot '{name}'")
    told = work.observed(progress)
    work.run(lambda: verify(info, directory, told))
    with holding(config, registry) as storage:
        slots = [slot for slot in storage.slots if slot.writable]
        for slot in slots:
            size = info.disks[str(slot.config.port)]
            if slot.drive.size != size:
                raise StateError(
                    f"the {slot.label} has {slot.drive.size} bytes, and had {size} when the snapshot was taken.",
                    "Attach the image that it had then.",
                )
        with _half_written(store, name, storage, bool(slots)):
            for slot in slots:
                put_back(slot, directory / f"disk-{slot.config.port}.img", work, told)
            storage.flush(work.check)
            generations = _generations(storage)
            if info.has_state:
                store.note_resume(name, generations)
    return info


@contextmanager
def _half_written(store: SnapshotStore, name: str, storage: MachineStorage, writes: bool) -> Iterator[None]:
    """While inside, and afterwards if it does not end well, the machine's disks are known to be partly written."""
    store.forget_resume()
    if not writes:
        yield
        return
    store.note_restoring(name)
    try:
        yield
        store.forget_restoring()
    except BaseException as error:
        storage.keep_leases()
        said = f"The disks of machine '{store.machine}' are partly written, and it does not start like this."
        remedy = f"Put it back once more: `vmf snapshot {store.machine} restore {name}`."
        if isinstance(error, VmfError):
            raise type(error)(f"{error.message} {said}", remedy) from error
        if isinstance(error, KeyboardInterrupt):
            raise OperationCancelled(f"putting back snapshot '{name}' was interrupted. {said}", remedy) from None
        raise


def verify(info: SnapshotInfo, directory: Path, progress: ProgressListener) -> None:
    """Read everything of a snapshot. Raises StateError naming what is missing, shorter, unreadable or changed.

    Snapshots that were taken by a vmf that noted no digests are compared by their sizes.
    """
    sizes = {f"disk-{port}.img": size for port, size in info.disks.items()}
    if info.has_state:
        sizes["ram.img"] = info.memory_mib * MIB
        sizes["state.cbor"] = info.files["state.cbor"].size if "state.cbor" in info.files else -1
    total, before = sum(max(size, 0) for size in sizes.values()), 0
    for name, size in sizes.items():
        path = directory / name
        noted = info.files.get(name)
        with _opened(path) as descriptor:
            found = os.fstat(descriptor).st_size
            if size >= 0 and (found != size or (noted is not None and noted.size != size)):
                raise _damaged(path, f"it has {found} bytes instead of {size}")

            def told(done: int, before: int = before) -> None:
                progress("checking the snapshot", before + done, total)

            digest = sparse.digest(descriptor, found, told)
            if noted is not None and noted.digest.startswith(sparse.ALGORITHM) and digest != noted.digest:
                raise _damaged(path, "its content is not what was written then")
            before += max(size, 0)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file of a snapshot; whatever goes wrong with it is a StateError."""
    try:
        with open_regular(path) as file:
            yield file.fileno()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _damaged(path: Path, why: str) -> StateError:
    return StateError(
        f"the snapshot is damaged: {path} cannot be used: {why.rstrip('.')}.",
        "Use another snapshot, or bring that file back from a backup.",
    )


def put_back(slot: Slot, copy: Path, operation: Operation, progress: ProgressListener) -> None:
    """Write a disk's copy over the disk, holes as zeroes. Raises StateError, StorageError; OperationCancelled."""
    drive = slot.drive
    block = memoryview(bytearray(min(sparse.CHUNK, drive.size)))

    def clear(start: int, end: int) -> None:
        for at in range(start, end, CLEARED_AT_ONCE):
            drive.write_zeroes(at, min(CLEARED_AT_ONCE, end - at))
            progress(slot.label, min(at + CLEARED_AT_ONCE, end), drive.size)

    def work() -> None:
        with _opened(copy) as descriptor:
            done = 0
            for start, end in sparse.data_extents(descriptor, drive.size):
                clear(done, start)
                for at in range(start, end, sparse.CHUNK):
                    view = block[: min(sparse.CHUNK, end - at)]
                    sparse.read_fully(descriptor, view, at)
                    if sparse.is_zero(view):
                        clear(at, at + view.nbytes)
                    else:
                        drive.writev(at, [view])
                    progress(slot.label, at + view.nbytes, drive.size)
                done = end
            clear(done, drive.size)

    operation.run(work)


def _generations(storage: MachineStorage) -> dict[str, int]:
    return {
        str(slot.config.port): slot.lease.generation
        for slot in storage.slots
        if slot.lease is not None and slot.lease.held
    }


def resume(machine: Machine, store: SnapshotStore, progress: ProgressListener) -> str:
    """At the start of a machine, with its disks open: continue from the snapshot that is noted; "" when none is.

    Leaves the machine assembled and stopped, as after `power_on`; returns the snapshot's name. Raises VmfError.
    """
    note = store.resume_note()
    name = str(note.get("snapshot", ""))
    if not name:
        return ""
    for port, generation in _generations(machine.storage).items():
        if note.get("generations", {}).get(port) != generation - 1:
            raise StateError(
                f"the disk at port {port} was used since machine '{machine.name}' was put back to snapshot '{name}':"
                " continuing from that memory would destroy its file system.",
                f"Put it back once more (`vmf snapshot {machine.name} restore {name}`), or boot it"
                f" (`vmf snapshot {machine.name} discard-state`).",
            )
    try:
        _bring_back(machine, store.get(name), store.path(name), progress)
    except BaseException:
        # Nothing was written to the disks: the next try finds them as they are.
        store.note_resume(name, _generations(machine.storage))
        raise
    return name


def _bring_back(machine: Machine, info: SnapshotInfo, directory: Path, progress: ProgressListener) -> None:
    """Memory, vCPU and devices as they were. Raises StateError."""
    try:
        plain = codec.decode(read_checked(directory / "state.cbor", info.files.get("state.cbor")))
        description = plain["description"]
        payloads = [Payload(kind, version, body, instance) for kind, version, instance, body in plain["payloads"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"snapshot '{info.name}' cannot be read: {error}.", "It is damaged; delete it.") from error
    _plug(machine, info.name, description)
    noted = info.files.get("ram.img")
    read_ram(machine.hardware.memory, directory / "ram.img", noted.digest if noted else "", progress)
    machine.hardware.restore(payloads)


def read_checked(path: Path, noted: FileInfo | None) -> bytes:
    """A small file of a snapshot, if it is what was written then. Raises StateError."""
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        known = noted is not None and noted.digest.startswith(sparse.ALGORITHM)
        if noted is not None and known and sparse.digest(descriptor, size) != noted.digest:
            raise _damaged(path, "its content is not what was written then")
        content = bytearray(size)
        sparse.read_fully(descriptor, memoryview(content), 0)
        return bytes(content)


def _plug(machine: Machine, name: str, description: Mapping[str, Any]) -> None:
    """Assemble the hardware as it was. Raises StateError naming every difference."""
    from vmf.machine.teleport_view import TeleportView

    machine.assemble()
    found = TeleportView(machine).check_saved(description)
    if found:
        said = " ".join(f"{each.field}: {each.source} then, {each.target} now." for each in found)
        raise StateError(
            f"machine '{machine.name}' cannot continue from snapshot '{name}': {said}",
            f"Change it back, or boot it: `vmf snapshot {machine.name} discard-state`.",
        )


def read_ram(memory: GuestMemory, path: Path, digest: str, progress: ProgressListener) -> None:
    """Fill RAM, which is all zeroes, from a snapshot. Raises StateError; `digest` is "" where none was noted."""
    found = sparse.Digest()
    block = memoryview(bytearray(min(sparse.CHUNK, memory.size)))
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size != memory.size:
            raise _damaged(path, f"it has {size} bytes instead of {memory.size}")
        for at, length, data in sparse.chunks(descriptor, memory.size):
            if data:
                view = block[:length]
                sparse.read_fully(descriptor, view, at)
                found.add(at, view)
                # Pages of zeroes stay untouched: they need no host memory.
                used = np.frombuffer(view, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8).any(axis=1)
                for first, end in (pages.from_mask(np.asarray(used)) * np.uint64(PAGE_SIZE)).tolist():
                    memory.buffer[at + first : at + end] = view[first:end]
            progress("memory", at + length, memory.size)
    if digest.startswith(sparse.ALGORITHM) and str(found) != digest:
        raise _damaged(path, "its content is not what was written then")
