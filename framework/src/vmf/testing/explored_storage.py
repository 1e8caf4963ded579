"""Machines' storage for explorations: stopped, killed or failed at every step of what they do with their leases.

Theory of operation. What runs is `vmf.machine.storage.MachineStorage` with the leases and rules below it, unchanged.
Under it are a driver, lease stores and images that exist only as a value (`Shared`). A deed ("pass", "take", "claim")
goes from *point* to point: a lock that was tried, a record written, an image flushed or opened. Every operation's
result is logged; to go on from a point the deed is run anew, gets what it got before from the log, does one operation
with an effect more, and is given up by an exception: from then on each operation raises it again, so that nothing else
has an effect. So a step is a function of values (`advance`) that can be remembered, a world between two steps is one in
which a process may sleep or die, and both sides' steps can be interleaved in every way.

At each point the storage may fail as well: before the operation or after it, for once or for good.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import evolve, frozen

from vmf.errors import LeaseLost, StorageError, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.storage import holder
from vmf.storage import lease as rules
from vmf.storage.base import ImageInfo, LeaseStore, StorageImage
from vmf.storage.calls import Caller
from vmf.storage.holder import Lease
from vmf.storage.lease import Owner, Record

TELEPORT = "11" * 16
MIB = 1 << 20


def owner(name: str, *, host: str, machine: str) -> Owner:
    return Owner(name, machine, machine, host, host, f"boot of {host}", 1)


OWNERS = {
    "source": owner("source", host="h1", machine="vm"),
    "target": owner("target", host="h2", machine="copy"),
    "heir": owner("heir", host="h1", machine="vm"),
}
"""The heir is the source's machine, started again on its host after a crash."""


@frozen(cache_hash=True)
class Shared:
    """What all hosts see; each field has an item for each image.

    Attributes:
        records: the leases.
        locks: who has the lease's lock; "" for nobody.
        open: who has the image open for writing.
    """

    records: tuple[Record, ...]
    locks: tuple[str, ...]
    open: tuple[tuple[str, ...], ...]

    def without(self, who: str) -> Shared:
        """After its death: the kernel frees what it held."""
        return Shared(
            self.records,
            tuple("" if lock == who else lock for lock in self.locks),
            tuple(tuple(each for each in names if each != who) for names in self.open),
        )


@frozen(cache_hash=True)
class Holding:
    """What a process believes to have.

    Attributes:
        generations: at which it holds the leases; 0 when it does not.
        open: the images that it has open.
    """

    generations: tuple[int, ...]
    open: tuple[bool, ...]


Log = tuple[Any, ...]


@frozen
class Step:
    """What came of going on until the next point.

    Attributes:
        status: "paused" between two points; "done" or "failed" at the deed's end.
        log: when paused, what must be given to go on.
        gone: the storage failed for good, so that what it holds cannot be put right.
    """

    shared: Shared
    holding: Holding
    log: Log
    status: str
    gone: bool = False


def at_first(images: int) -> tuple[Shared, Holding, Holding]:
    """The source runs and holds everything: (shared, the source's, the target's)."""
    record = rules.claim(Record("image"), OWNERS["source"], excludes=True)
    shared = Shared((record,) * images, ("source",) * images, (("source",),) * images)
    return shared, Holding((record.generation,) * images, (True,) * images), nothing(images)


def nothing(images: int) -> Holding:
    return Holding((0,) * images, (False,) * images)


def may_write(who: str, shared: Shared, holding: Holding) -> bool:
    """Whether everything is open and the fences would let it write everywhere."""
    for record, lock, names, generation in zip(
        shared.records, shared.locks, shared.open, holding.generations, strict=True
    ):
        try:
            rules.verify(record, OWNERS[who], generation)
        except LeaseLost:
            return False
        if lock != who or who not in names:
            return False
    return True


