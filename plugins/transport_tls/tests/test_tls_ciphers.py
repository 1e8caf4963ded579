"""AES-128-GCM comes first where that can be arranged, and everything works where it cannot."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from vmf_transport_tls import ciphers
from vmf_transport_tls.transport import TlsChannel, TlsListener, TlsTransport

Listening = Callable[..., TlsListener]
AES_256 = "TLS_AES_256_GCM_SHA384"


def negotiated(listening: Listening, certs: Path) -> str:
    listener = listening()
    from vmf.transport.base import Address

    address = Address("tls", "localhost", listener.address.port, {"tls_dir": str(certs)})
    source = TlsTransport().connect(address, 10)
    target = listener.accept(10)
    try:
        assert isinstance(source, TlsChannel)
        data = memoryview(bytearray(5))
        target.send(b"hello")
        source.recv_into(data)
        assert bytes(data) == b"hello"
        return source.cipher
    finally:
        source.close()
        target.close()


def arranged() -> bool:
    return ciphers.prefer_fast(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_the_fast_cipher_is_negotiated(listening: Listening, certs: Path) -> None:
    if not arranged():
        pytest.skip("this Python keeps its TLS context elsewhere, and has no set_ciphersuites")
    assert negotiated(listening, certs) == ciphers.FIRST


@pytest.mark.parametrize("protocol", [ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT])
def test_nothing_else_of_a_context_changes(protocol: int) -> None:
    before, after = ssl.SSLContext(protocol), ssl.SSLContext(protocol)
    if not ciphers.prefer_fast(after):
        pytest.skip("this Python keeps its TLS context elsewhere, and has no set_ciphersuites")
    assert after.get_ciphers()[0]["name"] == ciphers.FIRST
    assert {each["name"] for each in before.get_ciphers()} == {each["name"] for each in after.get_ciphers()}
    for name in ("options", "verify_mode", "verify_flags", "minimum_version", "maximum_version", "check_hostname"):
        assert getattr(before, name) == getattr(after, name)


@pytest.mark.parametrize("found", ["nothing", "an odd pointer", "a pointer to something else"])
def test_a_pointer_that_is_not_the_context_is_never_used(
    found: str, listening: Listening, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hasattr(ssl.SSLContext, "set_ciphersuites"):
        pytest.skip("no pointer is looked for")
    real, other = ciphers._word, object()

    def word(memory: int, address: int) -> int:
        if found == "nothing":
            return 0
        pointer = real(memory, address)
        return {"an odd pointer": 0xDEAD_BEEF_0000_0001, "a pointer to something else": id(other)}[found] or pointer

    monkeypatch.setattr(ciphers, "_word", word)
    assert not arranged()
    assert negotiated(listening, certs) == AES_256


def test_an_address_that_is_not_there_reads_as_nothing() -> None:
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for address in (0, 1, 0xDEAD_BEEF_0000_0000, (1 << 64) - 8, 1 << 70):
            assert ciphers._word(memory.fileno(), address) == 0
        word = b"12345678"
        assert ciphers._word(memory.fileno(), id(word) + bytes.__basicsize__ - 1) == int.from_bytes(word, "little")


def test_other_pythons_and_no_library_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(ssl.SSLContext, "set_ciphersuites"):
        pytest.skip("nothing is looked for")

    def none() -> object:
        raise OSError("no such library")

    monkeypatch.setattr(ciphers, "_library", none)
    assert not arranged()
    monkeypatch.setattr(ciphers, "_library", object)
    assert not arranged()
