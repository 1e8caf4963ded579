"""Holding a lease: the transitions of `vmf.storage.lease`, done on a store.

A `Lease` is opened for one writable image of one machine. Changes of owner happen under the store's lock, which is
kept for as long as the lease is held. `fence` is called by every thread before every write:

- where the store is on this host's own file system, it reads the record each time (four microseconds: what is compared
  is the bytes);
- where reading is a round trip to another host, at most every `CHECK_EVERY_S` of real time, suspends and stops
  included, so that a process which was stopped for longer reads before it writes.

What remains is the time between the check and the write itself: no plain file can do both at once. While the kernel's
lock works, the lock closes that gap: nobody else gets it while we live. docs/explanation/leases.md has the table.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable

from vmf import host
from vmf.errors import ImageInUse, LeaseLost, StorageError
from vmf.storage import lease as rules
from vmf.storage.base import LeaseStore
from vmf.storage.lease import Owner, Record

CHECK_EVERY_S = 0.25
PATIENCE_S = 1.0


def this_owner(machine: str, uuid: str) -> Owner:
    """A new run of a machine, in this process."""
    return Owner(
        incarnation=secrets.token_hex(16),
        machine=machine,
        uuid=uuid,
        host=host.host_name(),
        host_id=host.machine_id(),
        boot_id=host.boot_id(),
        pid=os.getpid(),
    )


def read_record(store: LeaseStore) -> Record:
    """The record as it is now; a fresh one when there is none yet."""
    try:
        record = rules.decode(store.read())
    except StorageError as error:
        raise type(error)(f"{store.place}: {error.message}", error.remedy) from None
    return record if record is not None else Record(image=secrets.token_hex(16))


class Lease:
    """The lease of one image, for one run of one machine. `fence` from any thread; the rest from one at a time.

    Attributes:
        store: where it is kept.
        generation: at which we hold it; 0 when we do not.
    """

    def __init__(self, store: LeaseStore, me: Owner) -> None:
        self.store = store
        self._me = me
        self.generation = 0
        self._expected = b""
        self._fresh_until = 0.0
        self._checking = threading.Lock()

    @property
    def _image(self) -> str:
        """For people: the image whose lease this is, or, where it is kept elsewhere, the lease."""
        return self.store.place.removesuffix(".vmf-lease")

    @property
    def held(self) -> bool:
        return self.generation > 0

    def claim(self) -> None:
        """Get it for a machine that starts. Raises ImageInUse naming its owner, or StorageError."""
        self._lock()
        try:
            record = self._read()
            reach = {"excludes": self.store.excludes, "excludes_here": self.store.excludes_here}
            try:
                claimed = rules.claim(record, self._me, **reach, since=int(time.time()))
            except ImageInUse as error:
                raise ImageInUse(f"{self._image} is not free: {error.message}", error.remedy) from None
            self._hold(claimed)
            if not self.store.excludes:
                # Another machine may have read the same record before we wrote ours; it has written by now.
                time.sleep(CHECK_EVERY_S)
                self.fence()
        except BaseException:
            self.generation = 0
            self._undo(lambda record: rules.release(record, self._me, record.generation))
            self.store.unlock()
            raise

    def publish(self) -> tuple[str, str]:
        """Make the image recognisable: (the lease's name, a fresh mark that is now in its record)."""
        probe = secrets.token_hex(16)
        record = rules.publish(self._read(), self._me, self.generation, probe)
        self._hold(record)
        return record.image, probe

    def offer(self, teleport: str) -> None:
        """Let the other side of a teleport take it. The image has been flushed and closed. Raises LeaseLost."""
        self._write(rules.offer(self._read(), self._me, self.generation, teleport))
        self._drop()

    def take(self, teleport: str) -> None:
        """Get what was offered, as the target or back at the source. Raises LeaseLost: the machine is not ours.

        Nor is it after any other error. What is ours already (an offer that failed had perhaps been written, and
        perhaps not) is kept.
        """
        # The other side lets go of its lock a moment after its record is written, or holds it for good.
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._lock()
                break
            except ImageInUse as error:
                if time.monotonic() > end:
                    raise LeaseLost(error.message, error.remedy) from None
                time.sleep(0.001)
        try:
            record = self._read()
            if record.held_by(self._me.incarnation):
                self._hold(rules.touched(record))
            else:
                self._hold(rules.take(record, self._me, teleport, int(time.time())))
        except BaseException:
            self.generation = 0
            self._undo(lambda record: rules.offer(record, self._me, record.generation, teleport))
            self.store.unlock()
            raise

    def _undo(self, change: Callable[[Record], Record]) -> None:
        """Getting it failed: should the record call it ours all the same (written, but not heard of), change that."""
        try:
            record = self._read()
            if record.held_by(self._me.incarnation):
                self._write(change(record))
        except StorageError:
            pass  # out of reach: what the record says stands, and a person has to look

    def release(self) -> None:
        """Give it up in good order. Raises LeaseLost when it was lost before."""
        try:
            self._write(rules.release(self._read(), self._me, self.generation))
        finally:
            self._drop()

    def fence(self) -> None:
        """Raise LeaseLost unless we hold it (still). Cheap; before every write."""
        if not self.generation:
            raise LeaseLost(f"{self.store.place}: this machine does not hold the lease.")
        if self.store.shared_slowly and _boottime() < self._fresh_until:
            return
        with self._checking:
            began = _boottime()
            if not self.store.still_locked():
                raise LeaseLost(
                    f"{self.store.place}: the lock on the lease was lost.",
                    "Nothing was written. Look who has the image now: `vmf media locks`.",
                )
            if self.store.read() != self._expected:
                record = self._read()
                rules.verify(record, self._me, self.generation)
                self._expected = self.store.read()
            self._fresh_until = began + CHECK_EVERY_S

    def close(self) -> None:
        """Let go of the store; whoever looks then finds HELD, but not locked."""
        self._drop()
        self.store.close()

    # -- the steps

    def _lock(self) -> None:
        if self.store.lock():
            return
        record = read_record(self.store)
        raise ImageInUse(
            f"{self._image} is in use: {rules.describe(record)}.",
            "Stop that machine, or teleport it here.",
        )

    def _read(self) -> Record:
        return read_record(self.store)

    def _write(self, record: Record) -> None:
        self.store.write(record.sequence % 2 * rules.BLOCK, rules.encode(record))

    def _hold(self, record: Record) -> None:
        self._write(record)
        expected = self.store.read()
        if rules.decode(expected) != record:
            # Only a store that nothing excludes others from can do this: somebody wrote at the same moment.
            raise LeaseLost(f"{self.store.place}: another host wrote the lease at the same moment.", "Try again.")
        self._expected = expected
        self._fresh_until = 0.0
        self.generation = record.generation

    def _drop(self) -> None:
        self.generation = 0
        self.store.unlock()


def _boottime() -> float:
    """Seconds, counting on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
