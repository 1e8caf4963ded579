"""Interrupts between devices, chipset and vCPU. Everything here runs on the vCPU thread."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class InterruptController(Protocol):
    """What a vCPU needs of an interrupt controller (hot path: called at every slice and port access)."""

    def pending(self) -> bool:
        """Whether INTR is asserted: some unmasked request of sufficient priority waits."""

    def acknowledge(self) -> int:
        """The INTA cycle: the vector to deliver. Only after `pending()` was true; a request that has gone in the
        meantime gives the controller's spurious vector."""


class IrqLine(Protocol):
    """One wire into the interrupt controller."""

    def set_level(self, level: bool) -> None:
        """Drive the wire. Edge-triggered inputs latch the rising edge."""


@runtime_checkable
class LatchingLine(Protocol):
    """Optional: an edge-triggered `IrqLine` that tells what became of the last edge, so that a timer can wait with the
    next one instead of losing it."""

    @property
    def latched(self) -> bool:
        """An edge waits for the vCPU: another one would be lost in it."""

    @property
    def masked(self) -> bool:
        """The guest does not want interrupts of this line at present."""
