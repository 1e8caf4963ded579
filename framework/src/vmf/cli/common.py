"""What several commands share: machine names, the home, and plain tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmf import sizes

if TYPE_CHECKING:
    from vmf.machine.home import Home

    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # generic from click 8.4 on only

F = TypeVar("F", bound=Callable[..., Any])
NONE = "none"
"""Written for an option that names something, it takes that out of the definition."""

MOST_SECONDS = 1e9
"""More than 31 years: no limit, to all intents."""


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


class Mebibytes(_IntType):
    """A memory size: MiB as a plain number, or with a unit: 512M, 1G, 1.5GiB."""

    name = "MIB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        size = sizes.parse(str(value), "M")
        if size is None:
            self.fail(f"{value!r} is not a size. Write MiB as a number, or a number with a unit: 512M, 1G.", param, ctx)
        if size % (1 << 20):
            self.fail(f"{value!r} is not a whole number of MiB.", param, ctx)
        return size >> 20


MEBIBYTES = Mebibytes()


class Seconds(click.FloatRange):
    """A span of time that can be counted: neither "nan" nor "inf"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not seconds <= MOST_SECONDS:
            self.fail(f"{value} is no number of seconds up to {MOST_SECONDS:.0f}.", param, ctx)
        return seconds


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


def paragraphs(entries: Sequence[tuple[str, str]]) -> None:
    """A text for each label, indented and as wide as the terminal."""
    import shutil
    import textwrap

    width = max(40, min(shutil.get_terminal_size().columns, 120))
    for label, text in entries:
        click.echo(f"\n{label}")
        click.echo(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


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
