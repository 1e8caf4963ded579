"""Reading files that people name: a pipe whose other end stays silent is not waited for without end.

Opening a FIFO blocks until a program writes to it, and reading a terminal or a pipe until something comes. An image
and the files of a home must be regular (or a block device); a password or a list may come through a pipe, as in
`--password-file <(pass show vmf)`, within a time limit.
"""

from __future__ import annotations

import errno
import io
import json
import os
import select
import stat
import time
from pathlib import Path
from typing import Any

PIPE_SECONDS = 60.0
"""For what comes through a pipe: long enough for a person to type a passphrase into the program at its other end."""
_PIPE = "it is a pipe, not a file"


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file or block device to read. Raises OSError; EINVAL says what it is instead."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | Path) -> str:
    """All of a regular file, as UTF-8. Raises OSError; UnicodeDecodeError, a ValueError."""
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def read_record(path: str | Path) -> dict[str, Any]:
    """The JSON object that a regular file holds. Raises OSError; ValueError when it holds anything else."""
    try:
        found = json.loads(read_text(path))
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def open_to_append(path: str | Path) -> int:
    """A descriptor of a log, made with mode 0600 when there is none; devices will do. Raises OSError.

    A pipe is an error (EINVAL): a program that does not read it would hold up who writes the log.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that no program reads
            raise OSError(errno.EINVAL, _PIPE, str(path)) from None
        raise
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _PIPE, str(path))
    os.set_blocking(descriptor, True)
    return descriptor


def read_file(path: str | Path, most: int) -> tuple[bytes, os.stat_result]:
    """Up to `most` bytes of a file, pipe or device, and what fstat(2) says of it.

    Raises OSError, TimeoutError among them after `PIPE_SECONDS`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        return read_descriptor(descriptor, most, fifo=stat.S_ISFIFO(status.st_mode)), status
    finally:
        os.close(descriptor)


def read_descriptor(descriptor: int, most: int, *, fifo: bool = False, line: bool = False) -> bytes:
    """Up to `most` bytes, to the end of the file, or with `line` to the end of a line.

    Args:
        fifo: the other end may not be open yet; an end of file before the first byte is none.

    Raises OSError, TimeoutError among them after `PIPE_SECONDS`.
    """
    deadline = time.monotonic() + PIPE_SECONDS
    content = b""
    while len(content) < most and not (line and content.endswith(b"\n")):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came within {PIPE_SECONDS:.0f} seconds")
        try:
            piece = os.read(descriptor, 1 if line else most - len(content))
        except BlockingIOError:
            continue
        if not piece:
            if not fifo or content:
                break
            time.sleep(0.01)  # no writer yet: select(2) reports the end of the file all the time
        content += piece
    return content
