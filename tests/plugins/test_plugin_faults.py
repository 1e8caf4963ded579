"""Plugins that raise, return nonsense or hang, at every call: the fault is named, and stays theirs.

Two levels: stand-ins of every seam, for each method and each kind of fault; and whole machines with a device that does
it at each point of its life.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmf.cpu.backend import CpuBackend, Vcpu, WriteLog
from vmf.device.base import Device, Payload
from vmf.errors import PluginError, StorageError, TransportError, VmfError
from vmf.machine import closing, vcpu_thread
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.machine.states import MachineState
from vmf.plugins import seams
from vmf.plugins.bridge import PluginRegistry
from vmf.plugins.containment import RELEASING, Culprit
from vmf.storage.base import LeaseStore, StorageDriver, StorageImage
from vmf.teleport.protocol import codec
from vmf.teleport.protocol import messages as m
from vmf.transport.base import Channel, Listener, Transport

CULPRIT = Culprit("device plugin 'bad' (of culprit 1.0)", "culprit")
FAULTS: dict[str, Callable[[], Any]] = {}


def fault(function: Callable[[], Any]) -> Callable[[], Any]:
    FAULTS[function.__name__] = function
    return function


@fault
def raises_an_error() -> Any:
    raise RuntimeError("boom")


@fault
def raises_system_exit() -> Any:
    raise SystemExit(3)


@fault
def raises_keyboard_interrupt() -> Any:
    raise KeyboardInterrupt


@fault
def raises_generator_exit() -> Any:
    raise GeneratorExit


NONSENSE: dict[str, Any] = {
    "none": None,
    "a set": {1, 2},
    "minus one": -1,
    "a fraction": 1.5,
    "80 MiB": b"\0" * (80 << 20),
    "an object": object(),
    "a huge number": 1 << 20000,
}


# -- stand-ins ----------------------------------------------------------------------------------------------

SEAMS: dict[type, Callable[[Any], Any]] = {
    Device: lambda made: seams.contained_device(made, CULPRIT),
    CpuBackend: lambda made: seams.contained_backend(made, CULPRIT),
    Vcpu: lambda made: seams.contained_vcpu(made, CULPRIT),
    StorageDriver: lambda made: seams.contained_storage(made, CULPRIT),
    Transport: lambda made: seams.contained_transport(made, CULPRIT),
}
MADE_BY: dict[type, tuple[type, str]] = {
    WriteLog: (Vcpu, "write_log"),
    StorageImage: (StorageDriver, "open"),
    LeaseStore: (StorageDriver, "lease_store"),
    Listener: (Transport, "listen"),
    Channel: (Transport, "connect"),
}
"""Seams whose objects another one makes."""
ERRORS = {StorageDriver: StorageError, StorageImage: StorageError, LeaseStore: StorageError} | dict.fromkeys(
    (Transport, Listener, Channel), TransportError
)
ATTRIBUTES = {"kind": "bad.thing", "size": 4096, "preference": 1, "VERSION": 1, "writes_ram": True}
UNCHECKED = {"WriteLog.collect": "NumPy checks the array when it is used"}


def methods_of(seam: type) -> list[str]:
    return sorted(name for name, value in inspect.getmembers(seam, inspect.isfunction) if not name.startswith("_"))


def contained(seam: type, answer: Callable[[], Any]) -> Any:
    """A stand-in for an object of this seam, all of whose methods do `answer`."""
    body: dict[str, Any] = {name: lambda self, *_args, **_named: answer() for name in methods_of(seam)}
    raw = type("Bad", (seam,), {**body, **ATTRIBUTES})()
    if seam in SEAMS:
        return SEAMS[seam](raw)
    maker, method = MADE_BY[seam]
    return getattr(contained(maker, lambda: raw), method)(*(() if maker is Vcpu else ("", False)))


CALLS = [(seam, method) for seam in (*SEAMS, *MADE_BY) for method in methods_of(seam)]


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize(("seam", "method"), CALLS, ids=lambda each: getattr(each, "__name__", each))
def test_whatever_a_method_raises_is_named(seam: type, method: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    stand_in = contained(seam, FAULTS[how])
    caught: list[BaseException] = []

    def call() -> None:
        try:
            getattr(stand_in, method)()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)  # as devices are; on the main thread Ctrl-C is the user's
    thread.start()
    thread.join(60)
    if method in RELEASING:
        assert not caught
        said = caplog.text
    else:
        (error,) = caught
        assert type(error) is ERRORS.get(seam, PluginError)
        assert isinstance(error, VmfError)
        assert "culprit" in error.remedy
        said = error.message
    assert "device plugin 'bad' (of culprit 1.0)" in said
    assert method in said
    assert seam is not Device or "bad.thing" in said


def returning(seam: type) -> list[str]:
    """Methods that give something back, by their annotation."""
    found = []
    for name in methods_of(seam):
        annotation = str(inspect.signature(getattr(seam, name)).return_annotation)
        if annotation not in ("None", "<class 'inspect._empty'>"):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("seam", "method"),
    [
        (seam, method)
        for seam in (*SEAMS, *MADE_BY)
        for method in returning(seam)
        if f"{seam.__name__}.{method}" not in UNCHECKED
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_whatever_a_method_returns_is_checked(seam: type, method: str) -> None:
    """Each method that gives something back refuses an object that means nothing there."""
    stand_in = contained(seam, lambda: NONSENSE["an object"])
    with pytest.raises(ERRORS.get(seam, PluginError), match=r"device plugin 'bad' .*returned object from .*" + method):
        getattr(stand_in, method)()


@pytest.mark.parametrize("what", NONSENSE)
def test_a_saved_state_must_be_one(what: str) -> None:
    stand_in = contained(Device, lambda: NONSENSE[what])
    with pytest.raises(PluginError, match=r"save of device bad\.thing, where a Payload is specified"):
        stand_in.save()


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (Payload("other.thing", 1, {}), "its own kind bad.thing"),
        (Payload("bad.thing", 2, {}), "version 1"),
        (Payload("bad.thing", 1, None), "a mapping"),  # type: ignore[arg-type]
        (Payload("bad.thing", 1, {"a": {"b": 1.5}}), "a.b is float"),
        (Payload("bad.thing", 1, {"a": {1}}), "a is set"),
        (Payload("bad.thing", 1, {1: 2}), "keys that are texts"),  # type: ignore[dict-item]
        (Payload("bad.thing", 1, {"a": 1 << 64}), "64 bits"),
        (Payload("bad.thing", 1, {"a": "\ud800"}), "lone surrogate"),
        (Payload("bad.thing", 1, {"a": NONSENSE["80 MiB"]}), "at most 8000 KiB"),
        (Payload("bad.thing", 1, {"a": [0] * 100_000}), "at most 90000 values"),
    ],
)
def test_a_state_that_cannot_travel_is_refused_where_it_is_made(payload: Payload, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        contained(Device, lambda: payload).save()


def test_a_state_nested_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(PluginError, match="levels deep"):
        contained(Device, lambda: Payload("bad.thing", 1, {"a": endless})).save()


def test_the_bounds_at_the_source_are_within_those_of_the_protocol() -> None:
    from vmf.device import state

    assert state.MAX_BYTES + (64 << 10) <= m.State.LIMIT
    assert state.MAX_ITEMS + 5 * m.MAX_PAYLOADS + 100 <= codec.MAX_ITEMS
    body: Any = 0
    for _ in range(state.MAX_DEPTH):
        body = {"a": body}
    state.measure(body)
    codec.encode({"payloads": [["kind", 1, 0, body]]})


@pytest.mark.parametrize("kind", [None, 5, "", "x" * 101, "a\nb", {"a"}])
def test_a_device_without_a_kind_is_refused(kind: Any) -> None:
    body = {name: lambda self, *_: None for name in methods_of(Device)}
    made = type("Nameless", (Device,), {**body, "kind": kind})()
    with pytest.raises(PluginError, match=r"device plugin 'bad'.*Nameless.* attribute kind"):
        seams.contained_device(made, CULPRIT)
    bare = type("Nameless", (Device,), body)()
    with pytest.raises(PluginError, match=r"Nameless.* attribute kind is missing"):
        seams.contained_device(bare, CULPRIT)


# -- whole machines ------------------------------------------------------------------------------------------

GUEST = bytes.fromhex(
    "66baa005"  # loop: mov dx, 0x5a0
    "ec"  #       in al, dx
    "ee"  #       out dx, al
    "ebfc"  #       jmp in
)
"""Reads and writes the device's port for ever."""

