"""One operation at a time, and none without an end."""

from __future__ import annotations

import threading
import time

import pytest

from vmf.errors import InvalidStateError, MachineError, OperationCancelled
from vmf.machine import operations as module
from vmf.machine.operations import Operations
from vmf.plugins.containment import Culprit, guarded
from vmf.storage import calls


def elsewhere(work: object) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_a_long_operation_is_told_of_at_once_and_cancelled_from_elsewhere() -> None:
    operations = Operations("vm")
    begun, errors = threading.Event(), []

    def work() -> None:
        try:
            with operations.long("the snapshot 's'") as operation, operations:
                told = operation.observed(None)
                for done in range(10_000):
                    told("memory", done, 10_000)
                    begun.set()
                    time.sleep(0.005)
        except OperationCancelled as error:
            errors.append(str(error))

    thread = elsewhere(work)
    assert begun.wait(10)
    with pytest.raises(InvalidStateError, match=r"busy: the snapshot 's' is under way.*memory"), operations:
        pass
    with pytest.raises(InvalidStateError, match="busy"), operations.long("another"):
        pass
    assert operations.under_way is not None
    assert operations.under_way.describe()["step"] == "memory"
    assert operations.cancel(wait=True, reason="its machine was powered off") == "the snapshot 's'"
    thread.join(10)
    assert errors == ["the snapshot 's' of machine 'vm' was cancelled: its machine was powered off."]
    with operations:
        assert operations.under_way is None
    assert operations.cancel(wait=True) == ""


def test_a_short_operation_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = Operations("vm")
    release = threading.Event()

    def work() -> None:
        with operations:
            release.wait(10)

    thread = elsewhere(work)
    threading.Timer(0.6, release.set).start()
    with operations:
        assert release.is_set()
    thread.join(10)
    release.clear()
    thread = elsewhere(work)
    time.sleep(0.05)
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    with pytest.raises(InvalidStateError, match="does not end"), operations:
        pass
    release.set()
    thread.join(10)


def test_a_step_that_does_not_return_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.05)
    operations = Operations("vm")
    stuck, began = threading.Event(), threading.Event()

    def step() -> None:
        began.set()
        stuck.wait(30)

    def cancel() -> None:
        began.wait(10)
        operations.cancel(wait=False)

    elsewhere(cancel)
    with pytest.raises(OperationCancelled), operations.long("the snapshot") as operation:
        operation.run(step)
    assert [each for each in calls.abandoned() if "the snapshot" in each]
    stuck.set()
    end = time.monotonic() + 10
    while calls.abandoned() and time.monotonic() < end:
        time.sleep(0.01)
    assert not calls.abandoned()


def test_an_operation_that_never_looks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANCEL_SECONDS", 0.1)
    operations = Operations("vm")
    with operations.long("the start"), pytest.raises(MachineError, match=r"does not end\.") as caught:
        operations.cancel(wait=True)
    assert "SIGTERM twice" in caught.value.remedy
    plugin = Culprit("device plugin 'x' (of y)")

    def create() -> None:
        with pytest.raises(MachineError, match=r"does not end: it waits for the device plugin 'x' .* in its reset"):
            operations.cancel(wait=True)

    with operations.long("the start"):
        guarded(plugin, "its reset", create)()
