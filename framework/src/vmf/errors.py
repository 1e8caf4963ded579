"""The one hierarchy of errors that vmf raises on purpose.

Every error carries what a person needs: the thing that went wrong, the reason, and the remedy. `str()` of an
error is one line without jargon; the CLI prints it as it is and exits with `exit_status`.
"""

from __future__ import annotations

import errno
from typing import Any


class VmfError(Exception):
    """Base of every error vmf raises on purpose.

    Attributes:
        message: what went wrong and why, naming the thing.
        remedy: what to do about it, an imperative sentence, or "" where nothing can be done.
    """

    exit_status: int = 1
    code: str = "error"
    """A stable word for programs (`--json`, the control socket)."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(VmfError):
    """A machine definition, option or file content is wrong; the message names the key."""

    code = "config"
    exit_status = 2


class ImageError(VmfError):
    """A kernel, initrd or bare-metal image is missing, truncated or of an unknown kind."""

    code = "image"


class PluginError(VmfError):
    """A plugin cannot be found, imported or used; the message names it and its distribution."""

    code = "plugin"


class BackendUnavailable(PluginError):
    """A CPU backend is installed but cannot work here."""

    code = "backend-unavailable"


class MachineError(VmfError):
    """An operation on a machine failed."""

    code = "machine"


class InvalidStateError(MachineError):
    """The operation is not legal in the machine's present state."""

    code = "invalid-state"


class OperationCancelled(VmfError):
    """A long operation was cancelled on request and left nothing behind, unless the message says so."""

    code = "cancelled"


class NotFoundError(VmfError):
    """No machine (or medium) of that name."""

    code = "not-found"


class ControlError(VmfError):
    """The control socket of a machine's process did not do its part."""

    code = "control"


class StateError(VmfError):
    """A saved state cannot be restored here: unknown kind or version, leftover or impossible field."""

    code = "state"


class ContractOverridden(StateError):
    """A CPU backend presents another CPUID than the machine's contract; the message names every difference.

    Attributes:
        differences: what differs (`vmf.cpuid.compare.Difference`).
    """

    code = "contract-overridden"

    def __init__(self, message: str, remedy: str = "", differences: tuple[Any, ...] = ()) -> None:
        super().__init__(message, remedy)
        self.differences = differences


class StorageError(VmfError):
    """A disk image cannot be opened, read or written; the message names it."""

    code = "storage"


class StorageTimeout(StorageError):
    """Storage did not answer in time: the call was given up. It may still be done, or have been done."""

    code = "storage-timeout"


class StorageFull(StorageError):
    """There is no room where an image is kept: the same write may succeed once there is some."""

    code = "storage-full"


class ImageInUse(StorageError):
    """Another machine holds the image; the message names it."""

    code = "image-in-use"


class LeaseLost(StorageError):
    """This machine does not hold the image any more: another one has taken it over. It must not write."""

    code = "lease-lost"


class TransportError(VmfError):
    """A channel could not be opened, or broke."""

    code = "transport"


class TransportTimeout(TransportError):
    """Nothing came, or nothing could be sent, within the time allowed."""

    code = "transport-timeout"


class TransportClosed(TransportError):
    """The other side closed the channel."""

    code = "transport-closed"


class TransportRefused(TransportError):
    """One side turned the other away: no certificate, the wrong one, or not allowed. A listener goes on listening."""

    code = "transport-refused"


class TeleportError(VmfError):
    """A teleport did not happen; unless said otherwise the source machine goes on."""

    code = "teleport"


class AuthenticationError(TeleportError):
    """One side did not prove that it knows the password, or there is none; nothing of the machine was told."""

    code = "authentication"


class TeleportCancelled(TeleportError):
    """A teleport was cancelled on request before the handover."""

    code = "teleport-cancelled"


class TeleportBlocked(TeleportError):
    """The target cannot take this machine; nothing was moved.

    Attributes:
        blockers: every reason (`vmf.teleport.check.Blocker`), all at once.
    """

    code = "teleport-blocked"

    def __init__(self, message: str, remedy: str = "", blockers: tuple[Any, ...] = ()) -> None:
        super().__init__(message, remedy)
        self.blockers = blockers


class TeleportUncertain(TeleportError):
    """HANDOVER was sent and the target did not confirm: it may run there, so the source stays paused.

    Attributes:
        teleport_id: by which both sides know this teleport, hexadecimal.
        custodian: in the process where it happened, what resolves it (`vmf.teleport.custodian.SourceCustodian`).
    """

    code = "teleport-uncertain"

    def __init__(self, message: str, remedy: str = "", teleport_id: str = "", custodian: Any = None) -> None:
        super().__init__(message, remedy)
        self.teleport_id = teleport_id
        self.custodian = custodian


class TeleportInDoubt(TeleportError):
    """A machine whose handover nobody confirmed must not go on, or be given up, as asked: the message says why."""

    code = "teleport-doubt"


class LocalProtocolError(TeleportError):
    """This side tried to send what the protocol does not allow now: a bug in vmf or in its caller."""

    code = "protocol-local"


class RemoteProtocolError(TeleportError):
    """The other side sent bytes that the protocol does not allow."""

    code = "protocol-remote"


class ShortageError(VmfError):
    """This host, or a limit that was set for this process, has too little of something; no fault of vmf's."""

    code = "shortage"


_SHORTAGES: dict[int, tuple[str, str]] = {
    errno.EMFILE: ("the limit of open files of this process is reached", "Raise it (`ulimit -n`)."),
    errno.ENFILE: ("this host has no file descriptor left", "End other programs, or raise fs.file-max."),
    errno.ENOMEM: ("there is too little memory", "Free some, or raise the limit of this process (`ulimit -v`)."),
    errno.EAGAIN: ("no further process or thread can be started", "Raise the limit (`ulimit -u`, pids.max)."),
    errno.ENOSPC: ("the host's disk is full", "Free some space."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space."),
    errno.EFBIG: ("a file would be larger than allowed", "Raise the limit (`ulimit -f`)."),
}


def shortage(error: BaseException) -> ShortageError | None:
    """The error for a lack of memory, descriptors, threads or disk space; None for anything else."""
    number: int | None = None
    where = ""
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN
    elif isinstance(error, OSError):
        number = error.errno
        where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    if number not in _SHORTAGES:
        return None
    reason, remedy = _SHORTAGES[number]
    return ShortageError(f"{reason[0].upper()}{reason[1:]}{where}.", f"{remedy[:-1]}, and try again.")
