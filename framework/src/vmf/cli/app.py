"""The command group, and how errors become lines and exit statuses."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from vmf.cli.password import hide
from vmf.errors import PluginError, VmfError

COMMANDS: dict[str, tuple[str, str, str]] = {
    "createvm": ("vmf.cli.define", "createvm", "Define a new machine."),
    "modifyvm": ("vmf.cli.define", "modifyvm", "Change a machine's definition."),
    "unregistervm": ("vmf.cli.define", "unregistervm", "Forget a machine."),
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
    "tls": ("vmf_transport_tls.commands", "tls", "Make the certificates of encrypted teleports, and show them."),
    "demo": ("vmf.cli.demo", "demo", "Watch a machine teleport between two hosts."),
    "completion": ("vmf.cli.completion", "completion", "Print the script that completes vmf's commands in a shell."),
}
"""Command name to the module and attribute that implement it, and its line in `vmf --help`."""

FROM_PLUGINS = {"tls": "vmf-transport-tls"}
"""Commands of bundled plugins, and the distribution that has them; it may not be installed."""

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a command only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            distribution = FROM_PLUGINS.get(cmd_name)
            if distribution is None or error.name != module.partition(".")[0]:
                raise
            raise PluginError(
                f"The command '{cmd_name}' is part of the distribution {distribution}, which is not installed.",
                f"Install it: pip install {distribution}",
            ) from None
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {close[0]}?" if close else "See `vmf --help`."
            raise click.UsageError(f"There is no command '{args[0]}'. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; ends the process."""
    if arguments is None:
        hide(sys.argv)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Every error becomes lines on stderr."""
    global _json
    _json = False
    try:
        result = cli.main(args=None if arguments is None else list(arguments), prog_name="vmf", standalone_mode=False)
        sys.stdout.flush()
    except VmfError as error:
        return _report(error)
    except click.UsageError as error:
        context = error.ctx
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        _line(f"vmf: error: {error.format_message().rstrip()}{hint}")
        return 2
    except click.ClickException as error:
        _line(f"vmf: error: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _line("vmf: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`vmf list vms | head -1`); the interpreter must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:  # noqa: BLE001 - the last line of defence against a traceback
        _debug()
        text = " ".join(str(error).split())
        _line(f"vmf: error: internal error, {type(error).__name__}: {text} Report it with what VMF_DEBUG=1 shows.")
        return EXIT_INTERNAL
    return result if isinstance(result, int) else 0


def _report(error: VmfError) -> int:
    _debug()
    problems = getattr(error, "problems", ())
    blockers = getattr(error, "blockers", ())
    if wants_json():
        record: dict[str, Any] = {"code": error.code, "message": error.message, "remedy": error.remedy}
        if blockers:
            import attrs

            record["blockers"] = [attrs.asdict(blocker) for blocker in blockers]
        click.echo(json.dumps({"error": record}))
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
