"""A guest that writes without pause, through many teleports between two hosts that share its disks.

    python benchmarks/bench_disk_stress.py [--hops 20] [--storage file|nbd] [--guest debian|small] [--seed N]

The first disk has a file system: Debian boots from it to a login prompt (`debian`), or busybox mounts it (`small`).
On it a script writes, flushes and deletes files, reads back past the page cache, and says on the console what is done.
On the second disk `diskcheck stamp` writes blocks past the page cache and says which are flushed. The machine is moved
at random moments. At the end everything that was ever acknowledged must be there, whatever was deleted must not, and
the file system must be clean without a repair. Before each teleport a thief is started on the target's host, a machine
with the same disks, which must be refused.

    --storage file   two VMF_HOMEs, the images are files that both see
    --storage nbd    two network namespaces and a third one with qemu-storage-daemon (root): a qcow2 image and a raw
                     one with their leases, which each host reaches at another address

Exits with 1 on any loss.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from common import machine_line, median, table
from vmf.control.reach import CONSOLE_LIVE, reach
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.plugins.bridge import PluginRegistry
from vmf.storage.media import lease_of
from vmf.testing import disks, guests, network
from vmf.testing.guests import LinuxGuest
from vmf.testing.hosts import Host

STAMPED_MIB = 16
SMALL_MIB = 256
BLOCK = 4096
MEMORY_MIB = {"debian": 512, "small": 128}
TOOLS = "/usr/sbin:/sbin:/usr/bin:/bin"

WORK = """\
#!/bin/sh
# Files on a file system, and blocks on /dev/vdb, as benchmarks/bench_disk_stress.py checks them.
say() { echo "$*" > /dev/ttyS0; }
diskcheck stamp /dev/vdb @BLOCKS@ | while read line; do say "$line"; done &
mkdir -p @HERE@/work
cd @HERE@/work
i=0
while [ ! -e /stop ]; do
    i=$((i+1))
    head -c $((i * 7919 % 150000 + 1)) /dev/urandom > new
    sum=$(sha256sum < new)
    sum=${sum%% *}
    mv new f$i
    echo "$sum  f$i" >> sums
    sync
    say "kept $i $sum"
    if [ $((i % 3)) = 0 ]; then
        rm f$((i-2))
        sync
        say "gone $((i-2))"
        echo 3 > /proc/sys/vm/drop_caches
        tail -n 2 sums > last
        sha256sum -c last > /dev/null 2>&1 || say "MISMATCH near f$i"
    fi