DEVICE = """
import threading, time
from vmf.plugins import hookimpl
from vmf.device.base import Device, Payload
vmf_api_version = 1

class Bad(Device):
    kind = "bad.thing"

    def __init__(self, environment):
        self.environment = environment
        self.does = {}
        environment.bus.claim_ports(self.kind, 0x5A0, 1, self)
        self.timer = environment.timers.timer(lambda: self.act("timer"))
        self.reads = 0

    def act(self, name, usual=None):
        action = self.does.get(name)
        return usual if action is None else action()

    def io_read(self, offset, size):
        self.reads += 1
        return self.act("io_read", 0)

    def io_write(self, offset, size, value): return self.act("io_write")
    def reset(self): return self.act("reset")
    def quiesce(self): return self.act("quiesce")
    def save(self): return self.act("save", Payload(self.kind, self.VERSION, {"n": 1}))
    def restore(self, payload): return self.act("restore")
    def migration_blocker(self): return self.act("migration_blocker", "")
    def serial_input(self, data): return self.act("serial_input", 0)
    def settings(self): return self.act("settings", {})
    def close(self): return self.act("close")

DOES = {}

@hookimpl
def vmf_create_device(environment):
    made = Bad(environment)
    made.does = DOES
    return [made]
"""


class Bench:
    """A machine with the bad device, and what is open and running before it."""

    def __init__(self, machine: Machine, does: dict[str, Callable[[], Any]]) -> None:
        self.machine = machine
        self.does = does

    @property
    def device(self) -> Any:
        return self.machine.hardware.devices[-1]

    def runs(self) -> bool:
        before = self.device.reads
        return _soon(lambda: self.device.reads > before)


