"""What the process of a machine needs of the machine that it runs.

`vmf.control.adapter` fits `vmf.machine.machine.Machine` to it; tests give it a fake. Everything that crosses is plain
data (what JSON can hold), because all of it may leave through the control socket.

Progress of a teleport is a `vmf.teleport.progress.ProgressEvent` as a mapping, a summary a `TeleportSummary` as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vmf.machine.snapshot import SnapshotStore
    from vmf.teleport.journal import Journal

Plain = dict[str, Any]
ProgressCallback = Callable[[Mapping[str, Any]], None]


@runtime_checkable
class WritesJournal(Protocol):
    """Optional: a machine whose teleports can be written down."""

    def use_journal(self, journal: Journal) -> None:
        """Write them down there; called before the first one."""


@runtime_checkable
class TakesSnapshots(Protocol):
    """Optional: a machine of which snapshots can be taken."""

    def use_snapshots(self, store: SnapshotStore) -> None:
        """Keep them there; called before the machine starts."""

    def take_snapshot(self, name: str, description: str, progress: ProgressCallback) -> Plain:
        """Take one; blocks, and the guest stands still meanwhile. Progress is {"what", "done", "total"}."""


@runtime_checkable
class CancelsOperations(Protocol):
    """Optional: a machine whose long operations can be cancelled."""

    def cancel_operation(self, reason: str = "") -> str:
        """Ask the long operation under way to end; what it is, "" when there is none. Does not wait."""


class ControlledMachine(Protocol):
    """One machine. Every method may be called from any thread; those that say so block."""

    @property
    def name(self) -> str: ...

    def info(self) -> Plain:
        """A snapshot; never blocks. "state" is the value of a MachineState."""

    def start(self, peer_password: str | None = None) -> None:
        """Power on and boot; returns when the guest runs. The password is that of the teleport peers."""

    def listen(self) -> str:
        """Power on as a teleport target; the real address, `scheme:host:port`."""

    def wait_for_teleport(self, progress: ProgressCallback) -> Plain:
        """After `listen`: block until a machine has arrived; the summary. Raises TeleportCancelled."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def power_off(self) -> Sequence[str]:
        """Returns what its storage may lack, a sentence each."""

    def reset(self) -> None: ...

    def start_teleport(
        self,
        host: str,
        port: int,
        transport: str,
        max_downtime_ms: int,
        timeout_s: float | None,
        progress: ProgressCallback,
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> Plain:
        """Teleport out; blocks until the machine runs there and gives the summary. Raises TeleportError.

        `options` are the transport's own settings, by name; `password` is the target's, None for none.
        """

    def check_teleport(
        self,
        host: str,
        port: int,
        transport: str,
        options: Mapping[str, Any] | None = None,
        password: str | None = None,
    ) -> Plain:
        """{"ok", "target", "blockers"}: what speaks against a teleport to who waits there; nothing is moved."""

    def cancel_teleport(self) -> bool:
        """Ask a teleport under way, in or out, to stop; False when there is none that could be. Does not wait."""

    def switch_backend(self, backend: str) -> Plain:
        """Go on with another CPU backend: {"before", "after", "stopped_ns", "total_ns"}."""

    def change_medium(self, port: int, medium: str) -> None:
        """Put another medium (a URI; "" for none) into a removable drive."""

    def trace(self, instructions: int, output: str, json_lines: bool, progress: ProgressCallback) -> Plain:
        """Write the next instructions of the guest to a file; blocks until they are there and gives the summary."""

    def cancel_trace(self) -> bool:
        """Ask a trace under way to end; False when there is none. Does not wait."""

    def teleport_status(self, ask: bool = False, peer: Plain | None = None) -> Plain:
        """{"active": bool, "role": "source"|"target"|"", "progress": the last event, "summary": of the last one,
        "doubt": what is known of a handover that nobody confirmed, or None}.

        With `ask` the target is asked, which may take some seconds; `peer` may name another one: "host", "port",
        "transport", "options", "password", all optional.
        """

    def release_teleporter(self) -> bool:
        """Stop answering questions about an arrival that its source did not confirm; False when it did not."""

    def resolve_teleport(self, how: str, force: bool, peer: Plain | None = None) -> str:
        """Decide a handover that nobody confirmed, "resume" or "discard"; what was found and done, for people."""

    def console_write(self, data: bytes) -> int:
        """Type at the serial console; how many bytes were taken. Does not block."""

    def add_console_listener(self, listener: Callable[[bytes], None]) -> None:
        """Call with all output from now on, on the vCPU thread; must not block."""

    def add_state_listener(self, listener: Callable[[str, str], None]) -> None:
        """Call with (old, new) after every change; must not block."""

    def wait_finished(self) -> str:
        """Block until the machine is powered off or teleported away; the state."""

    def close(self) -> None:
        """End it, whatever it does; idempotent."""
