"""The command group, and how errors become lines and exit statuses."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.output import Streams
from vmf.cli.password import hide
from vmf.errors import PluginError, VmfError, shortage

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS: dict[str, tuple[str, str, str]] = {
    "createvm": ("vmf.cli.define", "createvm", "Define a new machine."),
    "modifyvm": ("vmf.cli.define", "modifyvm", "Change a machine's definition."),
    "unregistervm": ("vmf.cli.register", "unregistervm", "Forget a machine."),
    "registervm": ("vmf.cli.register", "registervm", "Bring back a machine that was unregistered."),
    "unlockvm": ("vmf.cli.register", "unlockvm", "Give up a machine's process on a host that is gone for good."),
    "startvm": ("vmf.cli.start", "startvm", "Start a machine, or let it wait for a teleport."),
    "controlvm": ("vmf.cli.controlvm", "controlvm", "Pause, resume, reset, power off or teleport a running machine."),
    "console": ("vmf.cli.start", "console", "Attach to a machine's serial console."),
    "showvminfo": ("vmf.cli.show", "showvminfo", "Show a machine's definition and state."),
    "list": ("vmf.cli.show", "list_", "List machines or plugins."),
    "createmedium": ("vmf.cli.media", "createmedium", "Make a new disk image."),
    "storageattach": ("vmf.cli.media", "storageattach", "Attach a disk image to a machine, or take it out."),
    "showmediuminfo": ("vmf.cli.media", "showmediuminfo", "Show what a disk image is and who has it."),
    "media": ("vmf.cli.media", "media", "List disk images, see and break their leases."),
    "snapshot": ("vmf.cli.snapshot", "snapshot", "Take snapshots of a machine, and go back to them."),
    "cpuid": ("vmf.cli.cpuid", "cpuid", "Show what CPUs can present, compare hosts, find what suits them all."),
    "demo": ("vmf.cli.demo", "demo", "Watch a machine teleport between two hosts."),
    "completion": ("vmf.cli.completion", "completion", "Print the script that completes vmf's commands in a shell."),
}
"""Command name to the module and attribute that implement it, and its line in `vmf --help`."""

PLUGIN_GROUP = "vmf.command"
"""Entry points of plugins: a command's name, and the `click.Command` that it is."""
OF_BUNDLED_PLUGINS = {"tls": "vmf-transport-tls"}
"""Commands that people look for, and the distribution that has them; it may not be installed."""

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


def plugin_commands() -> dict[str, EntryPoint]:
    """The commands that installed plugins bring, by name. Imports none; vmf's own commands cannot be replaced."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=PLUGIN_GROUP) if point.name not in COMMANDS}


class LazyGroup(click.Group):
    """A group that imports a command only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(plugin_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, attribute, _ = COMMANDS[cmd_name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        point = plugin_commands().get(cmd_name)
        return None if point is None else _load(point)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = [*COMMANDS]
        if args and args[0] not in COMMANDS:
            known += plugin_commands()
        if args and not args[0].startswith("-") and args[0] not in known:
            import difflib

            if (distribution := OF_BUNDLED_PLUGINS.get(args[0])) is not None:
                raise PluginError(
                    f"The command '{args[0]}' is part of the distribution {distribution}, which is not installed.",
                    f"Install it: pip install {distribution}",
                )
            close = difflib.get_close_matches(args[0], known, n=1)
            hint = f"Did you mean {close[0]}?" if close else "See `vmf --help`."
            raise click.UsageError(f"There is no command '{args[0]}'. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])
        if others := plugin_commands():
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, _line_of(point)) for name, point in sorted(others.items())])


def _line_of(point: EntryPoint) -> str:
    """The distribution's own line: asking the command would import the plugin."""
    return str(point.dist.metadata["Summary"] or point.dist.name) if point.dist is not None else point.value


