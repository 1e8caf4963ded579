"""Guest RAM sealed beside TLS: large pieces under keys that only the two ends of one TLS connection know.

Theory of operation. A TLS record holds at most 16 KiB, and OpenSSL copies it twice on each side; for gigabytes that is
most of what TLS costs. As QUIC and DTLS-SRTP do, the handshake, the certificates and everything that is *said* are left
to TLS, and bulk data is protected with keys from within it: both ends send 32 random bytes inside the TLS connection,
and one secret for each direction is derived from them (HKDF). RAM is then encrypted by AES-128-GCM, 1 MiB at a
time, straight out of guest memory and straight into it. What is on the wire is a sequence of TLS records and frames:

    kind    1 byte   0x56, which is no TLS content type
    length  4 bytes  of what follows, big-endian: at most `MOST` + 16
    data             ciphertext and tag

- The nonce is the number of the frame, which is not sent: what is repeated, left out or out of order fails.
- Header and *position* are authenticated: how many bytes have been sent through TLS before in this direction. So a
  frame cannot be moved before or behind something that was said.
- After `FRAMES_PER_KEY` frames (64 GiB) the next secret is derived from the last one, so a key stays far below the
  limits of GCM and an old one does not lead to those before it.
- Both ends agree by ALPN, which the handshake authenticates. Without it everything goes through TLS.

This module does no I/O. Keys live as long as their connection.
"""

from __future__ import annotations

import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

ALPN = "vmf-sealed-1"
SHARE_SIZE = 32
"""Random bytes that each end contributes."""
KIND = 0x56
HEADER = struct.Struct("!BI")
"""As long as the header of a TLS record."""
TAG_SIZE = 16
MOST = 1 << 20
"""Bytes of RAM in a frame: so many that calls and wake-ups do not count, so few that a second cache holds them."""
FRAMES_PER_KEY = 1 << 16
SOURCE_TO_TARGET, TARGET_TO_SOURCE = "source to target", "target to source"
_NONCE = struct.Struct("!4xQ")
_POSITION = struct.Struct("!Q")


class Forged(Exception):
    """A frame is not what the other end sealed as the next one at this position."""


def available() -> bool:
    """Whether the library here can encrypt from memory into memory (cryptography 47)."""
    return hasattr(AESGCM, "encrypt_into") and hasattr(AESGCM, "decrypt_into")


def new_share() -> bytes:
    return os.urandom(SHARE_SIZE)


class _Keys:
    """The keys of one direction, one after the other."""

    def __init__(self, source_share: bytes, target_share: bytes, direction: str) -> None:
        if len(source_share) != SHARE_SIZE or len(target_share) != SHARE_SIZE:
            raise ValueError(f"a share is {SHARE_SIZE} bytes")
        info = f"{ALPN} {direction}".encode()
        self._secret = HKDF(hashes.SHA256(), 32, b"", info).derive(source_share + target_share)
        self._frames = 0
        self._cipher = self._make()

    def _make(self) -> AESGCM:
        return AESGCM(HKDFExpand(hashes.SHA256(), 16, f"{ALPN} key".encode()).derive(self._secret))

    def next(self) -> tuple[AESGCM, bytes]:
        """Cipher and nonce of the next frame; never the same pair again."""
        if self._frames == FRAMES_PER_KEY:
            self._secret = HKDFExpand(hashes.SHA256(), 32, f"{ALPN} next".encode()).derive(self._secret)
            self._cipher, self._frames = self._make(), 0
        nonce = _NONCE.pack(self._frames)
        self._frames += 1
        return self._cipher, nonce


class Sealer:
    """The sending end of one direction. Not for two threads at once."""

    def __init__(self, source_share: bytes, target_share: bytes, direction: str) -> None:
        self._keys = _Keys(source_share, target_share, direction)

    def seal(self, plain: memoryview, position: int, out: memoryview) -> int:
        """Write the frame of 1 to `MOST` bytes to the start of `out` (`plain` and 21 bytes); its size."""
        size = HEADER.size + plain.nbytes + TAG_SIZE
        HEADER.pack_into(out, 0, KIND, plain.nbytes + TAG_SIZE)
        cipher, nonce = self._keys.next()
        header = bytes(out[: HEADER.size]) + _POSITION.pack(position)
        cipher.encrypt_into(nonce, plain, header, out[HEADER.size : size])
        return size


class Opener:
    """The receiving end of one direction. Not for two threads at once."""

    def __init__(self, source_share: bytes, target_share: bytes, direction: str) -> None:
        self._keys = _Keys(source_share, target_share, direction)

    def open(self, frame: memoryview, position: int, into: memoryview) -> None:
        """Decrypt a whole frame, which must hold just as many bytes as `into`.

        Raises Forged; `into` may hold anything then, and nothing more can be opened.
        """
        cipher, nonce = self._keys.next()
        header = bytes(frame[: HEADER.size]) + _POSITION.pack(position)
        if frame.nbytes != HEADER.size + into.nbytes + TAG_SIZE:
            raise Forged("its length is another one")
        try:
            cipher.decrypt_into(nonce, frame[HEADER.size :], header, into)
        except InvalidTag:
            raise Forged("it was not sealed so") from None


def frame_length(header: bytes | memoryview) -> int | None:
    """Bytes behind the header of a frame; None for the header of a TLS record. Raises Forged for no length."""
    kind, length = HEADER.unpack_from(header)
    if kind != KIND:
        return None
    if not TAG_SIZE < length <= MOST + TAG_SIZE:
        raise Forged("its length is none")
    return int(length)
