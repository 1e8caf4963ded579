"""A live guest's clocks beside the host's, over many stops of every kind.

Nothing is timed from outside: each reading is of the host's clock, the machine's clock and the TSC in one call on the
vCPU thread, and the instants at which time was left out on purpose are those that the machine itself noted. So a busy
host makes the test slow, never wrong.

VMF_TIME_HOPS=100 asks for so many of each kind; without it all kinds take turns.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field

from vmf.cpu.backend import Vcpu
from vmf.errors import BackendUnavailable, PluginError, StateError, TeleportError, TeleportUncertain
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.machine.guest_time import GuestTime, Instant
from vmf.machine.machine import Machine, MachineState, wait_until
from vmf.machine.snapshot import SnapshotStore
from vmf.teleport.progress import TeleportSummary
from vmf.testing.faults import Fault, FaultProxy
from vmf.testing.guest.build import SOURCE, build
from vmf.testing.guests import builtin_guest
from vmf_cpu_unicorn.tsc import host_tsc

BOUND_NS = 500_000
EACH = int(os.environ.get("VMF_TIME_HOPS", "0"))
HOPS = EACH or 3
TICKS_GPA, HZ = 0x112000, 100
"""Where the built-in guest counts its timer interrupts, and how many it asks for."""


def tightest(read: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """(host ns, what was read) of one instant."""
    best: tuple[int, tuple[int, ...]] | None = None
    for _ in range(20):
        before = time.monotonic_ns()
        values = read()
        width = time.monotonic_ns() - before
        if best is None or width < best[0]:
            best = (width, (before + width // 2, *values))
    assert best is not None
    return best[1]


class SlowLink:
    """Passes a port's connections on, from the source to the target at `rate` bytes a second."""

    def __init__(self, port: int, rate: float) -> None:
        self._port, self._rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with self._listener:
            source, _ = self._listener.accept()
        target = socket.create_connection(("127.0.0.1", self._port))
        for each in (source, target):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._pass, args=(target, source, None), daemon=True).start()
        self._pass(source, target, self._rate)

    def _pass(self, come: socket.socket, go: socket.socket, rate: float | None) -> None:
        try:
            while data := come.recv(1 << 16):
                if rate is not None:
                    time.sleep(len(data) / rate)
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@define
class Log:
    """What every machine of this process noted of its stops and starts."""

    stops: list[Instant] = field(factory=list)
    left_out: list[tuple[Instant, int]] = field(factory=list)
    """Starts that add no time: from which instant, and when (host)."""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    noted = Log()
    stop, start = GuestTime.stop, GuestTime.start

    def stopping(self: GuestTime, vcpu: Vcpu) -> None:
        ran = self.stopped is None
        stop(self, vcpu)
        if ran and self.stopped is not None:
            noted.stops.append(self.stopped)

    def starting(self: GuestTime, vcpu: Vcpu, since_ns: int | None = None) -> int:
        stopped, adds = self.stopped, self._catch_up or since_ns is not None
        now = start(self, vcpu, since_ns)
        if stopped is not None and not adds:
            noted.left_out.append((stopped, now))
        return now

    monkeypatch.setattr(GuestTime, "stop", stopping)
    monkeypatch.setattr(GuestTime, "start", starting)
    return noted


