"""The lab's base: a minimal Debian with Python as an ext4 image, its kernel, and an initrd that mounts it.

Made once and kept (about a minute and a half, a third of a gigabyte):

    root.img     debootstrap's minbase, Python and kmod, the cloud kernel's modules; mounted read-only in the lab
    vmlinuz      the cloud kernel, used for the lab itself and as the guest inside
    busybox      static, for initrds
    initrd.img   busybox and the virtio modules, in the order in which they need one another
    facts.json   the versions that went in

Nothing is mounted to make it: `mkfs.ext4 -d` fills the file system from a directory. The release is the one of this
machine and the packages come from where its apt gets them, so a mirror or proxy that is set up for apt is used.
"""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

from attrs import frozen

from kvmlab import needs
from kvmlab.cache import cached, digest, entry
from kvmlab.errors import LabError, LabUnavailable
from vmf.testing.disks import built_in, module_contents
from vmf.testing.initrd import Entry, cpio

HERE = Path(__file__).resolve().parent
RECIPE = 1
"""Count up when what is built below changes."""

PACKAGES = ("busybox-static", "kmod", "python3")
KERNEL = "linux-image-cloud-amd64"
BOOT_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
)
"""What the initrd loads to reach the disks; ext4 is built in."""

NEEDLESS = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache/apt",
    "var/lib/apt/lists",
)


@frozen
class Base:
    """The base in the cache. `python` is the lab's Python, e.g. "3.11"; `kernel` its kernel's release."""

    directory: Path
    python: str
    kernel: str

    @property
    def root_image(self) -> Path:
        return self.directory / "root.img"

    @property
    def vmlinuz(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def busybox(self) -> Path:
        return self.directory / "busybox"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"


def key() -> str:
    """Names the base by what it is made from; not by the archive's day: `build --fresh` takes a kernel update."""
    return digest(RECIPE, needs.release(), PACKAGES, KERNEL, BOOT_MODULES, (HERE / "initrd-init.sh").read_text())


def is_built() -> bool:
    return entry("base", key()).is_dir()


def base(*, fresh: bool = False) -> Base:
    """The base, built when it is not in the cache. Raises LabUnavailable or LabError."""
    needs.require(base_is_built=is_built() and not fresh)
    directory = cached("base", key(), _make, fresh=fresh)
    facts: dict[str, Any] = json.loads((directory / "facts.json").read_text())
    return Base(directory, facts["python"], facts["kernel"])


def _make(directory: Path) -> None:
    root, unpacked = directory / "root", directory / "kernel"
    _download_kernel(unpacked)  # first: it fails at once when there is no network
    needs.call(
        ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", needs.release()[1], root, _mirror()],
        what="make a minimal Debian",
    )
    (modules,) = (unpacked / "lib/modules").iterdir()
    (root / "usr/lib/modules").mkdir(exist_ok=True)
    modules.rename(root / "usr/lib/modules" / modules.name)
    needs.call(["chroot", root, "depmod", modules.name], what="index the kernel's modules")
    (python,) = (path.name for path in (root / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
    _settle(root, python)
    shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), directory / "vmlinuz")
    shutil.copy(directory / "vmlinuz", root / "boot/vmlinuz")
    shutil.copy(root / "bin/busybox", directory / "busybox")
    (directory / "initrd.img").write_bytes(_initrd(root, modules.name))
    make_image(root, directory / "root.img", "vmf-lab")
    facts = {"kernel": modules.name, "python": python.removeprefix("python"), "release": needs.release()[1]}
    (directory / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(unpacked)
    shutil.rmtree(root)


def _settle(root: Path, python: str) -> None:
    """Make a booted machine of the tree: mount points, names, and the way to the project's packages."""
    for name in NEEDLESS:
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "lab").mkdir()
    (root / "etc/hostname").write_text("vmf-lab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost vmf-lab\n::1 localhost\n")
    # a .pth file and not PYTHONPATH: it also holds for children with a cleaned environment, and for `python3 -I`
    packages = root / "usr/local/lib" / python / "dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "vmf-lab.pth").write_text("/lab/site\n/lab/deps\n")


def _initrd(root: Path, kernel: str) -> bytes:
    """What mounts the root image: see initrd-init.sh."""
    entries = [
        Entry("bin", stat.S_IFDIR | 0o755),
        Entry("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes()),
        Entry("init", stat.S_IFREG | 0o755, (HERE / "initrd-init.sh").read_bytes()),
        Entry("modules", stat.S_IFDIR | 0o755),
    ]
    modules = root / "usr/lib/modules" / kernel
    without = built_in((modules / "modules.builtin").read_bytes())
    for number, name in enumerate(BOOT_MODULES):
        if name in without:
            continue
        (path,) = modules.rglob(f"{name}.ko*")
        content = module_contents(path.name, path.read_bytes())
        entries.append(Entry(f"modules/{number}-{name}.ko", stat.S_IFREG | 0o644, content))
    return cpio(entries)


def _download_kernel(target: Path) -> None:
    """Unpack the newest cloud kernel package into `target`."""
    target.mkdir()
    try:
        _apt_download_kernel(target)
    except LabError:
        # no package lists yet, or stale ones that name what the archive has replaced
        try:
            needs.call(["apt-get", "update", "-qq"], what="read the package lists")
            _apt_download_kernel(target)
        except LabError as error:
            raise LabUnavailable(error.message, "Give this machine a way to a Debian mirror.") from error
    (package,) = target.glob("*.deb")
    needs.call(["dpkg-deb", "-x", package, target], what="unpack the kernel")
    package.unlink()


def _apt_download_kernel(target: Path) -> None:
    what = "fetch the kernel"
    meta = needs.call(["apt-cache", "depends", "--important", KERNEL], what=what)
    name = next((line.split()[-1] for line in meta.splitlines() if "Depends: linux-image-" in line), KERNEL)
    needs.call(["apt-get", "download", "-o", "APT::Sandbox::User=root", name], what=what, cwd=target)


def _mirror() -> str:
    """Where apt gets this release's main component from."""
    codename = needs.release()[1]
    targets = needs.call(
        ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"], what="read apt's sources"
    )
    for line in targets.splitlines():
        fields = line.split()
        if fields[1:] == [codename, "main"]:
            return fields[0]
    raise LabUnavailable(
        f"apt has no source for {codename}'s main component.", "Add Debian's main archive to apt's sources."
    )


def make_image(tree: Path, image: Path, label: str) -> None:
    """Write an ext4 image that holds the tree and little else; it is meant to be mounted read-only."""
    used = sum(-(-path.lstat().st_size // 4096) * 4096 + 512 for path in tree.rglob("*"))
    size_mib = int(used * 1.15) // (1 << 20) + 24
    needs.call(
        ["mkfs.ext4", "-q", "-F", "-L", label, "-m", "0", "-O", "^has_journal", "-d", tree, image, f"{size_mib}M"],
        what=f"make the image {image.name}",
    )
