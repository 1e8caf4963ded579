"""controlvm: what can be done to a running machine. Each verb is a command of the group, so verbs can be added."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from vmf.cli.app import json_option
from vmf.cli.cancelling import Cancelling
from vmf.cli.common import Seconds, home, machine_argument, printable, say
from vmf.cli.media import change_medium
from vmf.cli.password import password_from
from vmf.cli.watch import switch_backend, trace
from vmf.control.client import ControlClient
from vmf.directories import absolute

if TYPE_CHECKING:
    from vmf.machine.home import Home

END_SECONDS = 10.0


@click.group(subcommand_metavar="VERB [OPTIONS]")
@machine_argument
@click.pass_context
def controlvm(ctx: click.Context, name: str) -> None:
    """Control the running machine NAME.

    \b
    Examples:
      vmf controlvm web pause
      vmf controlvm web teleport --host otherhost --port 6000
    """
    ctx.obj = name


controlvm.add_command(switch_backend)
controlvm.add_command(trace)
controlvm.add_command(change_medium)


@controlvm.command()
@click.pass_obj
def pause(name: str) -> None:
    """Stop the guest; its time stands still.

    \b
    Example:
      vmf controlvm web pause
    """
    with ControlClient.of(home(), name) as machine:
        machine.pause()
    say(f"Machine '{name}' is paused.")


@controlvm.command()
@click.pass_obj
def resume(name: str) -> None:
    """Let a paused guest go on.

    \b
    Example:
      vmf controlvm web resume
    """
    with ControlClient.of(home(), name) as machine:
        machine.resume()
    say(f"Machine '{name}' is running.")


@controlvm.command()
@click.pass_obj
def poweroff(name: str) -> None:
    """Pull the plug: what the guest has not saved is lost.

    What is under way (a teleport, a snapshot, a trace) is cancelled first. Storage that does not answer does not keep
    the machine from ending: a warning says which disk may lack what the guest wrote last.

    \b
    Example:
      vmf controlvm web poweroff
    """
    with ControlClient.of(home(), name) as machine:
        problems = machine.power_off()
    _ended(home(), name)
    for problem in problems:
        click.echo(f"vmf: warning: {printable(problem)}", err=True)
    say(f"Machine '{name}' is powered off.")


@controlvm.command("cancel")
@json_option
@click.pass_obj
def cancel_operation(name: str, as_json: bool) -> None:
    """Cancel what is under way: a start, a snapshot, a restore, a trace, a teleport.

    The machine is afterwards what it was before, and nothing is left of what was begun; only a restore that had begun
    to write says otherwise. A teleport can be cancelled until the handover.

    \b
    Example:
      vmf controlvm web cancel
    """
    from vmf.control.offline import worker

    where = home()
    where.load(name)
    with worker(where, name) or ControlClient.of(where, name) as machine:
        what = machine.cancel_operation()
    if as_json:
        say(json.dumps({"cancelled": what}))
    elif what:
        say(f"{what[0].upper()}{what[1:]} of machine '{name}' is being cancelled.")
    else:
        say(f"Nothing is under way on machine '{name}' that could be cancelled.")


@controlvm.command()
@click.pass_obj
def reset(name: str) -> None:
    """Press the reset button: the guest starts anew.

    \b
    Example:
      vmf controlvm web reset
    """
    with ControlClient.of(home(), name) as machine:
        machine.reset()
    say(f"Machine '{name}' is reset.")


@controlvm.command()
@click.option("--host", metavar="H", help="Host name or address of the target.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="P", help="TCP port on which the target waits.")
@click.option(
    "--maxdowntime",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    metavar="MS",
    help="Goal for the time the guest stands still, milliseconds.",
)
@click.option("--timeout", type=Seconds(min=0, min_open=True), metavar="S", help="Give up after S seconds.")
@click.option(
    "--transport", default="tcp", show_default=True, metavar="tcp|tls", help="Transport plugin; tls encrypts."
)
@click.option("--tls-dir", metavar="DIR", help="This host's certificates (default: tls in vmf's home).")
@click.option("--tls-hostname", metavar="NAME", help="Name in the target's certificate, if it is not that of --host.")
@click.option(
    "--password",
    "--teleporter-password",
    "password",
    metavar="PASSWORD",
    help="Password that was set at the target. Better: --password-file. Without the tls transport the machine's memory"
    " crosses the network unencrypted all the same.",
)
@click.option(
    "--password-file",
    "--teleporter-password-file",
    "password_file",
    metavar="FILE|stdin",
    help="The same, from the only line of a file (mode 0600), or from standard input.",
)
@click.option("--cancel", is_flag=True, help="Cancel the teleport that is under way.")
@click.option("--check", "check_only", is_flag=True, help="Run every check against the target, and move nothing.")
@click.option("--status", is_flag=True, help="Tell what is known of a teleport that was cut short, and ask its target.")
@click.option(
    "--resolve",
    "resolution",
    type=click.Choice(["resume", "discard"]),
    help="Decide a handover that nobody confirmed: let the machine go on here, or give it up here.",
)
@click.option("--force", is_flag=True, help="With --resolve: even where the machine may run twice, or be lost.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "json", "none"]),
    default="auto",
    show_default=True,
    help="How to show it: auto draws on a terminal.",
)
@json_option
@click.pass_obj
def teleport(
    name: str,
    host: str | None,
    port: int | None,
    maxdowntime: int,
    timeout: float | None,
    transport: str,
    tls_dir: str | None,
    tls_hostname: str | None,
    password: str | None,
    password_file: str | None,
    cancel: bool,
    check_only: bool,
    status: bool,
    resolution: str | None,
    force: bool,
    progress: str,
    as_json: bool,
) -> int:
    """Move the machine, while it runs, to the host that waits for it.

    Ctrl-C (or --cancel from elsewhere) cancels the teleport before the handover: the machine goes on here. With
    --check both machines go on undisturbed; everything that speaks against the teleport is listed, and the exit
    status is 1 when there is anything.

    Should the connection break just when the machine is handed over, it stays stopped here, because it may run there.
    --status then asks the target, and --resolve decides.

    \b
    Examples:
      vmf controlvm web teleport --host otherhost --port 6000
      vmf controlvm web teleport --host otherhost --port 6000 --maxdowntime 100 --timeout 60
      vmf controlvm web teleport --check --host otherhost --port 6000
      vmf controlvm web teleport --host otherhost --port 6000 --transport tls
      vmf controlvm web teleport --host otherhost --port 6000 --password-file secret
      vmf controlvm web teleport --cancel
      vmf controlvm web teleport --status
      vmf controlvm web teleport --resolve resume
    """
    ctx = click.get_current_context()
    chosen = {"--cancel": cancel, "--check": check_only, "--status": status, "--resolve": resolution is not None}
    given = [option for option, wanted in chosen.items() if wanted]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other.", ctx)
    if force and resolution is None:
        raise click.UsageError("--force goes with --resolve.", ctx)
    if cancel:
        _cancel(name, as_json)
        return 0
    if status or resolution is not None:
        from vmf.cli import doubt

        peer = {
            "host": host,
            "port": port,
            "transport": transport if ctx.get_parameter_source("transport") is not ParameterSource.DEFAULT else None,
            "options": _transport_options(tls_dir, tls_hostname) or None,
            "password": password_from("--password", password, password_file),
        }
        peer = {key: value for key, value in peer.items() if value is not None}
        if resolution is None:
            return doubt.show_status(name, peer, as_json)
        return doubt.resolve(name, resolution, force, peer, as_json)
    if host is None or port is None:
        missing = " and ".join(option for option, value in (("--host", host), ("--port", port)) if value is None)
        raise click.UsageError(f"A teleport needs {missing}.", click.get_current_context())
    options = _transport_options(tls_dir, tls_hostname)
    secret = password_from("--password", password, password_file)
    if check_only:
        return _check(name, host, port, transport, options, secret, as_json)
    from vmf.cli.progress import progress_view, show_summary

    view = progress_view("none" if as_json and progress == "auto" else progress, ends_told=True)
    where = home()
    cancelling = Cancelling.of(where, name, "teleport", lambda machine: machine.cancel_teleport())
    with ControlClient.of(where, name) as machine, cancelling:
        try:
            summary = machine.teleport(
                host,
                port,
                transport=transport,
                max_downtime_ms=maxdowntime,
                timeout_s=timeout,
                progress=view.update,
                options=options,
                password=secret,
            )
        finally:
            view.close()
    _ended(where, name)
    if as_json:
        say(json.dumps(summary))
    else:
        say(f"Machine '{name}' runs on {host} now.")
        show_summary(summary)
    return 0


def _transport_options(tls_dir: str | None, tls_hostname: str | None) -> dict[str, str]:
    """Settings of the transport that were given. Paths are ours, not those of the machine's process."""
    options = {}
    if tls_dir is not None:
        options["tls_dir"] = str(absolute(tls_dir))
    if tls_hostname is not None:
        options["tls_hostname"] = tls_hostname
    return options


