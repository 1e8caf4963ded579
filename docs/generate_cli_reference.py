"""Write docs/reference/cli.md from the commands themselves.

    python docs/generate_cli_reference.py          # write it
    python docs/generate_cli_reference.py --check  # fail when it is not current

The text comes from the commands' own structure, not from click's help layout, so it does not change with click.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vmf.cli.app import COMMANDS, cli

GROUPS_OF_A_MACHINE = ("controlvm", "snapshot")
TARGET = Path(__file__).parent / "reference" / "cli.md"

HEAD = """\
# The vmf command

<!-- Made by docs/generate_cli_reference.py from the commands themselves. Do not edit. -->

Errors are one line on standard error, `vmf: error: ...`, with the reason and what to do about it. The exit status is
0 for success, 2 for a mistake in the command line or a definition, 70 for a bug in vmf, 74 when the command did its
work but its output could not be written (a full disk), 130 after Ctrl-C, 141 when the reader of its output had gone,
and 1 for everything else. With `--json` an error is also printed on standard output as
`{"error": {"code", "message", "remedy"}}`.

| environment | meaning |
|---|---|
| `VMF_HOME` | directory with everything of one host: definitions, logs, sockets |
| `VMF_DEBUG` | when `1`, errors come with a traceback |
"""


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below, with its full name."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, f"{path} {name}")


def usage(path: str, command: click.Command) -> str:
    """The command's line with its arguments."""
    words = [path]
    for group in GROUPS_OF_A_MACHINE:
        if path.startswith(f"vmf {group} "):
            words = [path.replace(group, f"{group} NAME", 1)]
    words += [parameter.make_metavar(click.Context(command)) for parameter in arguments(command)]
    if options(command):
        words.append("[OPTIONS]")
    if isinstance(command, click.Group):
        words.append("VERB" if command.name in GROUPS_OF_A_MACHINE else "COMMAND")
    return " ".join(words)


def arguments(command: click.Command) -> list[click.Argument]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def value_name(option: click.Option) -> str:
    """What is written after the option, "" for switches."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.metavar or option.type.name.upper()


def section(path: str, command: click.Command) -> str:
    """One command's part of the page."""
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\n")
    lines = [f"## {path}", "", f"    {usage(path, command)}", "", text.strip(), ""]
    rows = []
    for option in options(command):
        names = " ".join(part for part in (", ".join(option.opts), value_name(option)) if part)
        notes = [option.help or ""]
        if option.required:
            notes.append("Required.")
        elif option.show_default and option.default not in (None, False):
            notes.append(f"Default: {option.default}.")
        if option.multiple:
            notes.append("May be repeated.")
        rows.append(f"| `{names.replace('|', chr(92) + '|')}` | {' '.join(notes).replace('|', chr(92) + '|')} |")
    if rows:
        lines += ["| option | meaning |", "|---|---|", *rows, ""]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            # The group's table says it without importing; here both must agree on the name at least.
            line = COMMANDS[name][2] if command is cli and name in COMMANDS else child.get_short_help_str(200)
            lines.append(f"- `{name}`: {line}")
        lines.append("")
    shown = [line for line in examples.splitlines() if line.strip()]
    if shown:
        lines += [shown[0].rstrip(), "", "```sh", *(line.strip() for line in shown[1:]), "```", ""]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD, *(section(path, command) for path, command in commands(cli, "vmf"))]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text("utf-8") == text:
            return 0
        print(f"{TARGET} is not current: run python docs/generate_cli_reference.py")
        return 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
