"""Everything that can go wrong, at every point where it can: exactly one machine runs, and both sides say why."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from vmf.errors import (
    RemoteProtocolError,
    TeleportCancelled,
    TeleportError,
    TeleportUncertain,
    TransportError,
    VmfError,
)
from vmf.memory.guest import PAGE_SIZE
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.target import TargetOptions

MIB = 1 << 20


def small(pair, name: str, **settings):
    machine = pair.machine(name, MIB, **settings)
    machine.description["memory_mib"] = 1
    return machine


def running_source(pair, **settings):
    machine = small(pair, "a", **settings)
    machine.memory.buffer[: 64 * PAGE_SIZE] = np.random.default_rng(3).bytes(64 * PAGE_SIZE)
    machine.start()
    return machine


def settle(pair, source, target, waiting, error: VmfError | None) -> str:
    """The invariant after any fault; returns who runs: "source", "target" or "nobody"."""
    if error is None:
        waiting.wait_done()
        assert target.runs
        assert not source.runs
        return "target"
    if isinstance(error, TeleportUncertain):
        assert not source.runs, "an uncertain source must not run"
        assert "mark_handed_over" in source.log
        assert "undo_stop" not in source.log
        assert error.teleport_id
        deadline = time.monotonic() + 3
        while not target.runs and time.monotonic() < deadline and not any(e.message for e in waiting.events):
            time.sleep(0.01)
        return "target" if target.runs else "nobody"
    assert source.runs, f"the machine was lost: {error}"
    assert not target.runs
    assert source.throttle == 0
    assert "mark_handed_over" not in source.log
    assert source._logged.active is False
    waiting.wait_failure()
    assert waiting.waits
    assert not target.memory.touched_ranges().size
    return "source"


def attempt(pair, source, waiting, channel=None, **options) -> VmfError | None:
    try:
        pair.teleport(source, waiting, channel, handover_timeout_s=5.0, idle_timeout_s=10.0, **options)
    except TeleportError as caught:
        error = caught
    else:
        return None
    assert str(error)
    assert "\n" not in str(error)
    return error


def cut_at(channel, number: int) -> None:
    """Break the channel when it is about to send for the `number`-th time."""
    seen = 0

    def gate(_sent: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            channel.shutdown()

    channel.on_send = gate


SENDS = {"source": 24, "target": 16}
"""More than an undisturbed teleport makes; the tests below check that."""


@pytest.mark.parametrize(("side", "number"), [(s, n) for s, top in SENDS.items() for n in range(1, top + 1)])
def test_the_channel_cut_before_any_message(pair, side, number):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    channel = waiting.listener.connect()
    if side == "source":
        cut_at(channel, number)
    else:
        theirs = waiting.listener.last
        cut_at(theirs, number)
    who = settle(pair, source, target, waiting, attempt(pair, source, waiting, channel))
    if number == 1:
        assert who == "source"
    if number == SENDS[side]:
        assert who == "target", "SENDS is smaller than the number of messages"


@pytest.mark.parametrize("side", ["source", "target"])
def test_every_message_can_be_truncated(pair, side):
    """The channel breaks after half of what is sent there, wherever that is."""
    source, target = running_source(pair), small(pair, "a2")
    for limit in (5, 100, 400, 300_000):
        waiting = pair.wait(target)
        channel = waiting.listener.connect()
        end = channel if side == "source" else waiting.listener.last

        def gate(sent: int, end=end, limit=limit) -> None:
            if sent >= limit:
                end.shutdown()

        end.on_send = gate
        who = settle(pair, source, target, waiting, attempt(pair, source, waiting, channel))
        waiting.stop()
        if who != "source":
            break


PHASES = ["hello", "authenticate", "check", "precopy", "pause"]


@pytest.mark.parametrize("phase", PHASES)
def test_cancelled_at_the_source_in_each_phase(pair, phase):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    cancel = threading.Event()

    def watch(event) -> None:
        if event.phase == phase:
            cancel.set()

    with pytest.raises(TeleportCancelled):
        pair.teleport(source, waiting, progress=watch, cancel=cancel)
    settle(pair, source, target, waiting, TeleportCancelled("x"))
    assert "cancelled at the source" in waiting.wait_failure()


@pytest.mark.parametrize("call", ["describe", "open_dirty_tracker", "stop", "save"])
def test_cancelled_at_the_source_while_it_works(pair, call):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    cancel = threading.Event()
    source.delay[call] = 0.2
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(TeleportCancelled):
        pair.teleport(source, waiting, cancel=cancel)
    settle(pair, source, target, waiting, TeleportCancelled("x"))


@pytest.mark.parametrize("call", ["check", "restore"])
def test_cancelled_at_the_source_while_the_target_works(pair, call):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    cancel = threading.Event()
    target.delay[call] = 0.5
    threading.Timer(0.2, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(TeleportCancelled):
        pair.teleport(source, waiting, cancel=cancel)
    assert time.monotonic() - began < 2.5
    settle(pair, source, target, waiting, TeleportCancelled("x"))


@pytest.mark.parametrize("where", ["offer", "check", "precopy", "stop", "save", "restore"])
def test_cancelled_at_the_target(pair, where):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    if where in ("offer", "check", "precopy"):
        waiting.on_event = lambda event: waiting.cancel.set() if event.phase == where else None
        source.delay["open_dirty_tracker"] = 0.3
        source.delay["describe"] = 0.3
    else:
        (target if where == "restore" else source).delay[where] = 0.4
        side = target if where == "restore" else source
        call = side._call

        def watched(name: str) -> None:
            if name == where:
                waiting.cancel.set()
            call(name)

        side._call = watched
    with pytest.raises(TeleportCancelled, match="cancelled at the target"):
        pair.teleport(source, waiting)
    assert source.runs
    assert not target.runs
    with pytest.raises(TeleportCancelled):
        waiting.wait_done()


def test_a_cancel_after_the_handover_comes_too_late(pair):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    cancel = threading.Event()
    target.delay["resume"] = 0.3
    resume = target._call

    def watched(name: str) -> None:
        if name == "resume":
            cancel.set()
            waiting.cancel.set()
        resume(name)

    target._call = watched
    pair.teleport(source, waiting, cancel=cancel)
    waiting.wait_done()
    assert target.runs
    assert not source.runs


@pytest.mark.parametrize("call", ["local_blockers", "describe", "open_dirty_tracker", "stop", "save"])
def test_the_source_machine_fails(pair, call):
    source, target = running_source(pair), small(pair, "a2")
    source.fail.add(call)
    waiting = pair.wait(target)
    error = attempt(pair, source, waiting)
    assert error is not None
    assert call in str(error)
    settle(pair, source, target, waiting, error)
    assert call in waiting.wait_failure()


@pytest.mark.parametrize("call", ["check", "local_blockers", "restore"])
def test_the_target_machine_fails(pair, call):
    source, target = running_source(pair), small(pair, "a2")
    target.fail.add(call)
    waiting = pair.wait(target)
    error = attempt(pair, source, waiting)
    assert error is not None
    assert call in str(error)
    settle(pair, source, target, waiting, error)
    # It waits still: the next one arrives.
    target.fail.clear()
    source.log.clear()
    settle(pair, source, target, waiting, attempt(pair, source, waiting))


@pytest.mark.parametrize("call", ["check", "restore"])
def test_a_target_that_hangs_and_dies_in_silence(pair, call):
    """No keep-alive comes: the source gives up by itself."""
    source, target = running_source(pair), small(pair, "a2")
    target.delay[call] = 2.5
    waiting = pair.wait(target, TargetOptions(keepalive_s=60))
    with pytest.raises(TeleportError, match="silent"):
        pair.teleport(source, waiting, idle_timeout_s=0.5)
    assert source.runs
    waiting.wait_failure()
    assert not target.runs


def test_a_slow_target_that_shows_that_it_lives(pair):
    source, target = running_source(pair), small(pair, "a2")
    target.delay["check"] = 1.2
    waiting = pair.wait(target, TargetOptions(keepalive_s=0.2))
    pair.teleport(source, waiting, idle_timeout_s=0.5)
    waiting.wait_done()
    assert target.runs


def test_the_target_dies_after_the_handover(pair):
    """No RUNNING comes: uncertain, and the source stays stopped although the target never ran."""
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    channel = waiting.listener.connect()
    mark = source.mark_handed_over

    def cut() -> None:
        mark()
        channel.shutdown()

    source.mark_handed_over = cut
    with pytest.raises(TeleportUncertain, match="did not confirm") as caught:
        pair.teleport(source, waiting, channel)
    assert settle(pair, source, target, waiting, caught.value) == "nobody"
    waiting.wait_failure()


def test_running_is_lost_on_the_way(pair):
    """The target runs, the source cannot know it."""
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    channel = waiting.listener.connect()
    theirs = waiting.listener.last
    resume = target.resume

    def cut(stopped_at_ns: int, running: bool) -> int:
        theirs.shutdown()
        return resume(stopped_at_ns, running)

    target.resume = cut
    with pytest.raises(TeleportUncertain) as caught:
        pair.teleport(source, waiting, channel)
    assert settle(pair, source, target, waiting, caught.value) == "target"
    waiting.wait_done()


def test_an_answer_that_never_comes_is_uncertain_after_a_while(pair):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    target.delay["resume"] = 1.0
    with pytest.raises(TeleportUncertain, match=r"within 0\.2 s"):
        pair.teleport(source, waiting, handover_timeout_s=0.2)
    assert not source.runs
    waiting.wait_done()
    assert target.runs


# The target and strangers


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 5000,
        np.random.default_rng(1).bytes(50_000),
        m.encode(m.Handover()),
        m.encode(m.State((), 0, True)),
        b"VMFT" + b"\x01\0\0\0" + b"\xff\xff\xff\xff" + b"\0" * 4,
        m.encode(m.Hello(bytes(16), (99,), (), "vmf 99", "x")),
    ],
)
def test_rubbish_leaves_the_target_waiting(pair, rubbish):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target)
    stranger = waiting.listener.connect()
    try:
        stranger.send(rubbish)
    except TransportError:
        pass  # it hung up on us already: fine
    stranger.close()
    waiting.wait_failure()
    assert waiting.waits
    pair.teleport(source, waiting)
    waiting.wait_done()
    assert target.runs


def raw_session(waiting, *messages: m.Message):
    """A hand-made source: sends the messages and returns the channel."""
    channel = waiting.listener.connect()
    channel.set_timeout(5)
    for message in messages:
        channel.send(m.encode(message))
    return channel


def replies(channel) -> list[m.Message]:
    """What a hand-made source hears until the target hangs up."""
    connection = Connection(Role.SOURCE)
    out = []
    data = b""
    try:
        while True:
            one = bytearray(1)
            channel.recv_into(memoryview(one))
            data += one
    except TransportError:
        pass
    from vmf.teleport.protocol import frames

    del connection
    while data:
        header = frames.decode_header(data[:16], m.LIMITS)
        out.append(m.decode(header.type, data[16 : 16 + header.length]))
        data = data[16 + header.length :]
    return out


HELLO = m.Hello(bytes(16), (1,), (), "vmf", "x")
LOGIN = (HELLO, m.Authenticate("none", b""))


def offer(pages: int = 256, check_only: bool = False) -> m.Offer:
    return m.Offer({"memory_mib": 1, "devices": [["fake", 0]]}, pages, PAGE_SIZE, (), 0, check_only)


def test_pages_outside_ram_are_refused(pair):
    target = small(pair, "a2")
    waiting = pair.wait(target)
    runs = (256).to_bytes(4, "little") + (1).to_bytes(4, "little")
    channel = raw_session(waiting, *LOGIN, offer(), m.Begin(), m.Pages(1, runs))
    last = replies(channel)[-1]
    assert isinstance(last, m.Error)
    assert "beyond the RAM" in last.message
    waiting.wait_failure()


def test_pages_that_cannot_come_any_more_are_not_waited_for(pair):
    """Found by fuzzing: a lie about what was sent cost the place for as long as silence may last, here for ever."""
    target = small(pair, "a2")
    waiting = pair.wait(target, TargetOptions(idle_timeout_s=100_000.0))
    channel = raw_session(waiting, *LOGIN, offer(), m.Begin(), m.RoundEnd(1, PAGE_SIZE))
    last = replies(channel)[-1]
    assert isinstance(last, m.Error)
    assert "did not arrive" in last.message
    waiting.wait_failure()
    assert not target.runs


def test_a_source_that_ignores_the_check_is_refused(pair):
    target = small(pair, "a2")
    waiting = pair.wait(target)
    channel = raw_session(waiting, *LOGIN, offer(pages=512), m.Begin())
    last = replies(channel)[-1]
    assert isinstance(last, m.Error)
    assert "check had not passed" in last.message
    waiting.wait_failure()
    assert not target.runs


def test_an_unknown_method_is_refused(pair):
    waiting = pair.wait(small(pair, "a2"))
    last = replies(raw_session(waiting, HELLO, m.Authenticate("magic", b"")))[-1]
    assert isinstance(last, m.Error)
    assert last.code == "authentication"


def test_another_version_is_refused(pair):
    waiting = pair.wait(small(pair, "a2"))
    last = replies(raw_session(waiting, m.Hello(bytes(16), (7, 8), (), "vmf 9", "x")))[-1]
    assert isinstance(last, m.Error)
    assert last.code == "version"
    assert "same release" in last.remedy


def test_a_half_open_connection_is_dropped(pair):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target, TargetOptions(handshake_timeout_s=0.3))
    idle = waiting.listener.connect()
    assert "within 0.3 s" in waiting.wait_failure()
    idle.close()
    pair.teleport(source, waiting)
    waiting.wait_done()


def test_a_trickling_connection_is_dropped(pair):
    """Slowloris: a byte now and then is progress for the channel, but the handshake has one limit."""
    waiting = pair.wait(small(pair, "a2"), TargetOptions(handshake_timeout_s=0.5))
    slow = waiting.listener.connect()
    began = time.monotonic()
    try:
        for byte in m.encode(HELLO):
            slow.send(bytes([byte]))
            time.sleep(0.05)
    except TransportError:
        pass
    waiting.wait_failure()
    assert time.monotonic() - began < 2


def test_a_second_source_is_told_busy(pair):
    source, target = running_source(pair), small(pair, "a2")
    other = small(pair, "b")
    other._owner = {}  # a machine of its own
    waiting = pair.wait(target)
    source.delay["open_dirty_tracker"] = 1.5
    done: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: done.append(attempt(pair, source, waiting)))
    thread.start()
    time.sleep(0.3)
    with pytest.raises(TeleportError, match="receiving another teleport") as caught:
        pair.teleport(other, waiting)
    assert caught.value.code == "busy"
    thread.join()
    assert done == [None]
    waiting.wait_done()


def test_a_flood_of_connections_leaves_the_target_waiting(pair):
    source, target = running_source(pair), small(pair, "a2")
    waiting = pair.wait(target, TargetOptions(handshake_timeout_s=0.3))
    flood = [waiting.listener.connect() for _ in range(60)]
    time.sleep(0.8)
    for channel in flood:
        channel.close()
    deadline = time.monotonic() + 10
    while (error := attempt(pair, source, waiting)) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert error is None
    waiting.wait_done()


def test_a_target_that_speaks_rubbish(pair):
    source = running_source(pair)
    ours, theirs = socket.socketpair()
    from vmf.testing.teleport import SocketChannel

    theirs.sendall(b"220 mail.example ESMTP\r\n")
    with pytest.raises(RemoteProtocolError, match="does not speak vmf's teleport protocol"):
        pair.teleport(source, None, SocketChannel(ours, "source"))
    theirs.close()
    assert source.runs


def test_aborted_arrivals_leave_no_trace(pair):
    """RAM of a failed session must not shine through in the next one, where those pages are zero."""
    source, target = running_source(pair), small(pair, "a2")
    target.fail.add("restore")
    waiting = pair.wait(target)
    assert attempt(pair, source, waiting) is not None
    waiting.wait_failure()
    source.memory.buffer[: 32 * PAGE_SIZE] = bytes(32 * PAGE_SIZE)
    target.fail.clear()
    expected = bytes(source.memory.buffer)
    pair.teleport(source, waiting)
    waiting.wait_done()
    assert bytes(target.memory.buffer) == expected


def test_a_machine_that_was_handed_over_is_never_discarded(pair):
    """`resume` must not fail; if it does all the same, the target does not go back to waiting over the machine."""
    source, target = running_source(pair), small(pair, "a2")
    target.fail.add("resume")
    waiting = pair.wait(target)
    with pytest.raises(TeleportUncertain):
        pair.teleport(source, waiting)
    with pytest.raises(VmfError, match="resume fails"):
        waiting.wait_done()
    assert "discard_arrival" not in target.log
    assert not source.runs


def test_interrupted_between_marking_and_sending(pair):
    """A machine that was told to let go is not started again, even if HANDOVER never left."""
    source, target = running_source(pair), small(pair, "a2")

    def interrupted() -> None:
        source.log.append("mark_handed_over")
        raise KeyboardInterrupt

    source.mark_handed_over = interrupted
    waiting = pair.wait(target)
    with pytest.raises(TeleportUncertain):
        pair.teleport(source, waiting)
    assert not source.runs
    waiting.wait_failure()
    assert not target.runs


def test_a_target_that_lives_but_never_gets_ready_does_not_hold_the_guest(pair):
    """Its keep-alives show that it lives; the guest, which stands still, is not kept waiting for ever."""
    source, target = running_source(pair), small(pair, "a2")
    target.delay["restore"] = 2.5
    waiting = pair.wait(target, TargetOptions(keepalive_s=0.1))
    with pytest.raises(TeleportError, match="did not answer within"):
        pair.teleport(source, waiting, idle_timeout_s=0.5, max_downtime_ms=100)
    assert source.runs
    waiting.wait_failure()
    assert not target.runs
