"""Standard streams that cannot fail a command: what it does is more than what it prints.

A teleport that moved a machine is done whether or not its summary could be printed. So standard output and standard
error are replaced by streams that remember the first write that failed (a full disk, a reader that has gone) and drop
the rest; the command ends as it would have, and its exit status tells of the lost output afterwards. Characters that
the terminal's encoding lacks are escaped. A stream that was closed before the start (`>&-`) counts as /dev/null: its
number must not go to the next file that is opened, which would then be printed into.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LOST_OUTPUT = 74
"""Exit status of a command that did its work, but could not print all of its output (EX_IOERR of sysexits.h)."""
BROKEN_PIPE = 128 + 13


class Lenient(io.FileIO):
    """A descriptor to write to, which is not closed with it; `lost` is the first error of a write."""

    lost: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.lost is None and done < len(view):
            try:
                done += os.write(self.fileno(), view[done:])
            except BlockingIOError:  # somebody else's O_NONBLOCK on the terminal that we share
                _wait_writable(self.fileno())
            except OSError as error:
                self.lost = error
        return len(view)


def _wait_writable(descriptor: int) -> None:
    import select

    select.select([], [descriptor], [], 1.0)


class Streams:
    """This process's standard streams while a command runs."""

    def __init__(self) -> None:
        _fill_closed()
        self._out, self._err = Lenient(1), Lenient(2)
        sys.stdout = _text(sys.stdout, self._out)
        sys.stderr = _text(sys.stderr, self._err)
        if sys.stdin is None:
            sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it lives as long as the process

    def status(self, status: int) -> int:
        """The exit status of a command that ended with `status`, now that everything is written out."""
        sys.stdout.flush()
        lost = self._out.lost
        if lost is None or status:
            return status
        if lost.errno == errno.EPIPE:
            return BROKEN_PIPE  # the reader had seen enough (`vmf list vms | head -1`)
        sys.stderr.write(
            f"vmf: error: standard output cannot be written: {lost.strerror}. The command itself was carried out.\n"
        )
        return LOST_OUTPUT


def _fill_closed() -> None:
    """Put /dev/null where one of the three standard descriptors is closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _text(before: TextIO | None, raw: Lenient) -> TextIO:
    encoding = getattr(before, "encoding", None) or "utf-8"
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=raw.isatty() or raw.fileno() == 2)
