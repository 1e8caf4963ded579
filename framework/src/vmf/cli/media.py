"""createmedium, storageattach, showmediuminfo and media: disk images, and who has them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmf.cli.app import json_option
from vmf.cli.common import home, machine_argument, printable, say, size, table
from vmf.errors import ConfigError, NotFoundError, PluginError, StorageError, VmfError

if TYPE_CHECKING:
    from vmf.machine.config import DriveConfig, MachineConfig
    from vmf.plugins.bridge import PluginRegistry
    from vmf.storage.media import LeaseView

T = TypeVar("T")
NONE = "none"
EMPTY = "emptydrive"
DISK_DEVICE = "virtio"
"""The bundled device plugin that serves drives."""


def _registry() -> PluginRegistry:
    from vmf.plugins.bridge import PluginRegistry

    return PluginRegistry(on_problem=lambda problem: click.echo(f"vmf: warning: {problem}", err=True))


def _complete_media(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Media that machines of this host have; for everything else the shell's own completion of files."""
    from click.shell_completion import CompletionItem

    try:
        from vmf.storage.media import uses

        known = {str(row["medium"]) for row in uses(home()) if row["medium"]}
        found = [CompletionItem(each) for each in sorted(known) if each.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - completion must not disturb the shell
        found = []
    return found or [CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("medium", metavar="FILE")
@click.option("--size", "size_text", required=True, metavar="N[K|M|G|T]", help="Of the disk, in powers of 1024.")
@json_option
def createmedium(medium: str, size_text: str, as_json: bool) -> None:
    """Make a new raw disk image FILE.

    It is sparse: it takes space as the guest writes. An existing file is never touched.

    \b
    Examples:
      vmf createmedium /mnt/shared/web.img --size 4G
      vmf createmedium scratch.img --size 512M
    """
    from vmf.storage.media import create, parse_size

    wanted = parse_size(size_text)
    made = create(_registry(), medium, wanted)
    say(json.dumps({"medium": made, "size": wanted}) if as_json else f"{made} is made, {size(wanted)}.")


@click.command()
@machine_argument
@click.option("--port", type=click.IntRange(0, 15), required=True, metavar="N", help="Storage port, 0 to 15.")
@click.option(
    "--type", "kind", type=click.Choice(["hdd", "dvddrive", "floppy"]), required=True, help="What the guest has there."
)
@click.option(
    "--medium",
    required=True,
    metavar="PATH|URI|none",
    shell_complete=_complete_media,
    help="Image file or URI; none takes the drive out, emptydrive leaves it without a medium.",
)
@click.option("--read-only", is_flag=True, help="The guest cannot write; a dvddrive never can.")
@json_option
def storageattach(name: str, port: int, kind: str, medium: str, read_only: bool, as_json: bool) -> None:
    """Attach an image to machine NAME, which must not be running; or take it out.

    For a teleport both machines need the same drives with the same images, each by the path that it has on its host. A
    machine without a device that serves drives gets one (virtio).

    \b
    Examples:
      vmf storageattach web --port 0 --type hdd --medium /mnt/shared/web.img
      vmf storageattach web --port 1 --type dvddrive --medium debian.iso
      vmf storageattach web --port 0 --type hdd --medium 'nbd://storage:10809/web'
      vmf storageattach web --port 0 --type hdd --medium 'file:/dev/sdb?lease=/mnt/shared/web.lease'
      vmf storageattach web --port 1 --type dvddrive --medium none
    """
    import attrs

    from vmf.machine.config import DriveConfig
    from vmf.storage.uri import absolute

    drive = None
    capacity = 0
    if medium == EMPTY and kind == "hdd":
        raise ConfigError("a hard disk is never empty.", "Name its image, or take it out with --medium none.")
    if medium != NONE:
        uri = "" if medium == EMPTY else absolute(medium)
        drive = DriveConfig(port=port, type=kind, medium=uri, read_only=read_only and kind != "dvddrive")
        capacity = _look(drive)
    added: list[str] = []

    def change(config: MachineConfig) -> MachineConfig:
        rest = [each for each in config.drives if each.port != port]
        if drive is not None:
            _require_once(name, drive, rest)
        if drive is None and len(rest) == len(config.drives):
            raise NotFoundError(f"machine '{name}' has no drive at port {port}.", f"See `vmf showvminfo {name}`.")
        devices = config.devices
        if drive is not None and DISK_DEVICE not in devices and _installed(DISK_DEVICE):
            added.append(DISK_DEVICE)
            devices = (*devices, DISK_DEVICE)
        drives = sorted([*rest, *([drive] if drive is not None else [])], key=lambda each: each.port)
        return attrs.evolve(config, drives=tuple(drives), devices=devices)

    config = home().update(name, change)
    if as_json:
        say(json.dumps({"machine": name, "drives": config.to_dict()["drives"] if config.drives else []}, indent=2))
        return
    if drive is None:
        say(f"Machine '{name}' has no drive at port {port} any more.")
    else:
        what = f"{drive.medium} ({size(capacity)})" if drive.medium else "no medium"
        access = "" if drive.writable or not drive.medium else ", read-only"
        say(f"Machine '{name}' has a {kind} at port {port}: {what}{access}.")
    for device in added:
        say(f"It got the device {device}, which serves drives.")


@click.command("change-medium")
@click.option("--port", type=click.IntRange(0, 15), required=True, metavar="N", help="Storage port, 0 to 15.")
@click.option(
    "--medium",
    required=True,
    metavar="PATH|URI|none",
    shell_complete=_complete_media,
    help="Image file or URI; none (or emptydrive) leaves the drive empty.",
)
@click.pass_obj
def change_medium(name: str, port: int, medium: str) -> None:
    """Put another DVD or floppy image into a drive of the running machine, until it ends.

    The guest has to unmount the old one first. The machine's definition keeps its medium (see `storageattach`), and so
    must that of a teleport's target be given the new one.

    \b
    Examples:
      vmf controlvm web change-medium --port 1 --medium debian-12-DVD-2.iso
      vmf controlvm web change-medium --port 1 --medium none
    """
    from vmf.control.client import ControlClient
    from vmf.storage.uri import absolute

    uri = "" if medium in (NONE, EMPTY) else absolute(medium)
    with ControlClient.of(home(), name) as machine:
        machine.change_medium(port, uri)
    what = f"{uri} in it" if uri else "no medium in it"
    say(f"The drive at port {port} of machine '{name}' has {what} now.")


def _look(drive: DriveConfig) -> int:
    """The size of the medium. Raises when it cannot be used so."""
    from vmf.storage.formats import require_raw
    from vmf.storage.media import locks_warning, probe

    if not drive.medium:
        return 0
    info = probe(_registry(), drive.medium)
    if drive.writable and not info.writable:
        raise StorageError(
            f"{drive.medium} cannot be written here: {info.why_read_only}.", "Change that, or attach it --read-only."
        )
    require_raw(info)
    if drive.writable and (warning := locks_warning(info)):
        click.echo(f"vmf: warning: {printable(warning)}", err=True)
    return info.size


def _require_once(name: str, drive: DriveConfig, others: Iterable[DriveConfig]) -> None:
    """Raise ConfigError when the machine has that image already, and could write it."""
    for other in others:
        if drive.medium and _file_of(drive.medium) == _file_of(other.medium) and (drive.writable or other.writable):
            raise ConfigError(
                f"machine '{name}' has {drive.medium} at port {other.port} already, and one of the two could write it.",
                f"Take it out there (`vmf storageattach {name} --port {other.port} --type {other.type} --medium none`),"
                f" or attach both with --read-only.",
            )


def _file_of(medium: str) -> str:
    """The same for two names of one image, as far as that can be seen without looking into it."""
    from vmf.storage.uri import file_path, scheme_of

    return os.path.realpath(file_path(medium)) if scheme_of(medium) == "file" else medium


def _all_at_once(look: Callable[[T], None], items: Sequence[T]) -> None:
    """Look at many media: storage that does not answer delays none of the others."""
    from concurrent.futures import ThreadPoolExecutor

    if items:
        with ThreadPoolExecutor(min(16, len(items)), "vmf-media") as pool:
            list(pool.map(look, items))


def _installed(name: str) -> bool:
    from vmf.plugins import discovery

    try:
        discovery.find("device", name)
    except PluginError:
        return False
    return True


@click.command()
@click.argument("medium", metavar="MEDIUM", shell_complete=_complete_media)
@json_option
def showmediuminfo(medium: str, as_json: bool) -> None:
    """Show what MEDIUM (a path or URI) is, who has it, and which machines of this host use it.

    \b
    Examples:
      vmf showmediuminfo /mnt/shared/web.img
      vmf showmediuminfo nbd://storage:10809/web --json
    """
    import attrs

    from vmf.storage.media import inspect, uses
    from vmf.storage.uri import absolute

    info, lease = inspect(_registry(), medium)
    users = [row for row in uses(home()) if row["medium"] and absolute(str(row["medium"])) == info.uri]
    if as_json:
        say(json.dumps({**attrs.asdict(info), "lease": _plain(lease), "machines": users}, indent=2))
        return
    writable = "yes" if info.writable else f"no, {info.why_read_only}"
    rows = [
        ("Medium", info.uri),
        ("Format", info.format + (f" (but it looks like a {info.looks_like} image)" if info.looks_like else "")),
        ("Where", info.where),
        ("Size", f"{size(info.size)} ({info.size} bytes)"),
        ("Takes", "" if info.allocated is None else size(info.allocated)),
        ("Writable here", writable),
        ("Lease", _lease_line(lease)),
        ("Lease kept in", lease.place),
        ("Locks", f"reach this host only, as {info.local_locks}" if info.local_locks else ""),
        *(("Machine", f"{row['machine']} ({row['state']}), port {row['port']}, {row['type']}") for row in users),
    ]
    for key, value in rows:
        if value:
            say(f"{key + ':':<16} {printable(str(value))}")


@click.group()
def media() -> None:
    """The disk images of this host's machines, and their leases.

    The lease of an image says which machine may write it, on whichever host.

    \b
    Examples:
      vmf media list
      vmf media locks
      vmf media break-lock /mnt/shared/web.img
    """


@media.command("list")
@json_option
def list_media(as_json: bool) -> None:
    """List every medium of every machine that is defined on this host.

    \b
    Example:
      vmf media list --json
    """
    from vmf.storage.media import probe, uses

    registry = _registry()
    rows: list[dict[str, Any]] = [{**row, "size": None, "problem": ""} for row in uses(home())]

    def look(entry: dict[str, Any]) -> None:
        try:
            entry["size"] = probe(registry, entry["medium"]).size
        except VmfError as error:
            entry["problem"] = error.message

    _all_at_once(look, [entry for entry in rows if entry["medium"]])
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    table(
        [
            (
                row["machine"],
                str(row["port"]),
                row["type"],
                "" if row["size"] is None else size(row["size"]),
                "read-only" if row["read_only"] else "writable",
                printable(row["medium"]) + (f"  ({printable(row['problem'])})" if row["problem"] else ""),
            )
            for row in rows
        ],
        ("MACHINE", "PORT", "TYPE", "SIZE", "ACCESS", "MEDIUM"),
    )


@media.command()
@click.argument("named", metavar="[MEDIUM]...", nargs=-1, shell_complete=_complete_media)
@json_option
def locks(named: tuple[str, ...], as_json: bool) -> None:
    """Show who holds the leases of these media; by default of all that this host's machines could write.

    \b
    Examples:
      vmf media locks
      vmf media locks /mnt/shared/web.img --json
    """
    from vmf.storage.media import LeaseView, lease_of, uses
    from vmf.storage.uri import absolute

    registry = _registry()
    wanted: Iterable[str] = named or dict.fromkeys(
        str(row["medium"]) for row in uses(home()) if row["medium"] and not row["read_only"]
    )
    found: dict[str, LeaseView] = {absolute(medium): LeaseView("", "unknown") for medium in wanted}

    def look(medium: str) -> None:
        try:
            found[medium] = lease_of(registry, medium)
        except VmfError as error:
            found[medium] = LeaseView("", "unknown", text=error.message)

    _all_at_once(look, list(found))
    if as_json:
        say(json.dumps([{"medium": medium, **_plain(lease)} for medium, lease in found.items()], indent=2))
        return
    rows = [
        (printable(medium), lease.standing, str(lease.generation or ""), _lease_line(lease))
        for medium, lease in found.items()
    ]
    table(rows, ("MEDIUM", "LEASE", "GENERATION", "WHO"))


@media.command("break-lock")
@click.argument("medium", metavar="MEDIUM", shell_complete=_complete_media)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def break_lock(medium: str, yes: bool, as_json: bool) -> None:
    """Take MEDIUM's lease from an owner that is gone for good, so that a machine here can start with it.

    Refused while the owner can be seen to live. Where it cannot be seen (a host that is cut off), look yourself: should
    the machine still run there, it finds out before its next write and stops, but two guests may have written to the
    image for a moment, which destroys its file system. What the lost machine had not yet written is lost.

    \b
    Examples:
      vmf media break-lock /mnt/shared/web.img
      vmf media break-lock /mnt/shared/web.img --yes
    """
    from vmf.storage.media import break_lease, lease_of

    registry = _registry()
    before = lease_of(registry, medium)
    if before.standing == "free":
        say(json.dumps({"broken": False, **_plain(before)}) if as_json else f"{medium} is free: {before.text}.")
        return
    if before.standing == "none":
        raise NotFoundError(f"{medium} has no lease: nobody ever used it for writing.", "There is nothing to break.")
    if not yes:
        click.echo(f"{medium}: {printable(_lease_line(before))}.", err=True)
        click.echo(
            "If that machine still runs somewhere, breaking its lease may destroy the image: two guests write to it\n"
            "until the old one notices. What a machine that is gone had not written out is lost. "
            + ("" if before.decides else "This storage has no locks, so nothing here can tell whether it lives."),
            err=True,
        )
        click.confirm("Is that machine gone for good?", abort=True, err=True)
    before = break_lease(registry, medium)
    say(
        json.dumps({"broken": True, **_plain(before)})
        if as_json
        else f"The lease of {medium} is broken; it was: {printable(before.text)}. Check its file systems."
    )


def _plain(lease: LeaseView) -> dict[str, Any]:
    import attrs

    return attrs.asdict(lease)


def _lease_line(lease: LeaseView) -> str:
    if lease.standing in ("none", "damaged", "unknown"):
        return lease.text
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.since)) if lease.since else ""
    state = ""
    if lease.standing != "free":
        state = ", alive" if lease.alive else ", which does not hold its lock any more" if lease.decides else ""
    return f"{printable(lease.text)}{state}" + (f", since {when}" if when and lease.standing != "free" else "")
