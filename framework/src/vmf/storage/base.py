"""What a storage plugin implements."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vmf.transport.base import Buffer


class StorageImage(ABC):
    """An open disk image."""

    uri: str
    size: int
    """Bytes."""
    read_only: bool

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from image offset `offset` (bytes)."""

    @abstractmethod
    def write(self, offset: int, buffer: Buffer) -> None: ...

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written before is durable."""

    @abstractmethod
    def identity(self) -> str:
        """Equal on two hosts exactly when both see the same image."""

    @abstractmethod
    def close(self) -> None: ...


class StorageDriver(ABC):
    """Opens images of one URI scheme."""

    scheme: str
    """As in `scheme:...`, equal to the entry point's name."""

    @abstractmethod
    def open(self, uri: str, read_only: bool) -> StorageImage: ...
