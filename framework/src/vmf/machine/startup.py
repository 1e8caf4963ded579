"""What a machine starts with: its kernel, initrd, command line or bare-metal image."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vmf.errors import ImageError
from vmf.machine import boot
from vmf.memory.guest import GuestMemory
from vmf.reading import open_regular

if TYPE_CHECKING:
    from vmf.cpu.state import VcpuState
    from vmf.machine.config import MachineConfig


class Startup:
    """The images of one machine's definition. Reads them anew at every start, as a reset does."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._digests: dict[tuple[str, int, int], str] = {}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the images and the command line, by option name. Raises ImageError."""
        config = self._config
        digests = {
            key: self._digest(path)
            for key in ("kernel", "initrd", "image")
            if (path := getattr(config, key)) is not None
        }
        if config.kernel is not None:
            digests["cmdline"] = config.cmdline or boot.default_cmdline()
        return digests

    def _digest(self, path: Path) -> str:
        """Known for as long as the file's time and size stay."""
        try:
            status = path.stat()
            key = (str(path), status.st_mtime_ns, status.st_size)
            if key not in self._digests:
                with open_regular(path) as file:
                    self._digests[key] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            return self._digests[key]
        except OSError as error:
            raise ImageError(
                f"cannot read {path}: {error.strerror}.",
                f"Put it back, or change machine {self._config.name} with modifyvm.",
            ) from error

    def load(self, memory: GuestMemory, tsc_khz: int, *, vendor: str) -> VcpuState:
        """Put them into RAM; the state of the vCPU before its first instruction. Raises ImageError."""
        config = self._config
        if config.kernel is not None:
            if boot.identify(config.kernel, "kernel") is boot.ImageKind.FLAT:
                raise ImageError(
                    f"kernel {config.kernel} is neither a Linux kernel nor an ELF image.",
                    f"Give a bzImage or vmlinux; a flat bare-metal image is started with "
                    f"`vmf modifyvm {config.name} --image FILE`.",
                )
            return boot.load_guest(
                memory,
                config.kernel,
                config.initrd,
                config.cmdline or None,
                tsc_khz,
                tell_tsc=vendor != "GenuineIntel",  # which Linux asks for it by CPUID
            )
        if config.image is not None:
            return boot.load_image(memory, config.image, tsc_khz)
        raise ImageError(
            f"machine {config.name} has nothing to start.",
            f"Give it a kernel with `vmf modifyvm {config.name} --kernel FILE`.",
        )
