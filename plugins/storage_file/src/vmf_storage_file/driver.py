"""Raw images by path or `file:` URI, on any file system that this host mounts, and on block devices.

`file:/srv/web.img?lease=/mnt/shared/web.lease` keeps the lease somewhere else: for block devices (iSCSI), which have no
"beside".

Locks on an image: whoever writes it holds an exclusive one on the byte `IMAGE_LOCK`, whoever reads it a shared one.
They back the lease up: should somebody delete the lease file, they still exclude; and NFS fails the I/O of a client
whose locks it has lost. QEMU and its tools are kept out by their own locks (`qemulocks`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shlex
import stat
from collections.abc import Callable

from vmf import record_locks
from vmf.errors import ConfigError, ImageInUse, NotFoundError, StorageError
from vmf.storage import formats, sparse
from vmf.storage.base import SECTOR_SIZE, ImageInfo, ImageMark, LeaseStore, StorageDriver, StorageImage
from vmf.storage.uri import file_path, split_options
from vmf_storage_file import kernel, mounts, qemulocks
from vmf_storage_file.image import FileImage, explain
from vmf_storage_file.leasefile import SUFFIX, LeaseFile

IMAGE_LOCK = 1 << 62
MARKS = 1 << 61
"""Marks are locks on one of the 2^40 bytes from here."""
FICLONE = 0x40049409  # <linux/fs.h>
MAX_SIZE = 1 << 60


class FileDriver(StorageDriver):
    scheme = "file"

    def probe(self, uri: str) -> ImageInfo:
        path, place = _parse(uri)
        descriptor = _open(path, os.O_RDONLY)
        try:
            size = _size(path, descriptor)
            regular = _is_file(descriptor)
            kept_in = os.path.dirname(place) if place else path if regular else ""
            why = ""
            if not os.access(path, os.W_OK, effective_ids=True):
                read_only_there = os.fstatvfs(descriptor).f_flag & os.ST_RDONLY
                why = (
                    "its file system is mounted read-only" if read_only_there else "you have no permission to write it"
                )
            return ImageInfo(
                uri=uri,
                size=size,
                allocated=os.fstat(descriptor).st_blocks * 512 if regular else None,
                writable=not why,
                why_read_only=why,
                where=f"file on {kernel.file_system(descriptor)}" if regular else "block device",
                local_locks=mounts.local_locks_at(kept_in) if kept_in else "",
                looks_like="" if _declared_raw(uri) else _looks_like(path, descriptor),
            )
        finally:
            os.close(descriptor)

    def open(self, uri: str, read_only: bool) -> StorageImage:
        path, _ = _parse(uri)
        descriptor = _open(path, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            size = _size(path, descriptor)
            _lock(path, descriptor, exclusive=not read_only)
            if not _is_file(descriptor):
                # Another host may have written since this one read: a file system looks at the server when a file is
                # opened, a block device does not, as long as any program here has it open.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return FileImage(uri, path, descriptor, size, read_only=read_only)
        except BaseException:
            os.close(descriptor)
            raise

    def lease_store(self, uri: str, *, create: bool) -> LeaseStore | None:
        path, place = _parse(uri)
        if not place:
            if not stat.S_ISREG(os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG):
                return None
            # The image's own name, not a link's: two names of one image have one lease.
            place = os.path.realpath(path) + SUFFIX
        try:
            return LeaseFile(place, create=create)
        except FileNotFoundError:
            if create:
                raise NotFoundError(
                    f"there is no directory for the lease {place}.", "Make it, or mount the storage."
                ) from None
            return None

    def mark(self, uri: str) -> ImageMark:
        path, _ = _parse(uri)
        descriptor = _open(path, os.O_RDONLY)
        number = secrets.randbits(40)
        try:
            # Where locks reach this host only, another one would not see it.
            local = not _is_file(descriptor) or mounts.local_locks(*mounts.mount_of(descriptor))
            if not local and record_locks.lock(descriptor, MARKS + number, exclusive=False):
                return _LockMark(f"lock:{number}", descriptor)
        except OSError:
            pass  # no locks there
        os.close(descriptor)
        return super().mark(uri)

    def recognises(self, uri: str, token: str) -> bool:
        if not token.startswith("lock:"):
            return super().recognises(uri, token)
        path, _ = _parse(uri)
        try:
            number = int(token.removeprefix("lock:"))
            if not 0 <= number < 1 << 40:
                return False
        except ValueError:
            return False
        descriptor = _open(path, os.O_RDONLY)
        try:
            return record_locks.is_locked(descriptor, MARKS + number)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def create(self, uri: str, size: int) -> None:
        path, _ = _parse(uri)
        if size <= 0 or size % SECTOR_SIZE or size > MAX_SIZE:
            raise ConfigError(
                f"{path}: an image cannot have {size} bytes.", f"Give a positive multiple of {SECTOR_SIZE} bytes."
            )
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
        except FileExistsError:
            raise StorageError(f"{path} is there already.", "Choose another name, or remove it.") from None
        except OSError as error:
            raise explain(path, "made", error) from error
        try:
            kernel.let_group_write(descriptor)
            os.ftruncate(descriptor, size)
        except OSError as error:
            os.unlink(path)
            raise explain(path, f"made with {size} bytes", error) from error
        finally:
            os.close(descriptor)

    def copy(self, uri: str, target: str, progress: Callable[[int, int], None] | None = None) -> None:
        path, _ = _parse(uri)
        source = _open(path, os.O_RDONLY)
        try:
            size = _size(path, source)
            copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(copy, size)
                try:
                    fcntl.ioctl(copy, FICLONE, source)
                except OSError:
                    _copy_data(source, copy, size, progress)
            except BaseException:
                os.unlink(target)
                raise
            finally:
                os.close(copy)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the copy's file system
                raise StorageError(f"{path} cannot be copied to {target}: there is no room.", "Make room.") from error
            raise explain(path, f"copied to {target}", error) from error
        finally:
            os.close(source)


def _lock(path: str, descriptor: int, *, exclusive: bool) -> None:
    """Keep other machines and QEMU's programs out until the descriptor is closed. Raises ImageInUse, StorageError."""
    used = "used" if exclusive else "written"
    try:
        if not record_locks.lock(descriptor, IMAGE_LOCK, exclusive=exclusive):
            raise ImageInUse(
                f"{path} is {used} by another machine.", "`vmf media locks` shows by which. Stop that one first."
            )
        if mounts.mount_of(descriptor)[0] not in mounts.MANDATORY and not qemulocks.take(
            descriptor, exclusive=exclusive
        ):
            raise ImageInUse(
                f"{path} is {used} by another program: QEMU or one of its tools has locked it.",
                f"Stop that one first; on its host `fuser -v {shlex.quote(path)}` names it.",
            )
    except OSError as error:
        if error.errno not in record_locks.NO_LOCKS:
            raise explain(path, "locked", error) from error
        # A file system without locks: the lease's record alone decides.


