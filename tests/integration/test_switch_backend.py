"""Live switch of the CPU backend, and traces: the self-checking guest goes on without a mismatch."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from vmf.cpu.backend import Availability, CpuBackend, Vcpu, VcpuEnvironment
from vmf.cpu.state import VcpuState
from vmf.cpuid.contract import without
from vmf.cpuid.table import CpuidTable
from vmf.errors import (
    BackendUnavailable,
    InvalidStateError,
    MachineError,
    PluginError,
    StateError,
    TeleportBlocked,
)
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.machine.machine import Machine, MachineState, wait_until
from vmf.testing.guest.build import SOURCE, build
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check


class Run:
    """A machine and everything its guest said."""

    def __init__(self, config: MachineConfig) -> None:
        self.machine = Machine(config)
        self.output = bytearray()
        self.machine.console.add_listener(self.output.extend)
        self.machine.start()

    def wait_for_ticks(self, more: int, seconds: float = 30) -> None:
        wanted = self.output.count(b"tick ") + more
        assert wait_until(lambda: self.output.count(b"tick ") >= wanted, seconds), bytes(self.output[-300:])

    def check(self) -> None:
        self.wait_for_ticks(2)
        assert self.machine.state is MachineState.RUNNING
        # up to the last whole line
        report = check(bytes(self.output[: self.output.rindex(b"\n") + 1]))
        assert report.problems == ()
        assert report.ticks >= 2


@pytest.fixture
def run(builtin: MachineConfig) -> Iterator[Run]:
    started = Run(builtin)
    with started.machine:
        started.wait_for_ticks(1)
        yield started


@pytest.fixture
def on_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The guest without SSE on this host's KVM, which may be one that emulates ring 0."""
    monkeypatch.setenv("VMF_KVM_TRUST", "1")
    image = tmp_path / "integer.bin"
    try:
        image.write_bytes(build(SOURCE, "INTEGER_ONLY"))
    except FileNotFoundError as error:
        pytest.skip(f"no binutils here: {error}")
    config = MachineConfig(
        name="box", memory_mib=32, image=image, cpu_backend="kvm", cpuid=CpuidConfig(portability_level="3")
    )
    try:
        started = Run(config)
    except (BackendUnavailable, PluginError) as error:
        pytest.skip(f"no KVM here: {error}")
    with started.machine:
        started.wait_for_ticks(1)
        yield started


def tsc(machine: Machine) -> int:
    hardware = machine.hardware
    return hardware.thread.call(lambda: hardware.vcpu.read_tsc())


class Clocks:
    """A guest's clock, in ns, beside the host's: `check` says whether both have counted the same since."""

    def __init__(self, guest: Callable[[], int]) -> None:
        self._guest = guest
        self._first = self._read()

    def _read(self) -> tuple[int, int, int]:
        before = time.monotonic_ns()
        return before, self._guest(), time.monotonic_ns()

    def check(self) -> None:
        """However long the readings took. A TSC's rate is known to some parts in a million."""
        (begun, first, begun_late), (ended, last, ended_late) = self._first, self._read()
        slack = (ended_late - begun) // 1000
        assert ended - begun_late - slack <= last - first <= ended_late - begun + slack


# -- switching


def test_a_fresh_vcpu_at_random_instants(run: Run) -> None:
    random.seed(3)
    for _ in range(25):
        time.sleep(random.random() * 0.03)
        summary = run.machine.switch_backend("unicorn")
        assert (summary.before, summary.after) == ("unicorn", "unicorn")
        assert 0 < summary.stopped_ns <= summary.total_ns
    run.check()


