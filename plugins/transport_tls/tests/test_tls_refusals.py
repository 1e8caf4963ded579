"""Who is turned away: each with one clear line at each side, and the listener goes on listening."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from vmf.errors import TransportClosed, TransportError, TransportRefused, TransportTimeout
from vmf.transport.base import Address
from vmf_transport_tls import files
from vmf_transport_tls import transport as module
from vmf_transport_tls.transport import MAX_HANDSHAKES, TlsListener, TlsTransport

Listening = Callable[..., TlsListener]
Maker = Callable[..., Path]
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def one_line(error: TransportError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert "_ssl" not in text  # no jargon of the library
    assert "[SSL" not in text
    for word in words:
        assert word in text, text


def connect(listener: TlsListener, directory: Path, host: str = "localhost", **options: str) -> TransportError | None:
    """What a source learns; None when it was let in (then it is gone again)."""
    address = Address("tls", host, listener.address.port, {"tls_dir": str(directory)} | options)
    try:
        TlsTransport().connect(address, 10).close()
    except TransportError as error:
        return error
    return None


def refusal(listener: TlsListener) -> TransportRefused:
    with pytest.raises(TransportRefused) as caught:
        listener.accept(10)
    return caught.value


def still_waiting(listener: TlsListener, certs: Path) -> None:
    """A good source is let in afterwards."""
    assert connect(listener, certs) is None
    listener.accept(10).close()


def bare_client(directory: Path, *, certificate: bool = True) -> ssl.SSLContext:
    """A client without vmf's own checks beforehand."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context


def talk(listener: TlsListener, context: ssl.SSLContext) -> ssl.SSLError | None:
    """Shake hands and read; the error of the TLS library."""
    with socket.create_connection(("127.0.0.1", listener.address.port), 10) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                client.recv(1)
        except ssl.SSLError as error:
            return error
    return None


def test_a_foreign_ca_at_the_source(listening: Listening, certs: Path, make: Maker, authority: trustme.CA) -> None:
    """The source trusts the target, but not the other way round."""
    listener = listening()
    error = connect(listener, make("foreign", ca=trustme.CA(), trusted=authority))
    assert error is not None
    one_line(error, "target does not accept our certificate", "authority that is trusted there", "same CA")
    one_line(refusal(listener), "127.0.0.1", "source's certificate was not issued by an authority that is trusted here")
    still_waiting(listener, certs)


def test_a_foreign_ca_at_the_target(listening: Listening, certs: Path, make: Maker) -> None:
    listener = listening()
    error = connect(listener, make("foreign", ca=trustme.CA()))
    assert error is not None
    one_line(error, "target's certificate was not issued by an authority that is trusted here", "same CA")
    one_line(refusal(listener), "source does not accept our certificate")
    still_waiting(listener, certs)


def test_no_certificate(listening: Listening, certs: Path, tmp_path: Path) -> None:
    listener = listening()
    error = connect(listener, tmp_path)
    assert error is not None
    one_line(error, "no usable certificates", "ca-cert.pem is missing", "vmf tls init", "--tls-dir")
    raw = talk(listener, bare_client(certs, certificate=False))
    assert raw is not None
    assert "CERTIFICATE_REQUIRED" in str(raw.reason)
    one_line(refusal(listener), "the source showed no certificate", "vmf tls issue")
    still_waiting(listener, certs)


