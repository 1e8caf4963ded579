"""controlvm NAME teleport --status and --resolve: a handover that nobody confirmed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmf.cli.common import home, printable, say
from vmf.control.client import ControlClient

if TYPE_CHECKING:
    from vmf.machine.home import Home
    from vmf.plugins.bridge import PluginRegistry
    from vmf.transport.base import Address


def show_status(name: str, peer: Mapping[str, Any], as_json: bool) -> int:
    """What is known; the exit status: 1 while a teleport is in doubt."""
    where = home()
    where.load(name)
    if where.process(name) is not None:
        with ControlClient.of(where, name) as machine:
            status = machine.teleport_status(ask=True, peer=peer)
            status["state"] = machine.info().get("state", "")
    else:
        from vmf.machine.doubt import describe_orphan

        address, password = _address(where, name, peer)
        doubt = describe_orphan(where, name, _registry(), address, password)
        state = where.resting_state(name)
        status = {"active": False, "role": "", "progress": {}, "summary": None, "state": state, "doubt": doubt}
    doubt = status.get("doubt")
    if as_json:
        say(json.dumps(status))
    elif doubt:
        _show_doubt(name, doubt)
    else:
        _show_calm(name, status)
    return 1 if doubt else 0


def _show_doubt(name: str, doubt: Mapping[str, Any]) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(doubt["since"]))
    rows = [
        ("Teleport", doubt["teleport_id"]),
        ("To", doubt["target"]),
        ("Begun", f"{since} ({doubt['seconds']} s ago)"),
        ("Phase", f"{doubt['phase']}: handed over, not confirmed"),
        ("What happened", doubt["why"]),
        ("Here", "stopped, kept" if doubt["process"] == "alive" else "its process has ended, its memory is lost"),
        ("The target", doubt.get("said", "(not asked)")),
    ]
    for label, value in rows:
        say(printable(f"{label + ':':<15}{value}"))
    for how, does in (("resume", "let it go on here"), ("discard", "give it up here")):
        verdict = doubt.get(how)
        if verdict is not None:
            command = f"vmf controlvm {name} teleport --resolve {how}"
            if verdict["allowed"]:
                say(f"To {does}: {command}")
            else:
                say(f"To {does}: {command} --force, at your own risk: {verdict['risk']}.")


def _show_calm(name: str, status: Mapping[str, Any]) -> None:
    if status["active"]:
        progress = status.get("progress") or {}
        say(f"Machine '{name}' is {status['state']}, phase {progress.get('phase', 'hello')}.")
    else:
        say(f"Machine '{name}' is {status['state']}; no teleport of it is under way or in doubt.")


def resolve(name: str, how: str, force: bool, peer: Mapping[str, Any], as_json: bool) -> int:
    """Decide; the exit status."""
    where = home()
    where.load(name)
    if where.process(name) is not None:
        with ControlClient.of(where, name) as machine:
            done = machine.resolve_teleport(how, force=force, peer=peer)
    else:
        from vmf.machine.doubt import resolve_orphan

        address, password = _address(where, name, peer)
        done = resolve_orphan(where, name, how, _registry(), force=force, peer=address, password=password)
    say(json.dumps({"done": done}) if as_json else printable(done))
    return 0


def _registry() -> PluginRegistry:
    from vmf.plugins.bridge import PluginRegistry

    return PluginRegistry()


def _address(where: Home, name: str, peer: Mapping[str, Any]) -> tuple[Address | None, str | None]:
    """Whom to ask: who stands in the note, with what the user says otherwise."""
    from vmf.machine.journal import in_doubt
    from vmf.transport.base import Address

    entry = in_doubt(where, name)
    if entry is None:
        return None, None
    usual = entry.peer
    address = Address(
        peer.get("transport", usual.scheme),
        peer.get("host", usual.host),
        peer.get("port", usual.port),
        {**usual.options, **peer.get("options", {})},
    )
    return address, peer.get("password")
