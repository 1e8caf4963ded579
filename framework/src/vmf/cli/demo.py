"""demo: a teleport to watch.

Two hosts (state directories with machine processes of their own) on this computer, one guest. What the two consoles
show is drawn side by side on a terminal and printed as prefixed lines elsewhere; at the end the guest's own count is
checked: no number may be missing or doubled.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.common import Seconds, duration, say
from vmf.errors import MachineError, VmfError

if TYPE_CHECKING:
    from vmf.machine.config import MachineConfig
    from vmf.testing.hosts import Host

MACHINE = "traveller"
TICK = re.compile(rb"^tick (\d+) ", re.MULTILINE)

LINUX_COMMAND = """
echo "$(uname -sr): up after $(cut -d' ' -f1 /proc/uptime) s"
i=0
while true; do
    i=$((i+1))
    read up idle < /proc/uptime
    echo "tick $i  uptime $up s  $(date +%H:%M:%S)"
    sleep 0.2
done
"""


@click.command()
@click.option(
    "--guest", type=click.Choice(["auto", "linux", "builtin"]), default="auto", show_default=True, help="What to boot."
)
@click.option("--hops", type=click.IntRange(1, 1000), default=2, show_default=True, help="How often it teleports.")
@click.option("--stay", type=Seconds(min=0), default=3.0, show_default=True, help="Seconds that it stays at each host.")
@click.option("--cpu-backend", default="auto", show_default=True, help="Of both hosts.")
@click.option("--memory", type=click.IntRange(32), default=128, show_default=True, help="Guest RAM in MiB.")
def demo(guest: str, hops: int, stay: float, cpu_backend: str, memory: int) -> None:
    """Watch a machine teleport between two hosts on this computer.

    The guest is Linux when a kernel is at hand or can be had from the distribution's packages, else a small guest
    that is built into vmf and checks itself.

    \b
    Examples:
      vmf demo
      vmf demo --guest builtin --hops 10 --stay 1
    """
    from vmf.testing.hosts import Host

    with tempfile.TemporaryDirectory(prefix="vmf-demo-") as scratch:
        directory = Path(scratch)
        config = _choose_guest(guest, memory, cpu_backend)
        screen = _Drawn() if sys.stdout.isatty() else _Plain()
        with Host(directory / "amber") as amber, Host(directory / "blue") as blue:
            for host in (amber, blue):
                host.define(config)
            with screen:
                summaries, output = _travel(screen, {"amber": amber, "blue": blue}, hops, stay)
    _report(summaries, output)


def _choose_guest(guest: str, memory: int, cpu_backend: str) -> MachineConfig:
    from vmf.machine.config import MachineConfig
    from vmf.testing import guests

    if guest != "builtin":
        say("demo: looking for a Linux kernel (fetched once, then kept)")
        try:
            linux = guests.linux_guest(LINUX_COMMAND)
        except FileNotFoundError as error:
            if guest == "linux":
                raise VmfError(f"No Linux guest can be had here: {error}", "Use `vmf demo --guest builtin`.") from error
            say(f"demo: no Linux guest ({error}); using the built-in one")
        else:
            say("demo: the guest is Linux, Debian's cloud kernel")
            return MachineConfig(
                name=MACHINE,
                memory_mib=max(memory, 128),
                kernel=linux.kernel,
                initrd=linux.initrd,
                cmdline=linux.cmdline,
                cpu_backend=cpu_backend,
            )
    return MachineConfig(name=MACHINE, memory_mib=memory, image=guests.builtin_guest(), cpu_backend=cpu_backend)


def _travel(
    screen: _Screen, hosts: Mapping[str, Host], hops: int, stay: float
) -> tuple[list[Mapping[str, Any]], bytes]:
    """Boot at the first host and teleport back and forth; the summaries, and all output in order."""
    summaries: list[Mapping[str, Any]] = []
    output = b""
    names = itertools.cycle(hosts)
    here = next(names)
    screen.note(f"starting the machine on host {here}")
    hosts[here].start(MACHINE)
    _watch(screen, hosts, here, lambda: TICK.search(hosts[here].output(MACHINE)) is not None, 120)
    for _ in range(hops):
        _watch(screen, hosts, here, _after(stay), stay + 1)
        there = next(names)
        screen.note(f"host {there} waits; teleporting {here} -> {there}")
        port = hosts[there].wait(MACHINE)
        summary = _teleport(screen, hosts, here, there, port)
        summaries.append(summary)
        hosts[here].wait_gone(MACHINE)
        output += hosts[here].output(MACHINE)
        screen.note(f"runs on host {there}: downtime {duration(summary['downtime_ns'])}, rounds {summary['rounds']}")
        here = there
    _watch(screen, hosts, here, _after(stay), stay + 1)
    with hosts[here].client(MACHINE) as client:
        client.power_off()
    hosts[here].wait_gone(MACHINE)
    return summaries, output + hosts[here].output(MACHINE)


def _teleport(screen: _Screen, hosts: Mapping[str, Host], here: str, there: str, port: int) -> Mapping[str, Any]:
    result: list[Mapping[str, Any]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with hosts[here].client(MACHINE) as client:
                result.append(client.teleport("127.0.0.1", port, progress=screen.progress))
        except BaseException as error:  # noqa: BLE001 - raised again on the other thread
            errors.append(error)

    thread = threading.Thread(target=run, name="teleport")
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        for name, host in hosts.items():
            screen.console(name, host.output(MACHINE))
    if errors:
        raise errors[0]
    return result[0]


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _watch(screen: _Screen, hosts: Mapping[str, Host], here: str, done: Callable[[], bool], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise MachineError(f"The guest printed nothing within {timeout:.0f} s on host {here}.")
        for name, host in hosts.items():
            screen.console(name, host.output(MACHINE))
        time.sleep(0.05)


def _report(summaries: list[Mapping[str, Any]], output: bytes) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("hop", "rounds", "moved", "downtime", "total time", title="Teleports")
    for number, summary in enumerate(summaries, 1):
        table.add_row(
            str(number),
            str(summary["rounds"]),
            f"{summary['bytes'] / 2**20:.1f} MiB",
            duration(summary["downtime_ns"]),
            duration(summary["total_ns"]),
        )
    Console().print(table)
    numbers = [int(number) for number in TICK.findall(output)]
    gaps = [after for before, after in itertools.pairwise(numbers) if after != before + 1]
    if not numbers or gaps or b"MISMATCH" in output:
        raise MachineError(f"The guest's count is broken: {len(numbers)} ticks, wrong after {gaps[:5]}.")
    say(
        f"The guest counted from {numbers[0]} to {numbers[-1]} "
        f"across {len(summaries)} teleports: none missing, none twice."
    )


class _Screen(ABC):
    """Where the demonstration shows itself."""

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_details: object) -> None:
        return  # nothing to clear away

    @abstractmethod
    def note(self, text: str) -> None: ...

    @abstractmethod
    def console(self, name: str, output: bytes) -> None: ...

    @abstractmethod
    def progress(self, event: Mapping[str, Any]) -> None: ...


class _Plain(_Screen):
    """Lines with the host's name in front."""

    def __init__(self) -> None:
        self._shown: dict[str, bytes] = {}

    def note(self, text: str) -> None:
        say(f"demo: {text}")

    def console(self, name: str, output: bytes) -> None:
        before = self._shown.get(name, b"")
        if not output.startswith(before):
            before = b""  # the process has started anew
        lines, _, _ = output[len(before) :].rpartition(b"\n")
        if lines:
            self._shown[name] = output[: len(before) + len(lines) + 1]
            for line in lines.split(b"\n"):
                say(f"{name:>6} | {_printable(line)}")

    def progress(self, event: Mapping[str, Any]) -> None:
        pass


