"""One storage port of a machine: its drive, and what is behind it. Every call that may block has an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from vmf.errors import StorageError, VmfError
from vmf.machine.config import DriveConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.base import ImageInfo, ImageMark, LeaseStore, StorageDriver
from vmf.storage.calls import CALL_SECONDS, Caller
from vmf.storage.drive import Drive, DriveType
from vmf.storage.formats import require_raw
from vmf.storage.holder import Lease, read_record
from vmf.storage.uri import scheme_of

FLUSH_SECONDS = 30.0
"""How long what was written may take to become durable, while the machine stays here."""
ABORT_SECONDS = 1.0
"""For calls to return whose connection was cut."""

T = TypeVar("T")
Look = Callable[[], None]
"""Raises when the operation has been cancelled."""


class Slot:
    """One port: its drive, and what is behind it.

    Attributes:
        lease: of a writable image, from when its place was found; None where there is none.
        problem: why a waiting target cannot use the medium, found by looking at it.
    """

    def __init__(
        self, config: DriveConfig, registry: PluginRegistry, make_caller: Callable[[str], Caller] = Caller
    ) -> None:
        self.config = config
        self.drive = Drive(
            config.port, DriveType(config.type), config.medium, read_only=config.read_only or config.type == "dvddrive"
        )
        self.driver: StorageDriver | None = registry.storage(scheme_of(config.medium)) if config.medium else None
        self.lease: Lease | None = None
        self.mark: ImageMark | None = None
        self.problem: VmfError | None = None
        self._caller = make_caller(f"the {self.label} ({config.medium})")

    @property
    def label(self) -> str:
        return f"drive at port {self.config.port}"

    @property
    def writable(self) -> bool:
        return bool(self.config.medium) and not self.drive.read_only

    def call(
        self,
        what: str,
        function: Callable[[], T],
        *,
        seconds: float | None = None,
        look: Look | None = None,
        late: Callable[[T], None] | None = None,
    ) -> T:
        """Make a call that may never return, see `Caller.call`.

        Raises StorageTimeout after `seconds`, by default `CALL_SECONDS`.
        """
        return self._caller.call(what, function, seconds=seconds or CALL_SECONDS, look=look, late=late)

    def lease_store(self, *, create: bool, look: Look | None = None) -> LeaseStore | None:
        """Where the image's lease is; see `StorageDriver.lease_store`."""
        driver, medium = self.driver, self.config.medium
        assert driver is not None
        return self.call(
            "looking for its lease",
            lambda: driver.lease_store(medium, create=create),
            look=look,
            late=lambda store: store.close() if store is not None else None,
        )

    def probe(self, look: Look | None = None) -> ImageInfo | None:
        """Look at the medium, and give the drive its geometry; None for an empty drive. Raises VmfError."""
        self.problem = None
        driver, medium = self.driver, self.config.medium
        if driver is None:
            return None
        try:
            info = self.call("looking at it", lambda: driver.probe(medium), look=look)
            if self.writable and not info.writable:
                raise StorageError(
                    f"{self.config.medium} cannot be written here: {info.why_read_only}.",
                    f"Change that, or attach it with --read-only at port {self.config.port} of both machines.",
                )
            if info.looks_like and not self._used_before(look):
                require_raw(info)
        except VmfError as error:
            self.problem = error
            raise
        self.drive.size = info.size
        return info

    def _used_before(self, look: Look | None) -> bool:
        """A machine has had the image as its disk: what its guest wrote there changes nothing."""
        store = self.lease_store(create=False, look=look) if self.writable else None
        if store is None:
            return False
        try:
            return self.call("reading its lease", partial(read_record, store), look=look).generation > 0
        finally:
            self.call("closing its lease", store.close)

    def open(self, fence: Callable[[], None] | None, look: Look | None = None) -> None:
        """Open the image into the drive."""
        driver, medium, read_only = self.driver, self.config.medium, not self.writable
        assert driver is not None
        image = self.call(
            "opening it", lambda: driver.open(medium, read_only), look=look, late=lambda late: late.close()
        )
        if self.drive.size not in (0, image.size):
            image.close()
            raise StorageError(
                f"{self.config.medium} has {image.size} bytes now, and had {self.drive.size} when it was looked at.",
                "Start the machine anew.",
            )
        self.drive.size, self.drive.block_size = image.size, image.block_size
        self.drive.can_discard = image.can_discard
        self.drive.attach(image, fence)

    def flush(self, look: Look | None = None) -> None:
        """Make durable what was written. Raises StorageError."""
        self.call("flushing it", self.drive.flush, seconds=FLUSH_SECONDS, look=look)

    def close_image(self) -> None:
        """Take the image out of the drive; what was written has been flushed."""
        image = self.drive.detach()
        if image is not None:
            self.call("closing it", image.close)

    def finish(self, *, flush: bool, release: bool) -> Ending:
        """Flush, close and give back everything, in the background: see `Ending`."""
        ending = Ending(self)
        drive, lease = self.drive, self.lease
        if drive.given_up:
            flush = release = False
            if lease is not None:
                lease.store.abort()
        self.lease = None
        mark, self.mark = self.mark, None
        steps: list[Callable[[], None]] = []
        if mark is not None:
            steps.append(mark.close)
        if drive.attached:
            steps += [drive.flush] if flush and self.writable else []
            steps.append(lambda: image.close() if (image := drive.detach()) is not None else None)
        if lease is not None:
            # At that time: a call that was given up may have got it only just now.
            steps.append(lambda: lease.release() if release and ending.in_time and lease.held else None)
            steps.append(lease.close)
        if steps:
            ending.done = self._caller.eventually("closing it", lambda: ending.run(steps))
        else:
            ending.done.set()
        return ending

    def end_calls(self) -> None:
        """No more calls come."""
        self._caller.close()

    def drop_mark(self) -> None:
        mark, self.mark = self.mark, None
        if mark is not None:
            mark.close()


class Ending:
    """A slot that is being closed on its caller's thread.

    Attributes:
        done: when everything has returned.
        in_time: whether somebody waits still; afterwards no lease is given back.
        problems: what went wrong, for people.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.done = threading.Event()
        self.in_time = True
        self.problems: list[str] = []
        self.lease = slot.lease
        self.held = self.lease is not None and self.lease.held
        self.given_up = slot.drive.given_up

    def run(self, steps: Sequence[Callable[[], None]]) -> None:
        for step in steps:
            try:
                step()
            except VmfError as error:
                self.problems.append(f"{self.slot.label}: {error}")

    def wait(self, end: float) -> list[str]:
        """Until `end` (CLOCK_MONOTONIC), then cut the connection; what went wrong."""
        slot = self.slot
        if not self.done.wait(max(0.0, end - time.monotonic())):
            self.in_time = False
            slot.drive.abort()
            if self.lease is not None:
                self.lease.store.abort()
            self.done.wait(ABORT_SECONDS)
        if not self.in_time or self.given_up:
            kept = " Its lease was not given back: see `vmf media locks`." if self.held else ""
            self.problems = [
                f"{slot.label}: {slot.config.medium} did not answer at the end of the machine. What the guest wrote"
                f" last may not be on it.{kept}"
            ]
        slot.end_calls()
        return self.problems