class Journey:
    """One guest and where it is."""

    def __init__(self, config: MachineConfig, log: Log, directory: Path) -> None:
        self.config, self.log, self.directory = config, log, directory
        self.machine = self._make()
        self.machine.start()
        self._host = tightest(lambda: (host_tsc(),))
        log.stops.clear()
        log.left_out.clear()
        self._reference = self._read()
        self.clock_error = 0
        self._stretches: list[tuple[Instant, Instant]] = []
        """Of the guest's time, without what was left out: first and last instant."""
        self._ends = False

    def _make(self) -> Machine:
        return Machine(self.config)

    def _read(self) -> Instant:
        hardware = self.machine.hardware

        def read() -> Instant:
            host, guest, tsc = tightest(lambda: (hardware.clock.now(), hardware.vcpu.read_tsc()))
            return Instant(host, guest, tsc)

        return hardware.thread.call(read)

    def _stretch(self, last: Instant) -> None:
        first = self._reference
        self._stretches.append((first, last))
        self.clock_error += (last.guest_ns - first.guest_ns) - (last.host_ns - first.host_ns)

    def check(self) -> None:
        """The guest's clock has counted with the host's, but for what was left out."""
        for began, resumed in self.log.left_out:
            stop = next(each for each in reversed(self.log.stops) if each.host_ns <= resumed)
            assert (stop.guest_ns, stop.tsc) == (began.guest_ns, began.tsc)  # nothing was lost or added meanwhile
            self._stretch(stop)
            self._reference = evolve(began, host_ns=resumed)
            self.log.stops.clear()
        self.log.left_out.clear()
        now = self._read()
        self._stretch(now)
        self._reference = now
        assert abs(self.clock_error) < BOUND_NS

    def tsc_can_be_set(self) -> bool:
        """Not on every host whose KVM emulates ring 0: there it is the host's."""
        hardware = self.machine.hardware

        def attempt() -> bool:
            before = hardware.vcpu.read_tsc()
            hardware.vcpu.write_tsc(before + (1 << 50))
            after = hardware.vcpu.read_tsc()
            hardware.vcpu.write_tsc(before)
            return after - before >= 1 << 50

        return hardware.thread.call(attempt)

    def check_tsc(self) -> None:
        """The TSC has counted with the guest's clock, at the rate of the host's TSC."""
        begun, ended = self._host, tightest(lambda: (host_tsc(),))
        khz = (ended[1] - begun[1]) * 1e6 / (ended[0] - begun[0])
        error = sum(
            (last.tsc - first.tsc) * 1e6 / khz - (last.guest_ns - first.guest_ns) for first, last in self._stretches
        )
        assert abs(error) < BOUND_NS or not self.tsc_can_be_set()

    def check_ticks(self) -> None:
        """No interrupt of its timer has come twice. That late ones come is for the 8254's own tests: how soon a guest
        has taken them depends on the host."""
        hardware = self.machine.hardware
        ticks = int.from_bytes(hardware.memory.read(TICKS_GPA, 8), "little")
        assert 0 < ticks <= hardware.clock.now() * HZ // 10**9 + 5

    # -- the kinds

    def _teleport(
        self, machine: Machine, port_of: Callable[[int], int] = lambda port: port, **options: Any
    ) -> TeleportSummary:
        there = self._make()
        try:
            port = there.listen("127.0.0.1", 0).port
            arrival = threading.Thread(target=there.wait_for_teleport, daemon=True)
            arrival.start()
            summary = machine.teleport("127.0.0.1", port_of(port), **options)
            arrival.join(60)
            assert not arrival.is_alive()
        except BaseException:
            there.close()
            raise
        machine.close()
        self.machine = there
        return summary

    def teleport(self) -> None:
        self._teleport(self.machine)

    def over_a_slow_link(self) -> None:
        self._teleport(self.machine, lambda port: SlowLink(port, 30e6).port, max_downtime_ms=3000)

    def throttled(self) -> None:
        self.machine.hardware.thread.set_throttle(0.9)
        self._teleport(self.machine)

    def paused(self) -> None:
        self.machine.pause()
        self._teleport(self.machine)
        assert self.machine.state is MachineState.PAUSED
        self.machine.resume()

    def failed(self) -> None:
        """At the last moment: the target cannot take the state."""
        there = self._make()
        with there:
            port = there.listen("127.0.0.1", 0).port

            def fail(payloads: object) -> None:
                time.sleep(0.02)
                raise StateError("not this one.")

            there.hardware.restore = fail  # type: ignore[method-assign]
            waiting = threading.Thread(target=lambda: self._refused(there), daemon=True)
            waiting.start()
            with pytest.raises(TeleportError):
                self.machine.teleport("127.0.0.1", port)
            there.cancel_teleport(wait=True)
            waiting.join(60)
        assert self.machine.state is MachineState.RUNNING

    @staticmethod
    def _refused(there: Machine) -> None:
        with pytest.raises(TeleportError):
            there.wait_for_teleport()

    def in_doubt(self) -> None:
        """The handover is sent and never answered; the user decides that the machine continues here."""
        there = self._make()
        with there:
            port = there.listen("127.0.0.1", 0).port
            waiting = threading.Thread(target=lambda: self._refused(there), daemon=True)
            waiting.start()
            with FaultProxy(port, Fault("cut", "HANDOVER")) as proxy:
                with pytest.raises(TeleportUncertain):
                    self.machine.teleport("127.0.0.1", proxy.port)
                time.sleep(0.05)
                self.machine.resolve_teleport("resume", force=True)
            there.cancel_teleport(wait=True)
            waiting.join(60)
        assert self.machine.state is MachineState.RUNNING

    def not_stopped(self) -> None:
        """A device does not come to rest, so the guest runs on."""
        device = self.machine.hardware.devices[0]

        def refuse() -> None:
            del device.quiesce  # type: ignore[method-assign]
            time.sleep(0.02)
            raise StateError("not now.")

        device.quiesce = refuse  # type: ignore[method-assign]
        with pytest.raises(StateError):
            self.machine.pause()
        assert self.machine.state is MachineState.RUNNING

    def pause(self) -> None:
        self.machine.pause()
        time.sleep(0.05)
        self.machine.resume()

    def switch(self) -> None:
        self.machine.switch_backend(self.config.cpu_backend)

    def switch_paused(self) -> None:
        self.machine.pause()
        self.machine.switch_backend(self.config.cpu_backend)
        self.machine.resume()

    def snapshot(self) -> None:
        self.machine.snapshots = SnapshotStore(self.config.name, self.directory / "snapshots")
        self.machine.take_snapshot("s1")
        self.machine.snapshots.delete("s1")
        self.machine.snapshots = None


