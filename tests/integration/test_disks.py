"""Machines with disks: Debian from a disk, checked I/O through teleports, resets and kills."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from vmf.errors import StateError, VmfError
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.machine.machine import Machine, wait_until
from vmf.machine.states import MachineState
from vmf.testing import disks, guests
from vmf.testing.hosts import Host

pytestmark = pytest.mark.linux

HOPS = 6
DISK_MIB = 64
_REPORT = re.compile(rb"diskcheck: (\w+) rounds=(\d+) writes=(\d+) reads=(\d+) errors=(\d+)")


def machine(guest: guests.LinuxGuest, *media: Path, name: str = "box", **more: Any) -> MachineConfig:
    return MachineConfig(
        name=name,
        memory_mib=more.pop("memory_mib", 128),
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} loglevel=4",
        cpu_backend="unicorn",
        devices=("pc", "virtio"),
        drives=tuple(DriveConfig(port=port, medium=str(medium)) for port, medium in enumerate(media)),
        **more,
    )


def diskcheck(arguments: str) -> guests.LinuxGuest:
    try:
        return disks.diskcheck_guest(arguments)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def blank(directory: Path, mib: int = DISK_MIB) -> Path:
    path = directory / "disk.img"
    with path.open("wb") as file:
        file.truncate(mib << 20)
    return path


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with Host(tmp_path / "a") as first, Host(tmp_path / "b") as second:
        yield first, second


class Screen:
    """A machine in this process, and what is on its console."""

    def __init__(self, config: MachineConfig) -> None:
        self.machine = Machine(config)
        self.output = bytearray()
        self.machine.console.add_listener(self.output.extend)

    def expect(self, text: bytes, timeout: float, start: int = 0) -> None:
        wait_until(lambda: text in self.output[start:] or self.machine.state is not MachineState.RUNNING, timeout)
        assert text in self.output[start:], self.output[-2000:].decode(errors="replace")

    def command(self, line: str, timeout: float = 60) -> str:
        """Type a command into a shell; what it printed."""
        start = len(self.output)
        self.machine.type(f"{line}; echo do''ne\r".encode())
        self.expect(b"done\r\n", timeout, start)
        return self.output[start:].decode(errors="replace").replace("\r", "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_debian_boots_from_a_disk_to_a_login_prompt(tmp_path: Path) -> None:
    root = disks.debian_root()
    if root.path is None:
        pytest.skip(root.reason)
    image = disks.copy_image(root.path, tmp_path / "root.img")
    screen = Screen(machine(disks.root_guest(), image, memory_mib=512))
    with screen.machine as debian:
        debian.start()
        screen.expect(b"login:", 240)
        debian.type(b"root\r")
        screen.expect(b"# ", 60)
        screen.command("cp -a /usr/bin /root/copy && sync")
        screen.command("echo 3 > /proc/sys/vm/drop_caches")
        assert "the same" in screen.command("diff -r /usr/bin /root/copy && echo the sa''me", 120)
        assert "0 loaded units" in screen.command("systemctl --failed --no-pager")
        assert "virtio_rng" in screen.command("cat /sys/class/misc/hw_random/rng_current")
        screen.command("echo u > /proc/sysrq-trigger; sleep 2")  # all file systems become read-only
    checked = subprocess.run(
        [shutil.which("e2fsck", path="/usr/sbin:/sbin") or "e2fsck", "-fn", str(image)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def reports(output: bytes) -> list[tuple[bytes, int, int]]:
    """(verdict, rounds, errors) of each report."""
    return [(verdict, int(rounds), int(errors)) for verdict, rounds, _, _, errors in _REPORT.findall(output)]


@pytest.mark.timeout(300)
def test_no_write_is_lost_through_teleports(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Four processes write, read, zero and discard; the machine is moved in the middle of it."""
    guest = diskcheck(f"check /dev/vda -m {DISK_MIB} -z")
    for host in hosts:
        host.define(machine(guest, blank(tmp_path)))
    source, target = hosts
    source.start("box")
    source.wait_for_output("box", b"diskcheck: ok", 120)
    for _ in range(HOPS):
        port = target.wait("box")
        time.sleep(random.random())
        with source.client("box") as client:
            client.teleport("127.0.0.1", port)
        source.wait_gone("box")
        source, target = target, source
        source.wait_for_output("box", b"diskcheck: ", 60)
    time.sleep(1.5)
    output = source.output("box")
    found = reports(output)
    assert b"MISMATCH" not in output
    assert {verdict for verdict, _, _ in found} == {b"ok"}
    assert found[-1][1] > found[0][1], "it goes on"


