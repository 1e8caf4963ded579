"""The control server of one machine's process.

Theory of operation. One thread accepts; each connection has a reader thread, which handles requests in order, and a
writer thread behind a bounded queue. So nothing that a client does or fails to do can hold up the machine: a state
listener or progress callback only puts a line into a queue, and a client whose queue is full is disconnected
(progress is thinned out before that). A teleport, or a trace, runs on a thread of its own, so that its connection can
still cancel it. A teleport continues when its client has gone; a snapshot, for which the guest stands still, and a
trace, which slows it, end then.

`close` first lets requests in flight finish and be answered: the answer to `poweroff` must leave before the process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vmf.control import rpc, sockets
from vmf.control.seam import CancelsOperations, ControlledMachine, TakesSnapshots
from vmf.errors import ControlError, TeleportError, VmfError

log = logging.getLogger("vmf.control")

MAX_CONNECTIONS = 64
MAX_QUEUED = 1024
MAX_TEXT = 4096
"""Characters of a text in a request: names, paths, passwords."""
MAX_NUMBER = 1 << 62
SEND_SECONDS = 10.0
DRAIN_SECONDS = 5.0

_NUMBER = (int, float)
METHODS: dict[str, dict[str, tuple[type, ...]]] = {
    "info": {},
    "pause": {},
    "resume": {},
    "poweroff": {},
    "reset": {},
    "teleport": {
        "host": (str,),
        "port": (int,),
        "transport": (str,),
        "max_downtime_ms": (int,),
        "timeout_s": (*_NUMBER, type(None)),
        "options": (dict,),
        "password": (str,),
    },
    "teleport.check": {
        "host": (str,),
        "port": (int,),
        "transport": (str,),
        "options": (dict,),
        "password": (str,),
    },
    "teleport.cancel": {},
    "teleport.status": {"ask": (bool,), "peer": (dict,)},
    "teleport.release": {},
    "teleport.resolve": {"how": (str,), "force": (bool,), "peer": (dict,)},
    "switch_backend": {"backend": (str,)},
    "change_medium": {"port": (int,), "medium": (str,)},
    "trace": {"instructions": (int,), "output": (str,), "json_lines": (bool,)},
    "trace.cancel": {},
    "operation.cancel": {},
    "snapshot": {"name": (str,), "description": (str,)},
    "events.subscribe": {},
}
"""Every method with its parameters and their types; `_REQUIRED` says which must be there."""
_REQUIRED = {
    "teleport": ("host", "port"),
    "teleport.check": ("host", "port"),
    "teleport.resolve": ("how",),
    "switch_backend": ("backend",),
    "change_medium": ("port", "medium"),
    "trace": ("instructions", "output"),
    "snapshot": ("name",),
}
LONG = ("teleport", "trace", "snapshot")
"""Methods that run on threads of their own, with progress notifications."""


class ControlServer:
    """Serves one machine on one socket."""

    def __init__(self, machine: ControlledMachine, path: Path) -> None:
        self.machine = machine
        self.path = path
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_flight = 0
        self._connections: set[_Connection] = set()
        self._closing = False
        self._teleporting = threading.Lock()
        self._acceptor = sockets.Acceptor(sockets.listen(path))
        self._made = path.stat()
        self._thread = threading.Thread(target=self._accept, name="vmf-control", daemon=True)
        machine.add_state_listener(lambda old, new: self.publish({"event": "state", "old": old, "new": new}))

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def in_place(self) -> bool:
        """Whether clients find the socket at its path."""
        return sockets.is_at(self.path, self._made)

    def move(self, runtime: Path) -> None:
        """Listen on a new socket there. Raises ControlError, and then the old one is as it was."""
        path = runtime / self.path.name
        fresh = sockets.Acceptor(sockets.listen(path))
        before, self._acceptor, self.path, self._made = self._acceptor, fresh, path, path.stat()
        with contextlib.suppress(OSError):
            before.socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        before.close()

    def publish(self, event: Mapping[str, Any]) -> None:
        """Send an event to every subscriber; never blocks."""
        with self._lock:
            subscribers = [each for each in self._connections if each.subscribed]
        for connection in subscribers:
            connection.send({"method": "event", "params": dict(event)}, optional=event.get("event") == "teleport")

    def close(self) -> None:
        """Answer what is in flight, then end every connection; idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        with contextlib.suppress(OSError):
            self._acceptor.socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.close()
        self.path.unlink(missing_ok=True)
        with self._idle:
            self._idle.wait_for(lambda: self._in_flight == 0, DRAIN_SECONDS)
            connections = list(self._connections)
        for connection in connections:
            connection.finish()
        deadline = time.monotonic() + DRAIN_SECONDS
        for connection in connections:
            connection.join(max(0.0, deadline - time.monotonic()))

    # -- connections

    def _accept(self) -> None:
        while True:
            acceptor = self._acceptor
            try:
                accepted, reason, remedy = acceptor.accept(sockets.CONTROL_RESERVED)
            except OSError as error:
                if self._closing:
                    return
                if acceptor is not self._acceptor:
                    continue  # there is a new one
                log.warning("The control socket cannot accept: %s.", error.strerror or error)
                time.sleep(0.1)  # out of descriptors, say: it may pass
                continue
            with self._lock:
                full = len(self._connections) >= MAX_CONNECTIONS
            if accepted is None:
                continue
            if self._closing or not sockets.may_control(accepted):
                accepted.close()
                continue
            if full and not reason:
                reason = f"Machine '{self.machine.name}' has {MAX_CONNECTIONS} control connections already."
                remedy = "Try again when one of them has ended."
            if reason:
                refusal = {"id": None, "error": rpc.error_object(ControlError(reason, remedy))}
                with contextlib.suppress(OSError):
                    accepted.setblocking(False)
                    accepted.send(rpc.encode(refusal))
                accepted.close()
                acceptor.refill()
                continue
            connection = _Connection(self, accepted)
            with self._lock:
                self._connections.add(connection)
            connection.start()

    def forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    @contextlib.contextmanager
    def busy(self) -> Any:
        """While a request is in flight."""
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    # -- methods

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """Everything but `LONG` and `events.subscribe`."""
        machine = self.machine
        simple: dict[str, Callable[[], Any]] = {
            "info": machine.info,
            "pause": machine.pause,
            "resume": machine.resume,
            "poweroff": lambda: {"problems": list(machine.power_off() or ())},
            "reset": machine.reset,
            "teleport.check": lambda: machine.check_teleport(
                params["host"], params["port"], params.get("transport", "tcp"), **_options(params)
            ),
            "teleport.cancel": lambda: {"cancelled": machine.cancel_teleport()},
            "teleport.status": lambda: (
                machine.teleport_status(params.get("ask", False), params.get("peer"))
                if params
                else machine.teleport_status()
            ),
            "teleport.release": lambda: {"released": machine.release_teleporter()},
            "teleport.resolve": lambda: {
                "done": machine.resolve_teleport(params["how"], params.get("force", False), params.get("peer"))
            },
            "switch_backend": lambda: machine.switch_backend(params["backend"]),
            "change_medium": lambda: machine.change_medium(params["port"], params["medium"]),
            "trace.cancel": lambda: {"cancelled": machine.cancel_trace()},
            "operation.cancel": lambda: {"cancelled": self._cancel_operation()},
        }
        answer = simple[method]()
        return {} if answer is None else answer

    def _cancel_operation(self, reason: str = "") -> str:
        machine = self.machine
        return machine.cancel_operation(reason) if isinstance(machine, CancelsOperations) else ""

    def client_vanished(self, method: str) -> None:
        """Whoever asked for this has gone without waiting for its end."""
        if method == "snapshot" and (what := self._cancel_operation("the client that asked for it has gone")):
            log.warning("The client that asked for %s has gone: it is cancelled.", what)
        elif method == "trace" and self.machine.cancel_trace():
            log.warning("The client that asked for the trace has gone: it is ended.")

    def teleport(self, params: Mapping[str, Any], progress: Callable[[Mapping[str, Any]], None]) -> Any:
        """Run one teleport; blocks."""
        if not self._teleporting.acquire(blocking=False):
            name = self.machine.name
            raise TeleportError(
                f"Machine '{name}' is being teleported already.",
                f"Wait for it, or cancel it with `vmf controlvm {name} teleport --cancel`.",
            )

        def observe(event: Mapping[str, Any]) -> None:
            progress(event)
            self.publish({"event": "teleport", "progress": dict(event)})

        try:
            return self.machine.start_teleport(
                params["host"],
                params["port"],
                params.get("transport", "tcp"),
                params.get("max_downtime_ms", 250),
                params.get("timeout_s"),
                observe,
                **_options(params),
            )
        finally:
            self._teleporting.release()

    def trace(self, params: Mapping[str, Any], progress: Callable[[Mapping[str, Any]], None]) -> Any:
        """Write one trace; blocks."""
        return self.machine.trace(params["instructions"], params["output"], params.get("json_lines", False), progress)

    def snapshot(self, params: Mapping[str, Any], progress: Callable[[Mapping[str, Any]], None]) -> Any:
        """Take a snapshot; blocks."""
        if not isinstance(self.machine, TakesSnapshots):
            raise ControlError(f"Machine '{self.machine.name}' takes no snapshots.")
        return self.machine.take_snapshot(params["name"], params.get("description", ""), progress)


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The transport's own settings and the password as keyword arguments, when there are any."""
    return {key: params[key] for key in ("options", "password") if params.get(key)}


