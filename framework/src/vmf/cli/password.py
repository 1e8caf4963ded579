"""Passwords on the command line: from a file, from standard input, asked on the terminal, or, as VBoxManage has it too,
as an argument.

An argument is seen by everybody in the process list. `hide` overwrites it there as the first thing that the command
does, which leaves the moment before and the shell's history: so there is a warning, and the file options.
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from vmf.directories import absolute
from vmf.errors import ConfigError
from vmf.reading import read_descriptor, read_file

STDIN = "stdin"
OPTIONS = ("--password", "--teleporter-password")
"""Options whose value is a password."""
MAX_FILE_BYTES = 4096
_ARG_START = 45
"""Index of field 48 of /proc/PID/stat, proc(5), behind the command's name; the end of the arguments follows it."""


def hide(arguments: Sequence[str]) -> None:
    """Overwrite passwords among this process's arguments where `ps` reads them; does what the system lets it do."""
    pairs = itertools.pairwise(arguments)
    secrets = {os.fsencode(value) for option, value in pairs if option in OPTIONS and value}
    prefixes = [f"{option}=".encode() for option in OPTIONS]
    if not secrets and not any(os.fsencode(each).startswith(tuple(prefixes)) for each in arguments):
        return
    import ctypes

    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_START + 1])
        if not start < end:
            return
        position = start
        for each in ctypes.string_at(start, end - start).split(b"\0"):
            kept = next((len(prefix) for prefix in prefixes if each.startswith(prefix)), 0)
            if kept or each in secrets:
                ctypes.memset(position + kept, ord("*"), len(each) - kept)
            position += len(each) + 1
    except (OSError, ValueError, IndexError):
        pass  # no /proc: nothing to be done


def password_from(option: str, value: str | None, file: str | None, *, new: bool = False) -> str | None:
    """The password that was given by `option` or by its `-file` companion, checked; None when neither was.

    `new`: it is being set, so one that is typed is asked for twice. Raises ConfigError, UsageError.
    """
    if value is not None and file is not None:
        raise click.UsageError(f"{option} and {option}-file exclude each other.", click.get_current_context())
    if value is None and file is None:
        return None
    if value is not None:
        click.echo(
            f"vmf: warning: a password on the command line can be seen by others on this host for a moment, and stays "
            f"in the shell's history; {option}-file FILE (or stdin) avoids both.",
            err=True,
        )
        password = value
    else:
        assert file is not None
        password = _typed(new) if file == STDIN and sys.stdin.isatty() else _line(_read(f"{option}-file", file), option)
    from vmf.teleport.authentication import check_password

    check_password(password)
    return password


def _typed(new: bool) -> str:
    typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=new, err=True)
    return typed


def _read(option: str, name: str) -> bytes:
    if name == STDIN:
        try:
            # Not through Python's buffer: what follows the line is for who reads standard input next.
            return read_descriptor(sys.stdin.fileno(), MAX_FILE_BYTES + 1, line=True)
        except OSError as error:
            raise ConfigError(
                f"{option} stdin: standard input cannot be read: {error.strerror or error}.",
                "Write the password and a newline to it.",
            ) from error
    try:
        content, status = read_file(absolute(name), MAX_FILE_BYTES + 1)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISREG(status.st_mode) and mode & 0o077:
            raise ConfigError(
                f"{option} {name}: it can be read or changed by other users (mode {mode:04o}).",
                f"chmod 600 {name} - and if somebody else could have read it, choose another password.",
            )
        if stat.S_ISREG(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{option} {name}: it belongs to user {status.st_uid}.", "Make a copy of your own.")
        return content
    except OSError as error:
        raise ConfigError(
            f"{option} {name}: it cannot be read: {error.strerror or error}.",
            "Give a file with the password in its only line, mode 0600, or stdin.",
        ) from error


def _line(raw: bytes, option: str) -> str:
    """The one line of a file. Its messages never quote it."""
    reason = ""
    text = raw.removesuffix(b"\n").removesuffix(b"\r")
    if len(raw) > MAX_FILE_BYTES:
        reason = f"is longer than {MAX_FILE_BYTES} bytes"
    elif not text:
        reason = "is empty"
    elif b"\n" in text:
        reason = "has more than one line"
    else:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            reason = "is not UTF-8 text"
    raise ConfigError(f"{option}-file: the file {reason}.", "Put the password into it as its only line.")
