"""Preferring AES-128-GCM, which encrypts a machine's memory a good deal faster than AES-256-GCM.

Theory of operation. Three cipher suites exist for TLS 1.3, all strong enough for anything that a teleport carries;
the target's order decides. OpenSSL puts AES-256 first, and Python lets nobody change that before 3.15
(`SSLContext.set_ciphersuites`). Before that the OpenSSL function can only be called with the pointer that a
context object holds right behind its object header, and a wrong pointer there would be a disaster. So nothing is
believed: the pointer is read where it has been in every CPython with TLS 1.3, what it points to is read through
/proc/self/mem (which refuses a bad address where a dereference would crash) and must hold the very method object
that this context was made of, from the very library that the ssl module uses. Afterwards the ssl module itself must
report the new order. If anything is otherwise, the order stays as OpenSSL has it, and teleports are slower by some
percent; nothing else depends on it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import ssl
import struct
import sys
from typing import Any

log = logging.getLogger(__name__)

FIRST = "TLS_AES_128_GCM_SHA256"
SUITES = f"{FIRST}:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_POINTER = struct.calcsize("P")
_METHODS = {ssl.PROTOCOL_TLS_SERVER: "TLS_server_method", ssl.PROTOCOL_TLS_CLIENT: "TLS_client_method"}
_METHOD_AT = (0, _POINTER)
"""Where an SSL_CTX has its method: first (OpenSSL 1.1.1), or behind the library context (3.0 and later)."""


def prefer_fast(context: ssl.SSLContext) -> bool:
    """Put AES-128-GCM first in a context made for servers or clients; False where that cannot be done safely."""
    setter = getattr(context, "set_ciphersuites", None)
    if setter is not None:
        setter(SUITES)
        return True
    try:
        done = _set_ciphersuites(context)
    except (OSError, AttributeError, ImportError) as error:  # no such function or library, /proc not readable
        log.debug("AES-128-GCM cannot be preferred here: %s", error)
        return False
    if not done:
        log.debug("AES-128-GCM cannot be preferred here: this Python keeps its TLS context elsewhere")
    return done and next((cipher["name"] for cipher in context.get_ciphers()), "") == FIRST


def _set_ciphersuites(context: ssl.SSLContext) -> bool:
    if sys.implementation.name != "cpython" or type(context).__mro__[-2].__name__ != "_SSLContext":
        return False
    library = _library()
    method = getattr(library, _METHODS[context.protocol])
    method.restype = ctypes.c_void_p
    wanted: int = method()
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pointer = _word(memory, id(context) + object.__basicsize__)
        if not pointer or all(_word(memory, pointer + offset) != wanted for offset in _METHOD_AT):
            return False
    finally:
        os.close(memory)
    function = library.SSL_CTX_set_ciphersuites
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
    return bool(function(pointer, SUITES.encode()) == 1)


def _library() -> ctypes.CDLL:
    """The libssl that the ssl module has loaded: its own file's handle finds what that file is linked with."""
    import _ssl

    module: Any = _ssl
    return ctypes.CDLL(getattr(module, "__file__", None))


def _word(memory: int, address: int) -> int:
    """The pointer at an address of this process; 0 where nothing can be read."""
    try:
        data = os.pread(memory, _POINTER, address)
    except (OSError, OverflowError):
        return 0
    return int.from_bytes(data, sys.byteorder) if len(data) == _POINTER else 0