def test_expired(listening: Listening, certs: Path, make: Maker) -> None:
    old = make("old", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    listener = listening()
    error = connect(listener, old)
    assert error is not None
    one_line(error, "client-cert.pem expired on", f"{NOW - DAY:%Y-%m-%d}", "vmf tls issue")
    # and a source that shows it all the same
    raw = talk(listener, bare_client(old))
    assert raw is not None
    one_line(refusal(listener), "the source's certificate has expired", "vmf tls issue")
    with pytest.raises(TransportError, match=r"server-cert\.pem expired on"):
        TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_dir": str(old)}))
    still_waiting(listener, certs)


def test_not_valid_yet(listening: Listening, certs: Path, make: Maker) -> None:
    early = make("early", not_before=NOW + DAY, not_after=NOW + 9 * DAY)
    listener = listening()
    error = connect(listener, early)
    assert error is not None
    one_line(error, "is not valid before", "clock")
    assert talk(listener, bare_client(early)) is not None
    one_line(refusal(listener), "the source's certificate is not valid yet", "clocks")
    still_waiting(listener, certs)


def test_an_expired_target(listening: Listening, certs: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It expired while the target waited."""
    old = make("old", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    monkeypatch.setattr(module.files, "check_validity", lambda *a: ())
    listener = listening(tls_dir=str(old))
    error = connect(listener, certs)
    assert error is not None
    one_line(error, "the target's certificate has expired", "vmf tls issue")
    one_line(refusal(listener), "does not accept our certificate", "expired")


def test_a_wrong_name(listening: Listening, certs: Path, make: Maker) -> None:
    listener = listening(tls_dir=str(make("other", "other.example")))
    error = connect(listener, certs)
    assert error is not None
    one_line(error, "certificate is not for 'localhost'", "--tls-hostname")
    one_line(refusal(listener), "does not accept our certificate")
    assert connect(listener, certs, tls_hostname="other.example") is None
    listener.accept(10).close()
    error = connect(listener, certs, "127.0.0.1")
    assert error is not None
    one_line(error, "certificate is not for '127.0.0.1'")


def test_the_allow_list(listening: Listening, certs: Path, make: Maker) -> None:
    listener = listening(allow=["Friend.example.", "other.example"])
    stranger = make("stranger", "stranger.example", "192.0.2.3")
    error = connect(listener, stranger)
    assert isinstance(error, TransportRefused)
    one_line(error, "does not allow teleports from stranger.example, 192.0.2.3", "the target (localhost, 127.0.0.1)")
    one_line(refusal(listener), "stranger.example", "localhost", "allows only Friend.example.", "--teleporter-allow")
    assert connect(listener, make("friend", "friend.example")) is None
    assert "friend.example" in getattr(listener.accept(10), "peer", ())


def test_a_plaintext_client(listening: Listening, certs: Path) -> None:
    listener = listening()
    for said in (b"VMFT" + bytes(100), b"GET / HTTP/1.1\r\n\r\n", b"\0"):
        with socket.create_connection(("127.0.0.1", listener.address.port), 10) as raw:
            raw.sendall(said)
            answer = b"".join(iter(lambda raw=raw: raw.recv(1000), b""))
        assert b"TLS" in answer
        assert b"--transport tls" in answer
        one_line(refusal(listener), "does not speak TLS", "--transport tls")
    still_waiting(listener, certs)


def test_a_tls_1_2_client(listening: Listening, certs: Path) -> None:
    listener = listening()
    context = bare_client(certs)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    raw = talk(listener, context)
    assert raw is not None
    assert "PROTOCOL_VERSION" in str(raw.reason)
    one_line(refusal(listener), "the source does not speak TLS 1.3")
    still_waiting(listener, certs)


def answering(answer: bytes, *, close: bool = True) -> tuple[int, threading.Thread]:
    """A server that says the same to everybody, once."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as one:
            one.recv(4096)
            one.sendall(answer)
            if close:
                one.shutdown(socket.SHUT_WR)
            while one.recv(4096):
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return server.getsockname()[1], thread


def to(port: int, certs: Path, timeout: float = 5) -> None:
    TlsTransport().connect(Address("tls", "localhost", port, {"tls_dir": str(certs)}), timeout)


def test_a_plaintext_target(certs: Path) -> None:
    port, _ = answering(b"VMFT" + bytes(200))
    with pytest.raises(TransportError, match="the target does not speak TLS") as caught:
        to(port, certs)
    one_line(caught.value, "--teleporter-transport tls", "--transport tcp")
    port, _ = answering(b"")
    with pytest.raises(TransportClosed, match="before it had shaken hands"):
        to(port, certs)


def test_a_target_that_says_nothing(certs: Path) -> None:
    port, _ = answering(b"", close=False)
    began = time.monotonic()
    with pytest.raises(TransportTimeout, match="did not shake hands"):
        to(port, certs, 0.3)
    assert time.monotonic() - began < 3


def test_a_tls_server_that_is_no_vmf(certs: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server-cert.pem", certs / "server-key.pem")
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, context.wrap_socket(server.accept()[0], server_side=True) as one:
            one.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            one.recv(10)

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(TransportError, match="no vmf machine"):
        to(server.getsockname()[1], certs)


def test_half_open_connections_keep_nobody_out(
    listening: Listening, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there is room for, then a good source, at once."""
    listener = listening()
    port = listener.address.port
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MAX_HANDSHAKES)]
    idle[-1].sendall(b"\x16\x03\x01")  # a slow one
    began = time.monotonic()
    assert connect(listener, certs) is None
    assert time.monotonic() - began < 4
    deadline = time.monotonic() + 60
    while True:  # what became of the others is told, too
        assert time.monotonic() < deadline
        try:
            listener.accept(10).close()
            break
        except TransportRefused as error:
            one_line(error, "127.0.0.1")
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("vmf-tls-handshake") <= MAX_HANDSHAKES
    for each in idle:
        each.close()


def test_a_slow_handshake_is_dropped(certs: Path) -> None:
    """Byte by byte: the limit is for the whole handshake, not for a call."""
    from vmf.transport import sockets
    from vmf_transport_tls import files

    acceptor = sockets.listen(Address("tls", "127.0.0.1", 0))
    listener = TlsListener(acceptor, files.load(certs, "server"), (), handshake_seconds=0.6)
    with socket.create_connection(("127.0.0.1", listener.address.port)) as slow:
        began = time.monotonic()
        stop = threading.Event()

        def drip() -> None:
            try:
                for byte in b"\x16\x03\x01\x02\x00" + bytes(500):
                    slow.sendall(bytes([byte]))
                    if stop.wait(0.05):
                        return
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        one_line(refusal(listener), "did not shake hands within 0.6 s")
        assert time.monotonic() - began < 3
        stop.set()
        thread.join()
    listener.close()


def test_accept_times_out_and_is_woken(listening: Listening) -> None:
    listener = listening()
    with pytest.raises(TransportTimeout, match="nobody connected"):
        listener.accept(0.05)
    threading.Timer(0.1, listener.shutdown).start()
    with pytest.raises(TransportClosed):
        listener.accept(None)
    with pytest.raises(TransportClosed):
        listener.accept(None)
    listener.close()
    listener.close()


# Files


def changed(directory: Path, file: str, mode: int | None = None, text: str | None = None) -> str:
    if text is not None:
        (directory / file).write_text(text)
    if mode is not None:
        os.chmod(directory / file, mode)
    with pytest.raises(TransportError) as caught:
        TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_dir": str(directory)}))
    one_line(caught.value, file)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602])
def test_a_key_that_others_can_read(make: Maker, mode: int) -> None:
    said = changed(make("open"), "server-key.pem", mode)
    assert "chmod 600" in said


@pytest.mark.parametrize("file", ["", "ca-cert.pem", "server-cert.pem"])
def test_a_directory_that_everybody_can_change(make: Maker, file: str) -> None:
    directory = make("open")
    path = directory / file if file else directory
    path.chmod(0o777 if not file else 0o646)
    with pytest.raises(TransportError, match=f"{path.name} can be changed by every user") as caught:
        files.load(directory, "server")
    assert f"chmod o-w {path}" in str(caught.value)
    path.chmod(0o755 if not file else 0o664)
    files.load(directory, "server")


def test_files_that_are_not_right(make: Maker, certs: Path) -> None:
    assert "cannot be read as a certificate" in changed(make("a"), "server-cert.pem", text="hello")
    assert "cannot be read as a certificate" in changed(make("b"), "ca-cert.pem", text="")
    assert "cannot be used" in changed(make("c"), "server-key.pem", text="hello")
    other = (certs / "server-key.pem").read_text()
    assert "is not the key of" in changed(make("d"), "server-key.pem", text=other)


def test_a_key_with_a_passphrase(make: Maker) -> None:
    from cryptography.hazmat.primitives import serialization as s

    directory = make("locked")
    key = s.load_pem_private_key((directory / "server-key.pem").read_bytes(), None)
    text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    assert "passphrase" in changed(directory, "server-key.pem", text=text.decode())


def test_expiry_is_named_days_ahead(make: Maker, listening: Listening, caplog: pytest.LogCaptureFixture) -> None:
    soon = make("soon", not_before=NOW - DAY, not_after=NOW + 5 * DAY + datetime.timedelta(hours=1))
    listener = listening(tls_dir=str(soon))
    assert connect(listener, soon) is None
    for role in ("server", "client"):
        assert any(f"{role}-cert.pem expires in 5 days" in text for text in caplog.messages), caplog.messages
    channel = listener.accept(10)
    assert "expires in 5 days" in channel.notices[0]
    assert "server-cert.pem expires in 5 days" in listener.notices[0]
    channel.close()


def test_unknown_options() -> None:
    with pytest.raises(TransportError, match="no setting 'tls_hostname'"):
        TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"tls_hostname": "x"}))
    with pytest.raises(TransportError, match="not a list of names"):
        TlsTransport().listen(Address("tls", "127.0.0.1", 0, {"allow": "x"}))