def plain(shared: Shared, *holdings: Holding) -> tuple[Shared, ...]:
    """The same with the least numbers, so that a state that comes again is known. Nobody must be paused.

    Only equality matters: who holds the generation that stands gets 2, who believes in an older one 1.
    """
    records = tuple(evolve(record, generation=2, sequence=2) for record in shared.records)
    found: list[Any] = [evolve(shared, records=records)]
    for holding in holdings:
        numbers = zip(holding.generations, shared.records, strict=True)
        generations = tuple(number and (2 if number == record.generation else 1) for number, record in numbers)
        found.append(evolve(holding, generations=generations))
    return tuple(found)


def finish(who: str, verb: str, shared: Shared, holding: Holding) -> Step:
    """The whole deed, when nothing fails and nobody comes between."""
    step = Step(shared, holding, (), "paused")
    while step.status == "paused":
        step = advance(who, verb, step.shared, holding, step.log)[0]
    return step


@functools.cache
def advance(who: str, verb: str, shared: Shared, holding: Holding, log: Log) -> tuple[Step, ...]:
    """Every way to go on from a point until the next one; the first is that without a failure.

    Args:
        verb: "pass", "take" or "claim".
        holding: as it was when the deed began.
    """
    found = []
    for after in (None, False, True):
        for for_good in (False, True) if after is not None else (False,):
            try:
                step = _run(who, verb, shared, holding, log, after, for_good)
            except _Impossible:
                continue
            if step not in found:
                found.append(step)
    return tuple(found)


class _Stopped(BaseException):
    """The process sleeps, or is dead."""


class _Impossible(BaseException):
    """There is no such failure at this point."""


class _Run:
    """One run of a deed; `fails`: None for not at all, whether after the effect."""

    def __init__(self, who: str, shared: Shared, log: Log, fails: bool | None, for_good: bool) -> None:
        self.who = who
        self.records = list(shared.records)
        self.locks = list(shared.locks)
        self.open = list(shared.open)
        self.log = list(log)
        self._replay = len(log)
        self._at = 0
        self._fails = fails
        self._for_good = for_good
        self._moved = self.failed = False

    def operate(self, do: Callable[[], Any], *, point: bool = False, writes: bool = False) -> Any:
        if self._at < self._replay:
            self._at += 1
            return self.log[self._at - 1]
        if self._moved and not self.failed:
            raise _Stopped
        if self.failed and self._for_good:
            raise StorageError("the storage is gone.")
        if point and not self._moved:
            self._moved = True
            if self._fails is not None:
                self.failed = True
                if self._fails and not writes:
                    raise _Impossible
                if self._fails:
                    do()
                raise StorageError("the storage failed.")
        result = do()
        self.log.append(result)
        return result

    @property
    def shared(self) -> Shared:
        return Shared(tuple(self.records), tuple(self.locks), tuple(self.open))


class _Store(LeaseStore):
    excludes = True

    def __init__(self, run: _Run, number: int) -> None:
        self.place = f"lease {number}"
        self._run = run
        self._number = number

    def read(self) -> bytes:
        data: bytes = self._run.operate(lambda: rules.encode(self._run.records[self._number]))
        return data

    def write(self, offset: int, block: bytes) -> None:
        def do() -> None:
            record = rules.decode(block)
            assert record is not None
            self._run.records[self._number] = record

        self._run.operate(do, point=True, writes=True)

    def lock(self) -> bool:
        def do() -> bool:
            free = self._run.locks[self._number] in ("", self._run.who)
            if free:
                self._run.locks[self._number] = self._run.who
            return free

        return bool(self._run.operate(do, point=True))

    def unlock(self) -> None:
        def do() -> None:
            if self._run.locks[self._number] == self._run.who:
                self._run.locks[self._number] = ""

        if self._run.failed:
            do()  # the kernel's, whatever the storage does
        else:
            self._run.operate(do)

    def still_locked(self) -> bool:
        return bool(self._run.operate(lambda: self._run.locks[self._number] == self._run.who))

    def close(self) -> None:
        self.unlock()


