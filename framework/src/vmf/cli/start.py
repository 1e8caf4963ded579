"""startvm and console: the process of a machine, and its serial port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import click

from vmf.cli.app import json_option
from vmf.cli.bar import StartBar
from vmf.cli.common import Seconds, home, machine_argument, say
from vmf.cli.password import password_from
from vmf.control import terminal
from vmf.control.process import Observer, continuation, run_machine_process, spawn_detached
from vmf.errors import ControlError
from vmf.machine.home import Home


def _detach_key(_context: click.Context, _parameter: click.Parameter, value: str) -> bytes:
    from vmf.control.attach import parse_detach_key

    try:
        return parse_detach_key(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


_escape_option = click.option(
    "--escape",
    default="^]",
    show_default=True,
    metavar="KEY",
    callback=_detach_key,
    help="Key that detaches from the console: ^ and a letter or one of @[\\]^_, or a single character.",
)


@click.command()
@machine_argument
@click.option("--detach", is_flag=True, help="Leave it running in the background; return when it runs or waits.")
@click.option("--console", "with_console", is_flag=True, help="Attach to its serial console as soon as it runs.")
@click.option(
    "--insecure",
    is_flag=True,
    help="Wait for a teleport although other hosts reach it with neither TLS nor a password.",
)
@click.option(
    "--peer-password-file",
    metavar="FILE|stdin",
    help="File with the password of the teleport peers that are asked before the machine boots.",
)
@_escape_option
@json_option
def startvm(
    name: str,
    detach: bool,
    with_console: bool,
    insecure: bool,
    peer_password_file: str | None,
    escape: bytes,
    as_json: bool,
) -> None:
    """Start machine NAME.

    It runs in this process until it powers off or is teleported away; Ctrl-C powers it off. With the teleporter on,
    it does not boot but waits for a teleport to arrive; where other hosts could reach it that takes the tls transport,
    a password, or --insecure. Its serial output goes to `vmf console NAME` and to a log.

    \b
    Examples:
      vmf startvm web --detach
      vmf startvm web --console
    """
    if detach and with_console:
        raise click.UsageError("--detach and --console exclude each other.", click.get_current_context())
    password = password_from("--peer-password", None, peer_password_file)
    if detach:
        bar = StartBar(home(), name)
        try:
            ready = spawn_detached(home(), name, insecure=insecure, peer_password=password)
        finally:
            bar.end()
        if as_json:
            say(json.dumps({"name": name, **ready}))
            return
        for line in ready.get("notices", ()):
            say(line)
        if ready["address"]:
            say(f"Machine '{name}' waits for a teleport at {ready['address']} (process {ready['pid']}).")
        else:
            say(f"Machine '{name}' is running (process {ready['pid']}).")
        return
    observer = _Foreground(home(), name, escape if with_console else None, as_json)
    # SIGINT, SIGTERM and SIGHUP power the machine off.
    guard = terminal.signals_restore([signal.SIGQUIT]) if with_console else contextlib.nullcontext()
    with guard:
        try:
            state = run_machine_process(home(), name, observer, insecure=insecure, peer_password=password)
        finally:
            observer.finish()
    if as_json:
        say(json.dumps({"event": "ended", "state": state}))
    else:
        say(f"Machine '{name}' {'runs on another host now' if state == 'teleported' else 'is powered off'}.")


@click.command()
@machine_argument
@click.option("--no-scrollback", is_flag=True, help="Show only what comes from now on.")
@click.option(
    "--linger",
    type=Seconds(min=0),
    default=1.0,
    show_default=True,
    metavar="S",
    help="When piped input has ended, detach after S seconds without output.",
)
@_escape_option
def console(name: str, no_scrollback: bool, linger: float, escape: bytes) -> None:
    """Attach to the serial console of machine NAME.

    Ctrl-], or the key of --escape, detaches and leaves the machine running. Standard input may be a pipe. Input that
    the machine did not take (it was teleported away, it reads nothing) is counted and told; the exit status is then 1.

    \b
    Examples:
      vmf console web
      vmf console web --escape ^T
      echo uname -a | vmf console web
    """
    with terminal.signals_restore() as wakeup:
        _attach(home(), name, escape, scrollback=not no_scrollback, linger=linger, wakeup=wakeup)


def _attach(
    where: Home,
    name: str,
    escape: bytes,
    *,
    scrollback: bool,
    linger: float = 1.0,
    wakeup: int | None = None,
    tell_end: bool = True,
) -> None:
    """Attach and tell how that ended; without `tell_end` not the machine's own end, which the caller tells."""
    from vmf.control.attach import AttachEnd, attach, connect, detach_key_name

    if sys.stdout is None:
        raise click.UsageError("standard output is closed: there is nowhere to show the console.")
    connection = connect(where, name, scrollback=scrollback)
    stdin = None if sys.stdin is None else sys.stdin.fileno()
    interactive = stdin is not None and os.isatty(stdin)
    if interactive:
        click.echo(f"Attached to machine '{name}'; {detach_key_name(escape)} detaches.", err=True)
    sys.stdout.flush()
    attached = attach(connection, stdin, sys.stdout.fileno(), linger=linger, detach_key=escape, wakeup=wakeup)
    if attached.end is AttachEnd.OUTPUT_CLOSED:
        sys.exit(128 + signal.SIGPIPE)
    why = "Detached; the machine goes on."
    if attached.end is AttachEnd.ENDED:
        why = {
            "teleported": f"Machine '{name}' runs on another host now.",
            "poweredoff": f"Machine '{name}' is powered off.",
        }.get(attached.state, "The machine's console has ended.")
    if interactive:
        click.echo(f"\n{why}" if tell_end or attached.end is AttachEnd.DETACHED else "", err=True)
    if attached.undelivered:
        count = f"{attached.undelivered} byte{'s' if attached.undelivered != 1 else ''} typed"
        what = f"{count} were not delivered" if attached.certain else f"Of {count} some may not have been delivered"
        raise ControlError(f"{what}: {why[0].lower()}{why[1:]}", "Type them again where the machine runs.")


