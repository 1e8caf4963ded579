"""`vmf tls`: making and showing the certificates of encrypted teleports."""

from __future__ import annotations

from pathlib import Path

import click

from vmf.directories import absolute
from vmf.errors import VmfError
from vmf_transport_tls import files, issue

_DIRECTORY = click.option(
    "--tls-dir", metavar="DIR", help="Directory with this host's certificates (default: tls in vmf's home)."
)
_DAYS = click.IntRange(1, 36500)


def _directory(tls_dir: str | None) -> Path:
    return absolute(tls_dir) if tls_dir else files.default_directory()


@click.group()
def tls() -> None:
    """Make the certificates of encrypted teleports, and show them.

    One host has the CA and issues the certificates of all hosts. Two commands there, and a copy:

    \b
    Example:
      vmf tls init
      vmf tls issue otherhost
    """


@tls.command()
@click.option("--name", "names", multiple=True, metavar="HOST", help="Further name or address of this host.")
@click.option(
    "--days", type=_DAYS, metavar="N", default=issue.CA_DAYS, show_default=True, help="How long the CA is valid."
)
@click.option("--force", is_flag=True, help="Replace a CA that is there; what it issued is worthless then.")
@_DIRECTORY
def init(names: tuple[str, ...], days: int, force: bool, tls_dir: str | None) -> None:
    """Make a private CA, and this host's own certificates.

    \b
    Examples:
      vmf tls init
      vmf tls init --name web1.example.org --name 192.0.2.7
    """
    directory = _directory(tls_dir)
    for name in names:
        issue.check_host(name)
    every = list(dict.fromkeys([*names, *issue.own_names()]))
    issue.make_ca(directory, force=force, days=days)
    # Certificates of an authority before this one are of no use any more.
    issue.issue(directory, directory, every, force=True, days=min(days, issue.HOST_DAYS))
    click.echo(f"There is a CA in {directory} now, and certificates of this host ({', '.join(every)}).")
    click.echo("Next, for each other host: vmf tls issue HOST")


@tls.command("issue")
@click.argument("host", metavar="HOST")
@click.option("--name", "names", multiple=True, metavar="HOST", help="Further name or address of that host.")
@click.option("--client", "only_client", is_flag=True, help="Only to teleport machines away from it (a source).")
@click.option("--server", "only_server", is_flag=True, help="Only to receive machines (a target).")
@click.option(
    "--days", type=_DAYS, metavar="N", default=issue.HOST_DAYS, show_default=True, help="How long they are valid."
)
@click.option("--out", metavar="DIR", help="Where to write them (default: issued/HOST beside the CA).")
@click.option("--force", is_flag=True, help="Replace certificates that are there.")
@_DIRECTORY
def issue_(
    host: str,
    names: tuple[str, ...],
    only_client: bool,
    only_server: bool,
    days: int,
    out: str | None,
    force: bool,
    tls_dir: str | None,
) -> None:
    """Issue the certificates of HOST: the name, or address, that others use to connect to it.

    Copy the directory to HOST as its `tls` directory, by a way that nobody else can read.

    \b
    Examples:
      vmf tls issue otherhost
      vmf tls issue otherhost --name 192.0.2.8
      vmf tls issue laptop --client --days 30
    """
    if only_client and only_server:
        raise click.UsageError("Give --client or --server, not both.", click.get_current_context())
    roles: tuple[files.Role, ...] = ("client",) if only_client else ("server",) if only_server else ("server", "client")
    authority = _directory(tls_dir)
    issue.check_host(host)
    directory = absolute(out) if out else authority / "issued" / host
    every = list(dict.fromkeys([host, *names]))
    issue.issue(authority, directory, every, roles, force=force, days=days)
    click.echo(f"Certificates of {', '.join(every)} are in {directory}.")
    click.echo(f"Next: copy the files in it to {host}, into the directory that `vmf tls show` names there.")


@tls.command()
@_DIRECTORY
def show(tls_dir: str | None) -> None:
    """Show this host's certificates: names and days until they expire.

    \b
    Example:
      vmf tls show
    """
    directory = _directory(tls_dir)
    click.echo(f"Directory: {directory}")
    found = False
    for file, what in (
        (files.CA_CERT, "authority"),
        (files.cert_file("server"), "as a target"),
        (files.cert_file("client"), "as a source"),
    ):
        path = directory / file
        if not path.exists():
            click.echo(f"{what}: none ({file} is missing)")
            continue
        found = True
        certificate = files.read_certificate(path)
        days = files.days_left(certificate)
        left = f"expires in {days} days" if days >= 0 else "EXPIRED"
        names = ", ".join(files.certificate_names(certificate)) or "(no name)"
        click.echo(f"{what}: {names}; {left} ({certificate.not_valid_after_utc:%Y-%m-%d})")
    for role in ("server", "client"):
        if (directory / files.cert_file(role)).exists():
            try:
                files.load(directory, role)
            except VmfError as error:
                click.echo(f"problem: {error}")
    if not found:
        click.echo("Make them with `vmf tls init`, or copy those that were issued for this host.")