def _soon(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def bench(make_plugin: Any, tmp_path: Path) -> Iterator[Bench]:
    import sys

    from vmf.plugins import discovery

    make_plugin("device", "bad", DEVICE, distribution="culprit")
    image = tmp_path / "guest.img"
    image.write_bytes(GUEST)
    config = MachineConfig(name="m", memory_mib=4, image=image, devices=("pc", "bad"), cpu_backend="unicorn")
    registry = PluginRegistry()
    registry.load("device", "bad")
    does: dict[str, Callable[[], Any]] = sys.modules[discovery.find("device", "bad").target].DOES
    earlier = set(threading.enumerate())  # of other tests in this process
    with Machine(config, registry) as machine:
        yield Bench(machine, does)
        threads = {thread for thread in threading.enumerate() if thread.name.startswith(("vcpu-m", "vmf-"))}
    assert machine.state is MachineState.POWERED_OFF
    assert _soon(lambda: not any(thread.is_alive() for thread in threads - earlier - _left_behind))


_left_behind: set[threading.Thread] = set()
NAMED = r"device plugin 'bad' \(of culprit 1\.0\)"


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("call", ["io_read", "io_write", "timer", "post", "serial_input"])
def test_a_fault_while_the_guest_runs_ends_the_machine_and_is_named(bench: Bench, call: str, how: str) -> None:
    machine = bench.machine
    machine.start()
    assert bench.runs()
    if call == "post":
        bench.device.environment.post(FAULTS[how])
    else:
        bench.does[call] = FAULTS[how]
    if call == "timer":
        machine.hardware.thread.call(lambda: bench.device.timer.arm(0))
    if call == "serial_input":
        machine.type(b"x" * 65536)  # more than the serial port takes
    machine.wait_for(MachineState.FAILED, timeout=60)
    assert "device plugin 'bad' (of culprit 1.0)" in machine.failure
    assert "\n" not in machine.failure
    bench.does.clear()
    machine.reset()  # a fault that passes does not cost the machine
    assert machine.state is MachineState.RUNNING
    assert bench.runs()


@pytest.mark.parametrize("what", ["none", "a set", "a fraction", "80 MiB", "an object"])
def test_what_is_no_number_does_not_reach_the_guest(bench: Bench, what: str) -> None:
    bench.does["io_read"] = lambda: NONSENSE[what]
    bench.machine.start()
    bench.machine.wait_for(MachineState.FAILED, timeout=60)
    assert "device plugin 'bad' (of culprit 1.0) returned" in bench.machine.failure
    assert "io_read of bad.thing at 0x5a0" in bench.machine.failure


@pytest.mark.parametrize("what", ["minus one", "a huge number"])
def test_of_other_numbers_the_guest_gets_the_low_bits(bench: Bench, what: str) -> None:
    bench.does["io_read"] = lambda: NONSENSE[what]
    bench.machine.start()
    assert bench.runs()
    assert bench.machine.state is MachineState.RUNNING


@pytest.mark.parametrize("deadline", [None, 1.5, "soon"])
def test_a_deadline_that_is_none_is_the_devices_fault(bench: Bench, deadline: Any) -> None:
    bench.does["io_write"] = lambda: bench.device.timer.arm(deadline)
    bench.machine.start()
    bench.machine.wait_for(MachineState.FAILED, timeout=60)
    assert "bad.thing" in bench.machine.failure


@pytest.mark.parametrize("how", FAULTS)
def test_a_reset_that_fails_fails_the_start(bench: Bench, how: str) -> None:
    bench.does["reset"] = FAULTS[how]
    with pytest.raises(PluginError, match=NAMED + r" failed in reset of device bad\.thing"):
        bench.machine.start()
    assert bench.machine.state is MachineState.POWERED_OFF
    bench.does.clear()
    bench.machine.start()
    assert bench.runs()
    bench.does["reset"] = FAULTS[how]
    with pytest.raises(PluginError, match=NAMED):
        bench.machine.reset()
    assert bench.machine.state is MachineState.FAILED, "the guest is half gone"


@pytest.mark.parametrize("how", FAULTS)
def test_a_device_that_does_not_come_to_rest_fails_the_pause_only(bench: Bench, how: str) -> None:
    bench.machine.start()
    bench.does["quiesce"] = FAULTS[how]
    with pytest.raises(PluginError, match=NAMED):
        bench.machine.pause()
    assert bench.machine.state is MachineState.RUNNING
    assert bench.runs()
    bench.does.clear()
    bench.machine.pause()
    assert bench.machine.state is MachineState.PAUSED


BAD_STATES: dict[str, Callable[[], Any]] = {
    **FAULTS,
    **{what: (lambda value=value: value) for what, value in NONSENSE.items()},  # type: ignore[misc]
    "a float within": lambda: Payload("bad.thing", 1, {"temperature": 36.6}),
    "80 MiB within": lambda: Payload("bad.thing", 1, {"ram": NONSENSE["80 MiB"]}),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_a_state_that_cannot_be_saved_is_a_blocker_before_the_guest_is_stopped(bench: Bench, what: str) -> None:
    machine = bench.machine
    machine.start()
    bench.does["save"] = BAD_STATES[what]
    from vmf.machine.teleport_view import TeleportView

    (blocker,) = TeleportView(machine).local_blockers("source")
    assert "bad.thing" in blocker.field
    assert "device plugin 'bad' (of culprit 1.0)" in blocker.source
    assert blocker.target == "-"
    assert bench.runs()


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("how", [*FAULTS, "none", "a set", "minus one"])
def test_a_blocker_says_whose_it_is(bench: Bench, role: str, how: str) -> None:
    from vmf.machine.teleport_view import TeleportView

    bench.machine.start()
    bench.does["migration_blocker"] = FAULTS.get(how, lambda: NONSENSE[how])
    (blocker,) = TeleportView(bench.machine).local_blockers(role)
    own, other = (blocker.source, blocker.target) if role == "source" else (blocker.target, blocker.source)
    assert "device plugin 'bad' (of culprit 1.0)" in own
    assert other == "-"
    bench.does["migration_blocker"] = lambda: "it holds a\nlicense dongle"
    (blocker,) = TeleportView(bench.machine).local_blockers(role)
    own = blocker.source if role == "source" else blocker.target
    assert own == "it holds a license dongle"


def test_a_rehearsed_state_changes_nothing(bench: Bench) -> None:
    bench.machine.start()
    bench.machine.pause()
    first = bench.machine.hardware.save()
    assert bench.machine.hardware.rehearse_save() == []
    assert bench.machine.hardware.save() == first


@pytest.mark.parametrize("how", FAULTS)
def test_a_device_that_cannot_be_closed_is_logged_and_all_else_is(
    bench: Bench, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.machine.start()
    hardware = bench.machine.hardware
    closed: list[str] = []
    bench.does["close"] = lambda: (closed.append("bad"), FAULTS[how]())
    with caplog.at_level(logging.WARNING):
        bench.machine.close()
    assert bench.machine.state is MachineState.POWERED_OFF
    assert closed == ["bad"]
    assert "device plugin 'bad' (of culprit 1.0) failed in close of device bad.thing" in caplog.text
    assert hardware.devices == ()


@pytest.mark.parametrize("call", ["io_read", "close", "timer"])
def test_a_device_that_hangs_does_not_hold_up_the_end(
    bench: Bench, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (vcpu_thread, closing):
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr("vmf.machine.hardware.CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(vcpu_thread, "CALL_SECONDS", 0.3)
    machine, hangs, release = bench.machine, threading.Event(), threading.Event()

    def hang() -> int:
        hangs.set()
        release.wait(60)
        return 0

    machine.start()
    assert bench.runs()
    bench.does[call] = hang
    if call == "timer":
        machine.hardware.thread.call(lambda: bench.device.timer.arm(0))
    if call != "close":
        assert hangs.wait(60)
        with pytest.raises(VmfError, match=r"does not react.*device plugin 'bad' \(of culprit 1\.0\)"):
            machine.pause()
    _left_behind.update(thread for thread in threading.enumerate() if thread.name.startswith("vcpu-m"))
    began = time.monotonic()
    machine.close()
    assert time.monotonic() - began < 30, "bounded"
    assert machine.state is MachineState.POWERED_OFF
    assert "device plugin 'bad' (of culprit 1.0)" in caplog.text
    _left_behind.update(thread for thread in threading.enumerate() if thread.name == "vmf-close")
    release.set()


def test_nothing_is_left_open_by_machines_that_failed(bench: Bench) -> None:
    def once() -> None:
        bench.does["io_read"] = raises_an_error
        bench.machine.start()
        bench.machine.wait_for(MachineState.FAILED, timeout=60)
        bench.machine.close()

    once()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        once()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
