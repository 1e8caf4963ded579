"""The client's end of a machine's control socket.

    with ControlClient.of(Home.default(), "source") as machine:
        machine.teleport("localhost", 6000, progress=print)

A client is used by one thread at a time. To cancel a teleport from elsewhere, use another client.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from vmf.control import rpc
from vmf.control.reach import CONTROL, reach
from vmf.control.seam import Plain, ProgressCallback
from vmf.errors import ControlError
from vmf.machine.home import Home

CONNECT_SECONDS = 5.0
CHECK_ANSWER_SECONDS = 240.0
"""Longer than the checks of the source's plugins, connecting and the target's answer take at most, in a row."""


class ControlClient:
    """A connection to the process that runs a machine. Every call raises what the machine raised there."""

    def __init__(self, connection: socket.socket, name: str, patience: float | None = None) -> None:
        self.name = name
        self._patience = patience
        self._socket = connection
        self._lines = rpc.LineBuffer(rpc.MAX_RESPONSE)
        self._waiting: Iterator[bytes] = iter(())
        self._numbers = itertools.count(1)
        self._listener: Callable[[Plain], None] | None = None

    @classmethod
    def of(cls, home: Home, name: str, patience: float | None = None) -> ControlClient:
        """Connect to a machine. Raises NotFoundError, InvalidStateError when it does not run, ControlError.

        Args:
            patience: the longest silence in seconds of any call, the connection included; None for each call's own.
        """
        connection = reach(home, name, CONTROL, patience or CONNECT_SECONDS)
        connection.settimeout(None)
        return cls(connection, name, patience)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def info(self) -> Plain:
        """The machine's snapshot."""
        return self._mapping("info", timeout=30)

    def pause(self) -> None:
        self.call("pause", timeout=60)

    def resume(self) -> None:
        self.call("resume", timeout=60)

    def power_off(self) -> list[str]:
        """Pull the plug; what the machine's storage may lack, a sentence each."""
        return [str(each) for each in self._mapping("poweroff", timeout=120).get("problems", ())]

    def cancel_operation(self) -> str:
        """Ask the long operation under way to end; what it is, "" when there is none."""
        return str(self._mapping("operation.cancel", timeout=30).get("cancelled", ""))

    def reset(self) -> None:
        self.call("reset", timeout=120)

    def teleport(
        self,
        host: str,
        port: int,
        *,
        transport: str = "tcp",
        max_downtime_ms: int = 250,
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
        options: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> Plain:
        """Teleport the machine to where a target waits; blocks until it runs there and gives the summary.

        Args:
            max_downtime_ms: goal for the time during which the guest runs nowhere, milliseconds.
            timeout_s: give up after so many seconds; None for never.
            progress: called with every progress event, on this thread.
            options: settings of the transport: for `tls` `tls_dir` and `tls_hostname`.
            password: that was set at the target; None for none.
        """
        params: Plain = {"host": host, "port": port, "transport": transport, "max_downtime_ms": max_downtime_ms}
        if timeout_s is not None:
            params["timeout_s"] = timeout_s
        if options:
            params["options"] = dict(options)
        if password is not None:
            params["password"] = password

        def notified(method: str, content: Mapping[str, Any]) -> None:
            if method == "teleport.progress" and progress is not None:
                progress(content.get("progress", {}))

        return self._mapping("teleport", params, notified=notified)

    def check_teleport(
        self,
        host: str,
        port: int,
        *,
        transport: str = "tcp",
        options: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> Plain:
        """Whether the machine could teleport there: {"ok", "target", "blockers"}. Nothing is moved."""
        params: Plain = {"host": host, "port": port, "transport": transport}
        if options:
            params["options"] = dict(options)
        if password is not None:
            params["password"] = password
        return self._mapping("teleport.check", params, timeout=CHECK_ANSWER_SECONDS)

    def cancel_teleport(self) -> bool:
        """Ask a teleport under way to stop; False when there is none that can be."""
        return bool(self._mapping("teleport.cancel", timeout=30).get("cancelled"))

    def switch_backend(self, backend: str) -> Plain:
        """Go on with another CPU backend, live: {"before", "after", "stopped_ns", "total_ns"}."""
        return self._mapping("switch_backend", {"backend": backend}, timeout=60)

    def change_medium(self, port: int, medium: str) -> None:
        """Put another medium (a URI; "" for none) into the DVD or floppy drive at `port`."""
        self._mapping("change_medium", {"port": port, "medium": medium}, timeout=60)

    def trace(
        self,
        instructions: int,
        output: str,
        *,
        json_lines: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Plain:
        """Have the machine's process write the guest's next instructions to a file; blocks, gives the summary.

        Args:
            output: absolute path of the file, which is replaced.
            json_lines: a JSON object a line instead of text.
            progress: called about twice a second, on this thread.
        """
        params = {"instructions": instructions, "output": output, "json_lines": json_lines}

        def notified(method: str, content: Mapping[str, Any]) -> None:
            if method == "trace.progress" and progress is not None:
                progress(content.get("progress", {}))

        return self._mapping("trace", params, notified=notified)

    def cancel_trace(self) -> bool:
        """End a trace under way, with what there is; False when there is none."""
        return bool(self._mapping("trace.cancel", timeout=30).get("cancelled"))

    def teleport_status(self, *, ask: bool = False, peer: Mapping[str, Any] | None = None) -> Plain:
        """What is under way, and what is known of a handover that nobody confirmed ("doubt").

        Args:
            ask: ask the target, too.
            peer: another one: "host", "port", "transport", "options", "password", all optional.
        """
        params: Plain = {"ask": True} if ask else {}
        if peer:
            params["peer"] = dict(peer)
        return self._mapping("teleport.status", params, timeout=60)

    def release_teleporter(self) -> bool:
        """Have it stop answering questions about its arrival, so that its port is free; False when it did not."""
        return bool(self._mapping("teleport.release", timeout=30).get("released"))

    def resolve_teleport(self, how: str, *, force: bool = False, peer: Mapping[str, Any] | None = None) -> str:
        """Decide a handover that nobody confirmed: "resume" here, or "discard"; what was found and done."""
        params: Plain = {"how": how, "force": force}
        if peer:
            params["peer"] = dict(peer)
        return str(self._mapping("teleport.resolve", params, timeout=120).get("done", ""))

    def events(self) -> Iterator[Plain]:
        """Subscribe, and give every event from now on until the machine's process ends."""
        self.call("events.subscribe", timeout=30)
        self._socket.settimeout(None)
        while True:
            try:
                message = self._receive()
            except ControlError:
                return
            if message.get("method") == "event" and isinstance(message.get("params"), dict):
                yield message["params"]

    # -- the machinery

    def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        notified: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> Any:
        """One request and its result; `notified` gets the notifications that come in between.

        Args:
            timeout: longest silence in seconds.

        After an error of the connection itself (ControlError) the client cannot be used any more.
        """
        identifier = next(self._numbers)
        self._socket.settimeout(timeout if self._patience is None else self._patience)
        try:
            self._socket.sendall(rpc.encode({"id": identifier, "method": method, "params": dict(params or {})}))
        except BrokenPipeError:
            pass  # refused already, perhaps: what was said about it can still be read
        except OSError as error:
            raise self._lost(error) from error
        while True:
            message = self._receive()
            if "method" in message:
                content = message.get("params")
                if notified is not None and isinstance(content, dict):
                    notified(str(message["method"]), content)
            elif message.get("id") == identifier:
                if "error" in message:
                    raise rpc.error_from(message["error"])
                return message.get("result")
            elif message.get("id") is None and "error" in message:
                raise rpc.error_from(message["error"])

    def _mapping(self, method: str, params: Mapping[str, Any] | None = None, **arguments: Any) -> Plain:
        answer = self.call(method, params, **arguments)
        if not isinstance(answer, dict):
            raise ControlError(f"The process of machine '{self.name}' answered {method} with {answer!r}.")
        return answer

    def _receive(self) -> dict[str, Any]:
        while True:
            try:
                for line in self._waiting:
                    return rpc.decode(line)
                data = self._socket.recv(65536)
            except (ValueError, TypeError, rpc.TooLong) as error:
                raise ControlError(
                    f"The process of machine '{self.name}' does not speak the control protocol: {error}.",
                    "Is its vmf older or newer than this one?",
                ) from error
            except TimeoutError as error:
                raise ControlError(
                    f"The process of machine '{self.name}' does not answer.", "See its vmm.log, or try again."
                ) from error
            except OSError as error:
                raise self._lost(error) from error
            if not data:
                raise self._lost(None)
            self._waiting = self._lines.feed(data)

    def _lost(self, error: OSError | None) -> ControlError:
        why = f": {error.strerror or error}" if error is not None else ""
        return ControlError(
            f"The process of machine '{self.name}' ended the connection{why}.", f"See `vmf showvminfo {self.name}`."
        )
