"""createvm, modifyvm, unregistervm: the definitions of machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from vmf.cli.common import F, home, machine_argument, say

NONE = "none"
"""Written for a file option, it takes the file out of the definition."""


def _complete_backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from vmf.plugins import discovery

    return [
        name
        for name in ("auto", *(entry.name for entry in discovery.installed("cpu")))
        if name.startswith(incomplete)
    ]


def _hardware_options(function: F) -> F:
    options = [
        click.option("--kernel", metavar="FILE", help="Linux kernel to boot: bzImage or vmlinux."),
        click.option("--initrd", metavar="FILE", help="Initial RAM disk for the kernel."),
        click.option("--cmdline", metavar="TEXT", help="Kernel command line (default: vmf's usual one)."),
        click.option("--image", metavar="FILE", help="Bare-metal image, flat or ELF, instead of a kernel."),
        click.option(
            "--cpu-backend",
            metavar="auto|unicorn|kvm",
            shell_complete=_complete_backends,
            help="CPU backend plugin; auto takes the fastest that works here.",
        ),
        click.option(
            "--device", "devices", multiple=True, metavar="NAME", help="Device plugin, repeatable (default: pc)."
        ),
        click.option("--description", metavar="TEXT", help="Free text; a teleport does not compare it."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--memory", type=int, required=True, metavar="MIB", help="Guest memory in MiB.")
@_hardware_options
def createvm(name: str, memory: int, **options: Any) -> None:
    """Define a new machine called NAME.

    \b
    Examples:
      vmf createvm web --memory 512 --kernel /boot/vmlinuz --initrd initrd.img
      vmf createvm tiny --memory 16 --image ticker.bin --cpu-backend unicorn
    """
    from vmf.machine.config import MachineConfig

    config = MachineConfig(name=name, memory_mib=memory, **_settings(options))
    home().create(config)
    say(f"Machine '{name}' is defined (UUID {config.uuid}).")


@click.command()
@machine_argument
@click.option("--memory", type=int, metavar="MIB", help="Guest memory in MiB.")
@_hardware_options
@click.option("--teleporter", type=click.Choice(["on", "off"]), help="Wait for a teleport when started, or boot.")
@click.option("--teleporter-port", type=int, metavar="P", help="TCP port to wait on; 0 takes a free one.")
@click.option("--teleporter-address", metavar="A", help="Address of this host to wait on (default: 0.0.0.0, all).")
@click.option("--teleporter-transport", metavar="NAME", help="Transport plugin (default: tcp).")
def modifyvm(
    name: str,
    memory: int | None,
    teleporter: str | None,
    teleporter_port: int | None,
    teleporter_address: str | None,
    teleporter_transport: str | None,
    **options: Any,
) -> None:
    """Change the definition of machine NAME, which must not be running.

    Settings that are not given stay as they are; `none` takes a file (or the command line) out.

    \b
    Examples:
      vmf modifyvm target --teleporter on --teleporter-port 6000
      vmf modifyvm target --teleporter off --memory 1024
      vmf modifyvm web --initrd none
    """
    import attrs

    from vmf.machine.config import MachineConfig

    changes = _settings(options)
    if memory is not None:
        changes["memory_mib"] = memory
    waiting: dict[str, Any] = {
        "enabled": None if teleporter is None else teleporter == "on",
        "port": teleporter_port,
        "address": teleporter_address,
        "transport": teleporter_transport,
    }
    waiting = {key: value for key, value in waiting.items() if value is not None}
    if not changes and not waiting:
        raise click.UsageError("Nothing to change: give at least one option.", click.get_current_context())
    if teleporter_transport is not None:
        _installed("transport", teleporter_transport)

    def change(config: MachineConfig) -> MachineConfig:
        return attrs.evolve(config, **changes, teleporter=attrs.evolve(config.teleporter, **waiting))

    home().update(name, change)
    say(f"Machine '{name}' is modified.")


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
            _installed("cpu", backend)
        changes["cpu_backend"] = backend
    if options["devices"]:
        for device in options["devices"]:
            _installed("device", device)
        changes["devices"] = options["devices"]
    return changes


def _file(option: str, value: str) -> Path:
    """The absolute path of a file that can be read."""
    from vmf.errors import ConfigError

    path = Path(os.path.abspath(os.path.expanduser(value)))
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


def _installed(kind: str, name: str) -> None:
    """Raise PluginError unless a plugin of that name is installed; imports none."""
    from vmf.plugins import discovery

    discovery.find(kind, name)
