"""Attach a terminal, or a pair of pipes, to a machine's console.

On a terminal every key goes to the guest, except the detach key. From a pipe all bytes go to the guest as they are;
when the pipe ends, output is still shown until it has been silent for a while.

Theory of operation. One loop waits for whichever of input, output and connection is ready, and none of them holds up
another: the detach key is found however much input the guest has not taken, and however long the terminal's own output
stands still. Typed input waits in a queue of `TYPED_LIMIT`; beyond that it is counted and dropped, as reading has to go
on for the detach key's sake. Piped input is not read while a window of it is under way. The server says what the
machine has taken, so that in the end the user learns how much was not delivered.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import time
from collections.abc import Iterator

from attrs import define

from vmf.control import console_frames as frames
from vmf.control import terminal
from vmf.control.reach import CONSOLE_CLIENT, reach
from vmf.errors import ControlError
from vmf.machine.home import Home

TYPED_LIMIT = 16 << 20
OUTPUT_LIMIT = 256 << 10
"""Output that waits for the terminal or pipe; more stays with the server, which leaves out the oldest."""
PIECE = 4096
LEAVE_SECONDS = 1.0
"""How long the last input may take to be taken when the user detaches, and the server to answer."""
STUCK_SECONDS = 10.0
"""After the end of piped input: how long the machine may take none of it."""


class AttachEnd(enum.Enum):
    """Why attaching ended."""

    DETACHED = "detached"
    """The detach key, or the end of piped input."""
    ENDED = "ended"
    """The machine's process ended the console."""
    OUTPUT_CLOSED = "output closed"
    """Whoever read standard output has gone."""


class OutputError(ControlError):
    """Standard output takes no more: a full disk, say."""

    code = "output"
    exit_status = 74  # EX_IOERR of sysexits.h, as of every command whose output is lost


@define
class Attached:
    """How attaching ended."""

    end: AttachEnd
    state: str = ""
    """The machine's last state, where its process said so."""
    undelivered: int = 0
    """Bytes of input that the machine did not take."""
    certain: bool = True
    """False where the process ended without a word: some of `undelivered` may have been taken."""


def parse_detach_key(text: str) -> bytes:
    """The byte of a detach key: `^` and a letter or one of `@[\\]^_`, or a single character. Raises ValueError."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii() and text.isprintable():
        return text.encode()
    raise ValueError(f"{text!r} is no detach key: give ^ and a letter or one of @[\\]^_, or a single character")


def detach_key_name(key: bytes) -> str:
    """As people know it: "Ctrl-]"."""
    return f"Ctrl-{chr(key[0] | 0x40)}" if key[0] < 0x20 else key.decode("ascii")


def connect(home: Home, name: str, *, scrollback: bool = True) -> socket.socket:
    """A connection to the console. Raises NotFoundError, InvalidStateError when the machine does not run."""
    connection = reach(home, name, CONSOLE_CLIENT)
    with contextlib.suppress(OSError):  # it may have been refused already, and says why
        connection.sendall(frames.frame(frames.ATTACH, b"1" if scrollback else b"0"))
    return connection


def attach(
    connection: socket.socket,
    stdin: int | None,
    stdout: int,
    *,
    linger: float = 1.0,
    detach_key: bytes = b"\x1d",
    wakeup: int | None = None,
) -> Attached:
    """Shuttle bytes between two descriptors and the console until one side ends.

    Raises ControlError when the console is refused.

    Args:
        stdin: None for no input.
        linger: after the end of piped input, seconds of silence after which to detach.
        detach_key: one byte; only where stdin is a terminal.
        wakeup: readable when a signal has come (`terminal.signals_restore`).
    """
    is_terminal = stdin is not None and os.isatty(stdin)
    with (
        connection,
        _unblocked(stdout) as output,
        terminal.raw(stdin) if is_terminal and stdin is not None else contextlib.nullcontext(),
    ):
        return _Session(connection, stdin, output, linger, detach_key if is_terminal else None, wakeup).run()


@contextlib.contextmanager
def _unblocked(stdout: int) -> Iterator[int]:
    """Standard output to be written without waiting, where it is a terminal: one that stands still (Ctrl-S, a pager
    that is not read) must not keep the detach key from working. Opened anew, as the mode would be others', too."""
    descriptor = -1
    if os.isatty(stdout):
        with contextlib.suppress(OSError):
            descriptor = os.open(os.ttyname(stdout), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield stdout if descriptor < 0 else descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)


