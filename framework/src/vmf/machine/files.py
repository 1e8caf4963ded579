"""Files and directories of a home: private, replaced as a whole, and with errors that people understand."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from vmf.errors import VmfError


class HomeError(VmfError):
    """The home directory cannot be used: read-only, full, or not ours."""

    code = "home"


def private_directory(path: Path) -> None:
    """Make sure of a directory that only we can enter. Raises HomeError when it is another user's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            remedy = "Set VMF_HOME to a directory of your own."
            raise HomeError(f"{path} belongs to user {status.st_uid}, not to you.", remedy)
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise explained(error, path) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash at any moment, sees the old or the new one, complete. Mode 0600.

    A symbolic link stays one: the file that it names is replaced.
    """
    path = Path(os.path.realpath(path))
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise explained(error, path) from error


def explained(error: OSError, path: Path) -> HomeError:
    """What the system said about a file, for people."""
    place = "Set VMF_HOME to a directory that you can write to."
    remedies = {
        errno.EROFS: ("is on a read-only file system", place),
        errno.EACCES: ("cannot be written: permission denied", place),
        errno.EPERM: ("cannot be written: not permitted", place),
        errno.ENOSPC: ("cannot be written: the disk is full", "Free some space and try again; nothing was changed."),
        errno.EDQUOT: (
            "cannot be written: your quota is used up",
            "Free some space and try again; nothing was changed.",
        ),
        errno.ENOTDIR: ("cannot be used: something on its path is not a directory", place),
        errno.EBUSY: ("cannot be replaced: it is a mount point, or in use", "Mount its directory instead of the file."),
        errno.EISDIR: ("is a directory, not a file", "Move it away."),
        errno.EINVAL: (f"cannot be used: {error.strerror or error}", "Move it away."),
        errno.EEXIST: ("is there, but is not a directory", place),
    }
    reason, remedy = remedies.get(error.errno or 0, (f"cannot be used: {error.strerror or error}", place))
    return HomeError(f"{path} {reason}.", remedy)
