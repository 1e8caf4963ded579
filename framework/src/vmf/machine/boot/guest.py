"""Loading whatever the user gave as the machine's kernel."""

from __future__ import annotations

from pathlib import Path

from vmf.cpu.state import VcpuState
from vmf.errors import ConfigError
from vmf.machine.boot.bare import load_image
from vmf.machine.boot.image import identify
from vmf.machine.boot.linux import default_cmdline, load_linux
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
    """Load a Linux kernel or a bare-metal image, whichever `kernel` is; `cmdline` None means `default_cmdline()`.

    With `tell_tsc` that default also has the TSC's rate: Linux believes CPUID leaf 0x15 of an Intel CPU only. On
    others it calibrates the TSC against the 8254, which is too slow to read in a VM, and ends up counting jiffies.

    Raises ImageError for wrong files, and ConfigError when a bare-metal image is given an initrd or a command line.
    """
    if identify(kernel, "kernel").is_linux:
        if cmdline is None:
            cmdline = default_cmdline() + (f" tsc_early_khz={tsc_khz}" if tell_tsc else "")
        return load_linux(memory, kernel, initrd, cmdline, tsc_khz)
    for key, value in (("initrd", initrd), ("cmdline", cmdline)):
        if value is not None:
            raise ConfigError(
                f"{key}: {kernel} is a bare-metal image, which takes none.", f"Remove {key}, or use a Linux kernel."
            )
    return load_image(memory, kernel, tsc_khz)
