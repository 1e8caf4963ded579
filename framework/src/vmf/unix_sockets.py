"""Addresses of Unix sockets whose paths are too long for the kernel.

It takes at most 107 bytes of path (unix(7), sun_path). A descriptor has a short name, `/proc/self/fd/N`, which leads to
the same place: a descriptor of the socket's file for who connects, one of its directory for who makes it. Nothing
changes the working directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SUN_PATH_MAX = 107
"""Bytes."""


@contextlib.contextmanager
def to_bind(path: Path) -> Iterator[str]:
    """An address at which to make a socket; the file's own name must be short. Raises OSError."""
    if len(os.fsencode(path)) <= SUN_PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def to_connect(path: str | Path) -> Iterator[str]:
    """An address of the socket that is there. Raises OSError."""
    if len(os.fsencode(path)) <= SUN_PATH_MAX:
        yield str(path)
        return
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)
