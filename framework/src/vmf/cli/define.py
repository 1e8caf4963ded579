"""createvm, modifyvm: the definitions of machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.common import MEBIBYTES, NONE, F, home, installed, machine_argument, say
from vmf.cli.teleporter import apply, prepare, take, teleporter_options

if TYPE_CHECKING:
    from vmf.machine.config import CpuidConfig


def complete_backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: auto and the installed CPU backends."""
    from vmf.plugins import discovery

    return [
        name for name in ("auto", *(entry.name for entry in discovery.installed("cpu"))) if name.startswith(incomplete)
    ]


def _hardware_options(function: F) -> F:
    options = [
        click.option("--kernel", metavar="FILE", help="Linux kernel (bzImage or vmlinux) or multiboot image to boot."),
        click.option("--initrd", metavar="FILE", help="Initial RAM disk for the kernel."),
        click.option("--cmdline", metavar="TEXT", help="Kernel command line (default: vmf's usual one)."),
        click.option("--image", metavar="FILE", help="Bare-metal image, flat or ELF, instead of a kernel."),
        click.option(
            "--cpu-backend",
            metavar="auto|unicorn|kvm",
            shell_complete=complete_backends,
            help="CPU backend plugin; auto takes the fastest that works here and honours the machine's CPUID settings.",
        ),
        click.option(
            "--device", "devices", multiple=True, metavar="NAME", help="Device plugin, repeatable (default: pc)."
        ),
        click.option("--description", metavar="TEXT", help="Free text; a teleport does not compare it."),
        click.option(
            "--cpuid-portability-level",
            metavar="N|auto|PROFILE",
            help="How much of the CPU the guest sees: 0 (all) to 4 (any x86-64), or what the peers have in common.",
        ),
        click.option(
            "--cpuid-set",
            multiple=True,
            metavar="FEATURE",
            help="CPU feature to add to the level; none clears the list.",
        ),
        click.option(
            "--cpuid-remove",
            multiple=True,
            metavar="FEATURE",
            help="CPU feature to leave out; none clears the list.",
        ),
        click.option(
            "--cpuid-vendor",
            metavar="VENDOR",
            help="CPU vendor that the guest sees, as AuthenticAMD; none for the CPU backend's own.",
        ),
        click.option(
            "--teleport-peer",
            "teleport_peers",
            multiple=True,
            metavar="HOST:PORT",
            help="Host to ask before the guest starts, so that it can teleport there; none clears the list.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--memory", type=MEBIBYTES, required=True, help="Guest memory in MiB, or with a unit: 512M, 1G.")
@_hardware_options
@teleporter_options
def createvm(name: str, memory: int, **options: Any) -> None:
    """Define a new machine called NAME.

    \b
    Examples:
      vmf createvm web --memory 512 --kernel /boot/vmlinuz --initrd initrd.img
      vmf createvm tiny --memory 16 --image ticker.bin --cpu-backend unicorn
      vmf createvm db --memory 512 --kernel vmlinuz --cpuid-portability-level auto --teleport-peer other:6000
    """
    from vmf.machine.config import CpuidConfig, MachineConfig, TeleporterConfig

    waiting = take(options)
    settings, cpuid = _settings(options), _cpuid(CpuidConfig(), options)
    teleporter = apply(prepare(waiting), TeleporterConfig())
    config = MachineConfig(name=name, memory_mib=memory, cpuid=cpuid, teleporter=teleporter, **settings)
    aside = home().create(config)
    say(f"Machine '{name}' is defined (UUID {config.uuid}).")
    if aside is not None:
        say(f"What an earlier machine '{name}' had left there is in {aside}.")


@click.command()
@machine_argument
@click.option("--memory", type=MEBIBYTES, help="Guest memory in MiB, or with a unit: 512M, 1G.")
@click.option(
    "--uuid",
    type=click.Choice(["new", "keep"]),
    help="Of a machine whose directory was copied: new makes it a machine of its own, keep says that the other one is "
    "gone and this is the machine now.",
)
@_hardware_options
@teleporter_options
def modifyvm(name: str, memory: int | None, uuid: str | None, **options: Any) -> None:
    """Change the definition of machine NAME, which must not be running.

    Settings that are not given stay as they are; `none` takes a file (or the command line) out. --cpuid-set,
    --cpuid-remove, --teleport-peer and --teleporter-allow add to what is there; their `none` clears it first.

    \b
    Examples:
      vmf modifyvm target --teleporter on --teleporter-port 6000
      vmf modifyvm target --teleporter off --memory 1024
      vmf modifyvm target --teleporter-transport tls --teleporter-allow otherhost
      vmf modifyvm target --teleporter-password-file stdin
      vmf modifyvm web --initrd none
      vmf modifyvm web --cpuid-portability-level 3 --cpuid-set aes
      vmf modifyvm web --teleport-peer none --cpuid-portability-level 0
      vmf modifyvm copy-of-web --uuid new
    """
    import attrs

    from vmf.machine.config import MachineConfig

    changes = _settings(options)
    if memory is not None:
        changes["memory_mib"] = memory
    waiting = take(options)
    nothing = not changes and not waiting and not any(options[key] for key in _CPUID_OPTIONS)
    if uuid is not None:
        config = home().reidentify(name, new=uuid == "new")
        say(f"Machine '{name}' has the UUID {config.uuid}.")
        if nothing:
            return
    if nothing:
        raise click.UsageError("Nothing to change: give at least one option.", click.get_current_context())
    prepared = prepare(waiting)

    def change(config: MachineConfig) -> MachineConfig:
        teleporter = apply(prepared, config.teleporter)
        return attrs.evolve(config, **changes, teleporter=teleporter, cpuid=_cpuid(config.cpuid, options))

    home().update(name, change)
    say(f"Machine '{name}' is modified.")


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of MachineConfig from the options that were given."""
    changes: dict[str, Any] = {}
    for key in ("kernel", "initrd", "image"):
        if options[key] is not None:
            changes[key] = None if options[key] == NONE else _file(f"--{key}", options[key])
    if options["cmdline"] is not None:
        changes["cmdline"] = None if options["cmdline"] == NONE else options["cmdline"]
    if options["description"] is not None:
        changes["description"] = options["description"]
    if (backend := options["cpu_backend"]) is not None:
        if backend != "auto":
            installed("cpu", backend)
        changes["cpu_backend"] = backend
    if options["devices"]:
        for device in options["devices"]:
            installed("device", device)
        changes["devices"] = options["devices"]
    return changes


_CPUID_OPTIONS = ("cpuid_portability_level", "cpuid_set", "cpuid_remove", "cpuid_vendor", "teleport_peers")


def _cpuid(old: CpuidConfig, options: dict[str, Any]) -> CpuidConfig:
    """The section `cpuid` with the options that were given."""
    import attrs

    def more(before: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
        kept = () if NONE in given else before
        return tuple(dict.fromkeys([*kept, *(each for each in given if each != NONE)]))

    added, removed = options["cpuid_set"], options["cpuid_remove"]
    level, vendor = options["cpuid_portability_level"], options["cpuid_vendor"]
    return attrs.evolve(
        old,
        portability_level=old.portability_level if level is None else level,
        # The newer word holds: what is set now is not removed any more, and the other way round.
        set=more(tuple(each for each in old.set if each not in removed), added),
        remove=more(tuple(each for each in old.remove if each not in added), removed),
        peers=more(old.peers, options["teleport_peers"]),
        vendor=old.vendor if vendor is None else "" if vendor == NONE else vendor,
    )


def _file(option: str, value: str) -> Path:
    """The absolute path of a file that can be read."""
    from vmf.directories import absolute
    from vmf.errors import ConfigError

    path = absolute(value)
    reason = ""
    if not path.exists():
        reason = "there is no such file"
    elif not path.is_file():
        reason = "it is not a regular file"
    elif not os.access(path, os.R_OK):
        reason = "you may not read it"
    if reason:
        raise ConfigError(f"{option} {value}: {reason} ({path}).", "Give the path of a file that you can read.")
    return path