KINDS: dict[str, Callable[[Journey], None]] = {
    "teleport": Journey.teleport,
    "slow link": Journey.over_a_slow_link,
    "throttled": Journey.throttled,
    "paused": Journey.paused,
    "failed": Journey.failed,
    "in doubt": Journey.in_doubt,
    "not stopped": Journey.not_stopped,
    "pause": Journey.pause,
    "switch": Journey.switch,
    "switch, paused": Journey.switch_paused,
    "snapshot": Journey.snapshot,
}


@pytest.fixture
def journey(builtin: MachineConfig, log: Log, tmp_path: Path) -> Iterator[Journey]:
    begun = Journey(builtin, log, tmp_path)
    try:
        yield begun
    finally:
        begun.machine.close()


@pytest.fixture
def journey_on_kvm(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journey]:
    """On this host's KVM, which may be one that emulates ring 0: the guest then is one without SSE."""
    image = tmp_path / "integer.bin"
    try:
        image.write_bytes(build(SOURCE, "INTEGER_ONLY"))
        monkeypatch.setenv("VMF_KVM_TRUST", "1")
    except FileNotFoundError:  # no binutils
        image = builtin_guest()
    cpuid = CpuidConfig(portability_level="3")
    config = MachineConfig(name="box", memory_mib=32, image=image, cpu_backend="kvm", cpuid=cpuid)
    try:
        begun = Journey(config, log, tmp_path)
    except (BackendUnavailable, PluginError) as error:
        pytest.skip(f"no KVM here: {error}")
    try:
        yield begun
    finally:
        begun.machine.close()


def travel(journey: Journey, kinds: list[str]) -> None:
    for kind in kinds:
        KINDS[kind](journey)
        journey.check()
    journey.check_tsc()
    journey.check_ticks()


def test_all_kinds_in_turns(journey: Journey) -> None:
    travel(journey, [*KINDS] * HOPS)


def test_all_kinds_in_turns_on_kvm(journey_on_kvm: Journey) -> None:
    travel(journey_on_kvm, [*KINDS] * (EACH or 1))


@pytest.mark.skipif(not EACH, reason="VMF_TIME_HOPS says how many hops of each kind")
@pytest.mark.parametrize("kind", KINDS)
def test_many_of_a_kind(journey: Journey, kind: str) -> None:
    travel(journey, [kind] * EACH)


def test_between_two_hosts_the_error_is_what_the_summary_says(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the knowledge that both read one clock, over a link that is slow in one direction."""
    monkeypatch.setattr("vmf.teleport.source.clock_name", lambda _teleport_id: "")
    for _ in range(HOPS):
        before = journey.clock_error
        summary = journey._teleport(journey.machine, lambda port: SlowLink(port, 30e6).port, max_downtime_ms=3000)
        assert summary.clock_error_ns > 0
        first, last = journey._reference, journey._read()
        error = (last.guest_ns - first.guest_ns) - (last.host_ns - first.host_ns)
        assert abs(error) <= summary.clock_error_ns + 20_000
        journey._reference = last
        assert journey.clock_error == before


def test_a_guest_started_paused_has_no_time(builtin: MachineConfig) -> None:
    with Machine(builtin) as machine:
        machine.start(paused=True)
        hardware = machine.hardware
        first = hardware.thread.call(hardware.clock.now)
        time.sleep(0.2)
        machine.resume()
        khz = hardware.tsc_khz
        _, guest, tsc = hardware.thread.call(lambda: tightest(lambda: (hardware.clock.now(), hardware.vcpu.read_tsc())))
        assert abs(tsc * 1_000_000 // khz - (guest - first)) < BOUND_NS


def test_time_continues_after_a_reset_by_the_guest(builtin: MachineConfig) -> None:
    output = bytearray()
    with Machine(builtin) as machine:
        machine.console.add_listener(output.extend)
        machine.start()
        assert wait_until(lambda: b"tick 2" in output, 60)
        for _ in range(3):
            output.clear()
            machine.hardware.thread.post(machine._guest_reset)  # as by a port, between two slices
            assert wait_until(lambda: b"tick 2" in output, 60)
        assert machine.state is MachineState.RUNNING
