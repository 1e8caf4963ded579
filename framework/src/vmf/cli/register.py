"""unregistervm, unlockvm: what becomes of a machine that is gone from here, or whose host is."""

from __future__ import annotations

import click

from vmf.cli.common import home, machine_argument, printable, say


@click.command()
@machine_argument
@click.option("--delete", is_flag=True, help="Delete its definition and logs, too; never kernels or images.")
def unregistervm(name: str, delete: bool) -> None:
    """Forget machine NAME, which must not be running.

    Without --delete its definition is kept beside, under another name.

    \b
    Example:
      vmf unregistervm web --delete
    """
    kept = home().unregister(name, delete=delete)
    say(f"Machine '{name}' is deleted." if kept is None else f"Machine '{name}' is forgotten; its definition: {kept}")


@click.command()
@machine_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def unlockvm(name: str, yes: bool) -> None:
    """Declare that the process that ran machine NAME on another host is gone for good.

    For a home that several hosts share: when a host crashed, or is cut off, the others cannot see whether the machine
    still runs there, and do not start it. Look yourself first. Should it run there after all, two guests write to its
    disks until the old one notices.

    \b
    Example:
      vmf unlockvm web
    """
    where = home()
    where.load(name)
    seen = where.sight(name)
    holder = seen.running if seen.running is not None and not seen.running.same_host else seen.elsewhere
    if holder is not None and not yes:
        click.echo(f"Machine '{name}' was started on host {printable(holder.host)}, process {holder.pid}.", err=True)
        click.confirm("Is that process gone for good?", abort=True, err=True)
    where.unlock(name)
    say(f"Machine '{name}' can be started here.")