def _check(
    name: str, host: str, port: int, transport: str, options: dict[str, str], password: str | None, as_json: bool
) -> int:
    """Preflight; the exit status."""
    with ControlClient.of(home(), name) as machine:
        answer = machine.check_teleport(host, port, transport=transport, options=options, password=password)
    blockers = answer["blockers"]
    if as_json:
        say(json.dumps(answer))
    elif not blockers:
        say(f"Machine '{name}' can teleport to {host}:{port}: every check passed.")
        for note in answer["notes"]:
            say(f"Note: {printable(note)}")
    else:
        reasons = _grouped(blockers)
        count = "1 reason" if len(reasons) == 1 else f"{len(reasons)} reasons"
        say(f"Machine '{name}' cannot teleport to {host}:{port}, for {count}:")
        for number, blocker in enumerate(reasons, 1):
            said = f"{blocker['field']}: {blocker['source']} at the source, {blocker['target']} at the target."
            say(printable(f"{number:>3}. {said}"))
            if blocker["remedy"]:
                say(printable(f"     {blocker['remedy']}"))
        say("Nothing was moved; both machines go on.")
    return 1 if blockers else 0


def _grouped(blockers: list[dict[str, str]]) -> list[dict[str, str]]:
    """CPU features with the same remedy in one line, in the first one's place."""
    label = "CPU feature "
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for number, blocker in enumerate(blockers):
        key: tuple[str, ...] = (str(number),)
        if blocker["field"].startswith(label):
            key = ("", blocker["source"], blocker["target"], blocker["remedy"])
        groups.setdefault(key, []).append(blocker)
    return [
        group[0]
        if len(group) == 1
        else group[0] | {"field": "CPU features " + ", ".join(each["field"].removeprefix(label) for each in group)}
        for group in groups.values()
    ]


def _ended(where: Home, name: str) -> None:
    """Wait until the machine's process has gone, which takes it a moment, so that it can be started again at once."""
    deadline = time.monotonic() + END_SECONDS
    while where.process(name) is not None and time.monotonic() < deadline:
        time.sleep(0.005)


def _cancel(name: str, as_json: bool) -> None:
    with ControlClient.of(home(), name) as machine:
        cancelled = machine.cancel_teleport()
    if as_json:
        say(json.dumps({"cancelled": cancelled}))
    elif cancelled:
        say(f"The teleport of machine '{name}' is being cancelled.")
    else:
        say(f"There is no teleport of machine '{name}' to cancel.")
