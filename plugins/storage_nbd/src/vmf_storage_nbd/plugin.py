"""Entry points `nbd`, `nbds` and `nbd+unix` of the group `vmf.storage`: one driver for each scheme."""

from __future__ import annotations

from vmf.plugins import hookimpl
from vmf.storage.base import StorageDriver
from vmf_storage_nbd.driver import NbdDriver


class Plugin:
    """The plugin object of one scheme."""

    vmf_api_version = 1

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    @hookimpl
    def vmf_storage_driver(self) -> StorageDriver:
        """The driver."""
        return NbdDriver(self._scheme)


nbd, nbds, nbd_unix = Plugin("nbd"), Plugin("nbds"), Plugin("nbd+unix")
