"""snapshot: go back to what a machine was. Each verb is a command of the group, as with controlvm."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.app import json_option
from vmf.cli.bar import Bar
from vmf.cli.common import home, machine_argument, printable, say, size, table
from vmf.errors import InvalidStateError

if TYPE_CHECKING:
    from vmf.machine.snapshot import SnapshotInfo, SnapshotStore


NEXT_START = " (the next start continues from it)"


def _store(name: str) -> SnapshotStore:
    from vmf.machine.snapshot import SnapshotStore

    where = home()
    where.load(name)
    return SnapshotStore(name, where.paths(name).snapshots)


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        name = ctx.parent.params["name"] if ctx.parent is not None else ""
        return [each for each in _store(name).names() if each.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - completion must not disturb the shell
        return []


@click.group(subcommand_metavar="VERB [OPTIONS]")
@machine_argument
@click.pass_context
def snapshot(ctx: click.Context, name: str) -> None:
    """Take, list, restore and delete snapshots of machine NAME.

    A snapshot has the machine's writable disks and, when it was not switched off, its memory and devices. A machine
    that has snapshots does not teleport: delete them before.

    \b
    Examples:
      vmf snapshot web take before-upgrade
      vmf snapshot web restore before-upgrade
    """
    ctx.obj = name


@snapshot.command()
@click.argument("label", metavar="SNAPSHOT")
@click.option("--description", metavar="TEXT", default="", help="Free text.")
@json_option
@click.pass_obj
def take(name: str, label: str, description: str, as_json: bool) -> None:
    """Take a snapshot of a machine, running or not.

    A running one stands still while it is copied: moments for its memory, and for its disks as long as copying them
    takes where the file system cannot share blocks (btrfs and XFS can). Ctrl-C, or `vmf controlvm NAME cancel` from
    elsewhere, cancels it: the machine continues, and there is no snapshot.

    \b
    Example:
      vmf snapshot web take before-upgrade --description 'clean install'
    """
    from vmf.cli.cancelling import Cancelling
    from vmf.control.client import ControlClient

    where, store = home(), _store(name)
    store.path(label)
    bar = Bar()
    try:
        if where.process(name) is None:
            from vmf.control.offline import offline
            from vmf.machine import snapshot as snapshots
            from vmf.plugins.bridge import PluginRegistry

            with (
                where.changing(name, "take a snapshot") as paths,
                offline(paths, name, f"the snapshot '{label}'") as work,
                Cancelling("snapshot", work.cancel),
            ):
                snapshots.take_stopped(where.load(name), PluginRegistry(), store, label, description, bar, work)
        else:

            def notified(method: str, content: Mapping[str, Any]) -> None:
                if method == "snapshot.progress":
                    progress = content.get("progress", {})
                    bar(str(progress.get("what")), int(progress.get("done", 0)), int(progress.get("total", 0)))

            cancelling = Cancelling.of(where, name, "snapshot", lambda machine: bool(machine.cancel_operation()))
            with ControlClient.of(where, name) as machine, cancelling:
                machine.call("snapshot", {"name": label, "description": description}, notified=notified)
    finally:
        bar.end()
    info = store.get(label)
    say(json.dumps(_plain(info), indent=2) if as_json else f"Snapshot '{label}' of machine '{name}' ({info.state}).")


@snapshot.command("list")
@json_option
@click.pass_obj
def list_snapshots(name: str, as_json: bool) -> None:
    """List the snapshots, oldest first.

    \b
    Example:
      vmf snapshot web list --json
    """
    store = _store(name)
    next_start = store.resuming()
    if as_json:
        rows = [{**_plain(each), "next_start": each.name == next_start} for each in store.list()]
        say(json.dumps(rows, indent=2))
        return
    table(
        [
            (
                each.name,
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.taken)) if each.taken else "",
                each.state,
                ", ".join(f"port {port}: {size(count)}" for port, count in each.disks.items()),
                printable(each.description) + (NEXT_START if each.name == next_start else ""),
            )
            for each in store.list()
        ],
        ("SNAPSHOT", "TAKEN", "STATE", "DISKS", "DESCRIPTION"),
    )


@snapshot.command()
@click.argument("label", metavar="SNAPSHOT", shell_complete=_complete)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def restore(name: str, label: str, yes: bool, as_json: bool) -> None:
    """Put a machine that is switched off back to a snapshot.

    What its disks hold now is lost. If the snapshot was taken while it ran, its next start continues from there.

    The whole snapshot is read and checked before anything is written. Should the restore be cut short while it writes
    (Ctrl-C, a full disk, a crash), the machine does not start until a restore has ended well.

    \b
    Example:
      vmf snapshot web restore before-upgrade
    """
    from vmf.cli.cancelling import Cancelling
    from vmf.control.offline import offline
    from vmf.machine import snapshot as snapshots
    from vmf.plugins.bridge import PluginRegistry

    where, store = home(), _store(name)
    store.get(label)
    if where.process(name) is not None:
        raise InvalidStateError(
            f"Machine '{name}' is running and cannot be put back.", f"First: vmf controlvm {name} poweroff"
        )
    if not yes:
        click.confirm(f"What the disks of machine '{name}' hold now is lost. Put it back?", abort=True, err=True)
    bar = Bar()
    try:
        with (
            where.changing(name, "restore a snapshot", "put back") as paths,
            offline(paths, name, f"putting back snapshot '{label}'") as work,
            Cancelling("restore", work.cancel),
        ):
            info = snapshots.restore(where.load(name), PluginRegistry(), store, label, bar, work)
    finally:
        bar.end()
    if as_json:
        say(json.dumps(_plain(info), indent=2))
        return
    then = "its next start continues from there" if info.has_state else "it is switched off, as it was then"
    say(f"Machine '{name}' is put back to '{label}': {then}.")


@snapshot.command()
@click.argument("label", metavar="SNAPSHOT", shell_complete=_complete)
@click.pass_obj
def delete(name: str, label: str) -> None:
    """Delete a snapshot. The machine, running or not, is not touched.

    \b
    Example:
      vmf snapshot web delete before-upgrade
    """
    where, store = home(), _store(name)
    if where.process(name) is None:
        with where.changing(name, "delete a snapshot"):
            store.delete(label)
    else:
        store.delete(label)
    say(f"Snapshot '{label}' of machine '{name}' is deleted.")


@snapshot.command("discard-state")
@click.option("--force", is_flag=True, help="Also forget that a restore was cut short: its disks are whole.")
@click.pass_obj
def discard_state(name: str, force: bool) -> None:
    """Let the next start boot instead of continuing from a snapshot; the disks stay as they are.

    To the guest it is as if the plug had been pulled when the snapshot was taken. After a restore that was cut short,
    the disks are partly written and the machine does not start; if you have replaced them yourself, --force lets it.

    \b
    Example:
      vmf snapshot web discard-state
    """
    store = _store(name)
    with home().changing(name, "discard a state", "changed"):
        if force:
            store.forget_restoring()
        store.refuse_half_restored("booted")
        done = store.forget_resume()
    say(f"The next start of machine '{name}' boots." if done else f"Machine '{name}' would have booted anyway.")


def _plain(info: SnapshotInfo) -> dict[str, Any]:
    import attrs

    return attrs.asdict(info)
