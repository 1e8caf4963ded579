"""Port and MMIO dispatch. Hot: every IN and OUT of the guest comes through here, on the vCPU thread.

Who claims a range is known from the plugin's own view of the bus (`of_plugin`), so that a claim that cannot be, and a
handler that fails, stand under the right names. The handlers are called without a frame in between; what one raises
is attributed afterwards.
"""

from __future__ import annotations

import copy
import operator
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from attrs import evolve, frozen

from vmf.errors import ConfigError
from vmf.plugins.containment import Culprit, explain, interrupted

PORTS = 0x1_0000
ADDRESSES = 1 << 52
"""Guest-physical addresses end here, whatever the backend (Intel SDM vol. 3A, 4.1.4: at most 52 bits)."""
_OWN = Culprit("device")
"""Of claims that no plugin made: a program's own device on a bus of its own."""
_ONES = tuple((1 << 8 * size) - 1 for size in range(9))


class IoHandler(Protocol):
    """Answers accesses to a claimed range. `offset` counts from the range's base; `size` is 1, 2, 4 (MMIO: 8 too)."""

    def io_read(self, offset: int, size: int) -> int:
        """A whole number, of which the guest gets the low `size` bytes."""

    def io_write(self, offset: int, size: int, value: int) -> None: ...


@frozen
class Range:
    """A claimed range: [base, base+size) by `owner` (a device's kind, for error messages) of the plugin `culprit`."""

    base: int
    size: int
    owner: str
    handler: IoHandler
    culprit: Culprit

    def __str__(self) -> str:
        return self.owner if self.culprit is _OWN else f"{self.owner} of the {self.culprit.plugin}"

    def to_blame(self) -> Culprit:
        return evolve(self.culprit, part=f"{self.owner} at {self.base:#x}")