def test_guest_time_goes_on(run: Run) -> None:
    machine = run.machine
    khz = machine.hardware.tsc_khz
    clocks = [Clocks(machine.hardware.clock.now), Clocks(lambda: tsc(machine) * 1_000_000 // khz)]
    for _ in range(10):
        machine.switch_backend("unicorn")
    for each in clocks:
        each.check()


def test_a_paused_machine_is_switched_and_stays_paused(run: Run) -> None:
    machine = run.machine
    machine.pause()
    said, guest = len(run.output), machine.hardware.clock.now()
    for _ in range(3):
        machine.switch_backend("unicorn")
    time.sleep(0.3)
    assert machine.state is MachineState.PAUSED
    assert (len(run.output), machine.hardware.clock.now()) == (said, guest)
    machine.resume()
    run.check()


def test_a_switched_machine_resets_and_powers_off(run: Run) -> None:
    run.machine.switch_backend("unicorn")
    run.machine.reset()
    assert wait_until(lambda: run.output.count(b"tick 1 ") == 2, 30)
    run.machine.power_off()
    with pytest.raises(InvalidStateError, match="poweredoff"):
        run.machine.switch_backend("unicorn")


def test_a_backend_that_is_not_there(run: Run) -> None:
    with pytest.raises(PluginError, match="nosuch"):
        run.machine.switch_backend("nosuch")
    run.check()


def test_auto_takes_one_that_suits(run: Run) -> None:
    assert run.machine.switch_backend("auto").after in ("unicorn", "kvm")
    run.check()


class Odd(CpuBackend):
    """Unicorn under another name, with something wrong about it."""

    name = "odd"

    def __init__(self, real: CpuBackend) -> None:
        self.real = real
        self.capability = real.cpuid_capability()
        self.khz = real.tsc_khz()
        self.spoil: Callable[[Vcpu], None] = lambda vcpu: None
        self.made: list[Vcpu] = []

    def availability(self) -> Availability:
        return Availability(True)

    def cpuid_capability(self) -> CpuidTable:
        return self.capability

    def tsc_khz(self) -> int:
        return self.khz

    def create_vcpu(self, environment: VcpuEnvironment) -> Vcpu:
        vcpu = self.real.create_vcpu(environment)
        self.made.append(vcpu)
        self.spoil(vcpu)
        return vcpu


@pytest.fixture
def odd(run: Run, monkeypatch: pytest.MonkeyPatch) -> Odd:
    registry = run.machine.registry
    backend = Odd(registry.cpu_backend("unicorn"))
    monkeypatch.setattr(registry, "cpu_backend", lambda name: backend)
    monkeypatch.setattr(registry, "cpu_backends", lambda: [backend])
    return backend


def test_everything_that_stands_against_it_is_said_at_once(run: Run, odd: Odd) -> None:
    odd.capability = without(without(odd.capability, "sse4_2"), "popcnt")
    odd.khz = 1_000_000
    with pytest.raises(TeleportBlocked) as caught:
        run.machine.switch_backend("odd")
    fields = " ".join(blocker.field for blocker in caught.value.blockers)
    for word in ("sse4_2", "popcnt", "TSC"):
        assert word in fields
    assert "unicorn" in str(caught.value)
    assert odd.made == []
    assert run.machine.info()["cpu_backend_used"] == "unicorn"
    run.check()


def _refuses(vcpu: Any) -> None:
    def restore(state: VcpuState) -> None:
        raise StateError("vCPU state: tr is not to this engine's liking.")

    vcpu.restore = restore


def _breaks(vcpu: Any) -> None:
    def restore(state: VcpuState) -> None:
        raise RuntimeError("out of order")

    vcpu.restore = restore


def _lies(vcpu: Any) -> None:
    real = vcpu.restore
    vcpu.restore = lambda state: real(evolve(state, registers={**state.registers, "r9": state.registers["r9"] ^ 1}))


def _cannot_be_made(vcpu: Any) -> None:
    raise BackendUnavailable("no more of these.")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (_refuses, StateError, "liking"),
        (_breaks, RuntimeError, "order"),
        (_lies, StateError, "took up r9"),
        (_cannot_be_made, BackendUnavailable, "no more"),
    ],
)
def test_after_a_failure_the_machine_goes_on_as_before(
    run: Run, odd: Odd, spoil: Callable[[Vcpu], None], error: type[Exception], words: str
) -> None:
    before = run.machine.hardware.vcpu
    odd.spoil = spoil
    with pytest.raises(error, match=words):
        run.machine.switch_backend("odd")
    assert run.machine.hardware.vcpu is before
    assert run.machine.info()["cpu_backend_used"] == "unicorn"
    run.check()
    odd.spoil = lambda vcpu: None
    assert run.machine.switch_backend("odd").after == "odd"
    assert run.machine.info()["cpu_backend_used"] == "odd"
    run.check()


def test_a_state_that_must_wait_for_another_instant(run: Run, odd: Odd) -> None:
    """The guest goes on between the attempts."""

    def spoil(vcpu: Any) -> None:
        real, attempts = vcpu.restore, iter(range(100))

        def restore(state: VcpuState) -> None:
            if next(attempts) < 3:
                raise StateError("vCPU state: half delivered.")
            real(state)

        vcpu.restore = restore

    odd.spoil = spoil
    assert run.machine.switch_backend("odd").after == "odd"
    run.check()


# -- tracing

LINE = re.compile(r" +(\d+)  ([03])  ([0-9a-f]{16})  ((?:[0-9a-f]{2} ?)+)")