class _Connection:
    """One client."""

    _numbers = itertools.count(1)

    def __init__(self, server: ControlServer, connection: socket.socket) -> None:
        self.subscribed = False
        self._under_way: list[str] = []
        """Long methods that this client waits for."""
        self._server = server
        self._socket = connection
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        number = next(self._numbers)
        self._reader = threading.Thread(target=self._read, name=f"vmf-control-{number}-in", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"vmf-control-{number}-out", daemon=True)

    def start(self) -> None:
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, int(SEND_SECONDS).to_bytes(8, "little") + bytes(8)
        )
        self._writer.start()
        self._reader.start()

    def send(self, message: Mapping[str, Any], *, optional: bool = False) -> None:
        """Queue a message; never blocks. Optional ones are left out when the client lags behind."""
        if optional and self._queue.qsize() > MAX_QUEUED // 2:
            return
        try:
            self._queue.put_nowait(rpc.encode(message))
        except queue.Full:
            log.warning("A control client does not read its messages; it is disconnected.")
            self._break()

    def finish(self) -> None:
        """End after everything that is queued has been sent."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._break()

    def join(self, timeout: float) -> None:
        self._writer.join(timeout)
        self._break()

    def _break(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        try:
            while (line := self._queue.get()) is not None:
                self._socket.sendall(line)
        except OSError:
            pass  # the client has gone, or takes nothing for SEND_SECONDS
        finally:
            self._break()

    def _read(self) -> None:
        lines = rpc.LineBuffer(rpc.MAX_REQUEST)
        try:
            while data := self._socket.recv(65536):
                for line in lines.feed(data):
                    if line.strip():
                        self._handle(line)
        except rpc.TooLong:
            text = f"a request is longer than {rpc.MAX_REQUEST} bytes"
            self.send({"id": None, "error": {"code": rpc.INVALID_REQUEST, "message": text}})
        except OSError:
            pass
        finally:
            for method in tuple(self._under_way):
                self._server.client_vanished(method)
            self.finish()
            self._writer.join(SEND_SECONDS + 1)
            self._server.forget(self)
            self._socket.close()

    def _handle(self, line: bytes) -> None:
        identifier: Any = None
        try:
            message = rpc.decode(line)
        except (ValueError, TypeError) as error:
            code = rpc.PARSE_ERROR if isinstance(error, ValueError) else rpc.INVALID_REQUEST
            self.send({"id": None, "error": {"code": code, "message": str(error)}})
            return
        identifier = message.get("id")
        if isinstance(identifier, bool) or not isinstance(identifier, str | int):
            # Requests without an id would be answered by nobody: every method here has an answer worth having.
            self.send({"id": None, "error": {"code": rpc.INVALID_REQUEST, "message": "the request has no proper id"}})
            return
        with self._server.busy():
            try:
                method, params = _checked(message)
            except ControlError as error:
                unknown = message.get("method") not in list(METHODS)  # a list: it may be of any type
                code = rpc.METHOD_NOT_FOUND if unknown else rpc.INVALID_PARAMS
                self.send({"id": identifier, "error": rpc.error_object(error) | {"code": code}})
                return
            if method in LONG:
                # Begun here, so that the connection's next request (a cancel, say) comes after it.
                begun = threading.Event()
                threading.Thread(
                    target=self._long, args=(identifier, method, params, begun), name=f"vmf-{method}", daemon=True
                ).start()
                begun.wait()
            elif method == "events.subscribe":
                self.subscribed = True
                self.send({"id": identifier, "result": {}})
            else:
                self._answer(identifier, lambda: self._server.call(method, params))

    def _long(self, identifier: str | int, method: str, params: Mapping[str, Any], begun: threading.Event) -> None:
        def progress(event: Mapping[str, Any]) -> None:
            note = {"request": identifier, "progress": dict(event)}
            self.send({"method": f"{method}.progress", "params": note}, optional=True)

        with self._server.busy():
            self._under_way.append(method)
            begun.set()
            server = self._server
            work = {"teleport": server.teleport, "trace": server.trace, "snapshot": server.snapshot}[method]
            try:
                self._answer(identifier, lambda: work(params, progress))
            finally:
                self._under_way.remove(method)

    def _answer(self, identifier: str | int, work: Callable[[], Any]) -> None:
        try:
            self.send({"id": identifier, "result": work()})
        except VmfError as error:
            self.send({"id": identifier, "error": rpc.error_object(error)})
        except Exception as error:
            log.exception("A control request failed unexpectedly.")
            self.send({"id": identifier, "error": rpc.error_object(error)})


def _checked(message: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    method, params = message.get("method"), message.get("params", {})
    if not isinstance(method, str) or method not in METHODS:
        raise ControlError(f"There is no control method {method!r}.", f"Known are {', '.join(METHODS)}.")
    if not isinstance(params, dict):
        raise ControlError(f"The parameters of {method} are not an object.", "Send them by name.")
    known = METHODS[method]
    for name, value in params.items():
        if name not in known:
            raise ControlError(f"{method} has no parameter {name!r}.", f"Known are {', '.join(known) or 'none'}.")
        if not isinstance(value, known[name]) or (isinstance(value, bool) and bool not in known[name]):
            wanted = " or ".join(kind.__name__ for kind in known[name])
            raise ControlError(f"{method}: {name} is {type(value).__name__}, not {wanted}.", "Correct the request.")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ControlError(f"{method}: {name} is longer than {MAX_TEXT} characters.", "Correct the request.")
        if isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:  # nor is it infinite
            raise ControlError(f"{method}: {name} is out of all bounds.", "Correct the request.")
    for name in _REQUIRED.get(method, ()):
        if name not in params:
            raise ControlError(f"{method} lacks the parameter {name!r}.", "Add it.")
    if method == "trace":
        if params["instructions"] < 1:
            raise ControlError("trace: at least one instruction is needed.", "Ask for more.")
        if not params["output"].startswith("/"):
            raise ControlError("trace: the output is not an absolute path.", "Give it from the root on.")
    if method in ("teleport.status", "teleport.resolve"):
        kinds = {"host": str, "port": int, "transport": str, "options": dict, "password": str}
        for name, value in params.get("peer", {}).items():
            if name not in kinds or type(value) is not kinds[name]:
                raise ControlError(f"{method}: peer has an odd {name!r}.", f"Known are {', '.join(kinds)}.")
        if params.get("how", "resume") not in ("resume", "discard"):
            raise ControlError(f"{method}: how is neither resume nor discard.", "Choose one.")
    if method in ("teleport", "teleport.check"):
        if not 1 <= params["port"] <= 65535:
            raise ControlError(f"{method}: port {params['port']} is outside 1 to 65535.", "Give the target's port.")
        if params.get("max_downtime_ms", 1) < 1 or (params.get("timeout_s") or 1) <= 0:
            raise ControlError("teleport: downtime and timeout must be positive.", "Give larger ones.")
        if not all(isinstance(value, str) for value in params.get("options", {}).values()):
            raise ControlError(f"{method}: options must be texts.", "Give each transport option as a string.")
    return method, params
