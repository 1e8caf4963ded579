"""The options of createvm and modifyvm that say how a machine waits for a teleport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmf.cli.common import NONE, F, installed
from vmf.cli.password import password_from
from vmf.directories import absolute
from vmf.errors import ConfigError

if TYPE_CHECKING:
    from vmf.machine.config import TeleporterConfig

_KEYS = ("enabled", "port", "address", "transport", "tls_dir", "allow", "password", "password_file", "insecure")
SHORT_PASSWORD = 12
"""Fewer characters can be guessed by who recorded a connection that was not encrypted."""


def teleporter_options(function: F) -> F:
    """Adds them; `take` reads them."""
    options = [
        click.option(
            "--teleporter",
            "teleporter_enabled",
            type=click.Choice(["on", "off"]),
            help="Wait for a teleport when started, or boot.",
        ),
        click.option("--teleporter-port", type=int, metavar="P", help="TCP port to wait on; 0 takes a free one."),
        click.option(
            "--teleporter-address", metavar="A", help="Address of this host to wait on (default: 0.0.0.0, all)."
        ),
        click.option(
            "--teleporter-transport", metavar="tcp|tls", help="Transport plugin (default: tcp); tls encrypts."
        ),
        click.option(
            "--teleporter-tls-dir",
            metavar="DIR",
            help="Directory with this host's certificates; none for the usual one.",
        ),
        click.option(
            "--teleporter-allow",
            multiple=True,
            metavar="NAME",
            help="Source that may teleport here, by a name in its certificate; none clears the list (all that the CA"
            " knows).",
        ),
        click.option(
            "--teleporter-password",
            metavar="PASSWORD",
            help="Password that a source has to know; '' for none. Better: --teleporter-password-file. It keeps"
            " strangers out, but encrypts nothing: that is what the tls transport does.",
        ),
        click.option(
            "--teleporter-password-file",
            metavar="FILE|stdin",
            help="The same, from the only line of a file (mode 0600) or from standard input; none for no password.",
        ),
        click.option(
            "--teleporter-insecure",
            type=click.Choice(["on", "off"]),
            help="Wait where other hosts reach it with neither TLS nor a password, as startvm --insecure does once.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def take(options: dict[str, Any]) -> dict[str, Any]:
    """Take the teleporter's options that were given out of `options`."""
    taken = {key: options.pop(f"teleporter_{key}") for key in _KEYS}
    return {key: value for key, value in taken.items() if value not in (None, ())}


def apply(given: dict[str, Any], old: TeleporterConfig) -> TeleporterConfig:
    """The section `teleporter` with what `prepare` made."""
    import attrs

    changes = dict(given)
    if changes.pop("short_password", False) and changes.get("transport", old.transport) == "tcp":
        click.echo(
            f"vmf: warning: whoever can record a teleport over plain tcp can try passwords at home; one of fewer than "
            f"{SHORT_PASSWORD} characters will not stand that long. Use the tls transport, or a longer one.",
            err=True,
        )
    if "allow" in given:
        kept = () if NONE in given["allow"] else old.allow
        changes["allow"] = tuple(dict.fromkeys([*kept, *(each for each in given["allow"] if each != NONE)]))
    return attrs.evolve(old, **changes)


def prepare(given: dict[str, Any]) -> dict[str, Any]:
    """What `take` took, with texts made what the definition holds; reads the password, and makes its verifier."""
    changes = {key: value for key, value in given.items() if not key.startswith("password")}
    for key in {"enabled", "insecure"} & changes.keys():
        changes[key] = changes[key] == "on"
    if "tls_dir" in changes:
        changes["tls_dir"] = None if changes["tls_dir"] == NONE else absolute(changes["tls_dir"])
    if "transport" in changes:
        installed("transport", changes["transport"])
    if "password" in given or "password_file" in given:
        text = _password(given.get("password"), given.get("password_file"))
        changes["short_password"] = text is not None and len(text) < SHORT_PASSWORD
        changes["password_verifier"] = None
        if text is not None:
            from vmf.teleport.authentication import Verifier

            changes["password_verifier"] = str(Verifier.of(text))
    return changes


def _password(password: str | None, file: str | None) -> str | None:
    """The one that was given; None for none."""
    if (password == "" and file is None) or (password is None and file == NONE):
        return None
    if password == NONE:
        raise ConfigError(
            "--teleporter-password none: is it a password, or shall there be none?",
            "Choose a better password, or take it out with `--teleporter-password-file none`.",
        )
    return password_from("--teleporter-password", password, file, new=True)