class _Drawn(_Screen):
    """Two consoles side by side and the teleport below, redrawn a few times a second."""

    LINES = 14

    def __init__(self) -> None:
        from rich.live import Live

        self._consoles = {"amber": b"", "blue": b""}
        self._notes: list[str] = []
        self._event: Mapping[str, Any] = {}
        self._where = ""
        self._live = Live(get_renderable=self._draw, refresh_per_second=10)

    def __enter__(self) -> _Drawn:
        self._live.start()
        return self

    def __exit__(self, *_details: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._notes = [*self._notes[-3:], text]
        if not text.startswith("host"):
            self._event = {}

    def console(self, name: str, output: bytes) -> None:
        if output and output[-8192:] != self._consoles[name]:
            self._consoles[name] = output[-8192:]
            self._where = name

    def progress(self, event: Mapping[str, Any]) -> None:
        self._event = event

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        from vmf.cli.progress import facts

        colours = {"amber": "yellow", "blue": "bright_blue"}
        grid = Table.grid(expand=True)
        panels = []
        for name, output in self._consoles.items():
            grid.add_column(ratio=1)
            lines = [_printable(line) for line in output.rstrip(b"\n").split(b"\n")][-self.LINES :]
            text = Text("\n".join(lines), no_wrap=True, overflow="crop")
            title = f"host {name}: the guest runs here" if name == self._where else f"host {name}"
            panels.append(Panel(text, title=title, border_style=colours[name], height=self.LINES + 2))
        grid.add_row(*panels)
        line = "   ".join(f"{label} {value}".strip() for label, value in facts(self._event)) if self._event else ""
        return Group(grid, *(Text(f"  {note}", style="dim") for note in self._notes), Text(f"  {line}", style="bold"))


def _printable(line: bytes) -> str:
    return "".join(character if character.isprintable() else "" for character in line.decode("utf-8", "replace"))
