"""The storage seam: a driver opens a disk image by URI. Disks themselves are devices, which use drives."""

from vmf.storage.base import SECTOR_SIZE, ImageInfo, LeaseStore, StorageDriver, StorageImage
from vmf.storage.drive import Drive, DriveType

__all__ = ["SECTOR_SIZE", "Drive", "DriveType", "ImageInfo", "LeaseStore", "StorageDriver", "StorageImage"]