done
say "the work is done"
"""
UNIT = """\
[Unit]
Description=Writes that are checked
[Service]
ExecStart=/bin/sh /usr/local/bin/work
[Install]
WantedBy=multi-user.target
"""


def tool(name: str) -> str:
    found = shutil.which(name, path=TOOLS)
    if found is None:
        raise SystemExit(f"{name} is missing (apt install {'qemu-utils' if name.startswith('qemu') else 'e2fsprogs'})")
    return found


def debugfs(image: Path, commands: Sequence[str], *, write: bool = False) -> str:
    """Look into an ext4 image, or put something there, without mounting it."""
    script = image.with_name("debugfs.commands")
    script.write_text("\n".join(commands) + "\n")
    done = subprocess.run(
        [tool("debugfs"), *(["-w"] if write else []), "-f", str(script), str(image)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def work(here: str) -> str:
    return WORK.replace("@HERE@", here).replace("@BLOCKS@", str(STAMPED_MIB * (1 << 20) // BLOCK))


def debian(image: Path) -> LinuxGuest:
    """Debian in `image`, with the work as a service."""
    disks.copy_image(disks.debian_root().require(), image)
    checker = guests.compiled("diskcheck").require()
    script, unit = image.with_name("work"), image.with_name("work.service")
    script.write_text(work("/root"))
    unit.write_text(UNIT)
    service = "/etc/systemd/system/work.service"
    debugfs(
        image,
        [
            f"write {checker} /usr/local/bin/diskcheck",
            "set_inode_field /usr/local/bin/diskcheck mode 0100755",
            f"write {script} /usr/local/bin/work",
            f"write {unit} {service}",
            f"symlink /etc/systemd/system/multi-user.target.wants/work.service {service}",
        ],
        write=True,
    )
    return disks.root_guest()


def small(image: Path) -> LinuxGuest:
    """Busybox, with the work on an empty file system in `image`."""
    with image.open("wb") as file:
        file.truncate(SMALL_MIB << 20)
    subprocess.run([tool("mkfs.ext4"), "-q", "-F", str(image)], check=True)
    checker = guests.compiled("diskcheck").require().read_bytes()
    return disks.disk_guest(
        "mount -t ext4 /dev/vda /mnt; echo 'vmf-guest login:'; (. /bin/work) & setsid cttyhack sh",
        {"bin/diskcheck": checker, "bin/work": work("/mnt").encode()},
    )


# -- where the disks are


@contextmanager
def on_files(directory: Path, images: Sequence[Path]) -> Iterator[tuple[list[Host], list[list[str]]]]:
    """(hosts, media of each)."""
    with Host(directory / "a") as a, Host(directory / "b") as b:
        yield [a, b], [[str(image) for image in images]] * 2


@contextmanager
def on_nbd(directory: Path, images: Sequence[Path]) -> Iterator[tuple[list[Host], list[list[str]]]]:
    """As `on_files`. The first image is made qcow2 for the time being."""
    reason = network.missing()
    if reason:
        raise SystemExit(reason)
    served = directory / "served.qcow2"
    subprocess.run([tool("qemu-img"), "convert", "-O", "qcow2", str(images[0]), str(served)], check=True)
    backends: list[str] = []
    exports: list[str] = []

    def serve(name: str, path: Path, kind: str) -> None:
        backends.extend(("--blockdev", f"driver=file,filename={path},node-name=f{name}"))
        backends.extend(("--blockdev", f"driver={kind},file=f{name},node-name={name}"))
        export = name.replace("-l", ".vmf-lease")
        exports.extend(("--export", f"type=nbd,id=e{name},node-name={name},name={export},writable=on"))

    for name, path, kind in (("one", served, "qcow2"), ("two", images[1], "raw")):
        serve(name, path, kind)
        lease = directory / f"{name}.lease"
        lease.write_bytes(bytes(8192))
        serve(f"{name}-l", lease, "raw")
    with ExitStack() as stack:
        hosts = list(stack.enter_context(network.two_networked_hosts(directory)))
        prefix, addresses = stack.enter_context(network.storage_host(hosts))
        listen = ("--nbd-server", "addr.type=inet,addr.host=0.0.0.0,addr.port=10809,max-connections=0")
        ready = directory / "daemon.pid"
        daemon = subprocess.Popen(
            [*prefix, tool("qemu-storage-daemon"), *backends, *listen, *exports, "--pidfile", str(ready)]
        )
        try:
            wait(ready.exists, "the NBD server", 60)
            yield list(hosts), [[f"nbd://{address}:10809/{name}" for name in ("one", "two")] for address in addresses]
        finally:
            daemon.terminate()
            daemon.wait(60)
    subprocess.run([tool("qemu-img"), "check", "-q", str(served)], check=True)
    subprocess.run([tool("qemu-img"), "convert", "-O", "raw", str(served), str(images[0])], check=True)


def wait(condition: Callable[[], object], what: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {timeout} s")
        time.sleep(0.05)


# -- what must be there


def stamped_wrongly(image: Path, last: int) -> int:
    """How many of the blocks that `diskcheck stamp` acknowledged up to number `last` are not there."""
    count = STAMPED_MIB * (1 << 20) // BLOCK
    blocks = np.fromfile(image, dtype="<u8").reshape(count, BLOCK // 8)
    numbers = np.arange(max(0, last - count + 1), last + 1, dtype=np.uint64)
    found = blocks[numbers % count]
    state = ((found[:, 0] << np.uint64(32)) ^ found[:, 1]) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    # A later stamp that nobody heard of any more is as good.
    good = (found[:, 0] == numbers % count) & (found[:, 1] > numbers)
    for word in range(2, BLOCK // 8):
        for shift, left in ((13, True), (7, False), (17, True)):
            state ^= state << np.uint64(shift) if left else state >> np.uint64(shift)
        good &= found[:, word] == state
    return int((~good).sum())


def files_wrong(image: Path, here: str, output: str) -> tuple[int, int, list[str]]:
    """(files kept, files deleted, what is wrong), of all that the guest acknowledged."""
    kept = {int(number): digest for number, digest in re.findall(r"^kept (\d+) ([0-9a-f]{64})\r?$", output, re.M)}
    gone = {int(number) for number in re.findall(r"^gone (\d+)\r?$", output, re.M)}
    out = image.with_name("files")
    out.mkdir()
    listing = debugfs(image, [f"rdump {here}/work {out}"])
    there = {path.name: path for path in out.rglob("f*")}
    problems = [] if there else [f"no files at all: {listing}"]
    for number, digest in kept.items():
        path = there.get(f"f{number}")
        if number in gone:
            problems += [f"f{number} was deleted, and is there"] if path is not None else []
        elif path is None:
            # Its deletion may have been done, and its announcement cut off by the end.
            problems += [f"f{number} is missing"] if number + 2 < max(kept) else []
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append(f"f{number} has other content")
    return len(kept), len(gone), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hops", type=int, default=20)
    parser.add_argument("--storage", choices=["file", "nbd"], default="file")
    parser.add_argument("--guest", choices=["debian", "small"], default="debian")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--directory", type=Path, help="where the images are made; a temporary one by default")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(
        f"Writes through {options.hops} teleports, {options.guest} guest, images on {options.storage}, seed"
        f" {options.seed}. {machine_line()}.\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        directory = Path(place)
        images = [directory / "one.img", directory / "two.img"]
        guest = (debian if options.guest == "debian" else small)(images[0])
        with images[1].open("wb") as file:
            file.truncate(STAMPED_MIB << 20)
        storage = on_files if options.storage == "file" else on_nbd
        with storage(directory, images) as (hosts, media):
            run = Run(hosts, media, guest, options.guest, dice)
            output = run.through(options.hops)
            if options.storage == "file":
                leases = [lease_of(PluginRegistry(), medium) for medium in media[0]]
                ended = [f"{each.standing} at generation {each.generation}" for each in leases]
                if ended != [f"free at generation {options.hops + 1}"] * 2:
                    run.problems.append(f"leases: {ended}")
        return judge(options.guest, images, output, run)


class Run:
    """A machine that is moved back and forth.

    Attributes:
        problems: what went wrong until now.
        downtimes, totals: of each teleport, in ms.
        refused: how often a thief was.
    """

    def __init__(
        self, hosts: Sequence[Host], media: Sequence[Sequence[str]], guest: LinuxGuest, kind: str, dice: random.Random
    ) -> None:
        self._hosts = list(hosts)
        self._dice = dice
        self.problems: list[str] = []
        self.downtimes: list[float] = []
        self.totals: list[float] = []
        self.refused = 0
        for host, names in zip(hosts, media, strict=True):
            for machine in ("box", "thief"):
                host.define(
                    MachineConfig(
                        name=machine,
                        memory_mib=MEMORY_MIB[kind],
                        kernel=guest.kernel,
                        initrd=guest.initrd,
                        cmdline=f"{guest.cmdline} loglevel=4",
                        cpu_backend="unicorn",
                        devices=("pc", "virtio"),
                        drives=tuple(DriveConfig(port=port, medium=name) for port, name in enumerate(names)),
                    )
                )

    def through(self, hops: int) -> str:
        """Boot, move that often, stop the writing in good order, power off; the console's output."""
        source, target = self._hosts
        source.start("box")
        source.wait_for_output("box", b"login:", 400)
        source.wait_for_output("box", b"kept 2 ", 200)
        source.wait_for_output("box", b"stamped 20", 200)
        output = b""
        for hop in range(hops):
            self._steal(target)
            port = target.wait("box")
            time.sleep(self._dice.random())
            address = target.address if isinstance(target, network.NamespacedHost) else "127.0.0.1"
            with source.client("box") as client:
                summary = client.teleport(address, port, max_downtime_ms=500)
            self.downtimes.append(summary["downtime_ns"] / 1e6)
            self.totals.append(summary["total_ns"] / 1e6)
            source.wait_gone("box")
            output += source.output("box")
            source, target = target, source
            source.wait_for_output("box", b"kept ", 200)
            source.wait_for_output("box", b"stamped ", 200)
            print(
                f"hop {hop + 1}: downtime {self.downtimes[-1]:.1f} ms, total {self.totals[-1]:.0f} ms,"
                f" {len(re.findall(b'kept ', output))} files, {len(re.findall(b'stamped ', output))} stamps",
                flush=True,
            )
        self._end(source)
        output += source.output("box")
        return output.decode(errors="replace")

    def _steal(self, host: Host) -> None:
        done = host.vmf("startvm", "thief", "--detach", timeout=120)
        if done.returncode == 0 or "held by machine box" not in done.stderr:
            self.problems.append(f"a second machine got the disks: {done.stdout}{done.stderr}")
            host.kill("thief")
        else:
            self.refused += 1

    def _end(self, host: Host) -> None:
        with reach(host.home, "box", CONSOLE_LIVE) as console:

            def type_until(line: str, text: bytes) -> None:
                console.sendall(line.encode() + b"\r")
                host.wait_for_output("box", text, 200)

            if b"vmf-guest login: root" not in host.output("box") and b"vmf#" not in host.output("box"):
                type_until("root", b"# ")
            type_until("touch /stop", b"the work is done")
            type_until("sync; echo u > /proc/sysrq-trigger; sleep 1; echo read''only", b"readonly")
        with host.client("box") as client:
            client.power_off()
        host.wait_gone("box")


