"""Connections to the process that runs a machine, wherever its sockets are."""

from __future__ import annotations

import socket
from pathlib import Path

from vmf.control import sockets
from vmf.errors import ControlError, InvalidStateError
from vmf.machine.home import Home, MachinePaths
from vmf.machine.lock import Holder, printable, refusal_elsewhere

CONTROL, CONSOLE, CONSOLE_LIVE, CONSOLE_CLIENT = 0, 1, 2, 3
"""Which of `MachinePaths.sockets`."""


class Unreachable(ControlError):
    """The process of a machine lives, and does not listen where this one can reach it."""

    code = "unreachable"


def reach(home: Home, name: str, which: int, timeout: float | None = None) -> socket.socket:
    """Connect to one of a machine's sockets.

    Raises NotFoundError, InvalidStateError when the machine does not run, Unreachable.
    """
    seen = home.sight(name)
    holder = seen.running
    if seen.elsewhere is not None:
        raise refusal_elsewhere(name, seen.elsewhere)
    if holder is None:
        home.load(name)  # a machine that runs is reached whatever became of its definition
        state = home.resting_state(name)
        raise InvalidStateError(
            f"Machine '{name}' is not running (it is {state}).", f"Start it with `vmf startvm {name}`."
        )
    try:
        return sockets.connect(live_paths(home, name, holder).sockets[which], timeout)
    except ControlError as error:
        if home.process(name) is None:
            raise  # it has ended just now
        raise Unreachable(
            f"Machine '{name}' is running, but cannot be reached: {error.message}", remedy(holder)
        ) from error


def live_paths(home: Home, name: str, holder: Holder) -> MachinePaths:
    """The paths of a machine that runs: its process may have another runtime directory than this one."""
    paths = home.paths(name)
    return paths.at(Path(holder.runtime)) if holder.runtime else paths


def remedy(holder: Holder) -> str:
    """What to do about a machine that runs and cannot be reached."""
    if not holder.same_host:
        return f"It runs on host {printable(holder.host)}: use vmf there."
    text = "Its process makes missing sockets again within seconds: try again."
    if holder.pid:
        text += f" If that does not help: `kill {holder.pid}` powers it off"
        text += "." if not holder.where.endswith("namespace") else ", in the PID namespace where it runs."
    return text