class _Foreground(Observer):
    """Shows what a machine in this process does."""

    def __init__(self, where: Home, name: str, escape: bytes | None, as_json: bool) -> None:
        """With `escape`, the key that detaches, it attaches the console."""
        self._home = where
        self._name = name
        self._escape = escape
        self._as_json = as_json
        self._view: Any = None
        self._attached: threading.Thread | None = None
        self._bar = StartBar(where, name)

    def waiting(self, address: str) -> None:
        self._bar.end()
        if self._as_json:
            say(json.dumps({"event": "waiting", "address": address}))
        else:
            say(f"Machine '{self._name}' waits for a teleport at {address}. Ctrl-C ends it.")

    def arriving(self, event: Mapping[str, Any]) -> None:
        if self._view is None:
            from vmf.cli.progress import progress_view

            self._view = progress_view("json" if self._as_json else "auto")
        self._view.update(event)

    def arrived(self, summary: Mapping[str, Any]) -> None:
        if self._view is not None:
            self._view.close()
        if self._as_json:
            say(json.dumps({"event": "arrived", "summary": dict(summary)}))
        else:
            from vmf.cli.progress import show_summary

            show_summary(summary)

    def running(self, info: Mapping[str, Any]) -> None:
        self._bar.end()
        state = "running" if info.get("state") == "running" else str(info.get("state"))
        if self._as_json:
            say(json.dumps({"event": "running", "info": dict(info)}))
        else:
            if info.get("cpu_backend_choice"):
                say(f"CPU backend: {info['cpu_backend_choice']}.")
            for line in (info.get("cpuid") or {}).get("explanation", ()):
                say(f"CPUID contract: {line}")
            for line in continuation(info):
                say(line)
            backend = info.get("cpu_backend_used")
            on = f" on {backend}" if backend else ""
            say(f"Machine '{self._name}' is {state}{on}. Console: vmf console {self._name}   Ctrl-C powers it off.")
        if self._escape is not None:
            self._attached = threading.Thread(target=self._console, name="vmf-attach", daemon=True)
            self._attached.start()

    def state_changed(self, old: str, new: str) -> None:
        if self._as_json:
            say(json.dumps({"event": "state", "old": old, "new": new}))
        elif new == "failed":
            say(
                f"Machine '{self._name}' has failed (see vmf showvminfo {self._name});"
                " it can be reset, or powered off with Ctrl-C."
            )
        elif {old, new} == {"paused", "running"}:
            say(f"Machine '{self._name}' is {new}.")

    def notice(self, text: str) -> None:
        if self._view is not None:
            self._view.close()
        click.echo(f"vmf: {text}", err=True)

    def finish(self) -> None:
        """The process is about to end: give the terminal back."""
        self._bar.end()
        if self._view is not None:
            self._view.close()
        if self._attached is not None:
            self._attached.join(2)

    def _console(self) -> None:
        assert self._escape is not None
        try:
            _attach(self._home, self._name, self._escape, scrollback=True, tell_end=False)
        except SystemExit:
            pass  # nobody reads standard output; that ends no machine
        except Exception as error:  # noqa: BLE001 - the machine goes on without it
            click.echo(f"vmf: the console has ended: {error}", err=True)
