"""The frames between `vmf console` and a machine's console, on `console-client.sock`. No I/O here.

A frame is one byte for its kind, four for the length of its content (big-endian), and the content. The client begins
with ATTACH and may have `WINDOW` bytes of INPUT under way that the server has not answered with TAKEN. So it always
knows what the machine has taken, and tells its user what was not delivered. It leaves with LEAVE, after which nothing
more of its input is taken; the server answers with the last TAKEN and END.

The other two sockets, `console.sock` and `console-live.sock`, carry raw bytes, for programs such as socat.
"""

from __future__ import annotations

from collections.abc import Iterator

WINDOW = 16 << 10
"""Bytes of input that the client has sent and the machine has not taken."""
MAX_CONTENT = 1 << 20

ATTACH, INPUT, LEAVE = b"A", b"I", b"L"
"""From the client. ATTACH's content is b"1" with scrollback, b"0" without."""
OUTPUT, TAKEN, END, REFUSED = b"O", b"T", b"E", b"R"
"""From the server. TAKEN: how many bytes more have been taken (8 bytes); END: the machine's last state, or nothing
when only the console ends; REFUSED: reason and remedy, a line each."""


class FrameError(ValueError):
    """What came is no frame."""


def frame(kind: bytes, content: bytes = b"") -> bytes:
    """One frame."""
    return kind + len(content).to_bytes(4, "big") + content


def taken(count: int) -> bytes:
    """A TAKEN frame."""
    return frame(TAKEN, count.to_bytes(8, "big"))


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The (kind, content) pairs that `data` completes. Raises FrameError."""
        self._pending += data
        while len(self._pending) >= 5:
            size = int.from_bytes(self._pending[1:5], "big")
            if size > MAX_CONTENT:
                raise FrameError(f"a frame of {size} bytes")
            if len(self._pending) < 5 + size:
                return
            kind, content = bytes(self._pending[:1]), bytes(self._pending[5 : 5 + size])
            del self._pending[: 5 + size]
            yield kind, content
