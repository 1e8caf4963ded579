"""The result of comparing two machines before a teleport."""

from __future__ import annotations

from attrs import frozen


@frozen
class Blocker:
    """One reason why a teleport cannot happen.

    Attributes:
        field: what differs, as the user knows it ("memory", "cpu feature avx2", "device pc.uart16550").
        source, target: the two values, as the user would write them.
        remedy: what to do, with the command where there is one.
    """

    field: str
    source: str
    target: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.source} at the source, {self.target} at the target. {self.remedy}"
