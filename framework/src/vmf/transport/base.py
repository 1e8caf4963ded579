"""What a transport plugin implements.

A channel is one reliable, ordered byte stream. One thread sends and one thread receives at a time; `shutdown` may
be called from any thread and makes both return with TransportClosed. No call holds the GIL while it waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import field, frozen
from attrs.validators import instance_of

if TYPE_CHECKING:  # the command line imports this room, and NumPy takes a while
    import numpy as np
    import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
ByteRanges: TypeAlias = "npt.NDArray[np.uint64]"
"""Shape (n, 2): offset and length in bytes of each range."""


def _without_brackets(host: str) -> str:
    bracketed = isinstance(host, str) and host.startswith("[") and host.endswith("]")
    return host[1:-1] if bracketed else host


@frozen
class Address:
    """Where to listen or connect: `scheme:host:port`; port 0 listens on a free one.

    An IPv6 address may stand in brackets, as it does in URIs and wherever a port follows; `host` is without.
    Raises TypeError for a host that is no text or a port that is no number.
    """

    scheme: str
    host: str = field(converter=_without_brackets, validator=instance_of(str))
    port: int = field(validator=instance_of(int))
    options: Mapping[str, Any] = field(factory=dict)
    """Transport-specific settings (certificates and so on)."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{self.port}"


class Channel(ABC):
    """One byte stream. Errors: TransportTimeout, TransportClosed, TransportError.

    `notices` are what the user should know although it works, one line each: a certificate that expires soon.
    """

    notices: tuple[str, ...] = ()

    local: Address
    remote: Address

    computes: bool = False
    """Every byte is work for a processor at both ends (encryption), so more channels than processors are a loss."""

    @abstractmethod
    def set_timeout(self, seconds: float | None) -> None:
        """Longest time one send or receive call may make no progress; None waits for ever."""

    @abstractmethod
    def send(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers, in order."""

    @abstractmethod
    def recv_into(self, buffer: memoryview) -> None:
        """Fill the buffer completely."""

    def send_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """Send `base[offset:offset+length]` of every row, in order. Override where the kernel can gather."""
        for offset, length in ranges.tolist():
            self.send(base[offset : offset + length])

    def recv_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """Fill `base[offset:offset+length]` of every row, in order. Override where the kernel can scatter."""
        for offset, length in ranges.tolist():
            self.recv_into(base[offset : offset + length])

    def channel_binding(self) -> tuple[str, bytes] | None:
        """Name and data of a channel binding (RFC 5056), equal at both ends and nowhere else; None without one."""
        return None

    def unsent_bytes(self) -> int:
        """Bytes accepted by `send` that the peer's host has not acknowledged yet; 0 where unknown."""
        return 0

    @abstractmethod
    def shutdown(self) -> None:
        """Break the stream both ways and wake whoever waits on it; any thread; idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Free the channel; idempotent."""


class Listener(ABC):
    """Waits for channels."""

    address: Address
    """Where it listens, with the port that was really taken."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Of a name with several addresses (`localhost`): all of them, `address` first."""
        return (self.address,)

    notices: tuple[str, ...] = ()
    """As of `Channel`."""

    @abstractmethod
    def accept(self, timeout: float | None) -> Channel:
        """The next channel.

        Raises TransportTimeout, TransportClosed after `shutdown`, or TransportRefused for a connection that was
        turned away, to tell of it; the next call waits for the next one.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Wake `accept` for good; any thread; idempotent."""

    @abstractmethod
    def close(self) -> None: ...


class Transport(ABC):
    """A way to make channels."""

    scheme: str
    """As in `scheme:host:port`, equal to the entry point's name."""
    authenticates: bool = False
    """A listener gives only channels whose other side proved who it is, and that nobody on the way reads or alters."""

    def is_local(self, address: Address) -> bool:
        """Whether only processes of this host can connect to a listener there. Raises TransportError (unknown host)."""
        from vmf.transport.sockets import is_loopback

        return is_loopback(address)

    @abstractmethod
    def listen(self, address: Address) -> Listener:
        """Raises TransportError naming address, reason and remedy (port in use, no such address, no permission)."""

    @abstractmethod
    def connect(self, address: Address, timeout: float) -> Channel:
        """Raises TransportError naming address, reason and remedy (unknown host, nobody listens, no route)."""
