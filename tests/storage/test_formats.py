"""Images that are not raw are refused before they are used, by what QEMU and packers really make."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from vmf.errors import StorageError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.storage import MachineStorage
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.formats import require_raw
from vmf.storage.uri import with_option

MIB = 1 << 20
QEMU = [
    ("qcow2", "", "qcow2"), ("qcow2", "compat=0.10", "qcow2"), ("qcow", "", "qcow"), ("qed", "", "qed"),
    ("vdi", "", "vdi"), ("vhdx", "", "vhdx"), ("vpc", "", "vhd"), ("vpc", "subformat=fixed", "vhd"),
    ("vpc", "subformat=fixed,force_size=on", "vhd"),
    ("vmdk", "", "vmdk"), ("vmdk", "subformat=streamOptimized", "vmdk"),
    ("vmdk", "subformat=monolithicFlat", "vmdk"), ("parallels", "", "parallels"), ("raw", "", ""),
]  # fmt: skip


def padded(path: Path) -> Path:
    """The file as a whole number of sectors, as block devices and servers have it."""
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 512) * 512)
    return path


def found(path: Path) -> str:
    return PluginRegistry().storage("file").probe(str(path)).looks_like


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed (Debian: apt install qemu-utils)")
@pytest.mark.parametrize(("kind", "options", "name"), QEMU)
def test_what_qemu_makes(tmp_path: Path, kind: str, options: str, name: str) -> None:
    image = tmp_path / "disk"
    more = ["-o", options] if options else []
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *more, image, "4M"], check=True, timeout=60)
    assert found(padded(image)) == name


def test_what_packers_make(tmp_path: Path) -> None:
    disk = bytes(MIB)
    made = {"gzip": gzip.compress(disk), "xz": lzma.compress(disk), "bzip2": bz2.compress(disk)}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("disk.img", disk)
    for tool in ("zstd", "lz4"):
        if shutil.which(tool):
            subprocess.run([tool, "-q", "-c"], input=disk, stdout=(tmp_path / tool).open("wb"), check=True, timeout=60)
    for path in list(tmp_path.iterdir()):
        assert found(padded(path)) == path.name


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (bytes(4096 - 511) + b"conectix".ljust(511), "vhd"),
        (bytes(4096 - 512) + b"koly".ljust(512), "dmg"),
        (b"\n# disk DescriptorFile\r\nversion=1\n".ljust(4096), "vmdk"),
        (b"box.ovf".ljust(257, b"\0") + b"ustar".ljust(4096 - 257, b"\0"), "OVA"),
        (b"notes.txt".ljust(257, b"\0") + b"ustar".ljust(4096 - 257, b"\0"), ""),
        (b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"), ""),
        (b"\xeb\x63\x90".ljust(510, b"\0") + b"\x55\xaa" + bytes(3584), ""),
        (bytes(1024 + 56) + b"\x53\xef" + bytes(4096 - 1082), ""),
    ],
    ids=["vhd of 2003", "dmg", "vmdk text", "ova", "tar", "luks", "mbr", "ext4"],
)
def test_marks(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "disk").write_bytes(content)
    assert found(tmp_path / "disk") == name


def test_the_remedies_name_this_very_file(tmp_path: Path) -> None:
    image = tmp_path / "a 'web' disk.gz"
    image.write_bytes(gzip.compress(bytes(MIB)))
    info = PluginRegistry().storage("file").probe(str(padded(image)))
    with pytest.raises(StorageError) as caught:
        require_raw(info)
    command = caught.value.remedy.split("`")[1]
    assert shlex.split(command) == ["gunzip", str(image)]
    assert not PluginRegistry().storage("file").probe(with_option(str(image), "format", "raw")).looks_like


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(MIB, b"\0"))
    return path


def storage(medium: str | Path, kind: str = "hdd", *, read_only: bool = False) -> MachineStorage:
    drive = DriveConfig(port=0, type=kind, medium=str(medium), read_only=read_only)
    return MachineStorage(MachineConfig(name="m", memory_mib=16, drives=(drive,)), PluginRegistry(), lambda _: None)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_start_refuses_it(disk: Path, read_only: bool) -> None:
    """Also one that a hand wrote into the definition, or that was converted after it was attached."""
    with pytest.raises(StorageError, match="looks like a qcow2 image"):
        storage(disk, read_only=read_only).open()
    assert not Path(f"{disk}.vmf-lease").exists()
    machine = storage(with_option(str(disk), "format", "raw"), read_only=read_only)
    machine.open()
    machine.close()


def test_what_a_guest_wrote_changes_nothing(disk: Path) -> None:
    """A disk that a machine has used stays the raw disk that it is, whatever stands in it."""
    disk.write_bytes(bytes(MIB))
    machine = storage(disk)
    machine.open()
    machine.drives[0].writev(0, [memoryview(b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))])
    machine.close()
    again = storage(disk)
    again.open()
    block = bytearray(512)
    again.drives[0].readv(0, [memoryview(block)])
    assert block.startswith(b"QFI\xfb")
    again.close()
    with pytest.raises(StorageError, match="looks like a qcow2 image"):
        storage(disk, read_only=True).open()


def test_a_changed_medium_is_looked_at(tmp_path: Path) -> None:
    packed = tmp_path / "debian.iso.gz"
    packed.write_bytes(gzip.compress(bytes(MIB)))
    machine = storage("", "dvddrive")
    machine.open()
    with pytest.raises(StorageError, match="looks like a gzip image"):
        machine.change_medium(0, str(padded(packed)), lambda drive, exchange: exchange())
    assert not machine.drives[0].attached
    machine.close()
