"""Additional channels for RAM: everything arrives, whatever becomes of one of them, and only the invited join."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from vmf.errors import TeleportCancelled, TeleportError, TransportError
from vmf.memory.dirty import tracker_kinds
from vmf.teleport.lanes import WORTH_BYTES, Joiners, links_for
from vmf.teleport.link import Link
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.ram import Arrival, RamReceiver
from vmf.teleport.source import SourceOptions, teleport_source
from vmf.transport.base import Address

MIB = 1 << 20
NAMES = [kind.name for kind in tracker_kinds()]


class Counted:
    """Makes channels to a waiting target and remembers them; `spoil` may change each."""

    def __init__(self, waiting, spoil=None) -> None:
        self.waiting, self.spoil = waiting, spoil
        self.channels = []
        self.sent = []

    def __call__(self):
        channel = self.waiting.listener.connect()
        number, send_ranges = len(self.channels), channel.send_ranges
        self.channels.append(channel)
        self.sent.append(0)

        def counting(base, ranges) -> None:
            self.sent[number] += int(ranges[:, 1].sum())
            if self.spoil is not None:
                self.spoil(number, channel, self.sent[number])
            send_ranges(base, ranges)

        channel.send_ranges = counting
        return channel


def machines(pair, mib: int = 96, rate: int = 2000):
    source, target = pair.machine("a", mib * MIB, rate=rate), pair.machine("a2", mib * MIB)
    source.memory.buffer[: mib // 2 * MIB] = np.random.default_rng(7).bytes(mib // 2 * MIB)
    source.start()
    return source, target, pair.wait(target)


def go(source, connect, **options):
    channel = connect()
    try:
        return teleport_source(source, channel, SourceOptions(**options), None, None, connect)
    finally:
        channel.close()


@pytest.mark.parametrize("links", [0, 1, 3])
def test_a_writing_guest_arrives_byte_for_byte_over_several_channels(pair, links: int) -> None:
    source, target, waiting = machines(pair)
    seen = {}
    save, resume = source.save, target.resume

    def saving():
        seen["left"] = bytes(source.memory.buffer)
        return save()

    def resuming(stopped_at_ns: int, running: bool) -> int:
        seen["arrived"] = bytes(target.memory.buffer)
        return resume(stopped_at_ns, running)

    source.save, target.resume = saving, resuming
    connect = Counted(waiting)
    summary = go(source, connect, links=links)
    arrived = waiting.wait_done()
    assert seen["arrived"] == seen["left"]
    assert len(connect.channels) == links + 1
    assert all(connect.sent[: min(links, 1) + 1]), "a channel got no work"
    assert summary.bytes == arrived.bytes == sum(connect.sent)
    assert target.runs
    assert not source.runs


def test_a_channel_that_cannot_be_had_is_done_without(pair) -> None:
    source, _, waiting = machines(pair, rate=0)
    connect = Counted(waiting)
    made = 0

    def two_of_three():
        nonlocal made
        made += 1
        if made > 2:
            raise TransportError("no more.")
        return connect()

    go(source, two_of_three, links=3)
    waiting.wait_done()
    assert len(connect.channels) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("how", ["cut", "lose"])
def test_a_channel_that_breaks_fails_the_teleport_and_the_source_goes_on(pair, number: int, how: str) -> None:
    source, target, waiting = machines(pair)
    broken = threading.Event()

    def spoil(which, channel, sent) -> None:
        if which != number:
            broken.wait(30)  # the others leave it work to break at
        elif sent > (9 * MIB if number == 0 else 0):
            broken.set()
            channel.shutdown()
            if how == "lose":
                raise TransportError("the network is gone.")

    with pytest.raises(TeleportError):
        go(source, Counted(waiting, spoil), links=2)
    assert source.runs
    waiting.wait_failure()
    assert not target.memory.touched_ranges().size
    go(source, Counted(waiting), links=2)  # and it still waits
    waiting.wait_done()
    assert target.runs


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_cancel_while_several_channels_are_busy(pair, who: str) -> None:
    source, _, waiting = machines(pair, 192)
    cancel = threading.Event()

    def slow(_which, _channel, sent) -> None:
        if sent > 8 * MIB:
            (cancel if who == "source" else waiting.cancel).set()
            time.sleep(0.05)

    connect = Counted(waiting, slow)
    channel = connect()
    with pytest.raises(TeleportCancelled):
        teleport_source(source, channel, SourceOptions(links=2), None, cancel, connect)
    channel.close()
    assert source.runs
    if who == "source":
        assert "cancel" in waiting.wait_failure()


def test_only_who_knows_the_token_joins(pair) -> None:
    machine = pair.machine("a")
    ram = RamReceiver(machine.memory)
    joiners = Joiners(ram, machine.memory.pages)
    teleport_id = bytes(range(16))
    assert joiners.open(teleport_id, 0).token == b""
    checked = joiners.open(teleport_id, 1)
    waiting = pair.wait(pair.machine("b"))

    def attempt(message: m.Join) -> bool:
        link = Link(waiting.listener.connect(), Connection(Role.TARGET))
        link.connection.phase = link.connection.phase.JOINING
        try:
            return joiners.admit(link, message)
        finally:
            link.channel.close()

    assert not attempt(m.Join(teleport_id, bytes(32)))
    assert not attempt(m.Join(bytes(16), checked.token))
    assert attempt(m.Join(teleport_id, checked.token))
    assert not attempt(m.Join(teleport_id, checked.token)), "there was one place"
    joiners.open(teleport_id, 1)
    joiners.shut()
    assert not attempt(m.Join(teleport_id, checked.token)), "the door is shut"
    joiners.close()


def test_a_stranger_in_the_door_is_turned_away(pair) -> None:
    """While channels may join, somebody else's first word is answered as at any other time."""
    source, target, waiting = machines(pair, rate=0)
    answers = []

    def nosy():
        stranger = Link(waiting.listener.connect(), Connection(Role.SOURCE))
        stranger.send(m.Join(bytes(16), bytes(32)))
        answers.append(stranger.receive())
        stranger.channel.close()
        return connect()

    connect = Counted(waiting)
    channel = connect()
    teleport_source(source, channel, SourceOptions(links=1), None, None, nosy)
    channel.close()
    waiting.wait_done()
    assert isinstance(answers[0], m.Error)
    assert "does not belong" in answers[0].message
    assert target.runs


