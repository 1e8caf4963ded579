"""What several commands share: machine names, the home, and plain tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from vmf.machine.home import Home

F = TypeVar("F", bound=Callable[..., Any])
NONE = "none"
"""Written for an option that names something, it takes that out of the definition."""


def home() -> Home:
    """The host's state, as VMF_HOME or the user's directories have it."""
    from vmf.machine.home import Home

    return Home.default()


def _machine_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        return [name for name in home().names() if name.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - completion must not disturb the shell
        return []


def machine_argument(function: F) -> F:
    """The NAME of an existing machine, completed by the shell."""
    return click.argument("name", metavar="NAME", shell_complete=_machine_names)(function)


def installed(kind: str, name: str) -> None:
    """Raise PluginError unless a plugin of that name is installed; imports none."""
    from vmf.plugins import discovery

    discovery.find(kind, name)


def say(text: str) -> None:
    """One line on stdout, at once."""
    click.echo(text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """What a remote side put into it cannot move the cursor or forge a line."""
    return "".join(char if char.isprintable() else "?" for char in text)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    """Left-aligned columns; the last one as long as it is."""
    everything = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    for row in everything:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(count: float) -> str:
    """Bytes for people, binary prefixes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(nanoseconds: float) -> str:
    """A time for people."""
    seconds = nanoseconds / 1e9
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
