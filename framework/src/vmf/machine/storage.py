"""The disks of one machine: opened when it starts, passed on when it teleports, given back when it ends.

Theory of operation. Each storage port is a `Drive`, which a device serves for the machine's whole life here. This
module puts images into drives and takes them out:

- a machine that starts claims the lease of every writable image, then opens everything (`open`);
- one that waits for a teleport only looks at its media (`prepare`), since another host writes them; a missing medium
  does not keep it from waiting, but is a blocker in the check;
- at the handover the source flushes, closes and offers (`pass_leases`), the target takes and opens (`take_leases`),
  or the source takes back. Of several writable images the first decides: it is offered last and taken first, and
  whoever loses it touches none of the others;
- at the end everything is flushed, closed and given back (`close`).

An image whose storage has no place for a lease can be used, but its machine cannot teleport.

Everything is called under the machine's operation lock or from its one teleport; only the fences run on I/O threads.

No call here waits for storage for ever: each slot has a `Caller`, whose thread makes the calls that may block. What
does not answer in time is an error of the operation, except at the end (`close`): a machine ends without its storage,
and says what may not be on it. A lease is never given back before what was written is known to have arrived.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from vmf.errors import ConfigError, LeaseLost, NotFoundError, VmfError
from vmf.machine.config import MachineConfig
from vmf.machine.storage_check import check_drives
from vmf.machine.storage_slot import Look, Slot
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.base import ImageInfo
from vmf.storage.calls import CALL_SECONDS, Caller
from vmf.storage.drive import Drive
from vmf.storage.holder import Lease, this_owner
from vmf.storage.media import locks_warning
from vmf.teleport.check import Blocker

log = logging.getLogger(__name__)

HANDOVER_SECONDS = 8.0
"""For each call at the handover: the source waits 10 s for the word that the machine runs."""
CLOSE_SECONDS = 10.0
"""For everything to be flushed and given back at the end of a machine, all its disks together."""


class MachineStorage:
    """All drives of one machine.

    Attributes:
        drives: in the order of their ports; the same objects for the machine's whole life here.
    """

    def __init__(
        self,
        config: MachineConfig,
        registry: PluginRegistry,
        on_lost: Callable[[LeaseLost], None],
        make_caller: Callable[[str], Caller] = Caller,
    ) -> None:
        """`on_lost` is called once, on an I/O thread, when a fence finds that another machine has the image."""
        self._me = this_owner(config.name, config.uuid)
        self._registry = registry
        self._name = config.name
        self._make_caller = make_caller
        self._keep_leases = False
        self.slots = [Slot(each, registry, make_caller) for each in sorted(config.drives, key=lambda each: each.port)]
        self.drives: tuple[Drive, ...] = tuple(slot.drive for slot in self.slots)
        self._on_lost = on_lost
        self._lost = threading.Event()

    # -- the beginning

    def open(self, look: Look | None = None) -> None:
        """For a machine that starts: claim and open everything. Raises VmfError; then nothing is held.

        `look` is called now and then, and ends it by raising.
        """
        try:
            for slot in self.slots:
                if slot.driver is None:
                    continue
                info = slot.probe(look)
                if slot.writable and self._find_lease(slot, create=True, look=look):
                    assert slot.lease is not None
                    slot.call("claiming its lease", slot.lease.claim, look=look)
                    self._warn(slot, info)
                self._open(slot, look)
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """For a machine that waits for a teleport: look at the media. What is wrong is said by `check`."""
        for slot in self.slots:
            try:
                self._warn(slot, slot.probe())
            except VmfError as error:
                log.warning("%s: %s", slot.label, error)

    @staticmethod
    def _warn(slot: Slot, info: ImageInfo | None) -> None:
        if info is not None and slot.writable and (text := locks_warning(info)):
            log.warning("%s: %s", slot.label, text)

    def require_claimed(self) -> None:
        """Raise ConfigError for a drive that no device serves."""
        idle = [slot for slot in self.slots if not slot.drive.claimed_by]
        if idle:
            raise ConfigError(
                f"machine {self._name}: none of its devices serves the {idle[0].label} ({idle[0].config.type}).",
                f"Give it one that does: `vmf modifyvm {self._name} --device pc --device virtio`.",
            )

    def _find_lease(self, slot: Slot, *, create: bool, look: Look | None = None) -> bool:
        if slot.lease is None:
            store = slot.lease_store(create=create, look=look)
            if store is not None:
                slot.lease = Lease(store, self._me)
        return slot.lease is not None

    def _open(self, slot: Slot, look: Look | None = None) -> None:
        lease = slot.lease if slot.writable else None
        slot.open(None if lease is None else lambda: self._fence(lease), look)

    def _fence(self, lease: Lease) -> None:
        try:
            lease.fence()
        except LeaseLost as error:
            if not self._lost.is_set():
                self._lost.set()
                self._on_lost(error)
            raise

    def change_medium(self, port: int, medium: str, swap: Callable[[Drive, Callable[[], None]], None]) -> None:
        """Put another medium into the removable drive at `port`; "" for none. After an error the old one is in it.

        Args:
            swap: calls the callable that it gets when no request is under way, and tells the devices.
        """
        number = next((n for n, slot in enumerate(self.slots) if slot.config.port == port), -1)
        if number < 0:
            raise NotFoundError(
                f"machine {self._name} has no drive at port {port}.", f"See `vmf showvminfo {self._name}`."
            )
        old = self.slots[number]
        drive = old.drive
        if not drive.type.removable:
            raise ConfigError(
                f"the {old.label} is a hard disk, whose medium cannot be changed while the machine runs.",
                "Power the machine off, and use `vmf storageattach`.",
            )
        if medium == old.config.medium:
            return
        new = Slot(attrs.evolve(old.config, medium=medium), self._registry, self._make_caller)
        opened = new.drive
        try:
            if new.driver is not None:
                new.probe()
                if new.writable and self._find_lease(new, create=True):
                    assert new.lease is not None
                    new.call("claiming its lease", new.lease.claim)
                self._open(new)
            if old.writable and drive.attached:
                old.flush()  # most of it while the guest runs
            new.drive = drive

            def exchange() -> None:
                if old.writable and drive.attached:
                    old.flush()
                old.close_image()
                drive.medium, drive.size, drive.block_size = medium, opened.size, opened.block_size
                drive.can_discard = opened.can_discard
                image = opened.detach()
                if image is not None:
                    drive.attach(image, None if new.lease is None else partial(self._fence, new.lease))
                self.slots[number] = new

            swap(drive, exchange)
        except BaseException:
            if self.slots[number] is old:
                new.drive = opened
                self._give_up(new)
            raise
        old.drive = opened  # empty now: the drive itself is the new slot's
        self._give_up(old)

    @staticmethod
    def _give_up(slot: Slot) -> None:
        """Close what a slot that is no longer, or never became, this machine's holds."""
        end = time.monotonic() + CALL_SECONDS
        if slot.lease is not None or slot.mark is not None or slot.drive.attached:
            for problem in slot.finish(flush=False, release=True).wait(end):
                log.warning("%s", problem)
        slot.end_calls()

    # -- what both sides are

    def describe(self, *, publish: bool, look: Look | None = None) -> list[dict[str, Any]]:
        """For the OFFER; with `publish` (at the source) with what the target can recognise the images by."""
        return [self._describe(slot, publish, look) for slot in self.slots]

    def _describe(self, slot: Slot, publish: bool, look: Look | None) -> dict[str, Any]:
        drive, row = slot.drive, {"port": slot.config.port, "type": slot.config.type, "medium": slot.config.medium}
        row |= {"read_only": drive.read_only, "size": drive.size, "image": "", "probe": ""}
        driver, medium = slot.driver, slot.config.medium
        if not publish or driver is None:
            return row
        if slot.lease is not None and slot.lease.held:
            row["image"], row["probe"] = slot.call("marking its lease", slot.lease.publish, look=look)
        elif not slot.writable:
            slot.drop_mark()
            slot.mark = slot.call("marking it", lambda: driver.mark(medium), look=look, late=lambda late: late.close())
            row["probe"] = slot.mark.token
        return row

    def check(self, source: Any) -> list[Blocker]:
        """At the target: every difference between the source's drives and ours."""
        return check_drives(self._name, self.slots, source)

    def local_blockers(self) -> list[Blocker]:
        """What speaks against a teleport from here."""
        return [
            Blocker(
                f"lease of the {slot.label}",
                "none",
                "-",
                f"The storage of {slot.config.medium} has no place for it: name one, see `vmf storageattach --help`.",
            )
            for slot in self.slots
            if slot.writable and (slot.lease is None or not slot.lease.held)
        ]

    # -- the handover

    @property
    def leased(self) -> bool:
        """Whether there are writable images, each with a lease on a store that excludes: then the lease decides."""
        writable = [slot for slot in self.slots if slot.writable]
        return bool(writable) and all(slot.lease is not None and slot.lease.store.excludes for slot in writable)

    def flush(self, look: Look | None = None) -> None:
        """Make durable what was written until now. Raises StorageError."""
        for slot in self._writable():
            if slot.drive.attached:
                slot.flush(look)

    def pass_leases(self, teleport: str) -> None:
        """At the source; no request is under way. Raises VmfError: then `take_leases` takes back what was passed."""
        for slot in self._writable():
            if slot.drive.attached:
                slot.call("flushing it", slot.drive.flush, seconds=HANDOVER_SECONDS)
        for slot in self._writable():
            slot.close_image()
        for slot in reversed(self._writable()):
            lease = slot.lease
            assert lease is not None
            slot.call("offering its lease", partial(lease.offer, teleport), seconds=HANDOVER_SECONDS)

    def take_leases(self, teleport: str) -> None:
        """At the target after HANDOVER, or at the source that goes on after all.

        Raises VmfError; what was taken before is then offered again, for the other side.
        """
        taken: list[Slot] = []
        try:
            for slot in self.slots:
                if slot.driver is not None and not slot.writable and not slot.drive.attached:
                    self._open(slot)
            for slot in self._writable():
                if slot.drive.attached and slot.lease is not None and slot.lease.held:
                    continue  # it was never offered: that begins when every image is closed
                if not self._find_lease(slot, create=False):
                    raise NotFoundError(f"the {slot.label}: {slot.config.medium} has no lease here any more.")
                lease = slot.lease
                assert lease is not None
                slot.call(  # also what is held, as the source believes whose offer failed
                    "taking its lease",
                    partial(lease.take, teleport),
                    seconds=HANDOVER_SECONDS,
                    late=lambda _, lease=lease: lease.offer(teleport),  # type: ignore[misc]
                )
                taken.append(slot)
                if not slot.drive.attached:
                    self._open(slot)
        except BaseException:
            self._give_back(taken, teleport)
            raise

    def _give_back(self, taken: Sequence[Slot], teleport: str) -> None:
        for slot in reversed(taken):
            assert slot.lease is not None
            try:
                slot.close_image()
                slot.call("offering its lease", partial(slot.lease.offer, teleport))
            except VmfError as error:
                log.warning("%s: its lease could not be offered again: %s", slot.label, error)
                slot.lease.close()  # so that a person can see that nobody uses it
                slot.lease = None

    def end_teleport(self) -> None:
        """The teleport is over, whatever became of it."""
        for slot in self.slots:
            slot.drop_mark()

    def _writable(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.writable]

    # -- the end

    def keep_leases(self) -> None:
        """Do not give the leases back at the end: no other host is to use the images as they are."""
        self._keep_leases = True

    def close(self) -> tuple[str, ...]:
        """Flush, close and give everything back, within `CLOSE_SECONDS`. Idempotent.

        Returns (and logs) what could not be done, a sentence each: the machine ends all the same.
        """
        end = time.monotonic() + CLOSE_SECONDS
        endings = [slot.finish(flush=not self._lost.is_set(), release=not self._keep_leases) for slot in self.slots]
        problems = tuple(problem for ending in endings for problem in ending.wait(end))
        for problem in problems:
            log.warning("%s", problem)
        return problems

    def info(self) -> list[Mapping[str, Any]]:
        """For people and programs."""
        return [
            {
                "port": slot.config.port,
                "type": slot.config.type,
                "medium": slot.config.medium,
                "read_only": slot.drive.read_only,
                "size": slot.drive.size,
                "device": slot.drive.claimed_by,
                "attached": slot.drive.attached,
                "lease_generation": slot.lease.generation if slot.lease is not None else 0,
                "problem": str(slot.problem or slot.drive.problem),
            }
            for slot in self.slots
        ]
