"""Port and MMIO dispatch. Hot: every IN and OUT of the guest comes through here, on the vCPU thread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from vmf.errors import ConfigError


class IoHandler(Protocol):
    """Answers accesses to a claimed range. `offset` counts from the range's base; `size` is 1, 2, 4 (MMIO: 8 too)."""

    def io_read(self, offset: int, size: int) -> int: ...

    def io_write(self, offset: int, size: int, value: int) -> None: ...


@frozen
class Range:
    """A claimed range: [base, base+size) by `owner` (a device's kind, for error messages)."""

    base: int
    size: int
    owner: str
    handler: IoHandler


class Bus:
    """The machine's port and MMIO space. Unclaimed reads give all ones, unclaimed writes are ignored."""

    def __init__(self) -> None:
        self._port_read: dict[int, tuple[Callable[[int, int], int], int]] = {}
        self._port_write: dict[int, tuple[Callable[[int, int, int], None], int]] = {}
        self._ports: list[Range] = []
        self._mmio: list[Range] = []
        self._mmio_bases: list[int] = []

    @property
    def port_ranges(self) -> tuple[Range, ...]:
        return tuple(self._ports)

    @property
    def mmio_ranges(self) -> tuple[Range, ...]:
        return tuple(self._mmio)

    def claim_ports(self, owner: str, base: int, size: int, handler: IoHandler) -> None:
        """Claim I/O ports [base, base+size). Raises ConfigError naming both owners on overlap."""
        if not (base >= 0 and size > 0 and base + size <= 0x10000):
            raise ConfigError(f"{owner} claims impossible ports {base:#x}+{size:#x}.")
        for other in self._ports:
            if base < other.base + other.size and other.base < base + size:
                raise ConfigError(f"{owner} and {other.owner} both claim port {max(base, other.base):#x}.")
        self._ports.append(Range(base, size, owner, handler))
        for port in range(base, base + size):
            self._port_read[port] = (handler.io_read, port - base)
            self._port_write[port] = (handler.io_write, port - base)

    def claim_mmio(self, owner: str, base: int, size: int, handler: IoHandler) -> None:
        """Claim guest-physical [base, base+size), outside RAM. Raises ConfigError naming both owners on overlap."""
        for other in self._mmio:
            if base < other.base + other.size and other.base < base + size:
                raise ConfigError(f"{owner} and {other.owner} both claim address {max(base, other.base):#x}.")
        self._mmio.append(Range(base, size, owner, handler))
        self._mmio.sort(key=lambda claimed: claimed.base)
        self._mmio_bases = [claimed.base for claimed in self._mmio]

    def release_ports(self, base: int) -> None:
        """Give up the ports claimed from `base` on (a PCI device whose registers are moved); nothing if none are."""
        for claimed in [each for each in self._ports if each.base == base]:
            self._ports.remove(claimed)
            for port in range(base, base + claimed.size):
                del self._port_read[port], self._port_write[port]

    def release_mmio(self, base: int) -> None:
        """Give up the addresses claimed from `base` on; nothing if none are."""
        self._mmio = [each for each in self._mmio if each.base != base]
        self._mmio_bases = [claimed.base for claimed in self._mmio]

    def port_read(self, port: int, size: int) -> int:
        entry = self._port_read.get(port)
        if entry is None:
            return (1 << (8 * size)) - 1
        return entry[0](entry[1], size)

    def port_write(self, port: int, size: int, value: int) -> None:
        entry = self._port_write.get(port)
        if entry is not None:
            entry[0](entry[1], size, value)

    def _find_mmio(self, gpa: int) -> Range | None:
        index = bisect_right(self._mmio_bases, gpa) - 1
        if index >= 0:
            claimed = self._mmio[index]
            if gpa < claimed.base + claimed.size:
                return claimed
        return None

    def mmio_read(self, gpa: int, size: int) -> int:
        claimed = self._find_mmio(gpa)
        if claimed is None:
            return (1 << (8 * size)) - 1
        return claimed.handler.io_read(gpa - claimed.base, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        claimed = self._find_mmio(gpa)
        if claimed is not None:
            claimed.handler.io_write(gpa - claimed.base, size, value)
