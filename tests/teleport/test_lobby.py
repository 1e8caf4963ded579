"""Strangers at a waiting target, over real sockets: none keeps an honest source out, or the target from waiting."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmf.errors import TeleportError
from vmf.teleport import lobby
from vmf.teleport.authentication import LEAST_ITERATIONS, Verifier
from vmf.teleport.progress import ProgressEvent
from vmf.teleport.protocol import messages as m
from vmf.teleport.source import SourceOptions, teleport_source
from vmf.teleport.target import TargetOptions, wait_for_teleport
from vmf.testing.teleport import FakeMachine
from vmf.transport.base import Address

MIB = 1 << 20
SECRET = "the third door on the left"
VERIFIER = Verifier.of(SECRET, LEAST_ITERATIONS)
HELLO = m.encode(m.Hello(bytes(16), m.PROTOCOL_VERSIONS, m.FEATURES, "stranger", "box"))
tcp = pytest.importorskip("vmf_transport_tcp.transport")


class Waiting:
    """A target that waits on loopback."""

    def __init__(self, machine: FakeMachine, **options: Any) -> None:
        self.listener = tcp.TcpTransport().listen(Address("tcp", "127.0.0.1", 0))
        self.address = self.listener.address
        self.events: list[ProgressEvent] = []
        self._cancel = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(machine, TargetOptions(**options)), daemon=True, name="waiting"
        )
        self._thread.start()

    def _run(self, machine: FakeMachine, options: TargetOptions) -> None:
        try:
            wait_for_teleport(machine, self.listener, self.events.append, self._cancel, options)
        except TeleportError:
            pass

    @property
    def lines(self) -> list[str]:
        return [event.message for event in self.events if event.phase == "waiting" and event.message]

    def line(self, words: str, timeout: float = 20) -> str:
        end = time.monotonic() + timeout
        while not (found := [line for line in self.lines if words in line]):
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)
        return found[0]

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.address.port), 10, source_address=(address, 0))

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._cancel.set()
        self._thread.join(20)
        self.listener.close()


class Machines:
    def __init__(self) -> None:
        owner: dict[str, bool] = {}
        self.source, self.target = FakeMachine("source", 2 * MIB, owner), FakeMachine("target", 2 * MIB, owner)
        self.source.start()
        self.waiting: Waiting | None = None
        self.strangers: list[socket.socket] = []

    def wait(self, **options: Any) -> Waiting:
        self.waiting = Waiting(self.target, **options)
        return self.waiting

    def stranger(self, address: str = "127.0.0.1") -> socket.socket:
        assert self.waiting is not None
        made = self.waiting.connect(address)
        self.strangers.append(made)
        return made

    def teleport(self, **options: Any) -> None:
        """The honest source; it must get through at the first try."""
        assert self.waiting is not None
        channel = tcp.TcpTransport().connect(self.waiting.address, 20)
        try:
            teleport_source(self.source, channel, SourceOptions(**options))
        finally:
            channel.close()

    def close(self) -> None:
        for each in self.strangers:
            each.close()
        if self.waiting is not None:
            self.waiting.close()
        self.source.close()
        self.target.close()


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.close()


def visitors() -> int:
    return [thread.name for thread in threading.enumerate()].count("vmf-teleport-visitor")


def eventually(condition: Callable[[], bool], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_silent_ones_take_no_place(machines: Machines) -> None:
    """One is enough to take the only place, if connecting took it."""
    machines.wait()
    for _ in range(3):
        machines.stranger()
    machines.teleport()
    assert machines.target.runs


def test_a_flood(machines: Machines) -> None:
    """500 connections: silent, a wrong byte, a right beginning and no more. The honest source comes in the middle."""
    waiting = machines.wait()
    for number in range(500):
        if number == 250:
            machines.teleport(check_only=True)
        stranger = machines.stranger()
        try:
            if number % 5 == 1:
                stranger.send(b"GET / HTTP/1.1\r\n")
            elif number % 5 == 2:
                stranger.send(HELLO[:20])
            elif number % 5 == 3:
                stranger.send(HELLO)
        except OSError:
            pass  # dropped already
    assert waiting.waits
    machines.teleport()
    assert machines.target.runs
    assert len(waiting.lines) <= lobby.BURST + 10  # of a flood only some are told
    for stranger in machines.strangers:
        stranger.close()
    eventually(lambda: visitors() == 0)


def test_a_flood_that_drips_while_the_source_comes(machines: Machines) -> None:
    """Garbage and pieces of HELLO, byte by byte, all the time; never more threads than places."""
    waiting = machines.wait(handshake_timeout_s=2.0)
    stop, most = threading.Event(), 0
    chance = random.Random(1)

    def drip() -> None:
        nonlocal most
        inside: list[tuple[socket.socket, bytes, int]] = []
        while not stop.is_set():
            for _ in range(5):
                said = HELLO if chance.random() < 0.5 else bytes(chance.randrange(256) for _ in range(20))
                inside.append((waiting.connect(), said, 0))
            for index, (stranger, said, at) in enumerate(inside):
                try:
                    stranger.send(said[at : at + 1])
                    inside[index] = (stranger, said, at + 1)
                except OSError:
                    stranger.close()
            while len(inside) > 60:
                inside.pop(0)[0].close()
            most = max(most, visitors())
            time.sleep(0.01)
        for stranger, _, _ in inside:
            stranger.close()

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        time.sleep(1)
        machines.teleport()
    finally:
        stop.set()
        thread.join()
    assert machines.target.runs
    assert most <= 2 * lobby.MAX_VISITORS  # those who were dropped need a moment to be gone


def test_who_speaks_and_stalls_from_elsewhere_keeps_nobody_out(machines: Machines) -> None:
    """They say a right HELLO and begin to authenticate; the honest one has to compute meanwhile."""
    machines.wait(verifier=VERIFIER)
    stop = threading.Event()

    def flood() -> None:
        while not stop.wait(0.005):
            stranger = machines.stranger("127.0.0.9")
            stranger.send(HELLO)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        time.sleep(0.5)
        machines.teleport(password=SECRET)
    finally:
        stop.set()
        thread.join()
    assert machines.target.runs


@pytest.mark.parametrize(
    ("said", "step"),
    [
        (b"", "did not say HELLO within 0.5 s"),
        (HELLO[:-1], "did not say HELLO within 0.5 s"),
        (HELLO, "did not authenticate within 0.5 s"),
        (HELLO + m.encode(m.Authenticate("none", b"")), "did not make its offer within 0.5 s"),
    ],
)
def test_each_step_has_its_time(machines: Machines, said: bytes, step: str) -> None:
    """For the whole of it: a byte now and then does not help."""
    waiting = machines.wait(handshake_timeout_s=0.5)
    stranger = machines.stranger()
    for at in range(len(said)):
        stranger.send(said[at : at + 1])
    line = waiting.line(step)
    assert line.startswith("tcp:127.0.0.1:")
    assert "\n" not in line
    stranger.settimeout(10)
    while stranger.recv(1000):
        pass  # what was said before; then it is closed
    machines.teleport()
    assert machines.target.runs


def test_garbage_is_one_line_at_each_side(machines: Machines) -> None:
    waiting = machines.wait()
    stranger = machines.stranger()
    stranger.send(b"\x1b[31m\r\nGET / HTTP/1.1\r\n\r\n")
    answer = b""
    while data := stranger.recv(1000):
        answer += data
    assert b"does not speak vmf" in answer
    line = waiting.line("does not speak vmf")
    assert line.isprintable()


def test_messages_in_the_wrong_place(machines: Machines) -> None:
    waiting = machines.wait(verifier=VERIFIER)
    for first in (m.Offer({}, 1, 4096, (), 0, False), m.Begin(), m.Join(bytes(16), bytes(m.TOKEN_SIZE))):
        stranger = machines.stranger()
        stranger.sendall(m.encode(first))
        while stranger.recv(1000):
            pass
    assert waiting.line("additional channel")
    stranger = machines.stranger()
    stranger.sendall(HELLO + m.encode(m.Authenticate("none", b"")))
    while stranger.recv(1000):
        pass
    assert waiting.line("a method that was not offered")
    assert waiting.waits


def test_one_session_at_a_time(machines: Machines) -> None:
    """The second one is told so, after it has authenticated; a stranger is not."""
    machines.wait()
    machines.source.delay["open_dirty_tracker"] = 2.0
    first = threading.Thread(target=machines.teleport)
    first.start()
    eventually(lambda: "check" in machines.target.log)
    second = FakeMachine("second", 2 * MIB, {})
    assert machines.waiting is not None
    channel = tcp.TcpTransport().connect(machines.waiting.address, 20)
    try:
        with pytest.raises(TeleportError, match="receiving another teleport") as caught:
            teleport_source(second, channel, SourceOptions())
        assert caught.value.code == "busy"
        first.join(20)
        assert machines.target.runs
    finally:
        channel.close()
        second.close()


def test_false_additional_channels_in_a_session(machines: Machines) -> None:
    """Whoever says JOIN without the token is refused, and however many do, the session goes on."""
    waiting = machines.wait()
    machines.source.delay["open_dirty_tracker"] = 1.5
    first = threading.Thread(target=machines.teleport)
    first.start()
    eventually(lambda: "check" in machines.target.log)
    most = 0
    while first.is_alive() and len(machines.strangers) < 200:
        stranger = machines.stranger()
        try:
            stranger.sendall(m.encode(m.Join(bytes(16), bytes(m.TOKEN_SIZE))))
        except OSError:
            pass  # dropped already
        most = max(most, visitors())
    first.join(20)
    assert machines.target.runs
    assert len(machines.strangers) > 50
    assert most <= 2 * lobby.MAX_VISITORS
    eventually(lambda: not waiting.waits)


def test_who_only_shows_that_he_is_alive_is_dropped(machines: Machines) -> None:
    waiting = machines.wait(idle_timeout_s=1.0, keepalive_s=60)
    stranger = machines.stranger()
    description = dict(machines.target.description)
    offer = m.Offer(description, machines.target.memory.pages, 4096, (), 0, False)
    stranger.sendall(HELLO + m.encode(m.Authenticate("none", b"")) + m.encode(offer))
    try:
        for _ in range(100):
            stranger.send(m.encode(m.Ping(1)))
            time.sleep(0.05)
    except OSError:
        pass  # dropped
    assert "only shown that it is alive" in waiting.line("alive")
    machines.teleport()
    assert machines.target.runs


def test_who_goes_on_talking_after_the_end_does_not_hold_the_place(machines: Machines) -> None:
    """A session that failed is drained for a moment, not for as long as the other side likes to drip."""
    waiting = machines.wait()
    stranger = machines.stranger()
    offer = m.Offer(dict(machines.target.description), machines.target.memory.pages, 4096, (), 0, False)
    stranger.sendall(HELLO + m.encode(m.Authenticate("none", b"")) + m.encode(offer) + m.encode(m.Handover()))
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.1):
            try:
                stranger.send(b"x")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert "HANDOVER" in waiting.line("HANDOVER", timeout=8)
        machines.teleport()
    finally:
        stop.set()
        thread.join()
    assert machines.target.runs


def test_when_the_target_is_cancelled_who_shakes_hands_hears_it(machines: Machines) -> None:
    waiting = machines.wait(verifier=VERIFIER)
    stranger = machines.stranger()
    stranger.sendall(HELLO)
    stranger.recv(16)
    waiting.close()
    rest = b""
    try:
        while data := stranger.recv(1000):
            rest += data
    except OSError:
        pass
    assert b"cancelled at the target" in rest


def test_after_the_flood_the_lines_come_again(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "SECONDS_PER_LINE", 0.5)
    waiting = machines.wait(handshake_timeout_s=1.0)
    for _ in range(lobby.BURST + 30):
        machines.stranger().send(b"x")
    time.sleep(1.5)
    machines.stranger().send(b"y")
    assert waiting.line("more were turned away before")


def test_the_limit_of_a_message_before_authentication(machines: Machines) -> None:
    """8 KiB: nothing larger is allocated for a stranger."""
    from vmf.teleport.protocol import frames

    for kind in (m.Hello, m.Authenticate, m.Join):
        assert kind.LIMIT <= 8192
    waiting = machines.wait()
    stranger = machines.stranger()
    stranger.sendall(frames.encode_frame(m.Hello.TYPE, bytes(8193)))
    while stranger.recv(1000):
        pass
    assert "announced 8193 bytes" in waiting.line("announced")
