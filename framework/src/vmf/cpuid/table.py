"""A complete answer to the CPUID instruction: the form of a capability and of a contract.

Source: Intel SDM vol. 2A, CPUID; AMD APM vol. 3 appendix E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import field, frozen

from vmf.cpu.state import u
from vmf.errors import StateError

EXTENDED_BASE = 0x8000_0000


@frozen
class CpuidRegisters:
    """What one leaf and subleaf returns, 32 bits each."""

    eax: int = u(32)
    ebx: int = u(32)
    ecx: int = u(32)
    edx: int = u(32)

    def __iter__(self) -> Iterator[int]:
        return iter((self.eax, self.ebx, self.ecx, self.edx))


ZERO = CpuidRegisters()


def _frozen_entries(
    entries: Mapping[tuple[int, int], CpuidRegisters],
) -> Mapping[tuple[int, int], CpuidRegisters]:
    for (leaf, subleaf), registers in entries.items():
        if not (0 <= leaf < 1 << 32 and 0 <= subleaf < 1 << 32 and isinstance(registers, CpuidRegisters)):
            raise StateError(f"CPUID table: impossible entry {leaf!r}.{subleaf!r}.")
    return dict(sorted(entries.items()))


@frozen
class CpuidTable:
    """CPUID entries by (leaf, subleaf); leaves without subleaves use subleaf 0.

    What is not listed reads as zero in all four registers (AMD's rule; it leaks nothing of the engine).
    """

    entries: Mapping[tuple[int, int], CpuidRegisters] = field(factory=dict, converter=_frozen_entries)

    SUBLEAF_LEAVES = frozenset(
        {0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1B, 0x1D, 0x1E, 0x1F, 0x20, 0x23, 0x24,
         0x8000001D, 0x80000020, 0x80000026}
    )  # fmt: skip
    """Leaves whose answer depends on ECX."""

    def lookup(self, leaf: int, subleaf: int) -> CpuidRegisters:
        """The answer to CPUID with EAX=leaf, ECX=subleaf."""
        if leaf not in self.SUBLEAF_LEAVES:
            subleaf = 0
        return self.entries.get((leaf, subleaf), ZERO)

    @property
    def vendor(self) -> str:
        """The twelve characters of leaf 0."""
        top = self.lookup(0, 0)
        raw = b"".join(register.to_bytes(4, "little") for register in (top.ebx, top.edx, top.ecx))
        return raw.decode("ascii", "replace")

    def to_wire(self) -> list[list[int]]:
        """Rows [leaf, subleaf, eax, ebx, ecx, edx], ascending."""
        return [[leaf, subleaf, *registers] for (leaf, subleaf), registers in self.entries.items()]

    @classmethod
    def from_wire(cls, rows: object) -> CpuidTable:
        """The inverse of `to_wire`; raises StateError on anything else."""
        if not isinstance(rows, list) or len(rows) > 512:
            raise StateError("CPUID table: not a list of at most 512 rows.")
        entries: dict[tuple[int, int], CpuidRegisters] = {}
        for row in rows:
            if not isinstance(row, list) or len(row) != 6 or not all(type(value) is int for value in row):
                raise StateError("CPUID table: a row is not six integers.")
            leaf, subleaf, *registers = row
            if (leaf, subleaf) in entries:
                raise StateError(f"CPUID table: leaf {leaf:#x}.{subleaf} twice.")
            entries[leaf, subleaf] = CpuidRegisters(*registers)
        return cls(entries)