class _Session:
    def __init__(
        self,
        connection: socket.socket,
        stdin: int | None,
        stdout: int,
        linger: float,
        detach_key: bytes | None,
        wakeup: int | None,
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._stdin = stdin
        self._stdout = stdout
        self._linger = linger
        self._detach_key = detach_key
        self._wakeup = wakeup
        self._frames = frames.FrameBuffer()
        self._output = bytearray()
        self._typed = bytearray()
        """Read, and not sent yet."""
        self._wire = bytearray()
        """Frames on their way."""
        self._under_way = 0
        """Bytes of input in frames that the machine has not taken yet."""
        self._dropped = 0
        self._leave_at: float | None = None
        """When to leave without waiting any longer for what is under way; None while attached."""
        self._left = False
        self._last_event = time.monotonic()
        self._ended: Attached | None = None

    def run(self) -> Attached:
        while True:
            if self._ended is not None and (not self._output or self._waited_enough):
                return self._ended
            self._send()
            if self._ended is None:
                self._watch_time()
            for descriptor, events in self._wait():
                if descriptor == self._connection.fileno():
                    self._receive()
                elif descriptor == self._stdin:
                    self._read()
                elif descriptor == self._wakeup:
                    os.read(descriptor, PIECE)  # the handler has run, and lets this go on
                if descriptor == self._stdout and not self._write(events):
                    return Attached(AttachEnd.OUTPUT_CLOSED, undelivered=self._undelivered)

    @property
    def _undelivered(self) -> int:
        return self._under_way + len(self._typed) + self._dropped

    @property
    def _waited_enough(self) -> bool:
        return self._leave_at is not None and time.monotonic() >= self._leave_at

    def _watch_time(self) -> None:
        """Leave when it is time to, and do not wait for a server that does not answer."""
        now = time.monotonic()
        if self._leave_at is None:
            if self._stdin is not None or now < self._last_event + self._patience:
                return
            self._leave_at = now
        if not self._left and (now >= self._leave_at or not self._under_way + len(self._typed)):
            self._wire += frames.frame(frames.LEAVE)
            self._left = True
            self._leave_at = now + LEAVE_SECONDS
            self._send()
        elif self._left and now >= self._leave_at:
            self._ended = Attached(AttachEnd.DETACHED, undelivered=self._undelivered, certain=False)

    @property
    def _patience(self) -> float:
        """Seconds without any word from the machine, once input has ended."""
        return STUCK_SECONDS if self._under_way or self._typed else self._linger

    def _timeout(self) -> float | None:
        """Milliseconds until the time has to be looked at."""
        at = self._leave_at
        if at is None and self._stdin is None and self._ended is None:
            at = self._last_event + self._patience
        return None if at is None else max(0.0, at - time.monotonic()) * 1000 + 1

    def _wait(self) -> list[tuple[int, int]]:
        poll = select.poll()
        wanted = select.POLLIN if self._left or len(self._output) < OUTPUT_LIMIT else 0
        if self._ended is None:
            poll.register(self._connection, wanted | (select.POLLOUT if self._wire else 0))
        if self._wakeup is not None:
            poll.register(self._wakeup, select.POLLIN)
        poll.register(self._stdout, select.POLLOUT if self._output else 0)
        # A terminal is always read, for the detach key; a pipe waits until its input is taken.
        room = self._detach_key is not None or self._under_way + len(self._typed) < frames.WINDOW
        if self._stdin is not None and room and self._leave_at is None:
            poll.register(self._stdin, select.POLLIN)
        return poll.poll(self._timeout())

    def _read(self) -> None:
        assert self._stdin is not None
        try:
            typed = os.read(self._stdin, PIECE)
        except BlockingIOError:
            return  # somebody else reads there, too
        except OSError:
            typed = b""  # the terminal has gone
        if not typed and self._detach_key is None:
            self._stdin = None
            self._last_event = time.monotonic()
            return
        if self._detach_key is not None and (not typed or self._detach_key in typed):
            typed = typed.partition(self._detach_key)[0]
            self._leave_at = time.monotonic() + LEAVE_SECONDS
        room = TYPED_LIMIT - len(self._typed)
        self._typed += typed[:room]
        self._dropped += len(typed[room:])

    def _send(self) -> None:
        count = min(len(self._typed), frames.WINDOW - self._under_way)
        if count > 0 and not self._left:
            self._wire += frames.frame(frames.INPUT, bytes(self._typed[:count]))
            del self._typed[:count]
            self._under_way += count
        try:
            while self._wire and self._ended is None:
                del self._wire[: self._connection.send(self._wire)]
        except BlockingIOError:
            pass
        except OSError:
            self._wire.clear()  # what it said last is still to be read

    def _receive(self) -> None:
        try:
            data = self._connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            end = AttachEnd.DETACHED if self._left else AttachEnd.ENDED
            self._ended = Attached(end, undelivered=self._undelivered, certain=not self._under_way)
            return
        try:
            self._hear(data)
        except frames.FrameError as error:
            raise ControlError(
                f"The machine's process does not speak the console's protocol: {error}.",
                "Is its vmf older or newer than this one?",
            ) from error

    def _hear(self, data: bytes) -> None:
        for kind, content in self._frames.feed(data):
            self._last_event = time.monotonic()
            if kind == frames.OUTPUT:
                if len(self._output) < OUTPUT_LIMIT:
                    self._output += content
            elif kind == frames.TAKEN:
                self._under_way -= int.from_bytes(content, "big")
            elif kind == frames.END:
                end = AttachEnd.ENDED if content or not self._left else AttachEnd.DETACHED
                self._ended = Attached(end, content.decode("ascii", "replace"), self._undelivered)
                return
            elif kind == frames.REFUSED:
                reason, _, remedy = content.decode("utf-8", "replace").partition("\n")
                raise ControlError(reason, remedy)

    def _write(self, events: int) -> bool:
        """False when nobody reads any more."""
        if events & (select.POLLERR | select.POLLNVAL) or (events & select.POLLHUP and not events & select.POLLOUT):
            return False
        try:
            if self._output and events & select.POLLOUT:
                del self._output[: os.write(self._stdout, self._output[:PIECE])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return False
        except OSError as error:
            raise OutputError(
                f"standard output cannot be written: {error.strerror or error}; the console is detached.",
                "The machine continues. Attach again when the output has room.",
            ) from error
        return True