def _load(point: EntryPoint) -> click.Command:
    """A plugin's command. Raises PluginError when it cannot be had."""
    where = f"The command '{point.name}' of the plugin {point.dist.name if point.dist is not None else point.module}"
    remedy = "Reinstall or update that distribution, or uninstall it."
    try:
        command = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin that calls sys.exit() must not end vmf without a word
        raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {error}.", remedy) from error
    if not isinstance(command, click.Command):
        raise PluginError(f"{where} is no click command but a {type(command).__name__}.", remedy)
    return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"vmf {version('vmf')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="VMF_HOME selects the directory that holds the machines of one host. VMF_DEBUG=1 shows tracebacks.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Run virtual machines and teleport them, running, between hosts and CPU backends.

    \b
    Example: move a running machine from one terminal to another.
      vmf createvm source --memory 256 --kernel vmlinuz --initrd initrd.img
      vmf createvm target --memory 256 --kernel vmlinuz --initrd initrd.img
      vmf modifyvm target --teleporter on --teleporter-port 6000 --teleporter-address localhost
      vmf startvm target --detach
      vmf startvm source --detach
      vmf controlvm source teleport --host localhost --port 6000
    """


_ONLY_HELP: type[Exception] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""How click 8.2 and newer ask for help to be shown; older ones show it themselves."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; ends the process."""
    if arguments is None:
        hide(sys.argv)
    streams = Streams()
    sys.exit(streams.status(run(arguments)))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Every error becomes lines on stderr."""
    global _json
    _json = False
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(args=given, prog_name="vmf", standalone_mode=False)
        sys.stdout.flush()
    except VmfError as error:
        return _report(given, error)
    except click.UsageError as error:
        context = error.ctx
        if context is not None and isinstance(error, _ONLY_HELP):
            click.echo(context.get_help(), err=True)
            return 2
        remedy = f"See `{context.command_path} --help`." if context is not None else ""
        return _end(given, "usage", " ".join(error.format_message().split()), remedy, 2)
    except click.ClickException as error:
        return _end(given, "usage", error.format_message(), "", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if _asks_for_json(given):
            _print_error({"code": "interrupted", "message": "interrupted", "remedy": ""})
        _line("vmf: interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of defence against a traceback
        if (lack := shortage(error)) is not None:
            return _report(given, lack)
        _debug()
        text = f"internal error, {type(error).__name__}: {' '.join(str(error).split())}"
        return _end(given, "internal", text, "Report it with what VMF_DEBUG=1 shows.", EXIT_INTERNAL)
    return result if isinstance(result, int) else 0


def _asks_for_json(arguments: list[str]) -> bool:
    """Whether --json is among a command's arguments, which may be too wrong to be parsed."""
    return wants_json() or "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _end(arguments: list[str], code: str, message: str, remedy: str, status: int) -> int:
    """Tell an error that is none of vmf's own; gives `status`."""
    if _asks_for_json(arguments):
        _print_error({"code": code, "message": message, "remedy": remedy})
    _line(f"vmf: error: {message} {remedy}".rstrip())
    return status


def _print_error(record: dict[str, Any]) -> None:
    click.echo(json.dumps({"error": record}))


def _report(arguments: list[str], error: VmfError) -> int:
    _debug()
    problems = getattr(error, "problems", ())
    blockers = getattr(error, "blockers", ())
    if _asks_for_json(arguments):
        record: dict[str, Any] = {"code": error.code, "message": error.message, "remedy": error.remedy}
        if blockers:
            import attrs

            record["blockers"] = [attrs.asdict(blocker) for blocker in blockers]
        _print_error(record)
    if len(problems) > 1:
        where = error.message.partition(":")[0]
        for problem in problems:
            _line(f"vmf: error: {where}: {problem}")
    else:
        _line(f"vmf: error: {error}")
    for blocker in blockers:
        if str(blocker) not in str(error):
            _line(f"  {blocker}")
    return error.exit_status


def _line(text: str) -> None:
    """One line on stderr. What a remote side put into it cannot move the cursor or forge another line."""
    click.echo("".join(char if char.isprintable() else "?" for char in " ".join(text.split("\n"))), err=True)


def _debug() -> None:
    if os.environ.get("VMF_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exc()


_json = False


def wants_json() -> bool:
    """Whether this command was given --json."""
    return _json


def _note_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    global _json
    _json = value
    return value


json_option = click.option("--json", "as_json", is_flag=True, callback=_note_json, help="Print JSON, for programs.")
"""For every command that prints an answer; errors then come as JSON on stdout, too."""
