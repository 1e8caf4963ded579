"""showvminfo and list."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.app import json_option
from vmf.cli.common import home, machine_argument, paragraphs, printable, say, table
from vmf.errors import VmfError

if TYPE_CHECKING:
    from vmf.machine.config import DriveConfig, TeleporterConfig
    from vmf.machine.home import Home

UNRESPONSIVE = "does not answer"
UNREACHABLE = "running, unreachable"
_CELL = 60
"""Characters of a problem in a list; `showvminfo` has all of it."""


@click.command()
@machine_argument
@json_option
def showvminfo(name: str, as_json: bool) -> None:
    """Show the definition and the state of machine NAME.

    \b
    Examples:
      vmf showvminfo web
      vmf showvminfo web --json
    """
    from vmf.machine.identity import strangers

    where = home()
    config = where.load(name)
    paths = where.paths(name)
    process = where.process(name)
    state, live = _states(where, [name])[name]
    last = where.last_run(name) if process is None else {}
    why = _explain(where, name, state)
    if as_json:
        answer: dict[str, Any] = {
            "name": name,
            "state": state,
            "pid": None if process is None else process.pid,
            "config": config.to_dict(secrets=False),
            "live": live,
            "last_run": last,
            "explanation": why,
            "not_its_own": [str(path) for path in strangers(paths.directory)],
            "definition": str(paths.definition),
            "console_log": str(paths.console_log),
            "vmm_log": str(paths.vmm_log),
        }
        say(json.dumps(answer, indent=2))
        return
    teleporter = config.teleporter
    waits = f"on, {_configured(teleporter)}" if teleporter.enabled else "off"
    rows: list[tuple[str, object]] = [
        ("Name", name),
        ("State", state),
        ("Process", "" if process is None else process.where.removeprefix("process ")),
        ("Failure", live.get("failure")),
        ("Problem", live.get("problem")),
        ("Under way", _under_way(live.get("operation"))),
        ("Last run", last.get("detail") if state != "aborted" else ""),
        ("UUID", config.uuid),
        *(("Not its own", path) for path in strangers(paths.directory)),
        ("Description", config.description),
        ("Memory", f"{config.memory_mib} MiB"),
        ("CPU backend", config.cpu_backend),
        ("CPU backend in use", _backend_in_use(live)),
        ("Why that one", live.get("cpu_backend_choice")),
        ("CPUID level", config.cpuid.portability_level),
        ("CPUID features set", ", ".join(config.cpuid.set)),
        ("CPUID features removed", ", ".join(config.cpuid.remove)),
        ("CPUID vendor", config.cpuid.vendor),
        ("Teleport peers", ", ".join(config.cpuid.peers)),
        ("CPUID in force", _contract(live.get("cpuid"))),
        ("Kernel", config.kernel),
        ("Initrd", config.initrd),
        ("Command line", config.cmdline),
        ("Image", config.image),
        ("Devices", ", ".join(config.devices)),
        *(("Drive", _drive(each)) for each in config.drives),
        ("Teleporter", waits),
        ("Teleports allowed from", ", ".join(teleporter.allow)),
        ("Teleport password", "set" if teleporter.password_verifier else ""),
        ("Waits at", ", ".join(live.get("teleporter_addresses", ()))),
        ("Answers at", _answers(live.get("answers_at"))),
        ("Resets", _resets(live.get("resets"))),
        ("Guest time", f"{live['guest_time_seconds']} s" if "guest_time_seconds" in live else ""),
        ("Definition", paths.definition),
        ("Console log", paths.console_log),
    ]
    if why:
        rows.insert(2, ("", why))
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        if value not in (None, ""):
            say(f"{(label + ':' if label else '').ljust(width)}{value}")


def _explain(where: Home, name: str, state: str) -> str:
    """What a state means here and what to do about it, for those that need it."""
    seen = where.sight(name)
    if state == "uncertain":
        return f"handed over, not confirmed: it may run there; see `vmf controlvm {name} teleport --status`"
    if state == UNREACHABLE and seen.running is not None:
        from vmf.control.reach import remedy

        return remedy(seen.running)
    if state == "elsewhere" and seen.left is not None:
        return (
            f"it was started on host {printable(seen.left.host)}, and nothing here tells whether it still runs there: "
            f"use vmf there, or, if that host is gone for good, `vmf unlockvm {name}`"
        )
    if copied := _copied_from(where, name):
        return copied
    if state == "aborted":
        from vmf.machine import death

        why = str(where.last_run(name).get("detail") or "its process ended without cleaning up")
        if seen.left is not None:
            why = death.explain(seen.left, where.paths(name).vmm_log)
        return f"{why}; `vmf startvm {name}` starts it anew"
    return ""


def _copied_from(where: Home, name: str) -> str:
    """That a machine's directory is a copy, with the remedy."""
    from vmf.errors import InvalidStateError
    from vmf.machine import identity

    paths = where.paths(name)
    uuid = identity.uuid_in(paths.definition)
    try:
        identity.refuse_copy(name, paths.directory, uuid, where.twins(name, uuid))
    except InvalidStateError as error:
        return str(error)
    return ""


def _configured(teleporter: TeleporterConfig) -> str:
    """Where the definition lets it wait; "Waits at" tells where it does."""
    host = teleporter.address.strip("[]")
    where = f"[{host}]" if ":" in host else host
    return f"{teleporter.transport}, {where}, port {teleporter.port or 'chosen at the start'}"


def _resets(resets: Any) -> str:
    if not isinstance(resets, dict) or not resets.get("count"):
        return ""
    return f"{resets['count']}, the last {resets.get('seconds_since_last'):g} s ago ({resets.get('last_reason')})"


def _answers(address: Any) -> str:
    return f"{address}, because its source has not confirmed that it arrived" if address else ""


def _contract(cpuid: Any) -> str:
    """The contract in force in one line."""
    if not isinstance(cpuid, dict):
        return ""
    parts = [f"level {cpuid.get('label')}", str(cpuid.get("vendor", ""))]
    parts.append(f"{len(cpuid.get('features', ()))} features")
    parts.append(f"{cpuid.get('physical_address_bits')} physical address bits")
    return ", ".join(part for part in parts if part)


def _drive(drive: DriveConfig) -> str:
    access = "" if drive.writable or not drive.medium else ", read-only"
    return f"port {drive.port}, {drive.type}: {drive.medium or 'no medium'}{access}"


def _under_way(operation: Any) -> str:
    """A long operation in one line."""
    if not isinstance(operation, dict):
        return ""
    done, total = operation.get("done") or 0, operation.get("total") or 0
    part = f", {operation.get('step')} {100 * done // total} %" if total else ""
    return f"{operation.get('what')}, for {operation.get('seconds')} s{part}"


def _backend_in_use(live: dict[str, Any]) -> str:
    used = str(live.get("cpu_backend_used") or "")
    return f"{used}, tracing" if used and live.get("tracing") else used


@click.group(name="list")
def list_() -> None:
    """List machines or plugins.

    \b
    Examples:
      vmf list vms
      vmf list plugins --json
    """


@list_.command()
@json_option
def vms(as_json: bool) -> None:
    """Every machine that is defined here.

    \b
    Example:
      vmf list vms
    """
    where = home()
    _list_machines(where, where.names(), as_json)


@list_.command()
@json_option
def runningvms(as_json: bool) -> None:
    """The machines that have a process: running, paused, or waiting for a teleport.

    \b
    Example:
      vmf list runningvms --json
    """
    where = home()
    _list_machines(where, where.running(), as_json)


@list_.command()
@json_option
def plugins(as_json: bool) -> None:
    """Every installed plugin, and whether it works here.

    Each one is tried in a process of its own, so a broken one does no harm.

    \b
    Example:
      vmf list plugins
    """
    import attrs

    from vmf.plugins.listing import list_plugins

    records = list_plugins()
    if as_json:
        say(json.dumps([attrs.asdict(record) for record in records], indent=2))
        return
    rows, reasons = [], []
    for record in records:
        here = "yes" + (f" ({record.detail})" if record.detail else "")
        if not record.usable:
            here = "no, see below"
            reasons.append((f"{record.kind} {record.name}:", f"{record.reason.rstrip('.')}. {record.remedy}".rstrip()))
        rows.append((record.kind, record.name, record.version, record.distribution, here))
    table(rows, ("KIND", "NAME", "VERSION", "DISTRIBUTION", "USABLE HERE"))
    paragraphs(reasons)


def _list_machines(where: Home, names: list[str], as_json: bool) -> None:
    records: list[dict[str, Any]] = []
    for name in names:
        try:
            config = where.load(name)
        except VmfError as error:
            state = "invalid" if where.process(name) is None else ""  # it may run, from a definition that was whole
            records.append({"name": name, "uuid": "", "state": state, "memory_mib": 0, "error": str(error)})
            continue
        records.append({"name": name, "uuid": config.uuid, "state": "", "memory_mib": config.memory_mib})
    states = _states(where, [record["name"] for record in records if not record["state"]])
    for record in records:
        live: dict[str, Any] = {}
        if not record["state"]:
            record["state"], live = states[record["name"]]
        record["problem"] = str(record.get("error") or live.get("failure") or live.get("problem") or "")
    if as_json:
        say(json.dumps(records, indent=2))
        return
    table(
        [
            (
                record["name"],
                record["state"],
                f"{record['memory_mib']} MiB",
                record["uuid"],
                _shortened(record["problem"]),
            )
            for record in records
        ],
        ("NAME", "STATE", "MEMORY", "UUID", "PROBLEM"),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _states(where: Home, names: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each machine: its state, and what its process says of it. Those that run are asked side by side."""
    running = [name for name in names if where.process(name) is not None]
    if not running:
        return {name: (where.resting_state(name), {}) for name in names}
    from vmf.control.asking import ask_all
    from vmf.control.reach import Unreachable

    answers = ask_all(where, running, lambda machine: machine.info())
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        live = answers.get(name)
        if isinstance(live, dict):
            found[name] = str(live.get("state", UNRESPONSIVE)), live
        elif live is not None and where.process(name) is not None:
            found[name] = (UNREACHABLE if isinstance(live, Unreachable) else UNRESPONSIVE), {}
        else:  # it may have ended just now
            found[name] = where.resting_state(name), {}
    return found
