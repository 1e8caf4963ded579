"""controlvm's verbs for the CPU backend of a running machine: switch-backend and trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.app import json_option
from vmf.cli.cancelling import Cancelling
from vmf.cli.common import duration, home, printable, say
from vmf.control.client import ControlClient

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def _backend_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        from vmf.plugins import discovery

        names = {"auto", *(entry.name for entry in discovery.installed("cpu"))}
    except Exception:  # noqa: BLE001 - completion must not disturb the shell
        return []
    return sorted(name for name in names if name.startswith(incomplete))


@click.command("switch-backend")
@click.argument("backend", metavar="BACKEND", shell_complete=_backend_names)
@json_option
@click.pass_obj
def switch_backend(name: str, backend: str, as_json: bool) -> None:
    """Go on with another CPU backend while the guest runs (or stays paused).

    BACKEND is unicorn, kvm or any other CPU plugin; auto takes the best that can honour the machine's CPUID contract.
    The one in use now gives the machine a fresh vCPU. When the switch is refused or fails, the machine goes on as it
    was.

    \b
    Examples:
      vmf controlvm web switch-backend unicorn
      vmf controlvm web switch-backend kvm --json
    """
    with ControlClient.of(home(), name) as machine:
        summary = machine.switch_backend(backend)
    if as_json:
        say(json.dumps(summary))
        return
    stood = duration(summary["stopped_ns"])
    if summary["before"] == summary["after"]:
        say(f"Machine '{name}' has a fresh vCPU on {summary['after']}; the guest stood still for {stood}.")
    else:
        say(
            f"Machine '{name}' runs on {summary['after']} now, before on {summary['before']};"
            f" the guest stood still for {stood}."
        )
    for note in summary["notes"]:
        say(f"Note: {printable(note)}")


@click.command()
@click.option("--instructions", type=click.IntRange(min=1), metavar="N", help="How many instructions to write.")
@click.option("--output", type=click.Path(path_type=Path), metavar="F", help="File for the trace; it is replaced.")
@click.option("--json-lines", is_flag=True, help="Write one JSON object a line instead of text.")
@click.option("--cancel", is_flag=True, help="End the trace that is under way, with what there is.")
@json_option
@click.pass_obj
def trace(
    name: str, instructions: int | None, output: Path | None, json_lines: bool, cancel: bool, as_json: bool
) -> None:
    """Write down the next instructions that the guest executes, and what they change.

    The machine goes on meanwhile, slower. If its CPU backend cannot trace (kvm), it is switched to one that can
    (unicorn) for the trace, and back. Ctrl-C, or --cancel from elsewhere, ends the trace with what there is.

    \b
    Examples:
      vmf controlvm web trace --instructions 10000 --output trace.txt
      vmf controlvm web trace --instructions 500 --output trace.jsonl --json-lines
    """
    where = home()
    if cancel:
        with ControlClient.of(where, name) as machine:
            cancelled = machine.cancel_trace()
        if as_json:
            say(json.dumps({"cancelled": cancelled}))
        else:
            say(f"The trace of machine '{name}' is being ended." if cancelled else f"Machine '{name}' is not traced.")
        return
    if instructions is None or output is None:
        missing = " and ".join(
            option for option, value in (("--instructions", instructions), ("--output", output)) if value is None
        )
        raise click.UsageError(f"A trace needs {missing}.", click.get_current_context())
    view = _View(quiet=as_json)
    cancelling = Cancelling.of(where, name, "trace", lambda machine: machine.cancel_trace())
    with ControlClient.of(where, name) as machine, cancelling:
        try:
            # The machine's process writes it, whose working directory is another.
            summary = machine.trace(instructions, str(output.absolute()), json_lines=json_lines, progress=view.update)
        finally:
            view.close()
    if as_json:
        say(json.dumps(summary))
        return
    seconds = summary["traced_ns"] / 1e9
    rate = f" ({summary['instructions'] / seconds:,.0f} a second)" if seconds > 0 else ""
    say(
        f"{summary['instructions']} instructions and {summary['events']} exceptions and interrupts in"
        f" {duration(summary['traced_ns'])}{rate}: {output}"
    )
    if not summary["complete"]:
        say(f"The trace ended early: {summary['reason']}.")
    if summary["backend"] != summary["machine_backend"]:
        say(f"Machine '{name}' was on {summary['backend']} for it, and runs on {summary['machine_backend']} again.")


class _View:
    """A progress bar on a terminal, a line every few seconds elsewhere; nothing before the first report."""

    EVERY = 10

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._drawn: tuple[Progress, TaskID] | None = None
        self._reports = 0

    def update(self, event: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        if not sys.stderr.isatty():
            self._reports += 1
            if self._reports % self.EVERY == 1:
                done, wanted = event.get("instructions", 0), event.get("wanted", 0)
                click.echo(f"{event.get('phase', 'tracing')}: {done} of {wanted} instructions", err=True)
            return
        if self._drawn is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            progress.start()
            self._drawn = (progress, progress.add_task("tracing", total=event.get("wanted")))
        progress, task = self._drawn
        progress.update(task, completed=event.get("instructions", 0), description=str(event.get("phase", "tracing")))

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None
