"""Loading guests straight into RAM, without firmware: Linux kernels, and bare-metal images.

Everything here is a pure function of files and a `GuestMemory`: bytes go into RAM, the vCPU's first state comes out.
RAM must be zero before (fresh, or after `GuestMemory.clear`): zero-filled parts of an image are not written, so that
they stay holes. A wrong file is always one `vmf.errors.ImageError`.

- `image`      reading files, and saying what they are
- `elf`        ELF64 program headers, and loading them from a stream or a file
- `payload`    unpacking the compressed kernel inside a bzImage
- `linux`      the Linux x86 boot protocol (64-bit entry)
- `bare`       flat and ELF bare-metal guests
- `multiboot`  32-bit ELF images with a multiboot header
- `longmode`   page tables, descriptors and registers that all of them start with
"""

from vmf.machine.boot.bare import load_image
from vmf.machine.boot.guest import load_guest
from vmf.machine.boot.image import ImageKind, identify
from vmf.machine.boot.linux import default_cmdline, load_linux, with_clock

__all__ = ["ImageKind", "default_cmdline", "identify", "load_guest", "load_image", "load_linux", "with_clock"]
