"""A proxy between a source and a target that knows the frames of a teleport and does harm at any of them.

    with FaultProxy(port, Fault("cut", "HANDOVER")) as proxy:
        client.teleport("127.0.0.1", proxy.port)

Theory of operation. The first connection is the teleport; its frames are cut out of the byte stream in both directions
and passed on one at a time, so a fault happens at a message and not at whatever a `recv` returned. Later connections
(other lanes of the teleport, questions) are passed on as they come. Messages are named as in the protocol's tables; the
n-th one of a name is meant, because rounds and keep-alives repeat. Inside TLS (`tls`) the harm is done to the encrypted
records of the message (`vmf.testing.wires`).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from attrs import define, field, frozen

from vmf.errors import VmfError
from vmf.teleport.protocol import frames
from vmf.teleport.protocol import messages as m
from vmf.testing.wires import CHUNK, Wire, wires

DELAY_S = 0.3
SOURCE, TARGET = "source", "target"

CONVERSATION = (
    "HELLO", "WELCOME", "AUTHENTICATE", "AUTHENTICATED", "OFFER", "CHECKED", "PING", "PONG", "BEGIN", "PAGES",
    "ROUND_END", "ROUND_ACK", "PAUSED", "STATE", "READY", "HANDOVER", "RUNNING", "DONE",
)  # fmt: skip
"""Every message of a teleport over one channel, in order (ZEROS and further rounds apart)."""

KINDS = (
    "pass", "kill-source", "kill-target", "kill-source-after", "kill-target-after", "cut", "cut-after", "truncate",
    "delay", "drop", "swap", "duplicate", "flip",
)  # fmt: skip
"""What can happen at a message: nothing; SIGKILL of one side before or after it is passed on; the connection cut before
or after it, or in its middle; held up; swallowed; sent after the next one; sent twice; one bit of it inverted."""


@frozen
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: one of `KINDS`.
        message: the name of the message at which it happens.
        nth: which one of that name, from 1.
    """

    kind: str
    message: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.message}" + (f" #{self.nth}" if self.nth > 1 else "")


@define
class _Frame:
    name: str
    data: bytes
    bulk: int = 0


@define(eq=False)
class FaultProxy:
    """Passes connections on to `target`, a port on this host.

    Attributes:
        target: where to.
        fault: what goes wrong.
        kill: called with "source" or "target" where that side shall die; returns when it is dead.
        seen: (side that said it, name) of every frame that came, in order.
        happened: set when the fault was done.
        deaf: connections are refused: nobody can be asked.
        tls: the teleport is one over TLS; a directory with certificates of both kinds that both sides trust.
    """

    target: int
    fault: Fault = Fault("pass", "")
    kill: Callable[[str], None] = lambda side: None
    seen: list[tuple[str, str]] = field(factory=list)
    happened: threading.Event = field(factory=threading.Event)
    deaf: bool = False
    tls: Path | None = None
    _listener: socket.socket = field(init=False)
    _first: bool = True
    _count: dict[str, int] = field(factory=dict)
    _open: list[socket.socket] = field(factory=list)
    _lock: threading.Lock = field(factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def port(self) -> int:
        """Where the source connects."""
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection that is open."""
        with self._lock:
            ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.deaf:
                    raise ConnectionRefusedError
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [near, far]
                first, self._first = self._first, False
            try:
                ends = wires(near, far, self.tls if first else None)
            except (OSError, EOFError):
                self.cut()
                continue
            pump = self._frames if first else self._bytes
            for side, source, sink in ((SOURCE, *ends), (TARGET, *reversed(ends))):
                threading.Thread(target=pump, args=(side, source, sink), name=f"proxy-{side}", daemon=True).start()

    def _bytes(self, side: str, source: Wire, sink: Wire) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                sink.send(data)
        _end(source, sink)

    # One direction of the teleport

    def _frames(self, side: str, source: Wire, sink: Wire) -> None:
        held = b""
        with contextlib.suppress(OSError, EOFError, VmfError):
            for frame in _read_frames(source):
                self.seen.append((side, frame.name))
                with self._lock:
                    number = self._count[frame.name] = self._count.get(frame.name, 0) + 1
                struck = frame.name == self.fault.message and number == self.fault.nth
                if struck and self.fault.kind == "swap":
                    held = sink.encode(frame.data + _read(source, frame.bulk))
                    self.happened.set()
                    if not source.wait(1.0):  # if nothing follows, late is all that it can be
                        sink.socket.sendall(held)
                        held = b""
                    continue
                if struck and not self._strike(frame, source, sink):
                    continue
                _splice(source, sink, frame)
                if struck:
                    self._aftermath(frame)
                if held:
                    sink.socket.sendall(held)
                    held = b""
        _end(source, sink)

    def _strike(self, frame: _Frame, source: Wire, sink: Wire) -> bool:
        """Before the frame is passed on; whether it is passed on by the caller."""
        kind = self.fault.kind
        if kind in ("kill-source", "kill-target"):
            self.kill(kind.removeprefix("kill-"))
            self.happened.set()
            raise EOFError  # as if it had died before it said, or heard, this
        elif kind == "delay":
            time.sleep(DELAY_S)
        elif kind == "cut":
            self.happened.set()
            self.cut()
            raise EOFError
        elif kind in ("truncate", "drop", "duplicate", "flip"):
            bulk = _read(source, min(frame.bulk, 1000) if kind == "truncate" else frame.bulk)
            data = sink.encode(frame.data) + sink.encode(bulk)
            self.happened.set()  # whoever hears it may break the connection before it has all been said
            if kind == "truncate":
                sink.socket.sendall(data[: max(1, len(data) // 2)])
                self.cut()
                raise EOFError
            if kind == "duplicate":
                sink.socket.sendall(data + data)
            elif kind == "flip":
                spoiled = bytearray(data)
                spoiled[len(data) - len(bulk) - 1 if self.tls is None else -1] ^= 0x10
                sink.socket.sendall(spoiled)
            return False
        if not kind.endswith("-after"):
            self.happened.set()
        return True

    def _aftermath(self, frame: _Frame) -> None:
        """After the frame was passed on."""
        kind = self.fault.kind
        if kind in ("kill-source-after", "kill-target-after"):
            time.sleep(0.02)  # for it to arrive and be acted upon
            self.kill(kind.removeprefix("kill-").removesuffix("-after"))
        elif kind == "cut-after":
            time.sleep(0.02)
            self.cut()
        self.happened.set()


def _read_frames(source: Wire) -> Iterator[_Frame]:
    """Frames as they come; the caller reads the bulk of each before the next."""
    while True:
        head = _read(source, frames.HEADER_SIZE)
        header = frames.decode_header(head, m.LIMITS)
        body = _read(source, header.length)
        kind = m.BY_TYPE[header.type]
        bulk = m.decode(header.type, body).bulk if kind is m.Pages else 0
        yield _Frame(kind.word(), head + body, bulk)


def _read(source: Wire, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = source.recv(min(CHUNK, count - len(data)))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _splice(source: Wire, sink: Wire, frame: _Frame) -> None:
    sink.send(frame.data)
    count = frame.bulk
    while count:
        data = source.recv(min(CHUNK, count))
        if not data:
            raise EOFError
        sink.send(data)
        count -= len(data)


def _end(*ends: Wire) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.socket.shutdown(socket.SHUT_RDWR)