class _LockMark(ImageMark):
    def __init__(self, token: str, descriptor: int) -> None:
        super().__init__(token)
        self._descriptor = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _parse(uri: str) -> tuple[str, str]:
    """(path of the image, path of its lease or "")."""
    path = file_path(uri)
    options = _options(uri)
    if options.get("format", "raw") != "raw":
        raise ConfigError(
            f"medium {uri}: files are read as raw images only.", "For others see `docs/how-to/shared-storage.md`."
        )
    lease = options.get("lease", "")
    if lease and not os.path.isabs(lease):
        raise ConfigError(f"medium {uri}: its lease {lease} is no absolute path.", "Write lease=/the/whole/path.")
    if lease and os.path.realpath(lease) == os.path.realpath(path):
        raise ConfigError(
            f"medium {uri}: the lease would overwrite the beginning of the disk, as both are the same file.",
            "Name a file for the lease that nothing else uses.",
        )
    return path, lease


def _options(uri: str) -> dict[str, str]:
    return {} if os.path.isabs(uri) else split_options(uri, ("lease", "format"))[1]


def _declared_raw(uri: str) -> bool:
    return "format" in _options(uri)


def _looks_like(path: str, descriptor: int) -> str:
    """The name of the format that the content shows; "" for a raw image, as far as can be seen."""
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        tail = os.pread(descriptor, formats.TAIL, max(size - formats.TAIL, 0))
        return formats.recognise(os.pread(descriptor, formats.HEAD, 0), tail)
    except OSError as error:
        raise explain(path, "read", error) from error


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no image {path} here.", "Mount the storage that has it, or make one with `vmf createmedium`."
        ) from None
    except OSError as error:
        writing = flags & os.O_RDWR
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and writing:
            raise StorageError(
                f"{path} cannot be opened for writing: {error.strerror}.",
                "Give yourself the permission, or attach it with --read-only.",
            ) from error
        raise explain(path, "opened", error) from error


def _is_file(descriptor: int) -> bool:
    """A regular file; otherwise (see `_size`) a block device."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _size(path: str, descriptor: int) -> int:
    """Bytes. Raises StorageError for what is no image."""
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise StorageError(f"{path} is neither a file nor a block device.", "Name a disk image.")
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
    except OSError as error:
        raise explain(path, "read", error) from error
    if size % SECTOR_SIZE or not size:
        found = _looks_like(path, descriptor)
        if found:
            raise StorageError(
                f"{path} is a {found} image, and files are read as raw images.", f"{formats.remedy(path, found)}."
            )
        raise StorageError(
            f"{path} has {size} bytes, which is no disk: a disk has a multiple of {SECTOR_SIZE}.",
            f"Is it a raw image? It could be padded with `truncate --size %{SECTOR_SIZE} {path}`.",
        )
    return size


def _copy_data(source: int, copy: int, size: int, progress: Callable[[int, int], None] | None) -> None:
    """Copy what is no hole. Raises OSError, also when the source turns out to be shorter than `size`."""
    block = memoryview(bytearray(min(sparse.CHUNK, size)))
    in_kernel = True
    for start, end in sparse.data_extents(source, size):
        for at in range(start, end, sparse.CHUNK):
            length = min(sparse.CHUNK, end - at)
            in_kernel = in_kernel and _copy_in_kernel(source, copy, at, length)
            if not in_kernel:
                view = block[:length]
                sparse.read_fully(source, view, at)
                if not sparse.is_zero(view):  # a block device does not tell where it is empty
                    sparse.write_fully(copy, view, at)
            if progress is not None:
                progress(at + length, size)
    if progress is not None:
        progress(size, size)


def _copy_in_kernel(source: int, copy: int, at: int, length: int) -> bool:
    """Have the kernel copy a stretch; False where it cannot. Raises OSError."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, copy, length - done, at + done, at + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
                raise
            return False
        if not count:
            raise sparse.CutShort(at + done, at + length)
        done += count
    return True
