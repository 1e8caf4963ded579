"""Guests with disks, for tests and benchmarks: the kernel's virtio modules, initrds that load them, a Debian on a disk.

    guest = disk_guest("mount /dev/vda /mnt && ls /mnt")          # busybox with the disks in /dev/vd?
    guest, image = root_guest(), debian_root().require()          # Debian with systemd, copied before it is used

Everything is fetched or built once and kept in the cache of `vmf.testing.guests`. The Debian root file system needs
root, debootstrap and e2fsprogs; where they are missing, the `Found` says so.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vmf.testing import guests
from vmf.testing.guests import Found, LinuxGuest, Unavailable
from vmf.testing.initrd import initrd

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio-rng",
    "virtio_console",
)
"""In the order in which they need one another; ext4 is built in."""

ROOT_PACKAGES = ("systemd-sysv", "udev")
ROOT_MIB = 768
_RECIPE = 2
"""Count up when what is in the root file system changes."""
_DEBOOTSTRAP_SECONDS = 1800

_MOUNTS = """\
#!/bin/sh
export PATH=/bin PS1='vmf# ' HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
for module in /modules/*; do insmod $module || echo "vmf: cannot load $module"; done
mkdir -p /mnt
"""
DISK_INIT = (
    _MOUNTS
    + """\
echo "vmf: init is running"
{command}
echo "vmf: the command ended with status $?"
while true; do setsid cttyhack sh; done
"""
)
ROOT_INIT = (
    _MOUNTS
    + """\
echo "vmf: init is running"
mount -t ext4 {options} /dev/vda /mnt || exec sh
umount /proc /sys
mount --move /dev /mnt/dev
exec switch_root /mnt {program}
"""
)
"""Goes on in the root file system on the first disk."""


def kernel_release(kernel: Path) -> str:
    """The release of a bzImage, as `uname -r` has it (boot protocol, field kernel_version at 0x20E)."""
    with kernel.open("rb") as file:
        start = file.read(1 << 16)
    offset = struct.unpack_from("<H", start, 0x20E)[0] + 0x200
    return start[offset : offset + 200].split(b" ")[0].decode("ascii")


@functools.cache
def virtio_modules() -> Mapping[str, bytes]:
    """The kernel's virtio modules, by their place in an initrd. Raises FileNotFoundError with one line."""
    kernel = guests.debian_kernel().require()
    try:
        release = kernel_release(kernel)
        with guests.locked(f"modules-{release}") as folder:
            if not folder.is_dir():
                _fetch_modules(release, folder)
            return {f"modules/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    except (Unavailable, OSError, struct.error, UnicodeDecodeError) as error:
        raise FileNotFoundError(f"no modules for the kernel {kernel}: {error}") from error


def module_contents(name: str, content: bytes) -> bytes:
    """A kernel module as insmod takes it, of a file called NAME.ko, NAME.ko.xz, NAME.ko.gz or NAME.ko.zst."""
    suffix = name.rpartition(".")[2]
    if suffix == "xz":
        return lzma.decompress(content)
    if suffix == "gz":
        return gzip.decompress(content)
    if suffix == "zst":
        return guests.zstd_decompress(content)
    return content


def built_in(listing: bytes) -> frozenset[str]:
    """The names of the modules that a kernel's `modules.builtin` lists, as MODULES writes them."""
    return frozenset(Path(line).name.partition(".")[0].replace("-", "_") for line in listing.decode().split())


def _fetch_modules(release: str, folder: Path) -> None:
    """From this machine when it has that kernel, otherwise from the archive."""
    pattern = rf"({'|'.join(MODULES)})\.ko(\.xz|\.gz|\.zst)?"
    found: dict[str, bytes] = {}
    without: frozenset[str] = frozenset()

    def take(name: str, content: bytes) -> None:
        nonlocal without
        if name == "modules.builtin":
            without = built_in(content)
        else:
            found[name.partition(".")[0]] = module_contents(name, content)

    installed = Path("/lib/modules", release)
    for path in installed.glob("kernel/**/virtio*.ko*"):
        if re.fullmatch(pattern, path.name):
            take(path.name, path.read_bytes())
    if found and (installed / "modules.builtin").is_file():
        take("modules.builtin", (installed / "modules.builtin").read_bytes())
    if not found:
        deb = guests.download(f"linux-image-{release}", None)
        try:
            for name, content in guests.members_of_deb(deb, rf".*/(modules\.builtin|kernel/.*/{pattern})"):
                take(Path(name).name, content)
        finally:
            shutil.rmtree(deb.parent, ignore_errors=True)
    needed = [name for name in MODULES if name.replace("-", "_") not in without]
    missing = [name for name in needed if name not in found]
    if missing:
        raise Unavailable(f"kernel {release} comes without the module {missing[0]}")
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for number, name in enumerate(needed):
        (partial / f"{number}-{name}.ko").write_bytes(found[name])
    partial.rename(folder)


