"""What a teleport needs of a machine; `vmf.machine.Machine` implements it, tests fake it.

All methods are called on the teleport's own thread; the machine posts to its vCPU thread as needed and returns when
the work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import frozen

from vmf.device.base import Payload
from vmf.memory.dirty import DirtyTracker
from vmf.memory.guest import GuestMemory
from vmf.teleport.check import Blocker

if TYPE_CHECKING:
    from vmf.cpuid.negotiate import Capability
    from vmf.teleport.journal import Journal


@frozen
class Stopped:
    """How a machine was stopped.

    Attributes:
        running: it was running (False: the user had paused it).
        at_ns: when its vCPU and its time stopped, ns of this host's CLOCK_MONOTONIC. What `save` gives is of then.
    """

    running: bool
    at_ns: int


class TeleportableMachine(Protocol):
    """A machine as a teleport sees it, at either end."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> GuestMemory: ...

    def describe(self) -> Mapping[str, Any]:
        """Its hardware, as plain data for the OFFER: everything that must agree, and nothing descriptive."""

    def check(self, source: Mapping[str, Any]) -> Sequence[Blocker]:
        """At the target: every difference between the source's description and this machine, all at once."""

    def local_blockers(self, role: str) -> Sequence[Blocker]:
        """What speaks against teleporting this machine now, regardless of the other side; role "source"/"target"."""

    def open_dirty_tracker(self) -> DirtyTracker:
        """A tracker over `memory`, not started yet."""

    def set_throttle(self, fraction: float) -> None:
        """Keep the vCPU from running for this fraction of the time, 0 to 0.99."""

    def stop(self) -> Stopped:
        """Stop the vCPU, and with it guest time, for the handover. Fast."""

    def save(self) -> Sequence[Payload]:
        """vCPU, clock and devices of the stopped machine, as of the instant at which it stopped."""

    def undo_stop(self) -> None:
        """The teleport failed before the handover: go on as if nothing had happened (a paused machine stays so), guest
        time too: what has passed since the stop is added to it."""

    def mark_handed_over(self) -> None:
        """HANDOVER was sent: this machine must not run again on its own."""

    def take_back(self) -> None:
        """After `mark_handed_over`: it was decided that this machine goes on here; `undo_stop` follows."""

    def mark_teleported(self) -> None:
        """The target runs: this machine is done here."""

    def restore(self, payloads: Sequence[Payload]) -> None:
        """At the target: take over the state; raises StateError and changes nothing when it cannot."""

    def resume(self, stopped_at_ns: int, running: bool) -> int:
        """At the target after HANDOVER: let the vCPU run, unless `running` is False. Never raises once restored.

        Guest time first advances by what has passed since `stopped_at_ns`, when the guest stopped at the source, by
        this host's CLOCK_MONOTONIC. Returns when it was let run, by the same clock.
        """

    def discard_arrival(self) -> None:
        """At the target: forget everything that arrived (RAM too) and be as before, waiting."""


@runtime_checkable
class KeepsJournal(Protocol):
    """Optional: a machine that writes its teleports down; others forget them with their process."""

    @property
    def journal(self) -> Journal: ...


@runtime_checkable
class KeepsLeases(Protocol):
    """Optional: a machine whose writable media carry leases, so that only one side can open them.

    The deeds PASS_LEASE and TAKE_LEASE of `vmf.teleport.protocol.handover` call these, at the points that were explored
    there; `teleport_id` is the same at both sides. A machine without them hands over as if it had no such media.
    """

    @property
    def leased(self) -> bool:
        """Whether there are writable media and *all* carry leases: they decide where the target cannot be asked."""

    def pass_leases(self, teleport_id: bytes) -> None:
        """At the source, stopped: flush and close the media, and give up their leases for this teleport.

        Raises VmfError when it cannot; HANDOVER is not sent then, and `take_leases` is called to take back what was
        passed.
        """

    def take_leases(self, teleport_id: bytes) -> None:
        """Take the next generation of every lease, and open the media.

        At the target after HANDOVER, before the guest runs; at the source when it goes on after all. Raises VmfError
        when the generation is not the expected one any more: then the other side has the machine.
        """


@runtime_checkable
class Interruptible(Protocol):
    """Optional: a machine that waits for something that may not answer (its storage), and can stop waiting."""

    def interrupted_by(self, look: Callable[[], None]) -> None:
        """At the source, before anything else: call `look` at least ten times a second while waiting; it raises when
        the teleport is to end, and never after the handover has begun."""


@runtime_checkable
class ListsPayloads(Protocol):
    """Optional: a machine that can say beforehand which payloads it saves, or takes."""

    def payload_kinds(self) -> Sequence[tuple[str, int, int]]:
        """(kind, version, instance) of every payload."""


@runtime_checkable
class StatesCapability(Protocol):
    """Optional: a waiting machine that says what its CPU backend can present, to whoever asks before a start."""

    def cpuid_capability(self) -> Capability:
        """What its backend can present; the name is the backend's."""


@runtime_checkable
class TakesNotes(Protocol):
    """Optional: a machine that tells the user at the source what the check does not refuse, and should be known."""

    def notes(self, source: Mapping[str, Any]) -> Sequence[str]:
        """At the target, after `check` of the same description found nothing: sentences."""


def payload_kinds(machine: object) -> tuple[tuple[str, int, int], ...]:
    """What the machine says, or () when it does not."""
    return tuple(machine.payload_kinds()) if isinstance(machine, ListsPayloads) else ()