def test_missing_bytes_are_noticed() -> None:
    arrival = Arrival()
    arrival.add(10)
    arrival.wait(10, 0.1)
    with pytest.raises(TeleportError, match="5 bytes of pages"):
        arrival.wait(15, 0.1)
    with pytest.raises(TeleportError, match="more pages than it says"):
        arrival.wait(5, 0.1)
    arrival.short_of(TeleportError("closed"))
    with pytest.raises(TeleportError, match="closed"):
        arrival.wait(15, 30)
    arrival.wait(10, 0.1)
    arrival.fail(TeleportError("broken"))
    with pytest.raises(TeleportError, match="broken"):
        arrival.wait(15, 30)


@pytest.mark.parametrize(
    ("processors", "computes", "remote", "links"),
    [
        (2, False, "127.0.0.1", 1),
        (2, True, "127.0.0.1", 0),  # one processor sends, the other one receives
        (2, True, "192.0.2.7", 1),
        (1, False, "192.0.2.7", 0),
        (1, True, "127.0.0.1", 0),
        (16, True, "127.0.0.1", 3),
        (16, False, "192.0.2.7", 3),
    ],
)
def test_additional_channels_by_default(monkeypatch, processors, computes, remote, links) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(processors)))
    channel = SimpleNamespace(computes=computes, local=Address("x", "127.0.0.1", 1), remote=Address("x", remote, 2))
    assert links_for(WORTH_BYTES - 1, channel) == 0
    assert links_for(WORTH_BYTES, channel) == links
