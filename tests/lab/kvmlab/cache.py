"""Where the lab keeps what it built: directories named by a digest of what they were made from.

An entry is made in a temporary directory beside its place and renamed into it under a file lock, so that it is there
whole or not at all, and two test runs that need it at once make it once. An entry that nobody has used for
`UNUSED_DAYS` is deleted when a new one of its kind is made; a QEMU that still has its files open is not disturbed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from vmf import directories

UNUSED_DAYS = 7.0


def cache_root() -> Path:
    """`$VMF_CACHE/lab`, or `lab` in the user's cache directory of vmf; made when missing."""
    root = directories.cache_directory() / "lab"
    root.mkdir(parents=True, exist_ok=True)
    return root


def digest(*parts: object) -> str:
    """A short name for content: equal parts, equal name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def tree_digest(files: Iterable[tuple[str, Path]]) -> str:
    """A short name for the content of files, given with the names that they have in the tree."""
    total = hashlib.sha256()
    for name, path in sorted(files):
        data = path.read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()[:16]


def entry(kind: str, key: str) -> Path:
    """Where the entry is, or would be."""
    return cache_root() / f"{kind}-{key}"


def cached(kind: str, key: str, make: Callable[[Path], None], *, fresh: bool = False) -> Path:
    """The directory of that kind and key, made by `make(empty directory)` when it is not there.

    Args:
        fresh: make it anew even if it is there.
    """
    final = entry(kind, key)
    with FileLock(f"{final}.lock"):
        if final.is_dir() and not fresh:
            os.utime(final)
            return final
        temporary = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=final.parent))
        try:
            make(temporary)
            if final.is_dir():
                shutil.rmtree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _prune(kind)
    return final


def _prune(kind: str) -> None:
    """Delete the entries of this kind that nobody has used for a while."""
    for path in cache_root().glob(f"{kind}-*"):
        try:
            if path.is_dir() and time.time() - path.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # another run was quicker
