"""A machine that listens for a teleport while nobody waits with it yet, as programs that embed one may do."""

from __future__ import annotations

import socket
import threading

import pytest

from vmf import Machine, MachineConfig
from vmf.errors import InvalidStateError, TeleportCancelled, TransportError
from vmf.machine.states import MachineState
from vmf.testing import guests

pytestmark = pytest.mark.timeout(25)  # closing waited 30 s for a thread that there was not


@pytest.fixture
def listening():
    machine = Machine(MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest()))
    address = machine.listen("127.0.0.1", 0)
    yield machine, address
    machine.close()


def refused(address) -> bool:
    try:
        socket.create_connection((address.host, address.port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_is_closed_at_once(listening) -> None:
    machine, address = listening
    machine.close()
    assert machine.state is MachineState.POWERED_OFF
    assert refused(address)
    assert not machine.cancel_teleport()
    with pytest.raises(TeleportCancelled, match="powered off before"):
        machine.wait_for_teleport()
    machine.listen("127.0.0.1", 0)  # and again
    machine.power_off()


def test_a_cancel_before_anybody_waits_is_heard_by_who_waits_then(listening) -> None:
    machine, address = listening
    assert machine.cancel_teleport()
    with pytest.raises(TeleportCancelled):
        machine.wait_for_teleport()
    assert machine.state is MachineState.POWERED_OFF
    assert refused(address)


def test_powered_off_while_somebody_begins_to_wait(listening) -> None:
    """Whoever of the two comes first, both end and the hardware is taken apart once."""
    machine, _ = listening
    for _ in range(20):
        ends = []

        def wait(ends: list[Exception] = ends) -> None:
            try:
                machine.wait_for_teleport()
            except (TeleportCancelled, InvalidStateError, TransportError) as error:
                ends.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        machine.close()
        thread.join()
        assert isinstance(ends[0], TeleportCancelled)
        assert machine.state is MachineState.POWERED_OFF
        machine.listen("127.0.0.1", 0)


def test_who_never_listened_does_not_wait() -> None:
    with (
        Machine(MachineConfig(name="box", memory_mib=32, image=guests.builtin_guest())) as machine,
        pytest.raises(InvalidStateError),
    ):
        machine.wait_for_teleport()