FILES = 150
_FILE_WORK = f"""
mount -t ext4 /dev/vda /mnt; i=0
while [ $i -lt {FILES} ]; do
    head -c 300000 /dev/urandom > /mnt/f$i; rm -f /mnt/f$((i-30)); sha256sum /mnt/f$i >> /tmp/sums; sync
    echo 3 > /proc/sys/vm/drop_caches; tail -n 5 /tmp/sums > /tmp/last; sha256sum -c -s /tmp/last || echo MISMATCH
    echo "tick $i "; i=$((i+1))
done
umount /mnt && echo unmounted
"""


@pytest.mark.timeout(300)
def test_a_file_system_is_clean_after_teleports(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Files written, synchronised, read back and deleted on ext4 while the machine moves; then fsck."""
    tools = "/usr/sbin:/sbin:/usr/bin"
    mkfs, fsck = (shutil.which(name, path=tools) for name in ("mkfs.ext4", "e2fsck"))
    if mkfs is None or fsck is None:
        pytest.skip("mkfs.ext4 is missing (apt install e2fsprogs)")
    try:
        guest = disks.disk_guest(_FILE_WORK)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    disk = blank(tmp_path)
    subprocess.run([mkfs, "-q", "-F", str(disk)], check=True)
    for host in hosts:
        host.define(machine(guest, disk))
    source, target = hosts
    source.start("box")
    source.wait_for_output("box", b"tick 3 ", 120)
    output = b""
    for _ in range(HOPS):
        port = target.wait("box")
        with source.client("box") as client:
            client.teleport("127.0.0.1", port)
        source.wait_gone("box")
        output += source.output("box")
        source, target = target, source
        time.sleep(random.random() / 2)
    if b"ended with status" not in output:
        output += source.wait_for_output("box", b"ended with status", 120)
    assert b"MISMATCH" not in output
    assert b"unmounted" in output, output[-500:]
    with source.client("box") as client:
        client.power_off()
    source.wait_gone("box")
    checked = subprocess.run([fsck, "-fn", str(disk)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_a_kill(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Every block that the guest's fsync acknowledged is there after SIGKILL of the machine's process under load."""
    blocks, disk, host = 64, blank(tmp_path, 4), hosts[0]
    host.define(machine(diskcheck(f"stamp /dev/vda {blocks}"), disk))
    host.start("box")
    host.wait_for_output("box", b"stamped 100", 120)
    host.kill("box")
    host.wait_gone("box")
    last = int(re.findall(rb"stamped (\d+)\r?\n", host.output("box"))[-1])
    host.define(machine(diskcheck(f"verify /dev/vda {blocks} {last}"), disk))
    host.start("box")
    output = host.wait_for_output("box", b"verify: ", 120)
    assert b"MISMATCH" not in output


_KEEP_FILES = """
mount -t ext4 /dev/vda /mnt; i=0
while true; do
    i=$((i+1)); head -c 100000 /dev/urandom > /mnt/new; sum=$(sha256sum < /mnt/new); mv /mnt/new /mnt/f$i; sync
    echo "kept $i ${sum%% *} "; [ $i -gt 20 ] && rm /mnt/f$((i-20))
done
"""


@pytest.mark.timeout(300)
def test_a_file_system_survives_a_kill(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """SIGKILL while files are written and deleted: the journal is replayed, and what was synchronised is there."""
    tools = "/usr/sbin:/sbin:/usr/bin:/bin"
    mkfs, fsck, debugfs = (shutil.which(name, path=tools) for name in ("mkfs.ext4", "e2fsck", "debugfs"))
    if mkfs is None or fsck is None or debugfs is None:
        pytest.skip("mkfs.ext4, e2fsck or debugfs is missing (apt install e2fsprogs)")
    try:
        guest = disks.disk_guest(_KEEP_FILES)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    disk, host = blank(tmp_path), hosts[0]
    subprocess.run([mkfs, "-q", "-F", str(disk)], check=True)
    host.define(machine(guest, disk))
    host.start("box")
    host.wait_for_output("box", b"kept 25 ", 120)
    host.kill("box")
    host.wait_gone("box")
    repaired = subprocess.run([fsck, "-fp", str(disk)], capture_output=True, text=True)
    assert repaired.returncode in (0, 1), (
        repaired.stdout
    )  # 1: the journal was replayed, or the free blocks counted anew
    checked = subprocess.run([fsck, "-fn", str(disk)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    out = tmp_path / "files"
    out.mkdir()
    subprocess.run([debugfs, "-R", f"rdump / {out}", str(disk)], check=True, capture_output=True)
    kept = re.findall(rb"kept (\d+) ([0-9a-f]{64}) ", host.output("box"))
    for number, digest in kept[-15:]:
        content = (out / f"f{int(number)}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest.decode(), f"f{int(number)} was synchronised"


@pytest.mark.timeout(300)
def test_pauses_resets_and_another_engine_under_load(tmp_path: Path) -> None:
    screen = Screen(machine(diskcheck(f"check /dev/vda -m {DISK_MIB}"), blank(tmp_path)))
    with screen.machine as box:
        box.start()
        screen.expect(b"diskcheck: ok", 120)
        for _ in range(20):
            box.pause()
            box.resume()
            time.sleep(0.02)
        for _ in range(3):
            box.switch_backend("unicorn")
            time.sleep(0.1)
        before = len(screen.output)
        box.reset()
        screen.expect(b"diskcheck: ok", 120, before)
        time.sleep(1)
        assert b"MISMATCH" not in screen.output
        assert b"FAILED" not in screen.output


@pytest.mark.timeout(300)
def test_read_only_media_empty_drives_entropy_and_console(tmp_path: Path) -> None:
    try:
        guest = disks.disk_guest(
            "cat /proc/partitions; for d in a b c; do echo ro vd$d $(cat /sys/block/vd$d/ro); done;"
            " head -c 11 /dev/vdb; echo; echo x > /dev/vdb; echo write $?; head -c 16 /dev/hwrng | wc -c;"
            " echo to hvc0 > /dev/hvc0; cat /sys/block/vda/serial; echo; cat /sys/block/vda/queue/write_cache"
        )
    except FileNotFoundError as error:
        pytest.skip(str(error))
    dvd = tmp_path / "dvd.iso"
    dvd.write_bytes(b"hello world".ljust(1 << 20, b"\0"))
    config = machine(guest, blank(tmp_path, 4), device_options={"virtio": {"console": True}})
    drives = (*config.drives, DriveConfig(port=1, type="dvddrive", medium=str(dvd)), DriveConfig(port=2, type="floppy"))
    screen = Screen(attrs.evolve(config, drives=drives))
    with screen.machine as box:
        box.start()
        screen.expect(b"the command ended", 120)
    text = screen.output.decode().replace("\r", "")
    assert re.search(r"\b4096 vda\n.*\b1024 vdb\n", text)
    assert "ro vda 0\nro vdb 1\nro vdc 0\n" in text
    assert "hello world\n" in text
    assert re.search(r"write [1-9]\n16\n", text)
    assert "to hvc0" in text
    assert "vmf-hdd-0\nwrite back\n" in text


@pytest.mark.timeout(300)
def test_media_are_changed_while_the_machine_runs(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """By the command, with the errors that people make; and the machine teleports with the new one."""
    look = "dd if=/dev/vdb bs=9 count=1 2>/dev/null"
    write = "dd of=/dev/vdc bs=512 conv=sync,fsync,notrunc 2>/dev/null"
    try:
        guest = disks.disk_guest(
            f'while sleep 0.2; do echo "vdb $(cat /sys/block/vdb/size) $({look}) ";'
            f' size=$(cat /sys/block/vdc/size); echo "on $size" | {write} && echo "vdc $size written"; done'
        )
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for name, sectors in (("first", 2048), ("second", 4096)):
        (tmp_path / f"{name}.iso").write_bytes(f"{name:9}".encode().ljust(512 * sectors, b"\0"))
    floppies = [tmp_path / "one.flp", tmp_path / "two.flp"]
    for floppy, sectors in zip(floppies, (2880, 5760), strict=True):
        floppy.write_bytes(bytes(512 * sectors))
    drive = DriveConfig(port=1, type="dvddrive", medium=str(tmp_path / "first.iso"))
    config = machine(guest, blank(tmp_path, 4))
    one, two = (DriveConfig(port=2, type="floppy", medium=str(floppy)) for floppy in floppies)
    source, target = hosts
    source.define(attrs.evolve(config, drives=(*config.drives, drive, one)))
    second = attrs.evolve(drive, medium=str(tmp_path / "second.iso"))
    target.define(attrs.evolve(config, drives=(*config.drives, second, two)))
    source.start("box")
    source.wait_for_output("box", b"vdb 2048 first ", 120)

    def change(port: int, medium: str) -> str:
        done = source.vmf("controlvm", "box", "change-medium", "--port", str(port), "--medium", medium)
        return done.stdout if done.returncode == 0 else done.stderr

    assert "is a hard disk" in change(0, "none")
    assert "no drive at port 7" in change(7, "none")
    assert "missing.iso" in change(1, str(tmp_path / "missing.iso"))
    source.wait_for_more("box", b"vdb 2048 first ")
    assert "no medium" in change(1, "none")
    source.wait_for_output("box", b"vdb 0 ")
    assert "second.iso in it" in change(1, str(tmp_path / "second.iso"))
    source.wait_for_output("box", b"vdb 4096 second ")
    # A floppy is written, and belongs to the machine for as long as it is in the drive.
    source.wait_for_output("box", b"vdc 2880 written")
    assert "held by machine box" in target.vmf("media", "locks", str(floppies[0])).stdout
    assert "two.flp in it" in change(2, str(floppies[1]))
    source.wait_for_output("box", b"vdc 5760 written")
    assert [floppy.read_bytes()[:8] for floppy in floppies] == [b"on 2880\n", b"on 5760\n"]
    assert "given up by machine box" in target.vmf("media", "locks", str(floppies[0])).stdout
    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    target.wait_for_output("box", b"vdb 4096 second ")
    target.wait_for_output("box", b"vdc 5760 written")


def test_a_machine_without_virtio_is_as_before() -> None:
    """No PCI in it, and the same state and description as ever."""
    box = Machine(MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest(), cpu_backend="unicorn"))
    with box:
        box.start(paused=True)
        assert box.info()["devices"] == ["pc.i8259", "pc.i8254", "pc.uart16550", "pc.cmos", "pc.control"]
        assert box.hardware.bus.port_read(0xCF8, 4) == 0xFFFF_FFFF
        assert box.hardware.bus.mmio_ranges == ()


@pytest.mark.timeout(120)
def test_storage_that_hangs_fails_the_pause_and_the_teleport_and_not_the_machine() -> None:
    config = MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest(), cpu_backend="unicorn")
    source, target = Machine(config), Machine(config)
    output = bytearray()
    source.console.add_listener(output.extend)

    def goes_on() -> bool:
        before = output.count(b"tick ")
        return wait_until(lambda: output.count(b"tick ") > before + 2, 20)

    with source, target:
        source.start()
        address = target.listen("127.0.0.1", 0)
        waiting = threading.Thread(target=target.wait_for_teleport)
        waiting.start()
        device = source.hardware.devices[-1]

        def hang() -> None:
            raise StateError("disk at port 0: 1 requests to its storage are not answered.")

        device.quiesce = hang  # type: ignore[method-assign]
        with pytest.raises(StateError, match="not answered"):
            source.pause()
        assert source.state is MachineState.RUNNING
        assert goes_on()
        with pytest.raises(VmfError, match="not answered"):
            source.teleport(address.host, address.port)
        assert source.state is MachineState.RUNNING
        assert goes_on()
        del device.quiesce
        source.teleport(address.host, address.port)
        waiting.join(30)
        assert target.state is MachineState.RUNNING
