"""A drive: one storage port of a machine, with or without a medium in it. What device plugins work with.

A device is made before the machine may use its disks (a teleport target waits while another host still writes them),
and lives on when they have been passed on. So it holds a `Drive` all its life, and the machine puts the open image in
(`attach`) and takes it out (`detach`). Geometry (`size`, `read_only`, ...) is known and constant from the beginning,
except that a removable drive may get another medium (`Device.medium_changed`).
I/O outside of the time in which the machine holds the image raises StorageError.

Who may write is checked with every request that changes the image, by the `fence` that came with it: an owner that
slept through its own replacement finds out before it writes. See `vmf.storage.lease`.

Device plugins: take drives from `DeviceEnvironment.drives`, and call `claim` on each that the device serves. `quiesce`
of the device must wait until none of its requests is in a drive any more.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from vmf.errors import StorageError
from vmf.storage.base import StorageImage


class DriveType(enum.Enum):
    HDD = "hdd"
    DVD = "dvddrive"
    FLOPPY = "floppy"

    @property
    def removable(self) -> bool:
        """It may be empty."""
        return self is not DriveType.HDD


class Drive:
    """One storage port.

    Attributes:
        port: the port's number, unique in the machine; devices are made in this order.
        type: what the guest has there.
        medium: the image's URI; "" when there is none.
        size: bytes; 0 without a medium.
        block_size: what the image reads and writes best, bytes.
        read_only: the guest cannot write; true for every dvddrive.
        can_discard: discarding gives space back.
        serial: identifies the drive to the guest, at most 20 ASCII characters, equal at both ends of a teleport.
        claimed_by: the device that serves it; "" when none does.
        problem: what the device that serves it waits for, one sentence; "" for nothing.
        given_up: requests were given up (`abort`) that the storage did not answer: they may still reach it.
    """

    def __init__(
        self,
        port: int,
        type: DriveType,
        medium: str = "",
        *,
        size: int = 0,
        block_size: int = 4096,
        read_only: bool = False,
        can_discard: bool = False,
    ) -> None:
        self.port = port
        self.type = type
        self.medium = medium
        self.size = size
        self.block_size = block_size
        self.read_only = read_only
        self.can_discard = can_discard
        self.serial = f"vmf-{type.value}-{port}"
        self.claimed_by = ""
        self.problem = ""
        self.given_up = False
        self._image: StorageImage | None = None
        self._fence: Callable[[], None] | None = None

    def claim(self, device: str) -> None:
        """A device (its `kind`) serves this drive from now on."""
        if self.claimed_by:
            raise StorageError(f"the drive at port {self.port} is used by {self.claimed_by} already.")
        self.claimed_by = device

    # -- for the machine

    def attach(self, image: StorageImage, fence: Callable[[], None] | None = None) -> None:
        """The machine holds the image from now on. `fence` raises LeaseLost when it does not any more."""
        self._fence = fence
        self._image = image

    def detach(self) -> StorageImage | None:
        """The machine gives the image up; the caller flushes and closes it. No request must be under way."""
        image, self._image = self._image, None
        self._fence = None
        return image

    def abort(self) -> None:
        """The machine ends without waiting: what is under way in the image fails, where the storage can do that."""
        image = self._image
        if image is not None:
            self.given_up = True
            image.abort()

    @property
    def attached(self) -> bool:
        return self._image is not None

    @property
    def writes_wait(self) -> bool:
        """See `StorageImage.writes_wait`."""
        image = self._image
        return image is None or image.writes_wait

    # -- for devices: any thread

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `offset` (bytes). Raises StorageError."""
        self._opened().readv(offset, buffers)

    def readv_at_once(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Read if that needs no waiting; False when it does, with parts of the buffers perhaps filled."""
        return self._opened().readv_at_once(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers at `offset` (bytes). Raises StorageError; LeaseLost when another machine has the image."""
        self._writable().writev(offset, buffers)

    def flush(self) -> None:
        """Return when everything whose write returned before is durable. Raises StorageError."""
        image = self._opened()
        if not self.read_only:
            if self._fence is not None:
                self._fence()
            image.flush()

    def discard(self, offset: int, length: int) -> None:
        """The guest does not need that range any more. Raises StorageError."""
        self._writable().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make that range read as zeroes. Raises StorageError."""
        self._writable().write_zeroes(offset, length, may_unmap=may_unmap)

    def _opened(self) -> StorageImage:
        image = self._image
        if image is None:
            reason = "is not this machine's at the moment" if self.medium else "has no medium"
            raise StorageError(f"the drive at port {self.port} {reason}.")
        return image

    def _writable(self) -> StorageImage:
        image = self._opened()
        if self.read_only:
            raise StorageError(f"the drive at port {self.port} ({self.medium}) is read-only.")
        if self._fence is not None:
            self._fence()
        return image
