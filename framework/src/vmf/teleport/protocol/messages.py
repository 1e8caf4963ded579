"""Every message of the protocol: its type number, its fields, their bounds.

A body is one CBOR map with exactly the fields of its class, all present, none else. Each field knows how to check its
wire value (`parse`) and how to make it (`format`); the same check guards both directions, so that what one side can
send the other can read. Text is bounded and printable: it may be shown on a terminal as it is.

Adding to the protocol: new behaviour is a *feature*, named in HELLO and answered in WELCOME; a message or field that
only exists with a feature gets a new type number. Type numbers and fields of a released version never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
from attrs import field, frozen

from vmf.device.base import Payload
from vmf.errors import LocalProtocolError, RemoteProtocolError
from vmf.teleport.check import Blocker
from vmf.teleport.protocol import codec, frames
from vmf.teleport.protocol.runs import MAX_PAGES, MAX_RAM_PAGES, MAX_RUNS, RUN_SIZE, check_runs, count_pages

PROTOCOL_VERSIONS = (1,)
"""What this program speaks, best first."""
CAPABILITIES = "capabilities"
"""Feature: instead of offering a machine the source may ask what the target's CPU backend can present (INQUIRE)."""
WHEREABOUTS = "whereabouts"
"""Feature: instead of offering a machine the source may ask what became of an earlier teleport (LOCATE)."""
NOTES = "notes"
"""Feature: before CHECKED the target may say what the user should know, though it speaks against nothing (NOTES)."""
FEATURES: tuple[str, ...] = (CAPABILITIES, WHEREABOUTS, NOTES)
"""Optional behaviour this program knows."""
PAGE_SIZE = 4096
ID_SIZE = 16
MAX_TEXT = 1000
MAX_BLOCKERS = 256
MAX_NOTES = 16
MAX_PAYLOADS = 256
MAX_CPUID_ROWS = 512
MAX_LINKS = 8
"""Additional channels of one teleport."""
TOKEN_SIZE = 32

_KIB = 1 << 10
Parse = Callable[[Any], Any]


def clean_text(text: object, limit: int = MAX_TEXT) -> str:
    """Make any text fit for a message: printable, at most `limit` characters."""
    kept = "".join(c if c.isprintable() else " " for c in str(text))
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def _number(bits: int, least: int = 0, most: int | None = None) -> Parse:
    top = (1 << bits) - 1 if most is None else most

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= top:
            raise ValueError(f"not a number from {least} to {top}")
        return value

    return parse


def _text(limit: int = MAX_TEXT) -> Parse:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit or not value.isprintable():
            raise ValueError(f"not printable text of at most {limit} characters")
        return value

    return parse


def _blob(least: int, most: int) -> Parse:
    def parse(value: Any) -> bytes:
        if not isinstance(value, bytes) or not least <= len(value) <= most:
            raise ValueError(f"not {least} to {most} bytes")
        return value

    return parse


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not true or false")
    return value


