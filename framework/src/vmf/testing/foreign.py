"""Foreign test programs in a guest and on this host's own processor.

Statically linked programs are packed into an initrd, run one after the other in a Linux guest, and compared with what
the host makes of them: exit status and output. What may differ stands in a table (TOML):

    [[difference]]
    programs = ["vsyscall", "vsyscall-32"]
    differs = ["status"]                    # "status", "output" or both
    reason = "why"

A difference that is not in the table is a failure, and so is one in the table that no longer shows. Programs whose
output is another one each time stand in tables named `varies`, with `programs` and `reason`; of them the status is
compared.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import evolve, field, frozen

from vmf.machine.config import MachineConfig
from vmf.testing import guests
from vmf.testing.hosts import Host

PROGRAM_SECONDS = 300
"""For one program in the guest, and on the host."""
GUEST_MIB = 1024
_BOOT_SECONDS = 300
_COMPARED = 1 << 16
"""Bytes of the output of which a difference is shown; compared is all of it."""
_SHOWN_LINES = 20
_NO_RESULT = -1
_SUMMARY = re.compile(rb"SUMMARY: \d+ tests(?:, (\d+) unexpected failures)?[^\n]*\n")

# The guest says "@@ NAME begin", "@@ NAME ended STATUS DIGEST", lines of a difference after "@|", and "@@ all ended".
_SCRIPT = """\
#!/bin/sh
dmesg -n 1
busybox ifconfig lo 127.0.0.1 up
cd /tmp
while read program; do
    echo "@@ $program begin"
    rm -rf /tmp/*
    (exec env -i PATH=/bin busybox timeout -s KILL {seconds} /suite/programs/$program </dev/null >/tmp/output 2>&1)
    status=$?
    digest=$(sha256sum </tmp/output | cut -d' ' -f1)
    echo "@@ $program ended $status $digest"
    if [ $digest != $(cat /suite/expected/$program.digest) ]; then
        head -c {compared} /tmp/output >/tmp/start
        busybox diff /suite/expected/$program /tmp/start | head -n {lines} | sed 's/^/@| /'
    fi
done </suite/order
echo "@@ all ended"
poweroff -f
"""


@frozen
class Outcome:
    """What a program did.

    Attributes:
        status: as a shell tells it: 128 and more for a signal. -1: it took the guest with it.
        digest: SHA-256 of its output.
        start: the output's beginning; of a guest's only how it differs from the host's.
    """

    status: int
    digest: str
    start: bytes = b""


@frozen
class Table:
    """Expected differences: what differs, by program, whose output varies, and why."""

    differs: Mapping[str, frozenset[str]] = field(factory=dict)
    varies: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(factory=dict)

    @classmethod
    def read(cls, path: Path) -> Table:
        differs: dict[str, frozenset[str]] = {}
        reasons: dict[str, str] = {}
        varies: set[str] = set()
        tables = tomllib.loads(path.read_text())
        for row in tables.get("difference", []):
            for program in row["programs"]:
                differs[program], reasons[program] = frozenset(row["differs"]), row["reason"]
        for row in tables.get("varies", []):
            varies.update(row["programs"])
            reasons |= dict.fromkeys(row["programs"], row["reason"])
        return cls(differs, frozenset(varies), reasons)

    def verdict(self, program: str, host: Outcome, guest: Outcome) -> str:
        """What is wrong, or ""."""
        found = set()
        if host.status != guest.status:
            found.add("status")
        if host.digest != guest.digest and program not in self.varies:
            found.add("output")
        expected = self.differs.get(program, frozenset())
        if unexpected := sorted(found - expected):
            told = "none, as the guest ended with it" if guest.status == _NO_RESULT else str(guest.status)
            shown = guest.start.decode(errors="backslashreplace")
            differ = " and ".join(unexpected)
            return f"{differ} differ: status {host.status} on the host, {told} in the guest\n{shown}"
        if vanished := sorted(expected - found):
            return f"{' and '.join(vanished)} should differ ({self.reasons[program]}), and do not any longer"
        return ""


def programs_in(folder: Path) -> list[Path]:
    """Its executable files, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and os.access(path, os.X_OK))


def run_on_the_host(program: Path) -> Outcome:
    """As the guest runs it: nothing on stdin, an empty environment, an empty folder."""
    with tempfile.TemporaryDirectory(prefix="vmf-foreign-") as folder, tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [program.resolve()],
                cwd=folder,
                env={"PATH": "/bin"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PROGRAM_SECONDS,
                check=False,
            )
            status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        except subprocess.TimeoutExpired:
            status = 137
        output.seek(0)
        start = output.read(_COMPARED)
        output.seek(0)
        return Outcome(status, hashlib.file_digest(output, "sha256").hexdigest(), start)


def run_in_guests(host: Host, programs: Sequence[Path], expected: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """All of them in one guest; one that ends the guest, or holds it up, has no result, and the rest get another."""
    outcomes: dict[str, Outcome] = {}
    while remaining := [program for program in programs if program.name not in outcomes]:
        found, last = _one_guest(host, remaining, expected)
        outcomes |= found
        if last is None:
            break
        outcomes.setdefault(last, Outcome(_NO_RESULT, ""))
    return outcomes


def _one_guest(
    host: Host, programs: Sequence[Path], expected: Mapping[str, Outcome]
) -> tuple[dict[str, Outcome], str | None]:
    """Outcomes, and the program in which the guest ended (None: it ended after all of them)."""
    files: dict[str, bytes] = {
        "suite/order": "".join(f"{program.name}\n" for program in programs).encode(),
        "bin/suite": _SCRIPT.format(seconds=PROGRAM_SECONDS, compared=_COMPARED, lines=_SHOWN_LINES).encode(),
    }
    for program in programs:
        files[f"suite/programs/{program.name}"] = program.read_bytes()
        files[f"suite/expected/{program.name}"] = expected[program.name].start
        files[f"suite/expected/{program.name}.digest"] = expected[program.name].digest.encode()
    guest = guests.linux_guest("/bin/suite", files)
    machine = MachineConfig(
        name="foreign",
        memory_mib=GUEST_MIB,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} quiet",
        cpu_backend="unicorn",
    )
    host.define(machine)
    host.start(machine.name)
    heard, since, length = b"", time.monotonic(), 0
    while host.pid(machine.name) is not None and b"@@ all ended" not in heard:
        time.sleep(0.2)
        heard = host.output(machine.name)
        if len(heard) != length:
            length, since = len(heard), time.monotonic()
        elif time.monotonic() - since > _BOOT_SECONDS + PROGRAM_SECONDS:
            break
    heard = host.output(machine.name)
    host.kill(machine.name)
    host.wait_gone(machine.name)
    return _read(heard)


def _read(heard: bytes) -> tuple[dict[str, Outcome], str | None]:
    outcomes: dict[str, Outcome] = {}
    current: str | None = None
    for line in heard.replace(b"\r\n", b"\n").split(b"\n"):
        if match := re.search(rb"@@ (\S+) begin$", line):
            current = match[1].decode()
        elif match := re.search(rb"@@ (\S+) ended (\d+) ([0-9a-f]{64})$", line):
            outcomes[match[1].decode()] = Outcome(int(match[2]), match[3].decode())
        elif line.startswith(b"@| ") and current in outcomes:
            outcomes[current] = evolve(outcomes[current], start=outcomes[current].start + line[3:] + b"\n")
        elif line == b"@@ all ended":
            return outcomes, None
    if current is None:
        raise RuntimeError(f"the guest did not come to its first program: ...{heard[-500:]!r}")
    return outcomes, current


def run_image(host: Host, image: Path, seconds: float) -> str:
    """Boot an image of kvm-unit-tests: "pass", "fail: N", or "no result" when it has not summed up after that time."""
    machine = MachineConfig(name="foreign", memory_mib=128, kernel=image, cmdline="", cpu_backend="unicorn")
    host.define(machine)
    host.start(machine.name)
    end = time.monotonic() + seconds
    while (found := _SUMMARY.search(host.output(machine.name))) is None and time.monotonic() < end:
        if host.pid(machine.name) is None:
            break
        time.sleep(0.1)
    host.kill(machine.name)
    host.wait_gone(machine.name)
    if found is None:
        return "no result"
    return f"fail: {int(found[1])}" if found[1] else "pass"