def test_a_trace_for_people(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "trace.txt"
    summary = run.machine.trace(5000, file)
    assert (summary.instructions, summary.complete, summary.reason) == (5000, True, "")
    text = file.read_text()
    assert "machine box" in text.splitlines()[0]
    assert "unicorn" in text
    found = [LINE.match(line) for line in text.splitlines() if not line.startswith("#") and " -- " not in line]
    assert [int(match[1]) for match in found if match] == list(range(1, 5001))
    assert text.count(" -- interrupt 0x20") == summary.events
    assert file.stat().st_mode & 0o777 == 0o600
    run.check()


def test_a_trace_for_programs_is_a_chain(run: Run, tmp_path: Path) -> None:
    """Every instruction is where the one before leads, unless that jumps or an event comes between."""
    file = tmp_path / "trace.jsonl"
    run.machine.trace(20_000, file, json_lines=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["trace"]["machine"] == "box"
    assert lines[-1]["end"]["complete"] is True
    jumps = re.compile(r"j|call|ret|iret|loop|hlt")
    events = checked = 0
    for one, other in itertools.pairwise(lines[1:-1]):
        if "event" in one or "event" in other:
            events += 1
            continue
        if not one["text"] or jumps.match(one["text"]):
            continue
        checked += 1
        assert int(other["address"], 16) == int(one["address"], 16) + len(one["bytes"]) // 2, (one, other)
        if match := re.match(r"mov (e?[a-d]x|[er]?[sd]i), (0x[0-9a-f]+|\d+)$", one["text"]):
            assert set(one["changes"]) <= {match[1].replace("e", "r", 1) if match[1][0] == "e" else match[1]}
    assert checked > 10_000
    assert [line["number"] for line in lines if "number" in line] == list(range(1, 20_001))
    # the code is the guest's
    for line in lines[1:1000]:
        if "bytes" in line:
            code = bytes.fromhex(line["bytes"])
            assert run.machine.hardware.memory.read(int(line["address"], 16), len(code)) == code
    run.check()


def test_traces_and_switches_at_random_instants(run: Run, tmp_path: Path) -> None:
    random.seed(5)
    for _ in range(12):
        time.sleep(random.random() * 0.05)
        if random.random() < 0.7:
            wanted = random.randrange(1, 30_000)
            assert run.machine.trace(wanted, tmp_path / "t").instructions == wanted
        else:
            run.machine.switch_backend("unicorn")
    run.check()


def test_a_trace_keeps_time_and_interrupts(run: Run, tmp_path: Path) -> None:
    """While 400,000 instructions are written, the guest's clock ticks on: its interrupts come at 100 Hz."""
    machine = run.machine
    seen: list[dict[str, Any]] = []
    clocks = Clocks(machine.hardware.clock.now)
    summary = machine.trace(400_000, tmp_path / "t", progress=seen.append)
    clocks.check()
    assert summary.events > 0
    assert all(told["wanted"] == 400_000 for told in seen)
    run.check()


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_cancelled_trace_is_what_there_is(run: Run, tmp_path: Path) -> None:
    later(0.5, run.machine.cancel_trace)
    summary = run.machine.trace(10**9, tmp_path / "t")
    assert not summary.complete
    assert summary.reason == "cancelled"
    text = (tmp_path / "t").read_text()
    assert text.splitlines()[-1].startswith(f"# {summary.instructions} instructions")
    assert "ended early: cancelled" in text
    run.check()
    assert run.machine.cancel_trace() is False


def test_pause_reset_and_power_off_during_a_trace(run: Run, tmp_path: Path) -> None:
    machine = run.machine
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(machine.trace(10**9, tmp_path / "t")))
    thread.start()
    assert wait_until(lambda: machine.info()["tracing"], 10)
    for refused in (
        lambda: machine.trace(5, tmp_path / "u"),
        lambda: machine.switch_backend("unicorn"),
        lambda: machine.teleport("localhost", 1),
    ):
        with pytest.raises(InvalidStateError, match="is being traced"):
            refused()
    machine.pause()
    before = (tmp_path / "t").stat().st_size
    time.sleep(0.5)
    machine.resume()
    machine.reset()
    assert wait_until(lambda: (tmp_path / "t").stat().st_size > before, 20)
    machine.power_off()
    thread.join(30)
    assert not result[0].complete
    assert "powered off" in result[0].reason


def test_files_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none" / "t", tmp_path, tmp_path / "fifo"):
        with pytest.raises(MachineError, match=re.escape(str(path))):
            run.machine.trace(10, path)
    if Path("/dev/full").exists():
        with pytest.raises(MachineError, match="No space left"):
            run.machine.trace(100_000, "/dev/full")
    assert run.machine.info()["tracing"] is False
    run.check()


def test_a_machine_that_does_not_run_is_not_traced(run: Run, tmp_path: Path) -> None:
    run.machine.pause()
    with pytest.raises(InvalidStateError, match="running"):
        run.machine.trace(10, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_no_backend_can_trace(run: Run, odd: Odd, tmp_path: Path) -> None:
    run.machine.switch_backend("odd")
    with pytest.raises(BackendUnavailable, match="cannot trace"):
        run.machine.trace(10, tmp_path / "t")
    run.check()


def test_a_way_back_that_is_barred_leaves_the_machine_running(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vcpu: Any = run.machine.hardware.vcpu
    monkeypatch.setattr(vcpu, "restore", lambda state: (_ for _ in ()).throw(StateError("not now.")))
    with pytest.raises(MachineError, match="cannot go back"):
        run.machine.trace(100, tmp_path / "t")
    run.check()


# -- KVM


def test_kvm_to_unicorn_and_back_at_random_instants(on_kvm: Run) -> None:
    random.seed(7)
    for move in range(20):
        time.sleep(random.random() * 0.1)
        wanted = ("unicorn", "kvm")[move % 2]
        summary = on_kvm.machine.switch_backend(wanted)
        assert summary.after == wanted == on_kvm.machine.info()["cpu_backend_used"]
    on_kvm.check()


def test_a_machine_on_kvm_is_traced_and_runs_on_kvm_again(on_kvm: Run, tmp_path: Path) -> None:
    for _ in range(5):
        time.sleep(random.random() * 0.1)
        summary = on_kvm.machine.trace(3000, tmp_path / "t")
        assert (summary.backend, summary.machine_backend, summary.instructions) == ("unicorn", "kvm", 3000)
        assert on_kvm.machine.info()["cpu_backend_used"] == "kvm"
    assert "the machine runs on kvm" in (tmp_path / "t").read_text()
    on_kvm.check()


# -- Linux


@pytest.mark.slow
def test_linux_under_stress_is_switched_and_traced(selfcheck: MachineConfig, tmp_path: Path) -> None:
    # loglevel=4: time goes on while the guest is slow, and the kernel warns of that ("hrtimer: interrupt took ...").
    run = Run(evolve(selfcheck, cmdline=f"{selfcheck.cmdline} loglevel=4"))
    with run.machine:
        run.wait_for_ticks(3, 120)
        random.seed(11)
        for _ in range(5):
            time.sleep(random.random() * 0.3)
            run.machine.switch_backend("unicorn")
            time.sleep(random.random() * 0.3)
            assert run.machine.trace(40_000, tmp_path / "t", json_lines=True).complete
        lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
        assert {line["cpl"] for line in lines if "cpl" in line} <= {0, 3}
        run.wait_for_ticks(4, 60)
        report = check(bytes(run.output[: run.output.rindex(b"\n") + 1]))
        assert report.problems == ()


# -- the command


def ok(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def host(tmp_path: Path, builtin: MachineConfig) -> Iterator[Host]:
    with Host(tmp_path / "host") as made:
        made.define(builtin)
        made.start("box")
        made.wait_for_output("box", b"tick 1 ")
        yield made


def test_the_commands(host: Host, tmp_path: Path) -> None:
    assert "fresh vCPU on unicorn" in ok(host, "controlvm", "box", "switch-backend", "unicorn")
    assert json.loads(ok(host, "controlvm", "box", "switch-backend", "unicorn", "--json"))["after"] == "unicorn"
    file = tmp_path / "t.txt"
    said = ok(host, "controlvm", "box", "trace", "--instructions", "1000", "--output", str(file))
    assert said.startswith("1000 instructions")
    assert "# 1000 instructions" in file.read_text()
    done = json.loads(
        ok(host, "controlvm", "box", "trace", "--instructions", "10", "--output", str(file), "--json-lines", "--json")
    )
    assert done["complete"] is True
    assert json.loads(file.read_text().splitlines()[-1])["end"]["instructions"] == 10
    assert re.search(r"CPU backend in use: +unicorn\n", ok(host, "showvminfo", "box"))
    assert "not traced" in ok(host, "controlvm", "box", "trace", "--cancel")
    assert check(host.output("box")).mismatches == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["switch-backend", "nosuch"], "nosuch"),
        (["trace", "--instructions", "5", "--output", "/nonexistent/t"], "/nonexistent/t"),
        (["trace", "--instructions", "5"], "--output"),
        (["trace", "--instructions", "0", "--output", "t"], "--instructions"),
    ],
)
def test_refusals_are_one_clear_line(host: Host, arguments: list[str], words: str) -> None:
    done = host.vmf("controlvm", "box", *arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    host.wait_for_more("box")


def test_ctrl_c_ends_a_trace_cleanly(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    client = subprocess.Popen(
        [sys.executable, "-m", "vmf.cli", "controlvm", "box", "trace", "--instructions", "1000000000",
         "--output", str(file)],
        env=host.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    client.send_signal(signal.SIGINT)
    output, error = client.communicate(timeout=30)
    assert client.returncode == 0, error
    assert "ended early: cancelled" in output
    assert "Traceback" not in error
    assert "ended early: cancelled" in file.read_text()
    host.wait_for_more("box")
    assert host.state("box") == "running"
