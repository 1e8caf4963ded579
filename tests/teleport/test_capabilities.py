"""The feature `capabilities`: a waiting machine says what its CPU backend can present, and waits on."""

from __future__ import annotations

import threading

import pytest

from vmf.cpuid.negotiate import Capability
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import LocalProtocolError, RemoteProtocolError, TeleportError
from vmf.teleport.ask import ask_capability
from vmf.teleport.protocol import Connection, Phase, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.target import TargetOptions
from vmf.testing.cpuid_tables import HOSTS, SKYLAKE_SP
from vmf.testing.teleport import FakeMachine

ID = bytes(16)


class Capable(FakeMachine):
    """Answers; `answer` may be changed."""

    answer = Capability(SKYLAKE_SP, 2_100_000, False, "kvm")

    def cpuid_capability(self) -> Capability:
        self._call("cpuid_capability")
        return self.answer


@pytest.fixture
def capable(pair, monkeypatch):
    """Makes waiting machines that answer."""
    made: list[FakeMachine] = []

    def make(**settings: object) -> Capable:
        machine = Capable(f"target{len(made)}", 1 << 20, pair.owner, **settings)  # type: ignore[arg-type]
        made.append(machine)
        return machine

    yield make
    pair.close()
    for machine in made:
        machine.close()


def ask(waiting, label: str = "there:1"):
    channel = waiting.listener.connect()
    try:
        return ask_capability(channel, "asker", label)
    finally:
        channel.close()


@pytest.mark.parametrize("name", HOSTS)
def test_the_answer_arrives_whole_and_the_target_waits_on(pair, capable, name):
    machine = capable()
    machine.answer = Capability(HOSTS[name], 2_100_000, True, "kvm")
    waiting = pair.wait(machine)
    for _ in range(3):
        answer = ask(waiting)
        assert answer.capability == machine.answer
        assert answer.capability.name == "there:1 (kvm)"
        assert answer.backend == "kvm"
        assert answer.machine == machine.name
        assert answer.software.startswith("vmf ")
    assert waiting.waits
    assert not [entry for entry in machine.log if entry in ("check", "discard_arrival", "restore")]
    assert not any(event.message for event in waiting.events)
    # And a teleport still arrives.
    source = pair.machine("source", 1 << 20)
    source.start()
    pair.teleport(source, waiting)
    waiting.wait_done()


def test_a_target_without_the_feature_is_named_old(pair):
    waiting = pair.wait(pair.machine("plain"))
    with pytest.raises(TeleportError, match=r"cannot say what its CPU backend can present.*same release"):
        ask(waiting)
    assert waiting.waits


def test_a_target_that_cannot_answer_says_so_and_waits_on(pair, capable):
    machine = capable()
    machine.fail.add("cpuid_capability")
    waiting = pair.wait(machine)
    with pytest.raises(TeleportError, match="cpuid_capability fails"):
        ask(waiting)
    assert "cpuid_capability fails" in waiting.wait_failure()
    machine.fail.clear()
    assert ask(waiting).backend == "kvm"


def test_who_asks_and_falls_silent_does_not_keep_the_place(pair, capable):
    waiting = pair.wait(capable(), TargetOptions(handshake_timeout_s=0.3))
    channel = waiting.listener.connect()
    try:
        connection = Connection(Role.SOURCE)
        channel.send(connection.send(m.Hello(ID, (1,), m.FEATURES, "vmf", "x")))
        waiting.wait_failure()
    finally:
        channel.close()
    assert ask(waiting).backend == "kvm"


def test_an_impossible_table_is_the_targets_fault(pair, capable):
    machine = capable()

    class Twice(CpuidTable):
        def to_wire(self) -> list[list[int]]:
            return [[0, 0, 1, 1, 1, 1]] * 2

    machine.answer = Capability(Twice({(0, 0): CpuidRegisters(1)}), 0, False, "odd")
    waiting = pair.wait(machine)
    with pytest.raises(RemoteProtocolError, match=r"impossible.*twice"):
        ask(waiting)


def test_cut_in_the_answer(pair, capable):
    waiting = pair.wait(capable())
    channel = waiting.listener.connect()
    channel.on_receive = lambda received: channel.shutdown() if received > 100 else None
    try:
        with pytest.raises(TeleportError, match="lost in phase"):
            ask_capability(channel, "asker", "there:1")
    finally:
        channel.close()
    assert ask(waiting).backend == "kvm"


def test_several_ask_at_once(pair, capable):
    waiting = pair.wait(capable())
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(waiting))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answers) == 4


# The protocol's side


def talk(source: Connection, target: Connection, features: tuple[str, ...]) -> None:
    """Both up to OFFER."""
    for sender, receiver, message in (
        (source, target, m.Hello(ID, (1,), features, "vmf", "x")),
        (target, source, m.Welcome(ID, 1, features, ("none",), "vmf")),
        (source, target, m.Authenticate("none", b"")),
        (target, source, m.Authenticated(b"")),
    ):
        receiver.receive_data(sender.send(message))
        assert receiver.next_event() == message


def test_without_the_feature_its_messages_do_not_exist():
    source, target = Connection(Role.SOURCE), Connection(Role.TARGET)
    talk(source, target, ())
    assert not source.can_send(m.Inquire)
    with pytest.raises(LocalProtocolError, match="has no feature capabilities"):
        source.send(m.Inquire())
    target.receive_data(m.encode(m.Inquire()))
    with pytest.raises(RemoteProtocolError, match="INQUIRE in phase OFFER"):
        target.next_event()


def test_with_the_feature_question_answer_bye():
    source, target = Connection(Role.SOURCE), Connection(Role.TARGET)
    talk(source, target, m.FEATURES)
    assert source.can_send(m.Inquire)
    target.receive_data(source.send(m.Inquire()))
    assert target.next_event() == m.Inquire()
    answer = m.Capabilities("box", "kvm", tuple(map(tuple, SKYLAKE_SP.to_wire())), 1, False)
    source.receive_data(target.send(answer))
    assert source.next_event() == answer
    target.receive_data(source.send(m.Bye()))
    assert target.next_event() == m.Bye()
    assert source.phase is target.phase is Phase.CHECK_DONE


@pytest.mark.parametrize(
    "rows", [((1, 2, 3),), ((1, 2, 3, 4, 5, 1 << 32),), ((0, 0, 0, 0, 0, -1),), ((0,) * 6,) * (m.MAX_CPUID_ROWS + 1)]
)
def test_rows_are_bounded(rows):
    with pytest.raises(LocalProtocolError):
        m.encode(m.Capabilities("box", "kvm", rows, 1, False))


def test_the_largest_answer_fits():
    rows = tuple((0xFFFFFFFF,) * 6 for _ in range(m.MAX_CPUID_ROWS))
    m.encode(m.Capabilities("x" * 255, "k" * 64, rows, (1 << 32) - 1, True))
