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
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from vmf.errors import ConfigError, LeaseLost, NotFoundError, StorageError, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage_check import check_drives
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.base import ImageInfo, ImageMark, StorageDriver
from vmf.storage.drive import Drive, DriveType
from vmf.storage.formats import require_raw
from vmf.storage.holder import Lease, read_record, this_owner
from vmf.storage.media import locks_warning
from vmf.storage.uri import scheme_of
from vmf.teleport.check import Blocker

log = logging.getLogger(__name__)


class Slot:
    """One port: its drive, and what is behind it.

    Attributes:
        lease: of a writable image, from when its place was found; None where there is none.
        problem: why a waiting target cannot use the medium, found by looking at it.
    """

    def __init__(self, config: DriveConfig, registry: PluginRegistry) -> None:
        self.config = config
        self.drive = Drive(
            config.port, DriveType(config.type), config.medium, read_only=config.read_only or config.type == "dvddrive"
        )
        self.driver: StorageDriver | None = registry.storage(scheme_of(config.medium)) if config.medium else None
        self.lease: Lease | None = None
        self.mark: ImageMark | None = None
        self.problem: VmfError | None = None

    @property
    def label(self) -> str:
        return f"drive at port {self.config.port}"

    @property
    def writable(self) -> bool:
        return bool(self.config.medium) and not self.drive.read_only

    def probe(self) -> ImageInfo | None:
        """Look at the medium, and give the drive its geometry; None for an empty drive. Raises VmfError."""
        self.problem = None
        if self.driver is None:
            return None
        try:
            info = self.driver.probe(self.config.medium)
            if self.writable and not info.writable:
                raise StorageError(
                    f"{self.config.medium} cannot be written here: {info.why_read_only}.",
                    f"Change that, or attach it with --read-only at port {self.config.port} of both machines.",
                )
            if info.looks_like and not self._used_before():
                require_raw(info)
        except VmfError as error:
            self.problem = error
            raise
        self.drive.size = info.size
        return info

    def _used_before(self) -> bool:
        """A machine has had the image as its disk: what its guest wrote there changes nothing."""
        assert self.driver is not None
        store = self.driver.lease_store(self.config.medium, create=False) if self.writable else None
        if store is None:
            return False
        try:
            return read_record(store).generation > 0
        finally:
            store.close()

    def open(self, fence: Callable[[], None] | None) -> None:
        """Open the image into the drive."""
        assert self.driver is not None
        image = self.driver.open(self.config.medium, not self.writable)
        if self.drive.size not in (0, image.size):
            image.close()
            raise StorageError(
                f"{self.config.medium} has {image.size} bytes now, and had {self.drive.size} when it was looked at.",
                "Start the machine anew.",
            )
        self.drive.size, self.drive.block_size = image.size, image.block_size
        self.drive.can_discard = image.can_discard
        self.drive.attach(image, fence)

    def close_image(self) -> None:
        """Take the image out of the drive; what was written has been flushed."""
        image = self.drive.detach()
        if image is not None:
            image.close()

    def drop_mark(self) -> None:
        mark, self.mark = self.mark, None
        if mark is not None:
            mark.close()


