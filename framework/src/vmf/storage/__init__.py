"""The storage seam: a driver opens a disk image by URI. Disks themselves are devices."""

from vmf.storage.base import StorageDriver, StorageImage

__all__ = ["StorageDriver", "StorageImage"]