def _plain_map(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a map")
    return value


def _many(parse_one: Parse, limit: int) -> Parse:
    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise ValueError(f"not a list of at most {limit} items")
        return tuple(parse_one(item) for item in value)

    return parse


def _fixed(value: Any, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise ValueError(f"not a list of {length} items")
    return value


def _parse_blocker(value: Any) -> Blocker:
    return Blocker(*(_text()(item) for item in _fixed(value, 4)))


def _parse_payload(value: Any) -> Payload:
    kind, version, instance, body = _fixed(value, 4)
    return Payload(_text(100)(kind), _number(16)(version), _plain_map(body), _number(16)(instance))


def _parse_kind(value: Any) -> tuple[str, int, int]:
    kind, version, instance = _fixed(value, 3)
    return _text(100)(kind), _number(16)(version), _number(16)(instance)


def _parse_cpuid_row(value: Any) -> tuple[int, ...]:
    return tuple(_number(32)(item) for item in _fixed(value, 6))


def _plain(value: Any) -> Any:
    return value


def _listed(value: Any) -> Any:
    return list(value)


def _format_blockers(value: Any) -> Any:
    return [[clean_text(b.field), clean_text(b.source), clean_text(b.target), clean_text(b.remedy)] for b in value]


def _format_payloads(value: Any) -> Any:
    return [[p.kind, p.version, p.instance, dict(p.body)] for p in value]


def _format_kinds(value: Any) -> Any:
    return [list(kind) for kind in value]


def _format_rows(value: Any) -> Any:
    return [list(row) for row in value]


def wire(parse: Parse, format_: Parse = _plain, default: Any = attrs.NOTHING) -> Any:
    """A field that crosses the wire; the default is one for our own code, on the wire every field is there."""
    return field(default=default, metadata={"parse": parse, "format": format_})


@frozen
class Message:
    """Base of all messages."""

    TYPE: ClassVar[int]
    LIMIT: ClassVar[int] = 1 * _KIB
    """Longest body, bytes."""
    FEATURE: ClassVar[str] = ""
    """The feature without which the message does not exist, "" for those of version 1."""

    @classmethod
    def word(cls) -> str:
        """Name as in the documentation: HELLO, ROUND_END."""
        return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(cls.__name__)).upper()

    @property
    def bulk(self) -> int:
        """Raw bytes that follow the frame."""
        return 0


@frozen
class Hello(Message):
    """Source: who I am. `versions` best first; unknown features are ignored by the target."""

    TYPE = 1
    LIMIT = 8 * _KIB
    teleport_id: bytes = wire(_blob(ID_SIZE, ID_SIZE))
    versions: tuple[int, ...] = wire(_many(_number(16), 16), _listed)
    features: tuple[str, ...] = wire(_many(_text(64), 64), _listed)
    software: str = wire(_text(100))
    machine: str = wire(_text(255))


@frozen
class Welcome(Message):
    """Target: the version and the features that hold from here on, and how the source may authenticate."""

    TYPE = 2
    LIMIT = 8 * _KIB
    teleport_id: bytes = wire(_blob(ID_SIZE, ID_SIZE))
    version: int = wire(_number(16))
    features: tuple[str, ...] = wire(_many(_text(64), 64), _listed)
    methods: tuple[str, ...] = wire(_many(_text(32), 16), _listed)
    software: str = wire(_text(100))


@frozen
class Authenticate(Message):
    """Source: proves who it is, in one or more steps."""

    TYPE = 3
    LIMIT = 8 * _KIB
    method: str = wire(_text(32))
    data: bytes = wire(_blob(0, 4096))


@frozen
class Challenge(Message):
    """Target: the method needs another step."""

    TYPE = 4
    LIMIT = 8 * _KIB
    data: bytes = wire(_blob(0, 4096))


@frozen
class Authenticated(Message):
    """Target: proven; `data` is the target's own proof where the method has one."""

    TYPE = 5
    LIMIT = 8 * _KIB
    data: bytes = wire(_blob(0, 4096))


@frozen
class Offer(Message):
    """Source: the machine. `payloads` lists (kind, version, instance) of the state that will come; `links` counts the
    additional channels for RAM that it asks for; `check_only`: nothing is going to be moved."""

    TYPE = 6
    LIMIT = 1024 * _KIB
    description: Mapping[str, Any] = wire(_plain_map, dict)
    ram_pages: int = wire(_number(32, 1, MAX_RAM_PAGES))
    page_size: int = wire(_number(32, PAGE_SIZE, PAGE_SIZE))
    payloads: tuple[tuple[str, int, int], ...] = wire(_many(_parse_kind, MAX_PAYLOADS), _format_kinds)
    links: int = wire(_number(8, 0, MAX_LINKS))
    check_only: bool = wire(_flag)


@frozen
class Checked(Message):
    """Target: everything that speaks against it, all at once; empty: come, with up to `links` additional channels,
    each of which says JOIN with the `token` (secret, random, of this teleport only) before BEGIN is sent."""

    TYPE = 7
    LIMIT = 1024 * _KIB
    blockers: tuple[Blocker, ...] = wire(_many(_parse_blocker, MAX_BLOCKERS), _format_blockers)
    links: int = wire(_number(8, 0, MAX_LINKS), default=0)
    token: bytes = wire(_blob(0, TOKEN_SIZE), default=b"")


@frozen
class Begin(Message):
    """Source: RAM follows."""

    TYPE = 8


@frozen
class Bye(Message):
    """Source: there were blockers, or it was only a check; nothing happened."""

    TYPE = 9


@frozen
class Pages(Message):
    """Source: contents of pages; 4096 raw bytes for each follow the frame, in order."""

    TYPE = 10
    LIMIT = MAX_RUNS * RUN_SIZE + _KIB
    round: int = wire(_number(32))
    runs: bytes = wire(lambda value: check_runs(value, MAX_PAGES))

    @property
    def bulk(self) -> int:
        return count_pages(self.runs) * PAGE_SIZE


@frozen
class Zeros(Message):
    """Source: these pages became zero."""

    TYPE = 11
    LIMIT = MAX_RUNS * RUN_SIZE + _KIB
    round: int = wire(_number(32))
    runs: bytes = wire(lambda value: check_runs(value, MAX_RAM_PAGES))


@frozen
class RoundEnd(Message):
    """Source: all pages of this round were sent. `sent`: raw bytes of this teleport so far, on all channels."""

    TYPE = 12
    round: int = wire(_number(32))
    sent: int = wire(_number(64))


@frozen
class RoundAck(Message):
    """Target: they are all in RAM. `received`: raw bytes of this teleport so far."""

    TYPE = 13
    round: int = wire(_number(32))
    received: int = wire(_number(64))


@frozen
class Paused(Message):
    """Source: the guest stands still; the last pages follow."""

    TYPE = 14


@frozen
class State(Message):
    """Source: vCPU, clock and devices. `stopped_at` is when the guest's clock stood still, ns of the *target's*
    CLOCK_MONOTONIC as the source estimates it (0: unknown); `running`: False when its user had paused the machine;
    `sent`: all raw bytes of this teleport, on all channels."""

    TYPE = 15
    LIMIT = 8192 * _KIB
    payloads: tuple[Payload, ...] = wire(_many(_parse_payload, MAX_PAYLOADS), _format_payloads)
    stopped_at: int = wire(_number(64))
    running: bool = wire(_flag)
    sent: int = wire(_number(64), default=0)


@frozen
class Ready(Message):
    """Target: everything is restored, one word and I run. From here on it only waits for that word."""

    TYPE = 16


@frozen
class Handover(Message):
    """Source: the machine is yours. From here on the source never runs it on its own."""

    TYPE = 17


@frozen
class Running(Message):
    """Target: it runs. When HANDOVER came and when the vCPU started, ns of the target's CLOCK_MONOTONIC."""

    TYPE = 18
    received_at: int = wire(_number(64))
    resumed_at: int = wire(_number(64))


@frozen
class Done(Message):
    """Source: heard; good-bye."""

    TYPE = 19


@frozen
class Ping(Message):
    """Either: answer at once. `sent_at` is opaque to the receiver. Also the keep-alive."""

    TYPE = 20
    sent_at: int = wire(_number(64))


@frozen
class Pong(Message):
    """Either: `sent_at` as it came, and `at`, ns of the answerer's CLOCK_MONOTONIC."""

    TYPE = 21
    sent_at: int = wire(_number(64))
    at: int = wire(_number(64))


@frozen
class Cancel(Message):
    """Either, before the handover: a person wants it to end."""

    TYPE = 22
    LIMIT = 8 * _KIB
    reason: str = wire(_text())


@frozen
class Error(Message):
    """Either, before the handover: I cannot go on. `code` is for programs, the rest for people."""

    TYPE = 23
    LIMIT = 8 * _KIB
    code: str = wire(_text(64))
    message: str = wire(_text())
    remedy: str = wire(_text())


@frozen
class Inquire(Message):
    """Source, with the feature `capabilities`: no machine, just a question: what can your CPU backend present?"""

    TYPE = 24
    FEATURE = CAPABILITIES


@frozen
class Capabilities(Message):
    """Target: what its backend can present. `cpuid` has rows of leaf, subleaf, EAX, EBX, ECX and EDX, ascending;
    `tsc_khz` is the rate of its TSC (0: unknown), `tsc_scaling` whether it can give a guest any rate."""

    TYPE = 25
    FEATURE = CAPABILITIES
    LIMIT = 64 * _KIB
    machine: str = wire(_text(255))
    backend: str = wire(_text(64))
    cpuid: tuple[tuple[int, ...], ...] = wire(_many(_parse_cpuid_row, MAX_CPUID_ROWS), _format_rows)
    tsc_khz: int = wire(_number(32))
    tsc_scaling: bool = wire(_flag)


@frozen
class Locate(Message):
    """Source, with the feature `whereabouts`: what became of this teleport of mine, whose end I did not hear?"""

    TYPE = 26
    FEATURE = WHEREABOUTS
    teleport_id: bytes = wire(_blob(ID_SIZE, ID_SIZE))


@frozen
class Located(Message):
    """Target: `answer` is a value of `vmf.teleport.protocol.handover.Answer`; after "never" the teleport cannot arrive
    any more. `machine` and `detail` are for people."""

    TYPE = 27
    FEATURE = WHEREABOUTS
    LIMIT = 8 * _KIB
    answer: str = wire(_text(16))
    machine: str = wire(_text(255))
    detail: str = wire(_text())


@frozen
class Join(Message):
    """Source, on an additional channel: it belongs to this teleport, as `token` of its CHECKED shows."""

    TYPE = 28
    teleport_id: bytes = wire(_blob(ID_SIZE, ID_SIZE))
    token: bytes = wire(_blob(TOKEN_SIZE, TOKEN_SIZE))


@frozen
class Joined(Message):
    """Target, on an additional channel: pages may come this way, too."""

    TYPE = 29


@frozen
class Notes(Message):
    """Target, with the feature `notes`, once before CHECKED: sentences for the user at the source."""

    TYPE = 30
    FEATURE = NOTES
    LIMIT = 64 * _KIB
    notes: tuple[str, ...] = wire(_many(_text(), MAX_NOTES), _listed)


MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Authenticate, Challenge, Authenticated, Offer, Checked, Begin, Bye, Pages, Zeros, RoundEnd,
    RoundAck, Paused, State, Ready, Handover, Running, Done, Ping, Pong, Cancel, Error,
    Inquire, Capabilities, Locate, Located, Join, Joined, Notes,
)  # fmt: skip
BY_TYPE = {message.TYPE: message for message in MESSAGES}
LIMITS = {message.TYPE: message.LIMIT for message in MESSAGES}


