"""Requests and their replies on one connection, several of them under way at a time.

Theory of operation. There is no reader thread: of the threads that wait for a reply, one leads. It receives replies,
its own and the others', until its own has come, then leaves the lead to another one. So a single thread sends and
receives with two system calls and no change of threads, and with several threads nobody waits for somebody else's
request. A broken connection fails every request that is under way.

Data goes from the connection straight into the caller's buffers.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence

from attrs import define, field

from vmf.errors import StorageError, StorageFull
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.handshake import Export
from vmf_storage_nbd.stream import Stream


@define(eq=False)
class _Request:
    """One that waits.

    Attributes:
        offset: of the first byte of `buffers` in the export.
        left: bytes that have not come yet.
        error: the server's error number, 0 for none.
    """

    offset: int
    buffers: Sequence[memoryview]
    left: int
    done: bool = False
    error: int = 0
    text: str = ""


@define(eq=False)
class Client:
    """One connection to one export. Any thread.

    Attributes:
        server: for people.
        export: what the server says of it.
        broken: why nothing goes any more; "" while it works.
    """

    server: str
    export: Export
    _stream: Stream
    broken: str = ""
    _sending: threading.Lock = field(factory=threading.Lock)
    _turn: threading.Condition = field(factory=threading.Condition)
    _leading: bool = False
    _cookie: int = 0
    _pending: dict[int, _Request] = field(factory=dict)

    def request(
        self,
        command: p.Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        send: Sequence[memoryview] = (),
        fill: Sequence[memoryview] = (),
    ) -> None:
        """Do one request of at most `export.max_payload` bytes. Raises StorageError."""
        mine = _Request(offset, fill, sum(each.nbytes for each in fill))
        try:
            with self._sending:
                self._cookie += 1
                cookie = self._cookie
                with self._turn:
                    if self.broken:
                        raise StorageError(f"the connection to the NBD server {self.server} is broken: {self.broken}.")
                    self._pending[cookie] = mine
                header = p.REQUEST.pack(p.REQUEST_MAGIC, flags, command, cookie, offset, length)
                self._stream.send([memoryview(header), *send])
        except OSError as error:
            self._break(error)
        self._await(mine)
        if mine.error:
            number = p.ERRORS.get(mine.error, 5)
            said = mine.text or os.strerror(number)
            kind = StorageFull if number == errno.ENOSPC else StorageError
            raise kind(
                f"the NBD server {self.server} failed to {command.name.lower().replace('_', ' ')}: {said}.",
                "Look at that server's storage.",
            )
        if mine.left:
            raise StorageError(f"the NBD server {self.server} left out part of what was read.")

    def _await(self, mine: _Request) -> None:
        while True:
            with self._turn:
                while self._leading and not mine.done:
                    self._turn.wait()
                if mine.done:
                    return
                self._leading = True
            try:
                while not mine.done:
                    self._receive()
            except (OSError, _Nonsense) as error:
                self._break(error)
                self._fail_pending()
            finally:
                with self._turn:
                    self._leading = False
                    self._turn.notify_all()

    def _finish(self, cookie: int, request: _Request) -> None:
        with self._turn:
            self._pending.pop(cookie, None)
            request.done = True
            self._turn.notify_all()

    def _break(self, error: BaseException) -> None:
        """Any thread. The requests fail when the leader notices: until then it may be filling their buffers."""
        with self._turn:
            self.broken = self.broken or str(getattr(error, "strerror", None) or error) or "it was closed"
        self._stream.shutdown()

    def _fail_pending(self) -> None:
        with self._turn:
            for request in self._pending.values():
                request.done, request.error, request.text = True, 108, self.broken
            self._pending.clear()

    # -- the leader's

    def _receive(self) -> None:
        """One reply, or one chunk of a structured one."""
        magic = int.from_bytes(self._read(4), "big")
        if magic == p.SIMPLE_REPLY_MAGIC:
            error, cookie = p.SIMPLE_REPLY.unpack(self._read(12))
            request = self._find(cookie)
            request.error = error
            if not error and request.left:
                self._fill(request, request.offset, request.left)
            self._finish(cookie, request)
        elif magic == p.STRUCTURED_REPLY_MAGIC and self.export.structured:
            flags, kind, cookie, length = p.STRUCTURED_REPLY.unpack(self._read(16))
            request = self._find(cookie)
            self._chunk(request, kind, length)
            if flags & p.REPLY_DONE:
                self._finish(cookie, request)
        else:
            raise _Nonsense("the server answers nonsense")

    def _chunk(self, request: _Request, kind: int, length: int) -> None:
        if kind == p.CHUNK_NONE and length == 0:
            return
        if kind == p.CHUNK_OFFSET_DATA and length > 8:
            (offset,) = p.OFFSET.unpack(self._read(8))
            self._fill(request, offset, length - 8)
        elif kind == p.CHUNK_OFFSET_HOLE and length == 12:
            offset, size = p.HOLE.unpack(self._read(12))
            for view in self._views(request, offset, size):
                view[:] = bytes(view.nbytes)
            request.left -= size
        elif kind & p.CHUNK_IS_ERROR and 6 <= length <= p.MAX_ERROR_TEXT:
            body = self._read(length)
            request.error, size = p.ERROR_CHUNK.unpack_from(body)
            text = body[6 : 6 + size].decode("utf-8", "replace")
            request.text = "".join(char for char in text if char.isprintable())[:200]
            request.error = request.error or 5
        else:
            raise _Nonsense(f"the server sent a reply of unknown kind {kind}")

    def _fill(self, request: _Request, offset: int, size: int) -> None:
        for view in self._views(request, offset, size):
            self._stream.receive(view)
        request.left -= size

    @staticmethod
    def _views(request: _Request, offset: int, size: int) -> list[memoryview]:
        """The parts of the request's buffers that hold [offset, offset+size) of the export."""
        skip = offset - request.offset
        views = []
        if skip < 0 or size > request.left:
            raise _Nonsense("the server sent more than was asked for")
        for buffer in request.buffers:
            if skip >= buffer.nbytes:
                skip -= buffer.nbytes
                continue
            view = buffer.cast("B")[skip : skip + size]
            skip = 0
            size -= view.nbytes
            views.append(view)
            if not size:
                return views
        raise _Nonsense("the server sent more than was asked for")

    def _find(self, cookie: int) -> _Request:
        request = self._pending.get(cookie)
        if request is None:
            raise _Nonsense("the server answered a request that was not made")
        return request

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._stream.receive(memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Say good-bye; idempotent. Waits for nobody: a server that does not read is just left."""
        if not self.broken and self._sending.acquire(blocking=False):
            try:
                self._stream.send_last(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.Command.DISC, 0, 0, 0))
            except OSError:
                pass  # it was the last word anyway
            finally:
                self._sending.release()
        self._break(OSError("it was closed"))
        self._stream.close()

    def abort(self) -> None:
        """Break the connection: every request that waits fails. Any thread."""
        self._break(OSError("it was given up"))


class _Nonsense(Exception):
    """The server does not keep to the protocol."""