class Bus:
    """The machine's port and MMIO space. Unclaimed reads give all ones, unclaimed writes are ignored."""

    def __init__(self, ram: Sequence[tuple[int, int]] = ()) -> None:
        """`ram`: (base, size) of guest RAM, which no device may claim."""
        # Shared by the views of all plugins: changed in place only.
        self._port_read: dict[int, tuple[Callable[[int, int], int], int]] = {}
        self._port_write: dict[int, tuple[Callable[[int, int, int], None], int]] = {}
        self._ports: list[Range] = []
        self._mmio: list[Range] = []
        self._mmio_bases: list[int] = []
        self._ram = tuple(ram)
        self._culprit = _OWN

    def of_plugin(self, culprit: Culprit) -> Bus:
        """The same bus, for one plugin: what it claims stands under its name."""
        view = copy.copy(self)
        view._culprit = culprit
        return view

    @property
    def port_ranges(self) -> tuple[Range, ...]:
        return tuple(self._ports)

    @property
    def mmio_ranges(self) -> tuple[Range, ...]:
        return tuple(self._mmio)

    def claim_ports(self, owner: str, base: int, size: int, handler: IoHandler) -> None:
        """Claim I/O ports [base, base+size). Raises ConfigError naming both owners on overlap."""
        claimed = self._claim("ports", owner, base, size, handler, PORTS)
        for other in self._ports:
            if base < other.base + other.size and other.base < base + size:
                raise ConfigError(
                    f"{claimed} and {other} both claim port {max(base, other.base):#x}.",
                    "Leave one of them out of the machine's devices, or give it another place by its options.",
                )
        self._ports.append(claimed)
        for port in range(base, base + size):
            self._port_read[port] = (handler.io_read, port - base)
            self._port_write[port] = (handler.io_write, port - base)

    def claim_mmio(self, owner: str, base: int, size: int, handler: IoHandler) -> None:
        """Claim guest-physical [base, base+size), outside RAM. Raises ConfigError naming both owners on overlap."""
        claimed = self._claim("addresses", owner, base, size, handler, ADDRESSES)
        for start, length in self._ram:
            if base < start + length and start < base + size:
                raise ConfigError(
                    f"{claimed} claims {base:#x}+{size:#x}, where the machine has RAM ({start:#x}+{length:#x}).",
                    "Give it another place by its options, or the machine less memory.",
                )
        for other in self._mmio:
            if base < other.base + other.size and other.base < base + size:
                raise ConfigError(
                    f"{claimed} and {other} both claim address {max(base, other.base):#x}.",
                    "Leave one of them out of the machine's devices, or give it another place by its options.",
                )
        insort(self._mmio, claimed, key=lambda each: each.base)
        self._mmio_bases[:] = [each.base for each in self._mmio]

    def _claim(self, what: str, owner: Any, base: Any, size: Any, handler: Any, limit: int) -> Range:
        """Raises ConfigError for what no device can have."""
        owner = owner if isinstance(owner, str) and owner else type(handler).__name__
        claimed = Range(base, size, owner, handler, self._culprit)
        if type(base) is not int or type(size) is not int or base < 0 or size <= 0 or base + size > limit:
            where = "+".join(f"{each:#x}" if type(each) is int else repr(each)[:40] for each in (base, size))
            raise ConfigError(
                f"{claimed} claims impossible {what}, {where}: they go from 0 to {limit - 1:#x}.",
                self._culprit.remedy,
            )
        for method in ("io_read", "io_write"):
            if not callable(getattr(handler, method, None)):
                raise ConfigError(
                    f"{claimed} claims {what} for an object without {method}.",
                    self._culprit.remedy,
                )
        return claimed

    def release_ports(self, base: int) -> None:
        """Give up the ports claimed from `base` on (a PCI device whose registers are moved); nothing if none are."""
        for claimed in [each for each in self._ports if each.base == base]:
            self._ports.remove(claimed)
            for port in range(base, base + claimed.size):
                del self._port_read[port], self._port_write[port]

    def release_mmio(self, base: int) -> None:
        """Give up the addresses claimed from `base` on; nothing if none are."""
        self._mmio[:] = [each for each in self._mmio if each.base != base]
        self._mmio_bases[:] = [claimed.base for claimed in self._mmio]

    def port_read(self, port: int, size: int) -> int:
        entry = self._port_read.get(port)
        if entry is None:
            return _ONES[size]
        try:
            value = entry[0](entry[1], size)
            if type(value) is int:
                return value & _ONES[size]
        except BaseException as error:  # noqa: BLE001 - raised again under the right name
            self._raise(self._find_port(port), "io_read", error)
        return self._number(self._find_port(port), value, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        entry = self._port_write.get(port)
        if entry is not None:
            try:
                entry[0](entry[1], size, value)
            except BaseException as error:  # noqa: BLE001 - raised again under the right name
                self._raise(self._find_port(port), "io_write", error)

    def _find_port(self, port: int) -> Range | None:
        return next((each for each in self._ports if each.base <= port < each.base + each.size), None)

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
            return _ONES[size]
        try:
            value = claimed.handler.io_read(gpa - claimed.base, size)
            if type(value) is int:
                return value & _ONES[size]
        except BaseException as error:  # noqa: BLE001 - raised again under the right name
            self._raise(claimed, "io_read", error)
        return self._number(claimed, value, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        claimed = self._find_mmio(gpa)
        if claimed is not None:
            try:
                claimed.handler.io_write(gpa - claimed.base, size, value)
            except BaseException as error:  # noqa: BLE001 - raised again under the right name
                self._raise(claimed, "io_write", error)

    # -- what a handler does wrong

    @staticmethod
    def _raise(claimed: Range | None, method: str, error: BaseException) -> NoReturn:
        if claimed is None or interrupted(error):
            raise error
        fault = claimed.to_blame().fault(method, error)
        if fault is error:
            raise error
        raise fault from error

    @staticmethod
    def _number(claimed: Range | None, value: Any, size: int) -> int:
        """What is not an int, but may stand for one (NumPy's)."""
        try:
            return operator.index(value) & _ONES[size]
        except TypeError:
            culprit = claimed.to_blame() if claimed is not None else _OWN
            raise culprit.wrong("io_read", value, "a whole number") from None


def _at_port(method: str) -> Callable[[Mapping[str, Any]], tuple[Culprit, str] | None]:
    def found(values: Mapping[str, Any]) -> tuple[Culprit, str] | None:
        claimed = values["self"]._find_port(values["port"])
        return None if claimed is None else (claimed.to_blame(), method)

    return found


def _at_address(method: str) -> Callable[[Mapping[str, Any]], tuple[Culprit, str] | None]:
    def found(values: Mapping[str, Any]) -> tuple[Culprit, str] | None:
        claimed = values["self"]._find_mmio(values["gpa"])
        return None if claimed is None else (claimed.to_blame(), method)

    return found


explain(Bus.port_read.__code__, _at_port("io_read"))
explain(Bus.port_write.__code__, _at_port("io_write"))
explain(Bus.mmio_read.__code__, _at_address("io_read"))
explain(Bus.mmio_write.__code__, _at_address("io_write"))
