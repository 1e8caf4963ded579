"""Loading whatever the user gave as the machine's kernel."""

from __future__ import annotations

from pathlib import Path

from vmf.cpu.state import VcpuState
from vmf.errors import ConfigError
from vmf.machine.boot.bare import load_image
from vmf.machine.boot.image import ImageKind, identify
from vmf.machine.boot.linux import default_cmdline, load_linux, with_clock
from vmf.machine.boot.multiboot import load_multiboot
from vmf.memory.guest import GuestMemory


def load_guest(
    memory: GuestMemory,
    kernel: Path,
    initrd: Path | None,
    cmdline: str | None,
    tsc_khz: int,
    *,
    tell_tsc: bool = False,
) -> VcpuState:
    """Load a Linux kernel, a multiboot image or a bare-metal one, whichever `kernel` is; `cmdline` None means
    `default_cmdline()` for Linux.

    Linux gets what it needs for right time in front of any command line, see `with_clock`. `tell_tsc`: the CPU that it
    sees has no way to tell it the TSC's rate.

    Raises ImageError for wrong files, and ConfigError when a bare-metal image is given an initrd or a command line.
    """
    kind = identify(kernel, "kernel")
    if kind is ImageKind.MULTIBOOT:
        return load_multiboot(memory, kernel, initrd, cmdline, tsc_khz)
    if kind.is_linux:
        told = with_clock(default_cmdline() if cmdline is None else cmdline, tsc_khz if tell_tsc else 0)
        return load_linux(memory, kernel, initrd, told, tsc_khz)
    for key, value in (("initrd", initrd), ("cmdline", cmdline)):
        if value is not None:
            raise ConfigError(
                f"{key}: {kernel} is a bare-metal image, which takes none.", f"Remove {key}, or use a Linux kernel."
            )
    return load_image(memory, kernel, tsc_khz)
