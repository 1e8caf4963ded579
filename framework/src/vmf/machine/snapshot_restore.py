"""Going back to a snapshot: putting the disks back, and starting a machine from its saved state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmf.device.base import Payload
from vmf.errors import StateError
from vmf.machine.config import MachineConfig
from vmf.machine.snapshot_store import SnapshotInfo, SnapshotStore
from vmf.machine.snapshot_take import STEP, ProgressListener, holding
from vmf.machine.storage import MachineStorage
from vmf.memory.guest import GuestMemory
from vmf.teleport.protocol import codec

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.plugins.bridge import PluginRegistry


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
    with holding(config, registry) as storage:
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