def disk_guest(command: str, files: Mapping[str, bytes] | None = None) -> LinuxGuest:
    """Busybox that loads the virtio modules and runs `command` on the console. Raises FileNotFoundError."""
    return _guest(DISK_INIT.format(command=command), files)


def diskcheck_guest(arguments: str) -> LinuxGuest:
    """`disk_guest` that runs the disk checker, see `guest/diskcheck.c` for its arguments. Raises FileNotFoundError."""
    program = guests.compiled("diskcheck").require().read_bytes()
    return disk_guest(f"/bin/diskcheck {arguments}", {"bin/diskcheck": program})


def root_guest(program: str = "/sbin/init", options: str = "") -> LinuxGuest:
    """Goes on with `program` in the root file system on the first disk. Raises FileNotFoundError.

    Args:
        options: of mount(8), e.g. "-o ro".
    """
    return _guest(ROOT_INIT.format(program=program, options=options), None)


def _guest(init: str, files: Mapping[str, bytes] | None) -> LinuxGuest:
    kernel, box = guests.debian_kernel().require(), guests.busybox().require()
    image = initrd(box.read_bytes(), init, {**virtio_modules(), **(files or {})})
    name = f"initrd-{hashlib.sha256(image).hexdigest()[:16]}"
    try:
        with guests.locked(name) as target:
            if not target.is_file():
                guests.place(target, image)
            return LinuxGuest(kernel, target)
    except Unavailable as error:
        raise FileNotFoundError(str(error)) from error


@functools.cache
def debian_root() -> Found:
    """An ext4 image with a small Debian in it (systemd, a login prompt on the console, root without password).

    It is shared: copy it before a machine writes to it (`copy_image`).
    """
    try:
        release = platform.freedesktop_os_release()
        codename = release.get("VERSION_CODENAME", "")
        with guests.locked(f"root-{_RECIPE}-{codename}.img") as target:
            if not target.is_file():
                _build_root(target, release.get("ID", ""), codename)
            return Found(target)
    except (Unavailable, OSError) as error:
        return Found(None, f"no Debian root file system: {error}")


def _build_root(target: Path, distribution: str, codename: str) -> None:
    if distribution != "debian":
        raise Unavailable(f"it is made on Debian, and this is {distribution or 'something else'}")
    if os.geteuid() != 0:
        raise Unavailable("debootstrap needs root")
    for program, package in (("debootstrap", "debootstrap"), ("mkfs.ext4", "e2fsprogs")):
        if shutil.which(program, path=_path()) is None:
            raise Unavailable(f"{program} is missing (apt install {package})")
    work = Path(tempfile.mkdtemp(prefix="vmf-root-", dir=target.parent))
    try:
        tree, image = work / "tree", work / "image"
        include = f"--include={','.join(ROOT_PACKAGES)}"
        _call(work, "debootstrap", "--variant=minbase", include, codename, str(tree), _mirror(work, codename))
        (tree / "etc/hostname").write_text("vmf-guest\n")
        (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
        passwd = (tree / "etc/passwd").read_text()
        (tree / "etc/passwd").write_text(passwd.replace("root:x:", "root::", 1))
        for needless in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(tree / needless, ignore_errors=True)
        _call(work, "mkfs.ext4", "-q", "-F", "-L", "vmf-root", "-d", str(tree), str(image), f"{ROOT_MIB}M")
        image.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _mirror(work: Path, codename: str) -> str:
    """Where apt gets this release's main component from."""
    lines = guests.run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"], work).splitlines()
    for line in lines:
        site, *rest = line.split()
        if rest == [codename, "main"]:
            return site
    raise Unavailable(f"apt has no source for {codename} main")


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _call(work: Path, program: str, *arguments: str) -> None:
    found = shutil.which(program, path=_path())
    if found is None:
        raise Unavailable(f"this machine has no {program}")
    guests.run([found, *arguments], work, _DEBOOTSTRAP_SECONDS)


def copy_image(source: Path, target: Path) -> Path:
    """A copy of an image, with its holes, sharing blocks where the file system can."""
    with tempfile.TemporaryDirectory(prefix="vmf-cp-") as folder:
        guests.run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], Path(folder))
    return target


def main() -> int:
    """Build the Debian root file system, and say where it is."""
    sys.stdout.write(f"{debian_root().require()}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
