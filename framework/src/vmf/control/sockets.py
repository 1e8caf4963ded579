"""Unix sockets in the home directory: private, and with paths of any length (see `vmf.unix_sockets`)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

from vmf import unix_sockets as unix
from vmf.errors import ControlError


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
