"""unregistervm, registervm, unlockvm: what becomes of a machine that is gone from here, or whose host is."""

from __future__ import annotations

import os
import shlex

import click

from vmf.cli.common import home, machine_argument, printable, say


@click.command()
@machine_argument
@click.option("--delete", is_flag=True, help="Delete its definition, snapshots and logs; never kernels or images.")
def unregistervm(name: str, delete: bool) -> None:
    """Forget machine NAME, which must not be running.

    Without --delete everything of it is set aside as it is, and `vmf registervm` brings it back. With --delete it is
    lost; that is refused while a teleport of it is in doubt, and when its next start continues from a snapshot.

    \b
    Examples:
      vmf unregistervm web
      vmf unregistervm web --delete
    """
    where = home()
    snapshots = len(os.listdir(path)) if (path := where.paths(name).snapshots).is_dir() else 0
    kept = where.unregister(name, delete=delete)
    if not delete:
        say(f"Machine '{name}' is forgotten; everything of it is in {kept}")
        say(f"To bring it back: vmf registervm {shlex.quote(str(kept))}")
        return
    say(f"Machine '{name}' is deleted" + (f", with its snapshots ({snapshots})." if snapshots else "."))
    if kept is not None:
        say(f"What was in its directory and of other machines is in {kept}")


@click.command()
@click.argument("path", metavar="PATH", type=click.Path())
@click.option("--name", metavar="NAME", help="The name that it is to have, if not its own.")
def registervm(path: str, name: str | None) -> None:
    """Bring back a machine that was unregistered.

    PATH is the directory that `vmf unregistervm` named; or a definition (a machine.toml), of which a machine is made.

    \b
    Examples:
      vmf registervm ~/.local/share/vmf/unregistered/web.20261130T120000.3e2f5b8c
      vmf registervm web.toml --name web2
    """
    from vmf.directories import absolute

    config = home().register(absolute(path), name)
    say(f"Machine '{config.name}' is registered (UUID {config.uuid}).")


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
