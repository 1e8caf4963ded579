"""The control socket: what a client may send to a machine's process, and what a process may answer."""

from __future__ import annotations

import functools
import itertools
import json
import queue
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fuzzing import Choices, Finding, Target
from vmf.control import rpc
from vmf.control.server import METHODS, ControlServer, _Connection
from vmf.errors import InvalidStateError, VmfError


class Machine:
    """Answers everything, or refuses it properly."""

    name = "vm"

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "state": "running"}

    def pause(self) -> None:
        raise InvalidStateError("it is off.", "Start it.")

    def start_teleport(self, *_positional: Any, **_named: Any) -> dict[str, Any]:
        return {}

    def trace(self, *_positional: Any) -> dict[str, Any]:
        return {}

    def add_state_listener(self, listener: Callable[[str, str], None]) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_positional, **_named: {}


@functools.cache
def _server() -> ControlServer:
    # Never started: requests are handed to its connections directly.
    return ControlServer(Machine(), Path(tempfile.mkdtemp(prefix="vmf-fuzz-")) / "control")  # type: ignore[arg-type]


@functools.cache
def _sockets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def _lines(data: bytes, cuts: list[int]) -> list[bytes] | None:
    buffer = rpc.LineBuffer(1024)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    try:
        return [line for a, b in itertools.pairwise(edges) for line in buffer.feed(data[a:b])]
    except rpc.TooLong:
        return None


def requests(data: bytes) -> None:
    """Any bytes of a client: every line with something in it is answered once, and no answer is a bug of ours."""
    choices = Choices(data)
    cuts = [choices.number(2) for _ in range(3)]
    text = choices.rest()
    lines = _lines(text, cuts)
    if lines is None:
        return
    if _lines(text, []) not in (None, lines):
        raise Finding("lines depend on how the bytes were cut")
    connection = _Connection(_server(), _sockets()[0])
    for line in lines:
        if not line.strip():
            continue
        connection._handle(line)
        while True:
            try:
                answer = json.loads(connection._queue.get(timeout=10) or b"{}")
            except queue.Empty:
                raise Finding("a request is not answered") from None
            if "method" not in answer:
                break
        if answer.get("error", {}).get("code") == rpc.INTERNAL_ERROR:
            raise Finding(answer["error"]["message"])
        if not {"result", "error"} & answer.keys():
            raise Finding("an answer is neither a result nor an error")
    if not connection._queue.empty():
        raise Finding("a request is answered twice")


def request_seeds() -> Iterator[bytes]:
    examples: Mapping[type, Any] = {str: "/x", int: 6000, float: 1.5, dict: {"tls_dir": "/x"}, bool: True}
    for method, parameters in METHODS.items():
        params = {
            name: next(examples[kind] for kind in kinds if kind in examples) for name, kinds in parameters.items()
        }
        line = rpc.encode({"id": 1, "method": method, "params": params})
        yield bytes([5, 0, 30, 0, 60, 0]) + line
        yield bytes(6) + rpc.encode({"id": "a", "method": method}) + line
    yield bytes(6) + b'[{"jsonrpc":"2.0","id":1}]\n{"jsonrpc":"2.0","id":1e400}\n{"a":[[[[[[[[' + b"\n"


def answers(data: bytes) -> None:
    """Any line that a machine's process could answer: an error of vmf's own at the client, never another."""
    try:
        message = rpc.decode(data)
    except (ValueError, TypeError):
        return
    error = rpc.error_from(message.get("error"))
    if not isinstance(error, VmfError):
        raise Finding("an error that is none of ours")
    str(error)
    rpc.encode({"id": 1, "error": rpc.error_object(error)})


def answer_seeds() -> Iterator[bytes]:
    from vmf.errors import TeleportBlocked, TeleportUncertain
    from vmf.teleport.check import Blocker

    for error in (
        InvalidStateError("it is off.", "Start it."),
        TeleportBlocked("no.", "Change it.", (Blocker("memory", "1", "2", "Set it."),)),
        TeleportUncertain("unclear.", "Look.", "00ff"),
    ):
        yield rpc.encode({"id": 1, "error": rpc.error_object(error)}).strip()
    yield rpc.encode({"id": 1, "error": {"code": 1, "message": "x"}}).strip()


TARGETS = (
    Target("requests", requests, request_seeds, 1024, 1.0),
    Target("answers", answers, answer_seeds, 1024, 0.5),
)
