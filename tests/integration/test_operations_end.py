"""What machines do when an operation cannot continue: files keep their content, reasons are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmf.errors import OperationCancelled, StateError, TeleportCancelled
from vmf.machine import switch
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine, MachineState, wait_until
from vmf.machine.snapshot import SnapshotStore
from vmf.machine.snapshot_take import CHECKING
from vmf.teleport.link import Canceller, CancelRequest


@pytest.fixture
def machine(builtin: MachineConfig, tmp_path: Path) -> Iterator[Machine]:
    with Machine(builtin) as made:
        (tmp_path / "own").mkdir()
        made.snapshots = SnapshotStore(made.name, tmp_path / "own" / "snapshots")
        made.start()
        yield made


def runs_on(machine: Machine) -> None:
    before = machine.hardware.clock.now()
    assert wait_until(lambda: machine.hardware.clock.now() > before, 30)
    assert machine.state is MachineState.RUNNING


def test_a_trace_that_cannot_begin_leaves_the_file(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StateError("vCPU state: not now.")

    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("what was here\n")
    monkeypatch.setattr(switch, "exchange", refuse)
    for file in (old, new):
        with pytest.raises(StateError):
            machine.trace(10, file)
    assert old.read_text() == "what was here\n"
    assert not new.exists()
    monkeypatch.undo()
    old.write_text("x" * 100_000)
    assert machine.trace(10, old).instructions == 10
    assert old.read_text().startswith("# vmf trace")
    assert "xxx" not in old.read_text()
    runs_on(machine)


def test_a_machine_that_pauses_by_itself_says_why(machine: Machine) -> None:
    machine.hardware.thread.call(lambda: machine._pause_for("a write of the guest waits for room: make some."))
    machine.wait_for(MachineState.PAUSED, timeout=30)
    assert "room" in machine.info()["problem"]
    machine.resume()
    assert machine.info()["problem"] == ""
    runs_on(machine)


@pytest.mark.parametrize("step", ["memory", CHECKING])
def test_a_cancelled_snapshot_leaves_the_guest_running_and_nothing_else(machine: Machine, step: str) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == step:
            threading.Thread(target=machine.cancel_operation, daemon=True).start()
            assert wait_until(lambda: machine.operation.under_way is None or machine.operation.under_way.cancelled, 30)

    with pytest.raises(OperationCancelled):
        machine.take_snapshot("s", progress=progress)
    assert machine.snapshots is not None
    assert list(machine.snapshots.directory.iterdir()) == []
    runs_on(machine)
    assert machine.take_snapshot("s").files["ram.img"].size == machine.config.memory_mib << 20
    assert machine.cancel_operation() == ""


def test_a_power_off_ends_a_snapshot_first(machine: Machine) -> None:
    begun = threading.Event()
    errors: list[OperationCancelled] = []

    def progress(what: str, done: int, total: int) -> None:
        begun.set()
        wait_until(lambda: machine.operation.under_way is not None and machine.operation.under_way.cancelled, 30)

    def take() -> None:
        try:
            machine.take_snapshot("s", progress=progress)
        except OperationCancelled as error:
            errors.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert begun.wait(30)
    assert machine.power_off() == ()
    thread.join(30)
    assert "powered off" in str(errors[0])
    assert machine.state is MachineState.POWERED_OFF


def test_a_cancel_tells_its_reason() -> None:
    request = CancelRequest()
    canceller = Canceller(request, None, lambda: None, lambda: None)
    try:
        canceller.check()
        request.ask("the guest switched itself off")
        request.ask("another one")
        with pytest.raises(TeleportCancelled, match=r"^the teleport was cancelled: the guest switched itself off\.$"):
            canceller.check()
    finally:
        canceller.close()