def judge(kind: str, images: Sequence[Path], output: str, run: Run) -> int:
    problems = run.problems
    problems += sorted(set(re.findall(r"^.*(?:MISMATCH|FAILED|I/O error|EXT4-fs error|BUG:|Oops).*$", output, re.M)))
    checked = subprocess.run([tool("e2fsck"), "-fn", str(images[0])], capture_output=True, text=True)
    if checked.returncode:
        problems.append(f"the file system is not clean:\n{checked.stdout}")
    kept, gone, wrong = files_wrong(images[0], "/root" if kind == "debian" else "", output)
    problems += wrong
    last = max(map(int, re.findall(r"^stamped (\d+)\r?$", output, re.M)))
    lost = stamped_wrongly(images[1], last)
    problems += [f"{lost} stamped blocks are lost"] if lost else []
    print()
    table(
        ["hops", "files kept", "deleted", "blocks stamped", "thieves refused", "downtime median ms", "max",
         "total median ms", "fsck", "problems"],
        [[len(run.totals), kept, gone, last + 1, run.refused, f"{median(run.downtimes):.1f}",
          f"{max(run.downtimes):.1f}", f"{median(run.totals):.0f}", checked.returncode, len(problems)]],
    )  # fmt: skip
    for problem in problems[:20]:
        print(problem)
    return 1 if problems or not kept or not gone else 0


if __name__ == "__main__":
    sys.exit(main())