class MachineStorage:
    """All drives of one machine.

    Attributes:
        drives: in the order of their ports; the same objects for the machine's whole life here.
    """

    def __init__(self, config: MachineConfig, registry: PluginRegistry, on_lost: Callable[[LeaseLost], None]) -> None:
        """`on_lost` is called once, on an I/O thread, when a fence finds that another machine has the image."""
        self._me = this_owner(config.name, config.uuid)
        self._registry = registry
        self._name = config.name
        self.slots = [Slot(each, registry) for each in sorted(config.drives, key=lambda each: each.port)]
        self.drives: tuple[Drive, ...] = tuple(slot.drive for slot in self.slots)
        self._on_lost = on_lost
        self._lost = threading.Event()

    # -- the beginning

    def open(self) -> None:
        """For a machine that starts: claim and open everything. Raises VmfError; then nothing is held."""
        try:
            for slot in self.slots:
                if slot.driver is None:
                    continue
                info = slot.probe()
                if slot.writable and self._find_lease(slot, create=True):
                    assert slot.lease is not None
                    slot.lease.claim()
                    self._warn(slot, info)
                self._open(slot)
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

    def _find_lease(self, slot: Slot, *, create: bool) -> bool:
        assert slot.driver is not None
        if slot.lease is None:
            store = slot.driver.lease_store(slot.config.medium, create=create)
            if store is not None:
                slot.lease = Lease(store, self._me)
        return slot.lease is not None

    def _open(self, slot: Slot) -> None:
        lease = slot.lease if slot.writable else None
        slot.open(None if lease is None else lambda: self._fence(lease))

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
        new = Slot(attrs.evolve(old.config, medium=medium), self._registry)
        opened = new.drive
        try:
            if new.driver is not None:
                new.probe()
                if new.writable and self._find_lease(new, create=True):
                    assert new.lease is not None
                    new.lease.claim()
                self._open(new)
            new.drive = drive

            def exchange() -> None:
                if old.writable:
                    drive.flush()
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
        if old.lease is not None:
            self._give_up(old, image=False)
        old.drop_mark()

    def _give_up(self, slot: Slot, *, image: bool = True) -> None:
        """Close what a slot that is no longer, or never became, this machine's holds."""
        if image:
            slot.close_image()
        lease, slot.lease = slot.lease, None
        if lease is not None:
            try:
                if lease.held:
                    lease.release()
            finally:
                lease.close()

    # -- what both sides are

    def describe(self, *, publish: bool) -> list[dict[str, Any]]:
        """For the OFFER; with `publish` (at the source) with what the target can recognise the images by."""
        return [self._describe(slot, publish) for slot in self.slots]

    def _describe(self, slot: Slot, publish: bool) -> dict[str, Any]:
        drive, row = slot.drive, {"port": slot.config.port, "type": slot.config.type, "medium": slot.config.medium}
        row |= {"read_only": drive.read_only, "size": drive.size, "image": "", "probe": ""}
        if not publish or slot.driver is None:
            return row
        if slot.lease is not None and slot.lease.held:
            row["image"], row["probe"] = slot.lease.publish()
        elif not slot.writable:
            slot.drop_mark()
            slot.mark = slot.driver.mark(slot.config.medium)
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

    def flush(self) -> None:
        """Make durable what was written until now. Raises StorageError."""
        for slot in self._writable():
            if slot.drive.attached:
                slot.drive.flush()

    def pass_leases(self, teleport: str) -> None:
        """At the source; no request is under way. Raises VmfError: then `take_leases` takes back what was passed."""
        self.flush()
        for slot in self._writable():
            slot.close_image()
        for slot in reversed(self._writable()):
            assert slot.lease is not None
            slot.lease.offer(teleport)

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
                if not self._find_lease(slot, create=False):
                    raise NotFoundError(f"the {slot.label}: {slot.config.medium} has no lease here any more.")
                assert slot.lease is not None
                slot.lease.take(teleport)  # also what is held, as the source believes whose offer failed
                taken.append(slot)
                if not slot.drive.attached:
                    self._open(slot)
        except BaseException:
            self._give_back(taken, teleport)
            raise

    def _give_back(self, taken: Sequence[Slot], teleport: str) -> None:
        for slot in reversed(taken):
            slot.close_image()
            assert slot.lease is not None
            try:
                slot.lease.offer(teleport)
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

    def close(self) -> None:
        """Flush, close and give everything back; errors are logged, as nobody could do anything. Idempotent."""
        for slot in self.slots:
            steps: list[Callable[[], None]] = [slot.drop_mark]
            if slot.drive.attached and slot.writable and not self._lost.is_set():
                steps.append(slot.drive.flush)
            steps.append(slot.close_image)
            lease, slot.lease = slot.lease, None
            if lease is not None:
                steps += [lease.release] if lease.held else []
                steps.append(lease.close)
            for step in steps:
                try:
                    step()
                except VmfError as error:
                    log.warning("%s: %s", slot.label, error)

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
                "problem": str(slot.problem or ""),
            }
            for slot in self.slots
        ]
