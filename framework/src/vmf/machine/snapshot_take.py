"""Taking a snapshot, of a machine that runs or of one that is switched off.

Of a machine that runs, the guest stands still only while its memory and disks are copied. That the copies are durable,
and what their digests are, is seen to while it runs again; only then does the snapshot get its name. Cancelled before
that, it leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from vmf.device.base import Payload
from vmf.errors import InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.operations import Operation, ProgressListener
from vmf.machine.snapshot_store import FORMAT, FileInfo, SnapshotInfo, SnapshotStore, sync_directory, write_durably
from vmf.machine.states import MachineState
from vmf.machine.storage import MachineStorage
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.storage import sparse
from vmf.teleport.protocol import codec

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.plugins.bridge import PluginRegistry

CHECKING = "writing out"
"""What progress calls the part in which the guest runs again."""


def take(
    machine: Machine, store: SnapshotStore, name: str, description: str = "", progress: ProgressListener | None = None
) -> SnapshotInfo:
    """Of a running or paused machine, which stands still while it is copied and then continues."""
    with machine.operation.long(f"the snapshot '{name}'") as operation, store.new(name) as directory:
        told = operation.observed(progress)
        with machine.operation:
            before = machine.state
            if before not in (MachineState.RUNNING, MachineState.PAUSED):
                raise machine.illegal("snapshotted", "running or paused")
            machine.tracing.refuse("snapshotted")
            hardware, running = machine.hardware, before is MachineState.RUNNING
            machine.storage.flush(operation.check)  # most of it while the guest still runs
            if running:
                hardware.halt(freeze_time=True)
            try:
                payloads = hardware.save()  # nothing is in flight from here on
                machine.storage.flush(operation.check)

                def copy() -> dict[str, int]:
                    _write_state(machine, directory, payloads)
                    _write_ram(hardware.memory, directory / "ram.img", told)
                    return _copy_disks(machine.storage, directory, told)

                disks = operation.run(copy)
            finally:
                if running:
                    hardware.run()
            config = machine.config
        return operation.run(lambda: _finish(directory, name, description, before.value, config, disks, told))


def take_stopped(
    config: MachineConfig,
    registry: PluginRegistry,
    store: SnapshotStore,
    name: str,
    description: str = "",
    progress: ProgressListener | None = None,
    operation: Operation | None = None,
) -> SnapshotInfo:
    """Of a machine that is switched off. Its disks are held meanwhile, so that nobody writes them.

    `operation`: by which it can be cancelled.
    """
    store.refuse_half_restored("snapshotted")
    if store.resuming():
        raise InvalidStateError(
            f"the next start of machine '{config.name}' continues from snapshot '{store.resuming()}'.",
            "That snapshot is its state already; start it first.",
        )
    work = operation or Operation(config.name, f"the snapshot '{name}'")
    told = work.observed(progress)
    with store.new(name) as directory:
        with holding(config, registry) as storage:
            disks = work.run(lambda: _copy_disks(storage, directory, told))
        return work.run(lambda: _finish(directory, name, description, "poweredoff", config, disks, told))


@contextmanager
def holding(config: MachineConfig, registry: PluginRegistry) -> Iterator[MachineStorage]:
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
    write_durably(directory / "state.cbor", codec.encode(plain))


def _write_ram(memory: GuestMemory, path: Path, progress: ProgressListener) -> None:
    ranges = memory.touched_ranges().tolist()
    total = sum(end - first for first, end in ranges) * PAGE_SIZE
    done = 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, memory.size)
        for first, end in ranges:
            at, stop = first * PAGE_SIZE, end * PAGE_SIZE
            while at < stop:
                view = memory.buffer[at : min(at + sparse.CHUNK, stop)]
                sparse.write_fully(descriptor, view, at)
                at += view.nbytes
                done += view.nbytes
                progress("memory", done, total)
    finally:
        os.close(descriptor)


def _copy_disks(storage: MachineStorage, directory: Path, progress: ProgressListener) -> dict[str, int]:
    disks = {}
    for slot in storage.slots:
        if not slot.writable or slot.driver is None:
            continue  # what the guest cannot write need not be put back
        label = slot.label

        def told(done: int, total: int, label: str = label) -> None:
            progress(label, done, total)

        slot.driver.copy(slot.config.medium, str(directory / f"disk-{slot.config.port}.img"), told)
        disks[str(slot.config.port)] = slot.drive.size
    return disks


def _finish(
    directory: Path,
    name: str,
    description: str,
    state: str,
    config: MachineConfig,
    disks: Mapping[str, int],
    progress: ProgressListener,
) -> SnapshotInfo:
    files: dict[str, FileInfo] = {}
    paths = sorted(directory.iterdir())
    total, before = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size

            def told(done: int, before: int = before) -> None:
                progress(CHECKING, before + done, total)

            files[path.name] = FileInfo(size, sparse.digest(descriptor, size, told))
        finally:
            os.close(descriptor)
        before += size
    info = SnapshotInfo(name, description, int(time.time()), state, config.memory_mib, disks, files)
    plain = {"format": FORMAT, "uuid": config.uuid, **attrs.asdict(info)}
    write_durably(directory / "snapshot.json", json.dumps(plain, indent=2).encode())
    sync_directory(directory)
    return info
