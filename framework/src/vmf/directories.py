"""Where a user's files are by the XDG Base Directory Specification: data, configuration, cache, runtime directory.

The specification wants absolute paths and has others ignored, so a relative `XDG_RUNTIME_DIR` counts as unset. Without
a usable `HOME` the user's passwd entry tells the home directory. A user id that has neither (a container started with
a number, `env -i`) has no directories: a caller that needs one gets a `ConfigError` that names the remedy, never a
directory called "~".
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from vmf.errors import ConfigError

NAME = "vmf"


def data_directory() -> Path:
    """Machines and what belongs to them. Raises ConfigError."""
    return _directory("XDG_DATA_HOME", ".local/share")


def config_directory() -> Path:
    """Certificates, unless `VMF_HOME` is set. Raises ConfigError."""
    return _directory("XDG_CONFIG_HOME", ".config")


def cache_directory() -> Path:
    """What can be made again: `VMF_CACHE`, else vmf's part of the user's cache. Raises ConfigError."""
    chosen = os.environ.get("VMF_CACHE")
    return absolute(chosen) if chosen else _directory("XDG_CACHE_HOME", ".cache")


def optional_cache_directory() -> Path | None:
    """`cache_directory` for what works without one, too; None for a user without directories."""
    try:
        return cache_directory()
    except ConfigError:
        return None


def chosen_home() -> Path | None:
    """What `VMF_HOME` names; None when it is not set. Raises ConfigError."""
    chosen = os.environ.get("VMF_HOME")
    return absolute(chosen) if chosen else None


def runtime_base() -> Path | None:
    """The user's runtime directory, when there is one that is ours to write to."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    base = named if os.path.isabs(named) else f"/run/user/{os.geteuid()}"
    try:
        ours = os.stat(base).st_uid == os.geteuid() and os.access(base, os.W_OK | os.X_OK)
    except OSError:
        ours = False
    # Never a directory in /tmp: its name could be taken by another user first.
    return Path(base) if ours else None


def absolute(path: str | Path) -> Path:
    """What a person wrote, made absolute, with `~` and `~user` expanded. Raises ConfigError for an unknown home."""
    text = os.fspath(path)
    if not text.startswith("~") or os.path.lexists(text):
        return Path(os.path.abspath(text))
    user, _, rest = text[1:].partition("/")
    if not user:
        return Path(os.path.abspath(home() / rest))
    try:
        return Path(os.path.abspath(Path(pwd.getpwnam(user).pw_dir) / rest))
    except KeyError:
        raise ConfigError(f"{text}: there is no user '{user}'.", "Write the whole path.") from None


def home() -> Path:
    """The user's home directory. Raises ConfigError when nothing tells it."""
    named = os.environ.get("HOME", "")
    if os.path.isabs(named):
        return Path(named)
    user = os.geteuid()
    try:
        entry = pwd.getpwuid(user).pw_dir
    except KeyError:
        entry = ""
    if os.path.isabs(entry):
        return Path(entry)
    why = f"HOME is {named!r}, which is no absolute path" if named else "HOME is not set"
    raise ConfigError(
        f"The home directory of user {user} is not known: {why}, and the user has no passwd entry with one.",
        "Set HOME, or VMF_HOME to the directory where vmf is to keep its machines.",
    )


def _directory(variable: str, below_home: str) -> Path:
    named = os.environ.get(variable, "")
    return (Path(named) if os.path.isabs(named) else home() / below_home) / NAME
