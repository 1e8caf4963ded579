"""Media, apart from any running machine: make them, look at them, see and break their leases. What `vmf media` does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from attrs import frozen

from vmf import sizes
from vmf.errors import ConfigError, ImageInUse, NotFoundError, StorageError
from vmf.storage import lease as rules
from vmf.storage.base import SECTOR_SIZE, ImageInfo, LeaseStore, StorageDriver
from vmf.storage.calls import bounded
from vmf.storage.holder import read_record
from vmf.storage.lease import Owner, Record, Standing
from vmf.storage.uri import absolute, scheme_of

if TYPE_CHECKING:
    from vmf.machine.home import Home

T = TypeVar("T")
COMMAND_SECONDS = 12.0
"""How long a command waits for each look at storage; a little longer than a driver's own time limits."""


class Drivers(Protocol):
    """What of a `PluginRegistry` is needed here."""

    def storage(self, scheme: str) -> StorageDriver: ...


def parse_size(text: str) -> int:
    """Bytes from "4G", "512M", "1.5GiB" or a number of bytes; units are powers of 1024. Raises ConfigError."""
    size = sizes.parse(text) or 0
    if size <= 0 or size % SECTOR_SIZE:
        raise ConfigError(
            f"{text!r} is not the size of a disk.",
            f"Write 4G, 512M or a number of bytes that is a multiple of {SECTOR_SIZE}.",
        )
    return size


@frozen
class LeaseView:
    """A lease, as anybody may look at it.

    Attributes:
        place: where it is kept; "" when the medium has none.
        standing: "free", "held", "offered", "none" (there was never one) or "damaged".
        generation: grows with every change of owner.
        owner: who has it, or had it last; None when nobody did.
        since: when that was, seconds since the epoch by that host's clock.
        alive: its holder's lock stands: the process lives (or its host is cut off, and the file server has not
            noticed yet).
        decides: the storage has locks, so that the lease can decide who is the machine.
        text: one clause for people.
    """

    place: str
    standing: str
    generation: int = 0
    owner: Owner | None = None
    since: int = 0
    alive: bool = False
    decides: bool = False
    text: str = "never used"


def create(registry: Drivers, medium: str, size: int) -> str:
    """Make a raw image of `size` bytes; its path or URI as a definition would have it. Raises StorageError."""

    def work() -> str:
        uri = absolute(medium)
        registry.storage(scheme_of(uri)).create(uri, size)
        return uri

    return _bounded(medium, "making it", work)


def _bounded(medium: str, what: str, function: Callable[[], T]) -> T:
    """No command waits for ever for storage that does not answer. Raises StorageTimeout."""
    return bounded(f"the storage of {medium}", what, function, seconds=COMMAND_SECONDS)


def probe(registry: Drivers, medium: str) -> ImageInfo:
    """What a medium is. Raises NotFoundError or StorageError."""

    def work() -> ImageInfo:
        uri = absolute(medium)
        return registry.storage(scheme_of(uri)).probe(uri)

    return _bounded(medium, "looking at it", work)


def inspect(registry: Drivers, medium: str) -> tuple[ImageInfo, LeaseView]:
    """What a medium is, and who has it. Raises NotFoundError or StorageError."""
    return probe(registry, medium), lease_of(registry, medium)


def locks_warning(info: ImageInfo) -> str:
    """What to tell of an image whose lease is kept where locks reach this host only; "" where they reach all."""
    if not info.local_locks:
        return ""
    return (
        f"Locks on {info.uri} reach this host only, as {info.local_locks}. Its lease cannot decide between two hosts:"
        " after a crash another host needs `vmf media break-lock`, and an interrupted teleport waits for a person."
        " Mount its storage with locks (docs/how-to/shared-storage.md)."
    )


def lease_of(registry: Drivers, medium: str) -> LeaseView:
    """Who has a medium. Never waits for its owner. Raises StorageError."""
    return _bounded(medium, "reading its lease", lambda: _lease_of(registry, medium))


def _lease_of(registry: Drivers, medium: str) -> LeaseView:
    store = _store(registry, medium)
    if store is None:
        return LeaseView("", "none")
    try:
        try:
            found = rules.decode(store.read())
        except StorageError as error:
            return LeaseView(store.place, "damaged", text=error.message.removesuffix("."))
        if found is None:
            return LeaseView(store.place, "none", decides=store.excludes)
        return LeaseView(
            place=store.place,
            standing=found.standing.value,
            generation=found.generation,
            owner=found.owner,
            since=found.since,
            alive=found.standing is not Standing.FREE and store.locked_elsewhere(),
            decides=store.excludes,
            text=rules.describe(found),
        )
    finally:
        store.close()


def break_lease(registry: Drivers, medium: str) -> LeaseView:
    """Take a lease from an owner that is gone; what it was before. The medium is free then.

    Raises NotFoundError when there is no lease, ImageInUse when its owner can be seen to live, StorageError.
    """
    return _bounded(medium, "breaking its lease", lambda: _break_lease(registry, medium))


def _break_lease(registry: Drivers, medium: str) -> LeaseView:
    store = _store(registry, medium)
    if store is None:
        raise NotFoundError(f"{medium} has no lease: nobody ever used it for writing.", "There is nothing to break.")
    before = _lease_of(registry, medium)
    try:
        if not store.lock():
            raise ImageInUse(
                f"{medium} has a living owner: {before.text}.",
                "Its process holds the lock now. Stop that machine; should it hang, end that process, and try again.",
            )
        try:
            record = read_record(store)
        except StorageError:
            record = Record(image=secrets.token_hex(16))
        record = rules.broken(record)
        for _ in range(2):  # both blocks, as one of them may be what is damaged
            store.write(record.sequence % 2 * rules.BLOCK, rules.encode(record))
            record = rules.touched(record)
    finally:
        store.close()
    return before


def _store(registry: Drivers, medium: str) -> LeaseStore | None:
    uri = absolute(medium)
    return registry.storage(scheme_of(uri)).lease_store(uri, create=False)


def uses(home: Home) -> list[Mapping[str, Any]]:
    """Every drive of every machine that is defined here: machine, its state, port, type, medium, read_only."""
    rows: list[Mapping[str, Any]] = []
    for name in home.names():
        try:
            config = home.load(name)
        except ConfigError:
            continue  # `vmf showvminfo` says what is wrong with it
        state = "running" if home.process(name) is not None else home.resting_state(name)
        rows += [
            {
                "machine": name,
                "state": state,
                "port": drive.port,
                "type": drive.type,
                "medium": drive.medium,
                "read_only": not drive.writable,
            }
            for drive in config.drives
        ]
    return rows