class _Image(StorageImage):
    size = MIB
    read_only = False

    def __init__(self, run: _Run, number: int) -> None:
        self.uri = f"explored:{number}"
        self._run = run
        self._number = number

    def flush(self) -> None:
        self._run.operate(lambda: None, point=True)

    def close(self) -> None:
        def do() -> None:
            names = self._run.open[self._number]
            self._run.open[self._number] = tuple(each for each in names if each != self._run.who)

        if self._run.failed:
            do()
        else:
            self._run.operate(do)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise NotImplementedError

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise NotImplementedError

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        raise NotImplementedError


class _Driver:
    """A storage plugin, and the registry that finds it."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def storage(self, scheme: str) -> _Driver:
        return self

    def probe(self, uri: str) -> ImageInfo:
        return ImageInfo(uri, MIB, None, True)

    def lease_store(self, uri: str, *, create: bool) -> LeaseStore:
        return _Store(self._run, int(uri.partition(":")[2]))

    def open(self, uri: str, read_only: bool) -> StorageImage:
        number = int(uri.partition(":")[2])

        def do() -> None:
            self._run.open[number] = (*self._run.open[number], self._run.who)

        self._run.operate(do, point=True)
        return _Image(self._run, number)


class _Inline(Caller):
    """Makes the calls at once: time stands still here."""

    def call(self, what: str, function: Callable[[], Any], **settings: Any) -> Any:
        return function()

    def eventually(self, what: str, function: Callable[[], None]) -> threading.Event:
        function()
        done = threading.Event()
        done.set()
        return done


def _run(who: str, verb: str, shared: Shared, holding: Holding, log: Log, fails: bool | None, for_good: bool) -> Step:
    run = _Run(who, shared, log, fails, for_good)
    drives = tuple(DriveConfig(port=number, medium=f"explored:{number}") for number in range(len(shared.records)))
    with _clock_stands_still():
        storage = MachineStorage(
            MachineConfig(name=who, memory_mib=16, drives=drives),
            _Driver(run),  # type: ignore[arg-type]
            lambda error: None,
            _Inline,
        )
        storage._me = OWNERS[who]
        for number, slot in enumerate(storage.slots):
            slot.drive.size = MIB
            if holding.generations[number]:
                slot.lease = Lease(_Store(run, number), OWNERS[who])
                slot.lease.generation = holding.generations[number]
            if holding.open[number]:
                # Its fence has just been asked: nobody else can have got the lock of who lives.
                slot.drive.attach(_Image(run, number))
        deeds: dict[str, Callable[[], None]] = {
            "pass": lambda: storage.pass_leases(TELEPORT),
            "take": lambda: storage.take_leases(TELEPORT),
            "claim": storage.open,
        }
        deed = deeds[verb]
        try:
            deed()
            status = "done"
        except VmfError:
            status = "failed"
        except _Stopped:
            return Step(run.shared, holding, tuple(run.log), "paused")
    after = Holding(
        tuple(0 if slot.lease is None else slot.lease.generation for slot in storage.slots),
        tuple(slot.drive.attached for slot in storage.slots),
    )
    return Step(run.shared, after, (), status, run.failed and for_good)


@contextmanager
def _clock_stands_still() -> Iterator[None]:
    """In the leases: records are the same whenever they are made, and nobody waits for a lock."""
    module: Any = holder
    clock, patience = module.time, module.PATIENCE_S
    still: Any = types.SimpleNamespace(
        time=lambda: 0, monotonic=lambda: 0.0, sleep=lambda seconds: None, clock_gettime=lambda which: 0.0,
        CLOCK_BOOTTIME=clock.CLOCK_BOOTTIME,
    )  # fmt: skip
    module.time, module.PATIENCE_S = still, -1.0
    try:
        yield
    finally:
        module.time, module.PATIENCE_S = clock, patience
