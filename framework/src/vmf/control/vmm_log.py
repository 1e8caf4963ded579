"""vmm.log: what the processes that ran a machine said, and what they crashed of.

Runs follow one another in the file, each beginning with a line of its own. A start that finds the file large renames
it (`vmm.log.1` and so on), while it has the machine's lock, so never under a running machine. Crashes of the
interpreter or of a C library (`faulthandler`) go there too, also those of a machine in the foreground.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from vmf.errors import VmfError
from vmf.machine.death import BEGIN
from vmf.reading import open_to_append

LIMIT = 1 << 20
"""Bytes after which a start begins a new file."""
KEPT = 3
"""Older files that are kept."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log = logging.getLogger("vmf")


def rotate(path: Path) -> None:
    """Begin a new file if the present one is large. Only with the machine's lock; best effort."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LIMIT:
            for number in range(KEPT, 0, -1):
                older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
                with contextlib.suppress(FileNotFoundError):
                    os.replace(older, path.with_name(f"{path.name}.{number}"))


class MachineLog:
    """The log of one run, in the process that runs the machine. A disk that is full costs the log, not the machine."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._file: BinaryIO | None = None
        self._handler: logging.Handler | None = None
        self._level = _log.level
        self._enabled = False

    def __enter__(self) -> Self:
        if self._is_stderr():
            file = os.dup(2)
        else:  # in the foreground
            rotate(self._path)
            try:
                file = open_to_append(self._path)
            except OSError as error:
                _log.warning("%s cannot be written: %s.", self._path, error.strerror)
                return self
        self._file = open(file, "wb", buffering=0)
        with contextlib.suppress(OSError):
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"\n{BEGIN}machine {self._name}, process {os.getpid()}, {began}\n".encode())
        if not self._is_stderr():
            self._handler = _Quiet(self._path)
            self._handler.setFormatter(logging.Formatter(FORMAT))
            _log.addHandler(self._handler)
            _log.setLevel(logging.INFO)
        if not faulthandler.is_enabled():  # else an embedding program has its own idea
            faulthandler.enable(self._file)
            self._enabled = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if self._enabled:
            faulthandler.disable()
        if self._handler is not None:
            _log.removeHandler(self._handler)
            _log.setLevel(self._level)
            self._handler.close()
        self._file.close()

    def tell(self, error: BaseException) -> None:
        """What ended the machine; on stderr, where a detached one's log is, its reporter tells it."""
        if self._handler is not None:
            _log.error("%s", error, exc_info=None if isinstance(error, VmfError) else error)

    def _is_stderr(self) -> bool:
        try:
            return os.path.samestat(os.fstat(2), self._path.stat())
        except OSError:
            return False


class _Quiet(logging.FileHandler):
    """Says nothing on stderr when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass
