"""cpuid: what CPU backends can present, here and on other hosts, and what suits them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.app import json_option
from vmf.cli.common import F, printable, say, table
from vmf.cli.define import complete_backends
from vmf.cli.password import password_from
from vmf.directories import absolute

if TYPE_CHECKING:
    from vmf.cpuid.baseline import Party

MAX_FILE_BYTES = 1 << 20


def _backend_option(function: F) -> F:
    return click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="auto|unicorn|kvm",
        shell_complete=complete_backends,
        help="CPU backend plugin of this host.",
    )(function)


def _transport_option(function: F) -> F:
    tls = click.option("--tls-dir", metavar="DIR", help="This host's certificates, for the transport tls.")
    plugin = click.option("--transport", default="tcp", show_default=True, metavar="NAME", help="Transport plugin.")
    password = click.option(
        "--password-file", metavar="FILE|stdin", help="File with the password of the machines that are asked."
    )
    return plugin(tls(password(function)))


@click.group()
def cpuid() -> None:
    """Show what CPU backends can present, compare hosts, and find what suits them all.

    Other hosts are given as HOST:PORT, where a machine waits for a teleport (it is asked, and waits on), or as a FILE
    that `vmf cpuid show --json` printed there.

    \b
    Examples:
      vmf cpuid show --json > here.json
      vmf cpuid compare otherhost:6000 third.json
    """


@cpuid.command()
@_backend_option
@click.option("--level", metavar="N|PROFILE", help="Show the contract that a machine gets at this level.")
@click.option("--set", "added", multiple=True, metavar="FEATURE", help="Add a feature to the level.")
@click.option("--remove", "removed", multiple=True, metavar="FEATURE", help="Leave a feature out.")
@json_option
def show(backend: str, level: str | None, added: tuple[str, ...], removed: tuple[str, ...], as_json: bool) -> None:
    """Show everything this host's CPU backend can present, or a contract made from it.

    \b
    Examples:
      vmf cpuid show
      vmf cpuid show --backend unicorn --level 3
      vmf cpuid show --json > here.json
    """
    import vmf
    from vmf.cpuid.contract import make_contract
    from vmf.cpuid.render import feature_rows, summary_rows, table_json

    here = _here(backend)
    shown, what = here.capability.table, f"What {here.label} can present"
    if level is not None or added or removed:
        chosen = level if level is not None else "0"
        shown = make_contract(shown, chosen, added, removed, tsc_khz=here.capability.tsc_khz)
        what = f"The contract of a machine of {here.label} at level {chosen}"
    if as_json:
        answer = {
            "software": f"vmf {vmf.__version__}",
            "backend": here.backend,
            "capability": here.capability.to_wire(),
            "level": level,
            **table_json(shown),
        }
        say(json.dumps(answer, indent=2))
        return
    say(f"{what}:")
    scaling = ", any other by scaling" if here.capability.tsc_scaling else ""
    _pairs([*summary_rows(shown), ("TSC rate", f"{here.capability.tsc_khz} kHz{scaling}")])
    say("")
    table(feature_rows(shown), ("LEAF", "FEATURES"))


@cpuid.command()
@click.argument("others", metavar="HOST:PORT|FILE...", nargs=-1, required=True)
@_backend_option
@click.option("--level", default="0", show_default=True, metavar="N|PROFILE", help="Portability level.")
@_transport_option
@json_option
def compare(
    others: tuple[str, ...],
    backend: str,
    level: str,
    transport: str,
    tls_dir: str | None,
    password_file: str | None,
    as_json: bool,
) -> int:
    """Compare this host's CPU backend with others: could a machine made here go there?

    The exit status is 1 when one of them cannot honour a contract made here at the given level.

    \b
    Examples:
      vmf cpuid compare otherhost:6000
      vmf cpuid compare otherhost:6000 third.json --level 3
    """
    from vmf.cpuid.baseline import honours, suggest
    from vmf.cpuid.compare import fold
    from vmf.cpuid.contract import make_contract
    from vmf.cpuid.levels import parse_level
    from vmf.cpuid.negotiate import negotiate
    from vmf.cpuid.render import agreement_json, difference_json, matrix_rows, summary_rows

    parse_level(level)
    password = password_from("--password", None, password_file)
    here = _here(backend)
    parties = [here, *_parties(others, transport, tls_dir, password)]
    contract = make_contract(here.capability.table, level, tsc_khz=here.capability.tsc_khz or None)
    results = [(party, honours(contract, here.capability, party.capability, level)) for party in parties[1:]]
    agreement = negotiate([party.capability for party in parties])
    failed = any(differences for _, differences in results)
    if as_json:
        answer: dict[str, Any] = {
            "ok": not failed,
            "level": level,
            "here": here.label,
            "hosts": [
                {
                    "host": party.label,
                    "ok": not differences,
                    "differences": [difference_json(each) for each in differences],
                }
                for party, differences in results
            ],
            "agreement": agreement_json(agreement),
            "command": suggest(parties).command,
        }
        say(json.dumps(answer, indent=2))
        return int(failed)
    tables = [party.capability.table for party in parties]
    columns = [printable(party.label) for party in parties]
    summaries = [{row[0]: row[1] for row in summary_rows(each)} for each in tables]
    rows = [(what, *(printable(each[what]) for each in summaries)) for what in summaries[0]]
    rows.append(("TSC rate", *(f"{party.capability.tsc_khz or '?'} kHz" for party in parties)))
    table(rows, ("", *columns))
    say("")
    if matrix := matrix_rows(tables):
        table(matrix, ("FEATURE", *columns, "UP TO LEVEL"))
    else:
        say("All have the very same features.")
    say("")
    for party, differences in results:
        if not differences:
            say(printable(f"A machine made here at level {level} can go to {party.label}."))
            continue
        say(printable(f"A machine made here at level {level} cannot go to {party.label}:"))
        for each in fold(differences):
            say(printable(f"  {each.field}: {each.contract} here, {each.capability} there. {each.remedy}".rstrip()))
    _tell_agreement(parties, matrix_shown=True)
    return int(failed)


@cpuid.command()
@click.argument("others", metavar="HOST:PORT|FILE...", nargs=-1, required=True)
@click.option("--here", "with_here", is_flag=True, help="Count this host's CPU backend in.")
@_backend_option
@_transport_option
@json_option
def baseline(
    others: tuple[str, ...],
    with_here: bool,
    backend: str,
    transport: str,
    tls_dir: str | None,
    password_file: str | None,
    as_json: bool,
) -> int:
    """Find the contract that suits all the hosts given, and the command that gives it to a machine.

    The exit status is 1 when there is none.

    \b
    Examples:
      vmf cpuid baseline a.json b.json otherhost:6000
      vmf cpuid baseline --here otherhost:6000 --json
    """
    from vmf.cpuid.baseline import suggest
    from vmf.cpuid.features import names
    from vmf.cpuid.negotiate import negotiate
    from vmf.cpuid.render import agreement_json, summary_rows

    password = password_from("--password", None, password_file)
    parties = [*([_here(backend)] if with_here else []), *_parties(others, transport, tls_dir, password)]
    agreement = negotiate([party.capability for party in parties])
    suggestion = suggest(parties)
    if as_json:
        say(json.dumps({**agreement_json(agreement), "command": suggestion.command}, indent=2))
        return int(not agreement.possible)
    _tell_agreement(parties)
    if agreement.possible:
        _pairs(summary_rows(agreement.table))
        say(f"features: {' '.join(names(agreement.common))}")
    return int(not agreement.possible)


def _tell_agreement(parties: Sequence[Party], *, matrix_shown: bool = False) -> None:
    from vmf.cpuid.baseline import suggest
    from vmf.cpuid.negotiate import negotiate

    for line in negotiate([party.capability for party in parties]).explain():
        if not (matrix_shown and line.startswith("Without ")):
            say(printable(line))
    suggestion = suggest(parties)
    if suggestion.command:
        say(f"For a machine that can go to all of them: {suggestion.command}")
    if suggestion.note:
        say(suggestion.note)


def _pairs(rows: Sequence[tuple[str, ...]]) -> None:
    width = max(len(row[0]) for row in rows) + 1
    for row in rows:
        say(printable(f"{(row[0] + ':').ljust(width)} {' '.join(row[1:])}"))


def _here(backend: str) -> Party:
    from vmf.cpuid.baseline import Party
    from vmf.machine.contract import capability_of
    from vmf.plugins.bridge import PluginRegistry

    registry = PluginRegistry(on_problem=lambda problem: click.echo(f"vmf: warning: {problem}", err=True))
    chosen = registry.choose_cpu_backend(backend)
    capability = capability_of(chosen)
    return Party(capability.name, chosen.name, capability)


def _parties(others: Sequence[str], transport: str, tls_dir: str | None, password: str | None) -> list[Party]:
    """All of them, asked at the same time; raises the error of the first that did not answer."""
    from concurrent.futures import ThreadPoolExecutor

    from vmf.plugins.bridge import PluginRegistry

    registry = PluginRegistry()
    options = {} if tls_dir is None else {"tls_dir": str(absolute(tls_dir))}
    with ThreadPoolExecutor(8, "vmf-ask") as pool:
        return list(pool.map(lambda other: _party(registry, other, transport, options, password), others))


def _party(registry: Any, text: str, transport: str, options: dict[str, str], password: str | None) -> Party:
    from vmf.cpuid.baseline import Party
    from vmf.errors import ConfigError, VmfError
    from vmf.machine.config import split_peer
    from vmf.machine.contract import ask_host

    if Path(text).exists():
        return read_party(Path(text))
    host, port = split_peer(text)
    if not host or not 1 <= port <= 65535:
        raise ConfigError(
            f"{text}: there is no such file, and it is not HOST:PORT.",
            "Give where a machine waits for a teleport, or a file that `vmf cpuid show --json` printed.",
        )
    try:
        answer = ask_host(
            registry, host, port, asker="vmf cpuid", transport=transport, options=options, password=password
        )
    except VmfError as error:
        made = type(error)(f"{text} cannot be asked: {error.message}", error.remedy)
        raise made from error
    return Party(answer.capability.name, answer.backend, answer.capability, peer=text)


def read_party(path: Path) -> Party:
    """What `vmf cpuid show --json` printed. Raises ConfigError."""
    from vmf.cpuid.baseline import Party
    from vmf.cpuid.negotiate import Capability
    from vmf.errors import ConfigError, StateError
    from vmf.reading import read_file

    remedy = "Make it anew with `vmf cpuid show --json` on that host."
    try:
        raw, _ = read_file(path, MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes.", remedy)
        data = json.loads(raw)
        if not isinstance(data, dict) or not isinstance(backend := data.get("backend"), str):
            raise ConfigError(f"{path} is not what `vmf cpuid show --json` prints.", remedy)
        capability = Capability.from_wire(data.get("capability"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.", remedy) from error
    except StateError as error:
        raise ConfigError(f"{path}: {error.message}", remedy) from error
    label = f"{path.stem} ({printable(backend)})"
    import attrs

    return Party(label, printable(backend), attrs.evolve(capability, name=label[:255]))
