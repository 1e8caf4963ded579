"""The serial console of a machine's process: three sockets, and the log file.

`console.sock` first replays the last 64 KiB, `console-live.sock` does not; after that both give everything the guest
writes, and take what is typed, as raw bytes. `console-client.sock` is that of `vmf console`: the same in frames
(`vmf.control.console_frames`), so that the client learns what of its input the machine has taken, why it is refused
and how the machine ended. Several may be attached, all may type. What is replayed holds no questions to a terminal.

Theory of operation. The vCPU thread only appends to a buffer and, if nobody has yet, wakes this thread, which does
everything else: scrollback, log and sockets. As one thread decides both what has been replayed to a new client and
what it gets next, nothing is lost or doubled in between. A client that does not read loses its oldest output beyond
`CLIENT_BACKLOG` and is told so in the stream; it never holds up the guest. Input that the machine does not take stays
here: raw bytes until the console ends, with their sender not read any further, framed ones until their sender leaves
and is told how many were taken.

Descriptors: a console is refused, with the reason, when fewer than `sockets.RESERVED` would be left for the machine's
own work. Where accepting itself finds none, the spare one that `sockets.Acceptor` keeps is given for the refusal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vmf.control import console_frames as frames
from vmf.control import sockets
from vmf.control.terminal_queries import without_queries
from vmf.machine.tenure import MachinePaths
from vmf.reading import open_to_append

log = logging.getLogger("vmf.console")

SCROLLBACK = 64 << 10
CLIENT_BACKLOG = 1 << 20
LOG_LIMIT = 64 << 20
MAX_CLIENTS = 32
INPUT_RETRY_SECONDS = 0.05
FLUSH_SECONDS = 1.0


class _Client:
    """Whoever is attached, to a raw socket."""

    def __init__(self, connection: socket.socket, replay: bytes) -> None:
        self.socket = connection
        self.output = bytearray(replay)
        """What the guest wrote and is not in `wire` yet: of this the oldest is left out when there is too much."""
        self.wire = bytearray()
        self.input = b""
        self.reading = True
        """False after the client has shut down its sending side."""
        self.listening = True
        """False after it was found to read no more. What it sent before that is still typed."""
        self.told_the_end = False
        self.registered = 0

    @property
    def wants_input(self) -> bool:
        """Whether its socket is to be read now."""
        return self.reading and not self.input

    @property
    def has_gone(self) -> bool:
        """Whether it has closed its socket, and not just its sending side."""
        poll = select.poll()
        poll.register(self.socket, 0)  # POLLHUP is reported without being asked for
        return bool(poll.poll(0))

    def fill(self) -> bool:
        """Have something on the wire; False when there is nothing."""
        if not self.wire and self.output:
            self.wire += self._wrapped(bytes(self.output[:65536]))
            del self.output[:65536]
        return bool(self.wire)

    def _wrapped(self, output: bytes) -> bytes:
        return output

    def received(self, data: bytes) -> None:
        self.input += data

    def took(self, count: int) -> None:
        """The machine has taken that much of its input."""
        self.input = self.input[count:]

    def refuse(self, reason: str, remedy: str) -> None:
        self.wire += f"\r\n[vmf: {reason} {remedy}]\r\n".encode()

    def end(self, state: str) -> None:
        """The console ends after what is still to be sent."""


class _FramedClient(_Client):
    """`vmf console`."""

    def __init__(self, connection: socket.socket, scrollback: Callable[[], bytes]) -> None:
        super().__init__(connection, b"")
        self._frames = frames.FrameBuffer()
        self._scrollback = scrollback
        self.attached = False
        self.leaving = False

    @property
    def wants_input(self) -> bool:
        return self.reading and not self.leaving

    def _wrapped(self, output: bytes) -> bytes:
        return frames.frame(frames.OUTPUT, output)

    def received(self, data: bytes) -> None:
        """Raises FrameError."""
        for kind, content in self._frames.feed(data):
            if kind == frames.ATTACH and not self.attached:
                self.attached = True
                if content == b"1":
                    self.output[:0] = self._scrollback()
            elif kind == frames.INPUT and len(self.input) + len(content) <= frames.WINDOW:
                self.input += content
            elif kind == frames.LEAVE:
                self.leaving = True
            else:
                raise frames.FrameError(f"an unexpected frame {kind!r}")

    def took(self, count: int) -> None:
        super().took(count)
        self.wire += frames.taken(count)

    def refuse(self, reason: str, remedy: str) -> None:
        self.wire += frames.frame(frames.REFUSED, f"{reason}\n{remedy}".encode())

    def end(self, state: str) -> None:
        while self.output:
            self.wire += self._wrapped(bytes(self.output[:65536]))
            del self.output[:65536]
        self.wire += frames.frame(frames.END, state.encode())


_Maker = Callable[[socket.socket], _Client]


class ConsoleServer:
    """Serves one machine's console. `output` is the machine's console listener."""

    def __init__(self, type_input: Callable[[bytes], int], paths: MachinePaths) -> None:
        """`type_input` gives input to the machine and says how many bytes it took."""
        self._type = type_input
        self._scrollback = bytearray()
        self._lock = threading.Lock()
        self._incoming = bytearray()
        self._woken = False
        self._closing = False
        self._last_state = ""
        self._ended = False
        self._clients: set[_Client] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, "wake")
        self._acceptors: list[tuple[sockets.Acceptor, _Maker]] = []
        self._fresh = self._listen(paths)
        """Listeners that the console thread is to serve from now on; guarded by `_lock`."""
        self._replace_listeners()
        self._log_path = paths.console_log
        self._log = -1
        self._log_size = 0
        self._open_log()
        self._thread = threading.Thread(target=self._run, name="vmf-console", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def output(self, data: bytes) -> None:
        """The guest wrote; any thread, never blocks."""
        with self._lock:
            self._incoming += data
            if self._woken:
                return
            self._woken = True
        self._wake()

    def _listen(self, paths: MachinePaths) -> list[tuple[sockets.Acceptor, _Maker]]:
        makers: dict[Path, _Maker] = {
            paths.console_socket: lambda connection: _Client(connection, self._replay()),
            paths.console_live_socket: lambda connection: _Client(connection, b""),
            paths.console_client_socket: lambda connection: _FramedClient(connection, self._replay),
        }
        with contextlib.ExitStack() as stack:
            made = [
                (sockets.Acceptor(stack.enter_context(sockets.listen(path))), maker) for path, maker in makers.items()
            ]
            stack.pop_all()
        self._places = paths
        self._paths = tuple(makers)
        self._made = [path.stat() for path in self._paths]
        return made

    def in_place(self) -> bool:
        """Whether clients find the sockets at their paths."""
        return all(sockets.is_at(path, made) for path, made in zip(self._paths, self._made, strict=True))

    def move(self, runtime: Path) -> None:
        """Listen on new sockets there; who is attached stays. Raises ControlError."""
        fresh = self._listen(self._places.at(runtime))
        with self._lock:
            self._fresh = fresh
        self._wake()

    def _replace_listeners(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        for acceptor, _ in self._acceptors:
            self._selector.unregister(acceptor.socket)
            acceptor.close()
        self._acceptors = fresh
        for number, (acceptor, _) in enumerate(fresh):
            acceptor.socket.setblocking(False)
            self._selector.register(acceptor.socket, selectors.EVENT_READ, number)

    def close(self, last_state: str = "") -> None:
        """Log and send what is left, then end every connection; idempotent.

        Args:
            last_state: of the machine, for the clients: why there is no console any more.
        """
        self._last_state = last_state
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(FLUSH_SECONDS + 1)
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                with contextlib.suppress(BlockingIOError):  # full: it is awake
                    os.write(self._wake_writer, b"!")

    # -- the console thread

    def _run(self) -> None:
        try:
            while not self._closing:
                stuck = any(client.input for client in self._clients)
                self._turn(INPUT_RETRY_SECONDS if stuck else None)
            deadline = time.monotonic() + FLUSH_SECONDS
            self._distribute()
            for client in list(self._clients):
                self._end(client, self._last_state)
            while any(client.output or client.wire for client in self._clients) and time.monotonic() < deadline:
                self._turn(0.05)
        finally:
            for client in list(self._clients):
                self._drop(client)
            for acceptor, _ in [*self._acceptors, *self._fresh]:
                acceptor.close()
            self._selector.close()
            with self._lock:
                # From here on nobody may write to that descriptor: its number may be another's already.
                self._ended = True
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            if self._log >= 0:
                os.close(self._log)

    def _turn(self, timeout: float | None) -> None:
        for key, events in self._selector.select(timeout):
            if key.data == "wake":
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 4096)
                self._replace_listeners()
                self._distribute()
            elif isinstance(key.data, _Client):
                if events & selectors.EVENT_READ:
                    self._receive(key.data)
                if key.data in self._clients and events & selectors.EVENT_WRITE:
                    self._send(key.data)
            elif key.fileobj is self._acceptors[key.data][0].socket:  # not one that was replaced in this turn
                self._accept(*self._acceptors[key.data])
        for client in list(self._clients):
            if client.input and not self._closing:
                self._offer(client)
            if isinstance(client, _FramedClient) and client.leaving:
                client.input = b""  # its user is told that this was not delivered
                self._end(client, "")
                client.listening = client.listening and bool(client.wire)
                client.reading = False
            if client.input or client.reading or client.listening:
                self._register(client)
            else:
                self._drop(client)

    def _distribute(self) -> None:
        with self._lock:
            data, self._incoming = bytes(self._incoming), bytearray()
            self._woken = False
        if not data:
            return
        self._write_log(data)
        self._scrollback += data
        if len(self._scrollback) > 2 * SCROLLBACK:
            del self._scrollback[:-SCROLLBACK]
        for client in [each for each in self._clients if each.listening]:
            if isinstance(client, _FramedClient) and not client.attached:
                continue  # this comes with the scrollback, or has not been asked for
            client.output += data
            if len(client.output) > CLIENT_BACKLOG:
                lost = len(client.output) - CLIENT_BACKLOG // 2
                client.output[:lost] = f"\r\n[vmf: {lost} bytes of output left out]\r\n".encode()
            self._send(client)

    def _replay(self) -> bytes:
        return without_queries(bytes(self._scrollback[-SCROLLBACK:]))

    def _accept(self, acceptor: sockets.Acceptor, make: _Maker) -> None:
        connection, reason, remedy = acceptor.accept(sockets.RESERVED)
        if connection is None:
            return
        if not sockets.may_control(connection):
            connection.close()
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._forget_the_gone()
        if not reason and len(self._clients) >= MAX_CLIENTS:
            reason = f"{MAX_CLIENTS} consoles are attached to this machine already."
            remedy = "Detach one of them."
        connection.setblocking(False)
        # What is in `_incoming` still belongs to everybody's future, so to the new client's too.
        client = make(connection)
        if reason:
            client.output.clear()
            client.refuse(reason, remedy)
            self._send(client)
            connection.close()
            acceptor.refill()
            return
        self._clients.add(client)
        self._send(client)

    def _forget_the_gone(self) -> None:
        """Those that shut down their sending side first and have gone since: the next output would show it."""
        for client in [each for each in self._clients if not each.reading and not each.input and each.has_gone]:
            self._drop(client)

    def _send(self, client: _Client) -> None:
        try:
            while client.fill():
                del client.wire[: client.socket.send(client.wire)]
        except BlockingIOError:
            pass
        except OSError:
            # It may have typed something and gone: that is read until its end.
            client.listening = False
            client.output.clear()
            client.wire.clear()

    def _receive(self, client: _Client) -> None:
        try:
            data = client.socket.recv(4096)
            client.received(data)
        except BlockingIOError:
            return
        except (OSError, frames.FrameError) as error:
            log.debug("A console client is dropped: %s.", error)
            self._drop(client)
            return
        client.reading = bool(data)
        if not data and client.has_gone:
            client.listening = False

    def _end(self, client: _Client, state: str) -> None:
        """Say that no more comes, after what is still to be sent."""
        if client.listening and not client.told_the_end:
            client.told_the_end = True
            client.end(state)
            self._send(client)

    def _offer(self, client: _Client) -> None:
        try:
            count = self._type(client.input)
        except Exception:
            # Not running (any more): it stays here, and the client is told at the end that it was not delivered.
            log.debug("Console input is not taken.", exc_info=True)
            return
        if count:
            client.took(count)
            if client.listening:
                self._send(client)

    def _register(self, client: _Client) -> None:
        if client not in self._clients:
            return
        wanted = (selectors.EVENT_READ if client.wants_input else 0) | (
            selectors.EVENT_WRITE if client.output or client.wire else 0
        )
        if wanted == client.registered:
            return
        if not client.registered:
            self._selector.register(client.socket, wanted, client)
        elif not wanted:
            self._selector.unregister(client.socket)
        else:
            self._selector.modify(client.socket, wanted, client)
        client.registered = wanted

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        if client.registered:
            self._selector.unregister(client.socket)
            client.registered = 0
        client.socket.close()

    # -- the log

    def _open_log(self) -> None:
        """Begin a new log; the previous one is kept as `console.log.1`."""
        try:
            if self._log >= 0:
                os.close(self._log)
                self._log = -1
            if self._log_path.exists():
                os.replace(self._log_path, self._log_path.with_name(self._log_path.name + ".1"))
            self._log = open_to_append(self._log_path)
            self._log_size = 0
        except OSError as error:
            self._stop_logging(error)

    def _write_log(self, data: bytes) -> None:
        if self._log < 0:
            return
        if self._log_size + len(data) > LOG_LIMIT:
            self._open_log()
        view = memoryview(data)
        try:
            while view and self._log >= 0:
                view = view[os.write(self._log, view) :]
            self._log_size += len(data)
        except OSError as error:
            self._stop_logging(error)

    def _stop_logging(self, error: OSError) -> None:
        # The guest does not stop because our disk is full.
        log.warning("The console log %s is not written any more: %s.", self._log_path, error.strerror or error)
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
