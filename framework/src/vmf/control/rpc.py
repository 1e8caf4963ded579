"""The control protocol: JSON-RPC 2.0, one message a line, over a Unix socket. No I/O here.

Requests are objects with `id`, answered exactly once; the server sends notifications (no `id`) in between:
`teleport.progress` {"request", "progress"} to whoever asked for that teleport, and `event` to subscribers. Batches
are not supported. An error of vmf's own travels as code -32000 with data {"code", "message", "remedy"}, and becomes
an exception of the same class again at the client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from vmf.errors import ControlError, VmfError, shortage

MAX_REQUEST = 1 << 20
"""Bytes of one request line; longer ones end the connection."""
MAX_RESPONSE = 16 << 20
"""Bytes of one line from the server."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
VMF_ERROR = -32000


class TooLong(Exception):
    """A line passed the limit."""


class LineBuffer:
    """Cuts a byte stream into lines, holding at most `limit` bytes of an unfinished one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` completes, without their newlines. Raises TooLong."""
        start = max(0, len(self._pending))
        self._pending += data
        while (end := self._pending.find(b"\n", start)) >= 0:
            if end > self._limit:
                raise TooLong
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            start = 0
            yield line
        if len(self._pending) > self._limit:
            raise TooLong


def encode(message: Mapping[str, Any]) -> bytes:
    """One line. Non-ASCII is escaped, so no text can forge a line end or a terminal escape."""
    return json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """One message. Raises ValueError when it is not a JSON-RPC 2.0 object."""
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise TypeError("not an object")
    if message.get("jsonrpc") != "2.0":
        raise TypeError('"jsonrpc" is not "2.0"')
    return message


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def error_object(error: BaseException) -> dict[str, Any]:
    """The `error` member of a response."""
    data: dict[str, Any]
    error = shortage(error) or error
    if not isinstance(error, VmfError):
        text = f"{type(error).__name__}: {error}"
        data = {"code": "internal", "message": f"vmf has a bug: {text}.", "remedy": "See the machine's vmm.log."}
        return {"code": INTERNAL_ERROR, "message": text, "data": data}
    data = {"code": error.code, "message": error.message, "remedy": error.remedy}
    blockers = getattr(error, "blockers", None)
    if blockers:
        data["blockers"] = [attrs.asdict(blocker) for blocker in blockers]
    if teleport_id := getattr(error, "teleport_id", ""):
        data["teleport_id"] = teleport_id
    return {"code": VMF_ERROR, "message": str(error), "data": data}


def error_from(error: object) -> VmfError:
    """The exception that `error_object` described; ControlError for anything else."""
    if not isinstance(error, dict):
        return ControlError(f"The machine's process answered with a malformed error: {error!r}.")
    data = error.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("message"), str):
        return ControlError(f"The machine's process refused: {error.get('message')}.")
    kind = _class_of(str(data.get("code")))
    # Attributes that only some of the classes declare: which class it is was decided by the other side's code.
    made = kind(data["message"], str(data.get("remedy", "")))
    if "teleport_id" in data:
        made.teleport_id = str(data["teleport_id"])  # type: ignore[attr-defined]
    blockers = data.get("blockers")
    if isinstance(blockers, list):
        from vmf.teleport.check import Blocker

        fields = [field.name for field in attrs.fields(Blocker)]
        made.blockers = tuple(  # type: ignore[attr-defined]
            Blocker(*(str(each.get(field, "")) for field in fields)) for each in blockers if isinstance(each, dict)
        )
    return made


def _class_of(code: str) -> type[VmfError]:
    waiting: list[type[VmfError]] = [VmfError]
    while waiting:
        kind = waiting.pop(0)
        # Own attribute only: a subclass that names no code of its own shares its parent's.
        if kind.__dict__.get("code") == code:
            return kind
        waiting += kind.__subclasses__()
    return ControlError
