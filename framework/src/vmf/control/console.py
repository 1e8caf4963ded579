"""The serial console of a machine's process: raw bytes on two sockets, and the log file.

`console.sock` first replays the last 64 KiB, `console-live.sock` does not; after that both give everything the guest
writes, and take what is typed. Any number may be attached, all may type.

Theory of operation. The vCPU thread only appends to a buffer and, if nobody has yet, wakes this thread, which does
everything else: scrollback, log and sockets. As one thread decides both what has been replayed to a new client and
what it gets next, nothing is lost or doubled in between. A client that does not read loses its oldest output beyond
`CLIENT_BACKLOG` and is told so in the stream; it never holds up the guest. Input that the machine has no room for
stays here, and its sender is not read until it has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vmf.control import sockets

log = logging.getLogger("vmf.console")

SCROLLBACK = 64 << 10
CLIENT_BACKLOG = 1 << 20
LOG_LIMIT = 64 << 20
MAX_CLIENTS = 32
INPUT_RETRY_SECONDS = 0.05
FLUSH_SECONDS = 1.0


class _Client:
    def __init__(self, connection: socket.socket, replay: bytes) -> None:
        self.socket = connection
        self.output = bytearray(replay)
        self.input = b""
        self.reading = True
        """False after the client has shut down its sending side."""
        self.listening = True
        """False after it was found to read no more. What it sent before that is still typed."""
        self.registered = 0


class ConsoleServer:
    """Serves one machine's console. `output` is the machine's console listener."""

    def __init__(self, type_input: Callable[[bytes], int], replaying: Path, live: Path, log_path: Path) -> None:
        self._type = type_input
        self._scrollback = bytearray()
        self._lock = threading.Lock()
        self._incoming = bytearray()
        self._woken = False
        self._closing = False
        self._ended = False
        self._clients: set[_Client] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, "wake")
        self._listeners: list[tuple[socket.socket, bool]] = []
        self._fresh = self._listen(replaying, live)
        """Listeners that the console thread is to serve from now on; guarded by `_lock`."""
        self._replace_listeners()
        self._log_path = log_path
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

    def _listen(self, replaying: Path, live: Path) -> list[tuple[socket.socket, bool]]:
        made = [(sockets.listen(replaying), True)]
        try:
            made.append((sockets.listen(live), False))
        except BaseException:
            made[0][0].close()
            raise
        self._paths = (replaying, live)
        self._made = [path.stat() for path in self._paths]
        return made

    def in_place(self) -> bool:
        """Whether clients find the sockets at their paths."""
        return all(sockets.is_at(path, made) for path, made in zip(self._paths, self._made, strict=True))

    def move(self, runtime: Path) -> None:
        """Listen on new sockets there; who is attached stays. Raises ControlError."""
        replaying, live = (runtime / path.name for path in self._paths)
        fresh = self._listen(replaying, live)
        with self._lock:
            self._fresh = fresh
        self._wake()

    def _replace_listeners(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        for listener, _ in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners = fresh
        for listener, replay in fresh:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, replay)

    def close(self) -> None:
        """Log and send what is left, then end every connection; idempotent."""
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
            while any(client.output for client in self._clients) and time.monotonic() < deadline:
                self._turn(0.05)
        finally:
            for client in list(self._clients):
                self._drop(client)
            for listener, _ in [*self._listeners, *self._fresh]:
                listener.close()
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
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._accept(key.fileobj, bool(key.data))
        for client in list(self._clients):
            if client.input:
                self._offer(client)
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
            client.output += data
            if len(client.output) > CLIENT_BACKLOG:
                lost = len(client.output) - CLIENT_BACKLOG // 2
                client.output[:lost] = f"\r\n[vmf: {lost} bytes of output left out]\r\n".encode()
            self._send(client)

    def _accept(self, listener: socket.socket, replay: bool) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS or not sockets.may_control(connection):
            connection.close()
            return
        # What is in `_incoming` still belongs to everybody's future, so to the new client's too.
        connection.setblocking(False)
        client = _Client(connection, bytes(self._scrollback[-SCROLLBACK:]) if replay else b"")
        self._clients.add(client)
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            while client.output:
                del client.output[: client.socket.send(memoryview(client.output)[:65536].tobytes())]
        except BlockingIOError:
            pass
        except OSError:
            # It may have typed something and gone: that is read until its end.
            client.listening = False
            client.output.clear()

    def _receive(self, client: _Client) -> None:
        try:
            client.input = client.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.reading = bool(client.input)

    def _offer(self, client: _Client) -> None:
        try:
            client.input = client.input[self._type(client.input) :]
        except Exception:
            # Not running (any more): typed into nothing, as with a cable that is not plugged in.
            log.debug("Console input is dropped.", exc_info=True)
            client.input = b""

    def _register(self, client: _Client) -> None:
        if client not in self._clients:
            return
        wanted = (selectors.EVENT_READ if client.reading and not client.input else 0) | (
            selectors.EVENT_WRITE if client.output else 0
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
            self._log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
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
