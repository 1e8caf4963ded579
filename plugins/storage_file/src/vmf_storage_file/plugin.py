"""Entry point `file` of the group `vmf.storage`."""

from __future__ import annotations

from vmf.plugins import hookimpl
from vmf.storage.base import StorageDriver
from vmf_storage_file.driver import FileDriver

vmf_api_version = 1


@hookimpl
def vmf_storage_driver() -> StorageDriver:
    """The driver of raw images."""
    return FileDriver()
