"""The control socket: every method, errors as the same exceptions, hostile and lazy clients."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.control import rpc, sockets
from vmf.control.client import ControlClient
from vmf.control.server import MAX_QUEUED, ControlServer
from vmf.errors import (
    ControlError,
    InvalidStateError,
    NotFoundError,
    OperationCancelled,
    TeleportBlocked,
    TeleportCancelled,
    TeleportError,
    TeleportUncertain,
    VmfError,
)
from vmf.machine.home import Home


def talk(home: Home, *lines: bytes, answers: int) -> list[dict[str, Any]]:
    """Send raw lines, read so many messages."""
    with sockets.connect(home.paths("vm").control_socket, 10) as connection:
        connection.sendall(b"".join(line + b"\n" for line in lines))
        with connection.makefile("rb") as file:
            return [json.loads(file.readline()) for _ in range(answers)]


def test_every_simple_method(client: ControlClient, machine: Any) -> None:
    assert client.info() == {"name": "vm", "state": "running"}
    client.pause()
    assert machine.state == "paused"
    client.resume()
    assert not client.cancel_teleport()
    assert client.teleport_status()["active"] is False
    client.power_off()
    assert machine.state == "poweredoff"


def test_a_check_moves_nothing(client: ControlClient, machine: Any) -> None:
    assert client.check_teleport("there", 1) == {"ok": True, "target": "tcp:there:1", "blockers": []}
    answer = client.check_teleport("blocked", 1)
    assert not answer["ok"]
    assert [blocker["field"] for blocker in answer["blockers"]] == ["memory"]
    assert machine.state == "running"
    with pytest.raises(ControlError, match=r"teleport\.check: port 0"):
        client.check_teleport("there", 0)


def test_errors_arrive_as_the_same_class(client: ControlClient) -> None:
    with pytest.raises(InvalidStateError) as caught:
        client.resume()
    assert caught.value.message == "machine vm is running."
    assert caught.value.remedy == "Do something else."
    with pytest.raises(TeleportBlocked) as blocked:
        client.teleport("blocked", 1)
    assert [str(blocker) for blocker in blocked.value.blockers] == ["memory: 1 at the source, 2 at the target. Set it."]
    with pytest.raises(VmfError, match="ZeroDivisionError"):
        client.reset()
    assert client.info()["state"] == "running"


def test_socket_is_private(home: Home, server: ControlServer) -> None:
    path = home.paths("vm").control_socket
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_teleport_streams_progress_then_the_summary(client: ControlClient) -> None:
    seen: list[Any] = []
    summary = client.teleport("there", 6000, max_downtime_ms=7, timeout_s=1.5, progress=seen.append)
    assert [event["round"] for event in seen] == [1, 2, 3]
    assert summary["asked"] == ["there", 6000, "tcp", 7, 1.5]


def test_teleport_is_cancelled_from_another_connection(home: Home, client: ControlClient, machine: Any) -> None:
    def cancel(event: Any) -> None:
        if event["round"] == 3:
            with ControlClient.of(home, "vm") as other:
                assert other.teleport_status()["active"]
                with pytest.raises(TeleportError, match="already"):
                    other.teleport("there", 1)
                assert other.cancel_teleport()

    with pytest.raises(TeleportCancelled):
        client.teleport("slow", 6000, progress=cancel)
    assert machine.state == "running"


def test_teleport_is_cancelled_on_its_own_connection(home: Home, server: ControlServer) -> None:
    teleport = {"id": "t", "method": "teleport", "params": {"host": "slow", "port": 1}}
    with sockets.connect(home.paths("vm").control_socket, 10) as connection, connection.makefile("rb") as file:
        connection.sendall(rpc.encode(teleport))
        first = json.loads(file.readline())
        assert first["method"] == "teleport.progress"
        assert first["params"]["request"] == "t"
        connection.sendall(rpc.encode({"id": 2, "method": "teleport.cancel"}))
        answers: dict[Any, Any] = {}
        while len(answers) < 2:
            message = json.loads(file.readline())
            if "id" in message:
                answers[message["id"]] = message
    assert answers[2]["result"] == {"cancelled": True}
    assert answers["t"]["error"]["data"]["code"] == "teleport-cancelled"


def test_teleport_goes_on_when_its_client_has_gone(home: Home, server: ControlServer, machine: Any) -> None:
    with sockets.connect(home.paths("vm").control_socket, 10) as connection:
        connection.sendall(rpc.encode({"id": 1, "method": "teleport", "params": {"host": "slow", "port": 1}}))
        connection.recv(100)
    with ControlClient.of(home, "vm") as other:
        time.sleep(0.1)
        assert other.info()["state"] == "teleporting"
        assert other.cancel_teleport()
    deadline = time.monotonic() + 60
    while machine.state != "running":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_subscribers_get_every_change_and_teleport(home: Home, client: ControlClient) -> None:
    seen: list[Any] = []
    subscribed = threading.Event()

    def listen() -> None:
        with ControlClient.of(home, "vm") as other:
            for event in other.events():
                seen.append(event)
                if event == {"event": "state", "old": "teleporting", "new": "teleported"}:
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:  # until the subscription stands
        client.pause()
        client.resume()
        time.sleep(0.01)
    subscribed.set()
    client.teleport("there", 1)
    thread.join(60)
    assert not thread.is_alive()
    rounds = [event["progress"]["round"] for event in seen if event["event"] == "teleport"]
    assert rounds == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", rpc.PARSE_ERROR),
        (b"\xff\xfe", rpc.PARSE_ERROR),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "info", "params": {"x": NaN}}', rpc.PARSE_ERROR),
        (b"[" * 100_000, rpc.PARSE_ERROR),
        (b"[]", rpc.INVALID_REQUEST),
        (b"7", rpc.INVALID_REQUEST),
        (b'{"id": 1, "method": "info"}', rpc.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "method": "info"}', rpc.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": true, "method": "info"}', rpc.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": {}, "method": "info"}', rpc.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "infos"}', rpc.METHOD_NOT_FOUND),
        (b'{"jsonrpc": "2.0", "id": 1, "method": ["info"]}', rpc.METHOD_NOT_FOUND),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "info", "params": []}', rpc.INVALID_PARAMS),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "info", "params": {"a": 1}}', rpc.INVALID_PARAMS),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": "h"}}', rpc.INVALID_PARAMS),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": 1, "port": 1}}', rpc.INVALID_PARAMS),
        (
            b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": "h", "port": true}}',
            rpc.INVALID_PARAMS,
        ),
        (
            b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": "h", "port": 0}}',
            rpc.INVALID_PARAMS,
        ),
        (
            b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": "h", "port": 1, "timeout_s":1e999}}',
            rpc.INVALID_PARAMS,
        ),
        (
            b'{"jsonrpc": "2.0", "id": 1, "method": "teleport", "params": {"host": "' + b"h" * 5000 + b'", "port": 1}}',
            rpc.INVALID_PARAMS,
        ),
    ],
)
def test_wrong_requests_are_answered_and_the_connection_lives(
    home: Home, server: ControlServer, line: bytes, code: int
) -> None:
    good = b'{"jsonrpc": "2.0", "id": 9, "method": "info"}'
    first, second = talk(home, line, good, answers=2)
    assert first["error"]["code"] == code
    assert second["result"]["state"] == "running"


def test_endless_line_ends_only_its_connection(home: Home, server: ControlServer, client: ControlClient) -> None:
    connection = sockets.connect(home.paths("vm").control_socket, 10)
    with pytest.raises(OSError):
        connection.sendall(b"x" * (64 << 20))
    connection.close()
    assert client.info()["state"] == "running"


def test_client_that_never_reads_holds_up_nobody(home: Home, server: ControlServer, client: ControlClient) -> None:
    with sockets.connect(home.paths("vm").control_socket, 10) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(rpc.encode({"id": 1, "method": "events.subscribe"}))
        time.sleep(0.2)
        began = time.monotonic()
        for _ in range(4 * MAX_QUEUED):
            server.publish({"event": "state", "old": "x" * 200, "new": "y" * 200})
        assert time.monotonic() - began < 5
        assert client.info()["state"] == "running"


def test_answer_to_poweroff_leaves_before_the_end(home: Home, machine: Any) -> None:
    with home.own("vm") as paths:
        server = ControlServer(machine, paths.control_socket)
        server.start()
        machine.start()
        ended = threading.Thread(target=lambda: (machine.wait_finished(), server.close()))
        ended.start()
        with ControlClient.of(home, "vm") as client:
            client.power_off()
            ended.join(60)
            with pytest.raises(ControlError, match="ended the connection"):
                client.info()
        assert not paths.control_socket.exists()


def test_not_running_aborted_and_unknown_are_told_apart(home: Home) -> None:
    with pytest.raises(InvalidStateError, match="not running"):
        ControlClient.of(home, "vm")
    with pytest.raises(NotFoundError):
        ControlClient.of(home, "other")
    with home.own("vm"), pytest.raises(ControlError, match="no process serves it"):
        ControlClient.of(home, "vm")


def test_no_descriptors_are_left(home: Home, server: ControlServer) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with ControlClient.of(home, "vm") as client:
        client.info()
    time.sleep(0.2)
    before = count()
    for _ in range(20):
        with ControlClient.of(home, "vm") as client:
            client.info()
    deadline = time.monotonic() + 60
    while count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count() <= before


@given(st.lists(st.binary(max_size=60).filter(lambda piece: b"\n" not in piece), max_size=6), st.integers(1, 50))
def test_lines_come_out_whole_however_they_are_cut(lines: list[bytes], step: int) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    buffer = rpc.LineBuffer(100)
    found = [line for at in range(0, len(stream), step) for line in buffer.feed(stream[at : at + step])]
    assert found == lines


@given(st.binary(max_size=400), st.integers(1, 50))
def test_line_buffer_never_holds_more_than_its_limit(stream: bytes, step: int) -> None:
    buffer = rpc.LineBuffer(50)
    too_long = max(len(line) for line in stream.split(b"\n")) > 50
    try:
        for at in range(0, len(stream), step):
            for line in buffer.feed(stream[at : at + step]):
                assert len(line) <= 50
    except rpc.TooLong:
        assert too_long
    else:
        assert not too_long


leaves = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_error_answer_becomes_a_vmf_error(data: Any) -> None:
    assert isinstance(rpc.error_from(data), VmfError)
    assert isinstance(rpc.error_from({"data": data}), VmfError)
    assert isinstance(rpc.error_from({"data": {"code": data, "message": "m", "blockers": data}}), VmfError)


def test_every_error_class_survives_the_wire() -> None:
    def classes(kind: type[VmfError]) -> list[type[VmfError]]:
        return [kind, *(each for sub in kind.__subclasses__() for each in classes(sub))]

    for kind in classes(VmfError):
        if kind.__module__.startswith("vmf"):
            again = rpc.error_from(json.loads(rpc.encode({"error": rpc.error_object(kind("what.", "do."))}))["error"])
            assert again.code == kind.code
            assert (again.message, again.remedy) == ("what.", "do.")
    uncertain = rpc.error_from(rpc.error_object(TeleportUncertain("m", "r", "cafe")))
    assert isinstance(uncertain, TeleportUncertain)
    assert uncertain.teleport_id == "cafe"


def test_switch_backend(client: ControlClient, machine: Any) -> None:
    machine.set("running")
    assert client.switch_backend("other")["after"] == "other"
    with pytest.raises(ControlError, match="backend"):
        client.call("switch_backend", {})


def test_change_medium(client: ControlClient, machine: Any) -> None:
    machine.set("running")
    client.change_medium(1, "file:/a.iso")
    assert machine.media == {1: "file:/a.iso"}
    with pytest.raises(ControlError, match="medium"):
        client.call("change_medium", {"port": 1})


def test_a_trace_shows_progress_and_can_be_cancelled_by_another_client(
    home: Home, client: ControlClient, machine: Any
) -> None:
    machine.set("running")
    seen: list[Any] = []
    assert client.trace(5, "/tmp/x", json_lines=True, progress=seen.append)["json_lines"] is True
    assert seen == [{"phase": "tracing", "instructions": 1, "wanted": 5, "per_second": 1}]

    def cancel(event: Any) -> None:
        with ControlClient.of(home, machine.name) as other:
            assert other.cancel_trace()

    assert client.trace(5000, "/tmp/x", progress=cancel)["complete"] is False


@pytest.mark.parametrize(
    "params", [{}, {"instructions": 0, "output": "/x"}, {"instructions": 1, "output": "x"}, {"instructions": True}]
)
def test_a_trace_request_must_make_sense(client: ControlClient, machine: Any, params: dict[str, Any]) -> None:
    machine.set("running")
    with pytest.raises(ControlError, match="trace"):
        client.call("trace", params)


def test_a_long_operation_is_cancelled_by_another_client(home: Home, client: ControlClient, machine: Any) -> None:
    machine.set("running")

    def notified(method: str, content: Any) -> None:
        assert method == "snapshot.progress"
        with ControlClient.of(home, machine.name) as other:
            assert other.cancel_operation() == "the snapshot"

    with pytest.raises(OperationCancelled, match="'s'"):
        client.call("snapshot", {"name": "s"}, notified=notified)


@pytest.mark.parametrize("method", ["snapshot", "trace"])
def test_nobody_waits_for_it_so_it_ends(home: Home, server: ControlServer, machine: Any, method: str) -> None:
    """The guest stands still for a snapshot, and is slow for a trace: its client was killed."""
    machine.set("running")
    begun = threading.Event()
    connection = sockets.connect(server.path, 5)
    params = {"snapshot": {"name": "s"}, "trace": {"instructions": 5000, "output": "/tmp/x"}}[method]
    connection.sendall(rpc.encode({"id": 1, "method": method, "params": params}))
    assert connection.recv(100)
    begun.set()
    connection.close()
    ended = machine.operation_cancelled if method == "snapshot" else machine.trace_cancelled
    assert ended.wait(20)
    if method == "snapshot":
        assert "has gone" in machine.why
