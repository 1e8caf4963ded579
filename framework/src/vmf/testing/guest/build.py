"""Assemble the built-in guest: `python build.py [demo.bin]` beside demo.S, with GNU as, ld and objcopy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("demo.S")
LOAD_ADDRESS = 0x100000


def build(source: Path = SOURCE, *defined: str) -> bytes:
    """The flat image, with these symbols defined.

    Raises FileNotFoundError without binutils, CalledProcessError with as's complaints.
    """
    symbols = " ".join(f"--defsym {name}=1" for name in defined)
    with tempfile.TemporaryDirectory(prefix="vmf-guest-") as folder:
        made = Path(folder)
        for command in (
            f"as --64 {symbols} -o {made}/demo.o {source}",
            f"ld -m elf_x86_64 -nostdlib --build-id=none -Ttext={LOAD_ADDRESS:#x} -o {made}/demo.elf {made}/demo.o",
            f"objcopy -O binary -j .text {made}/demo.elf {made}/demo.bin",
        ):
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        return (made / "demo.bin").read_bytes()


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else SOURCE.with_suffix(".bin")).write_bytes(build())