def encode(message: Message) -> bytes:
    """The frame of a message. Raises LocalProtocolError when a field is out of bounds."""
    kind = type(message)
    body: dict[str, Any] = {}
    try:
        for attribute in attrs.fields(kind):
            raw = attribute.metadata["format"](getattr(message, attribute.name))
            attribute.metadata["parse"](raw)
            body[attribute.name] = raw
        data = codec.encode(body)
        if len(data) > kind.LIMIT:
            raise ValueError(f"{len(data)} bytes; {kind.LIMIT} is the limit")
    except (ValueError, TypeError) as error:
        raise LocalProtocolError(f"cannot send {kind.word()}: {error}.") from None
    return frames.encode_frame(kind.TYPE, data)


def decode(type_: int, data: bytes) -> Message:
    """The message of a checked frame. Raises RemoteProtocolError only."""
    kind = BY_TYPE[type_]
    try:
        body = codec.decode(data)
        if not isinstance(body, dict):
            raise ValueError("the body is not a map")
        fields = attrs.fields(kind)
        names = {attribute.name for attribute in fields}
        if body.keys() != names:
            odd = sorted(clean_text(name, 40) for name in body.keys() ^ names)
            raise ValueError(f"missing or leftover field {odd[0]!r}")
        values = {}
        for attribute in fields:
            try:
                values[attribute.name] = attribute.metadata["parse"](body[attribute.name])
            except ValueError as error:
                raise ValueError(f"field {attribute.name!r} is {error}") from None
        return kind(**values)
    except ValueError as error:
        raise RemoteProtocolError(f"the other side sent a malformed {kind.word()}: {error}.") from None
