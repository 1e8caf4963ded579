"""The teleport protocol without I/O: frames, messages, the table of states, and a `Connection` that applies it.

Nothing here imports a socket, a thread, a clock or a file.
"""

from vmf.teleport.protocol.connection import CLOSED, NEED_DATA, Connection, Signal
from vmf.teleport.protocol.states import Phase, Role, SourceOutcome

__all__ = ["CLOSED", "NEED_DATA", "Connection", "Phase", "Role", "Signal", "SourceOutcome"]
