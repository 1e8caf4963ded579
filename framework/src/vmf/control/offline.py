"""What works on a machine that is switched off, for as long as it works: to be seen and cancelled from elsewhere.

A command that takes or restores a snapshot of such a machine has its lock meanwhile (`Home.changing`). So it answers on
the machine's control socket, as a process that runs it would, with what it does and how far it is; and it can be
cancelled there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from vmf.control import sockets
from vmf.control.client import CONNECT_SECONDS, ControlClient
from vmf.control.seam import ControlledMachine, Plain
from vmf.control.server import ControlServer
from vmf.errors import ControlError, InvalidStateError, VmfError
from vmf.machine.home import Home, MachinePaths, private_directory
from vmf.machine.lock import RUN
from vmf.machine.operations import Operation


class _Offline:
    """A machine that is switched off, to a control server. Implements the part of `ControlledMachine` that it can."""

    def __init__(self, name: str, operation: Operation) -> None:
        self.name = name
        self._operation = operation

    def info(self) -> Plain:
        return {"name": self.name, "state": "poweredoff", "operation": self._operation.describe()}

    def cancel_operation(self, reason: str = "") -> str:
        self._operation.cancel(reason)
        return self._operation.what

    def add_state_listener(self, listener: Callable[[str, str], None]) -> None:
        """Its state does not change."""

    def __getattr__(self, method: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise InvalidStateError(
                f"machine {self.name} is switched off and busy: {self._operation}.",
                f"Wait for it, or cancel it with `vmf controlvm {self.name} cancel`.",
            )

        return refuse


@contextmanager
def offline(paths: MachinePaths, name: str, what: str) -> Iterator[Operation]:
    """Inside of `Home.changing`: a long operation on the machine, which answers on its control socket.

    Where there is no place for a socket it works all the same. `what` is for people ("the snapshot 's1'").
    """
    operation = Operation(name, what)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(VmfError, OSError):
            private_directory(paths.runtime.parent)
            private_directory(paths.runtime)
            paths.control_socket.unlink(missing_ok=True)  # of one that was killed
            server = ControlServer(cast(ControlledMachine, _Offline(name, operation)), paths.control_socket)
            stack.callback(server.close)
            server.start()
        yield operation


def worker(home: Home, name: str) -> ControlClient | None:
    """A connection to what works on a machine that is switched off; None when nothing does, or it cannot be reached."""
    seen = home.sight(name)
    if not seen.locked or seen.holder is None or seen.holder.doing == RUN or not seen.holder.runtime:
        return None
    try:
        path = home.paths(name).at(Path(seen.holder.runtime)).control_socket
        return ControlClient(sockets.connect(path, CONNECT_SECONDS), name)
    except ControlError:
        return None
