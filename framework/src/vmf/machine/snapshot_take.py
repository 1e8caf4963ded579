"""Taking a snapshot, of a machine that runs or of one that is switched off."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from vmf.device.base import Payload
from vmf.errors import InvalidStateError
from vmf.machine.config import MachineConfig
from vmf.machine.snapshot_store import FORMAT, SnapshotInfo, SnapshotStore, sync_directory, write_durably
from vmf.machine.states import MachineState
from vmf.machine.storage import MachineStorage
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.teleport.protocol import codec

if TYPE_CHECKING:
    from vmf.machine.machine import Machine
    from vmf.plugins.bridge import PluginRegistry

STEP = 16 << 20
ProgressListener = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all)."""


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
    with store.new(name) as directory, holding(config, registry) as storage:
        disks = _copy_disks(storage, directory, progress)
        return _finish(directory, name, description, "poweredoff", config, disks)


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
    plain = {"format": FORMAT, "uuid": config.uuid, **attrs.asdict(info)}
    write_durably(directory / "snapshot.json", json.dumps(plain, indent=2).encode())
    sync_directory(directory)
    return info
