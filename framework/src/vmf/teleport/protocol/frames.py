"""The frame: a fixed header that says how much follows, checked before a byte of it is allocated.

    offset  size  field
    0       4     magic "VMFT"
    4       2     message type
    6       2     flags, 0 in version 1
    8       4     length of the body in bytes
    12      4     CRC-32 (IEEE 802.3) of bytes 0-11 of the header and the body

All numbers are little-endian. The checksum finds broken middleboxes and bugs, not attackers (that is what the
transport's authentication is for). Raw page data that belongs to a message follows its frame and is not covered.
"""

from __future__ import annotations

import struct
import zlib

from attrs import frozen

from vmf.errors import RemoteProtocolError

MAGIC = b"VMFT"
_HEADER = struct.Struct("<4sHHII")
_PREFIX = struct.Struct("<4sHHI")
HEADER_SIZE = _HEADER.size
_TLS = (b"\x15\x03", b"\x16\x03")
"""How TLS records begin: an alert, a handshake (RFC 8446, 5.1)."""


@frozen
class Header:
    """A header whose magic, type, flags and length were checked, its checksum not yet."""

    type: int
    length: int
    prefix: bytes
    crc: int


def may_begin(data: bytes) -> bool:
    """Whether these first bytes, at most 4, leave open what `decode_header` will say."""
    return MAGIC.startswith(data) or any(len(data) < len(tls) and tls.startswith(data) for tls in _TLS)


def encode_frame(type_: int, body: bytes) -> bytes:
    """Header and body."""
    prefix = _PREFIX.pack(MAGIC, type_, 0, len(body))
    crc = zlib.crc32(body, zlib.crc32(prefix))
    return prefix + crc.to_bytes(4, "little") + body


def decode_header(data: bytes, limits: dict[int, int]) -> Header:
    """Check a header of `HEADER_SIZE` bytes against the body limits by message type, bytes.

    Raises RemoteProtocolError for another magic, an unknown type, unknown flags or an excessive length.
    """
    magic, type_, flags, length, crc = _HEADER.unpack(data)
    if magic[:2] in _TLS:
        raise RemoteProtocolError(
            "the other side speaks TLS, and this side plain TCP.",
            "Use the same on both: --transport tls at the source, --teleporter-transport tls at the target.",
        )
    if magic != MAGIC:
        raise RemoteProtocolError(
            "the other side does not speak vmf's teleport protocol (its bytes do not begin a frame).",
            "Check that host and port are those of a vmf machine that waits for a teleport.",
        )
    limit = limits.get(type_)
    if limit is None:
        raise RemoteProtocolError(f"the other side sent a message of unknown type {type_}.")
    if flags:
        raise RemoteProtocolError(f"the other side set unknown frame flags {flags:#06x}.")
    if length > limit:
        raise RemoteProtocolError(
            f"the other side announced {length} bytes in a message of type {type_}; {limit} is the limit."
        )
    return Header(type_, length, data[:12], crc)


def check_body(header: Header, body: bytes) -> None:
    """Raises RemoteProtocolError when the checksum does not match."""
    if zlib.crc32(body, zlib.crc32(header.prefix)) != header.crc:
        raise RemoteProtocolError(
            f"a message of type {header.type} arrived damaged (its checksum does not match).",
            "Check the network between the hosts and teleport again.",
        )
