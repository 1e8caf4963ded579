"""Unix sockets in the home directory: private, and with paths of any length (see `vmf.unix_sockets`)."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
from pathlib import Path

from vmf import unix_sockets as unix
from vmf.errors import ControlError

RESERVED = 12
"""Descriptors that stay free for the machine's own work, when consoles attach: control, a teleport, a disk."""
CONTROL_RESERVED = 4
"""The same when control clients connect."""


def listen(path: Path, backlog: int = 16) -> socket.socket:
    """A listening socket at `path`, mode 0600, replacing a stale one. Nobody else may be serving there."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        # Before the bind: the file is made with the socket's own mode, so it is never open to others.
        os.fchmod(server.fileno(), 0o600)
        with unix.to_bind(path) as address:
            server.bind(address)
        server.listen(backlog)
    except OSError as error:
        server.close()
        raise ControlError(
            f"The control socket {path} cannot be made: {error.strerror or error}.",
            "Set VMF_HOME (or XDG_RUNTIME_DIR) to a directory on a local file system that you can write to.",
        ) from error
    return server


def is_at(path: Path, status: os.stat_result) -> bool:
    """Whether `path` still names the socket that had that status when it was made."""
    try:
        return os.path.samestat(path.stat(), status)
    except OSError:
        return False


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """Connect to the socket at `path`. Raises ControlError when nobody answers there."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout)
    try:
        with unix.to_connect(path) as address:
            client.connect(address)
    except OSError as error:
        client.close()
        nobody = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
        raise ControlError(
            f"Nobody answers at {path}: {'no process serves it' if nobody else error.strerror or error}.",
            "See `vmf list runningvms`.",
        ) from error
    return client


def peer_uid(connection: socket.socket) -> int:
    """The user id of the process at the other end when it connected (unix(7), SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


def may_control(connection: socket.socket) -> bool:
    """Whether the peer is us or root; the directory's mode says the same, this holds when somebody changed it."""
    return peer_uid(connection) in (os.geteuid(), 0)


class Acceptor:
    """Accepts at a listening socket, also when the process has no descriptors left.

    `accept` at the limit fails and leaves the connection in the queue, so that a loop would try it again and again and
    the client wait for ever. One spare descriptor is kept to be closed then: the connection is accepted in its place,
    told the reason and closed.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self._spare = -1
        self.refill()

    def refill(self) -> None:
        """Have a spare descriptor again, if there is one."""
        if self._spare < 0:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self, reserved: int) -> tuple[socket.socket | None, str, str]:
        """A connection and why it has to be refused, with the remedy ("" where it need not be).

        The connection is None when there is none after all. The caller closes a refused one and calls `refill`. Raises
        OSError when it cannot accept for another reason than descriptors.

        Args:
            reserved: so many descriptors have to stay free.
        """
        try:
            connection, _ = self.socket.accept()
        except BlockingIOError:
            return None, "", ""
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self._spare < 0:
                raise
            os.close(self._spare)
            self._spare = -1
            try:
                connection, _ = self.socket.accept()
            except BlockingIOError:
                self.refill()
                return None, "", ""
            return connection, *_too_few()
        if _free_descriptors() < reserved:
            return connection, *_too_few()
        return connection, "", ""

    def close(self) -> None:
        """Listen no more; idempotent."""
        self.socket.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1


def _free_descriptors() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    try:
        return limit - len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0  # not even one for the look


def _too_few() -> tuple[str, str]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"The machine's process has too few file descriptors left for another connection (its limit is {limit}).",
        "Detach a console, or start the machine with a higher limit (`ulimit -n`).",
    )
