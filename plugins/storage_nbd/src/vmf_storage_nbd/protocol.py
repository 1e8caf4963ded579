"""The numbers and layouts of the NBD protocol.

Source: the protocol's specification, doc/proto.md of the project "NetworkBlockDevice/nbd"; names are its own. All
integers are big-endian.
"""

from __future__ import annotations

import enum
import errno
import struct

PORT = 10809
INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2  # handshake flags, the same bits in both directions


class Option(enum.IntEnum):
    LIST = 3
    STARTTLS = 5
    GO = 7
    STRUCTURED_REPLY = 8


REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERROR = 1 << 31
REP_ERRORS = {
    REP_ERROR + 1: "it does not support that",
    REP_ERROR + 2: "it does not allow that",
    REP_ERROR + 3: "it calls our request invalid",
    REP_ERROR + 5: "it insists on TLS",
    REP_ERROR + 6: "there is no export of that name",
    REP_ERROR + 7: "it is shutting down",
    REP_ERROR + 8: "it wants block sizes to be honoured",
}
REP_ERR_TLS_REQD, REP_ERR_UNKNOWN = REP_ERROR + 5, REP_ERROR + 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
MAX_OPTION_REPLY = 1 << 16
"""Bytes that we accept in one; ours need a few dozen."""


class Has(enum.IntFlag):
    """Transmission flags: what an export can do."""

    FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    ROTATIONAL = 16
    TRIM = 32
    WRITE_ZEROES = 64
    DF = 128
    MULTI_CONN = 256


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


CMD_FLAG_FUA, CMD_FLAG_NO_HOLE = 1, 2
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IQ")  # error, cookie; behind the magic
STRUCTURED_REPLY = struct.Struct(">HHQI")  # flags, type, cookie, length; behind the magic
REPLY_DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_ERROR, CHUNK_ERROR_OFFSET = 0, 1, 2, 0x8001, 0x8002
CHUNK_IS_ERROR = 0x8000
OFFSET = struct.Struct(">Q")
HOLE = struct.Struct(">QI")
ERROR_CHUNK = struct.Struct(">IH")
MAX_ERROR_TEXT = 4096
DEFAULT_MAX_PAYLOAD = 32 << 20

ERRORS = {1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW,
          95: errno.EOPNOTSUPP, 108: errno.ESHUTDOWN}  # fmt: skip
"""The protocol's error numbers are Linux's."""
