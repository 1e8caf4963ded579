"""Passwords: both sides prove that they know, guesses are slowed down, and hostile bytes break nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import AuthenticationError, RemoteProtocolError, TeleportError, TransportError
from vmf.teleport import authentication as auth
from vmf.teleport.authentication import Attempts, Verifier, WrongPassword, check_password, demand, prove
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.target import TargetOptions

SECRET = "correct horse battery staple"
VERIFIER = Verifier.of(SECRET, auth.LEAST_ITERATIONS)
BINDING = ("tls-server-end-point", b"\x01" * 32)


class Wire:
    """Runs `prove` and `demand` against each other, without threads: the target's half is driven by what it is sent."""

    def __init__(self) -> None:
        self.said: list[m.Message] = []

    def run(
        self,
        verifier: Verifier | None,
        password: str | None,
        *,
        target_binding: auth.Binding | None = None,
        source_binding: auth.Binding | None = None,
        attempts: Attempts | None = None,
        change: Callable[[m.Message], m.Message] = lambda message: message,
    ) -> None:
        import queue
        import threading

        to_target: queue.SimpleQueue[m.Message | None] = queue.SimpleQueue()
        to_source: queue.SimpleQueue[m.Message | BaseException] = queue.SimpleQueue()

        def taker(box: queue.SimpleQueue[Any]) -> Callable[[type[m.Message]], Any]:
            def take(kind: type[m.Message]) -> Any:
                message = box.get(timeout=20)
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    raise TransportError("gone.")
                if not isinstance(message, kind):
                    raise RemoteProtocolError(f"{message.word()} is not {kind.word()}")
                return message

            return take

        def teller(box: queue.SimpleQueue[Any]) -> Callable[[m.Message], None]:
            def tell(message: m.Message) -> None:
                message = change(message)
                self.said.append(message)
                box.put(message)

            return tell

        def target() -> None:
            try:
                demand(
                    verifier,
                    target_binding,
                    attempts or Attempts(),
                    "192.0.2.1",
                    teller(to_source),
                    taker(to_target),
                )
            except BaseException as error:
                to_source.put(error)

        thread = threading.Thread(target=target)
        thread.start()
        try:
            methods = auth.methods_of(verifier, target_binding)
            prove(methods, password, source_binding, teller(to_target), taker(to_source))
        finally:
            to_target.put(None)
            thread.join(20)


def test_the_right_password() -> None:
    wire = Wire()
    wire.run(VERIFIER, SECRET)
    assert [message.word() for message in wire.said] == [
        "AUTHENTICATE", "CHALLENGE", "AUTHENTICATE", "AUTHENTICATED",
    ]  # fmt: skip
    sent = b"".join(m.encode(message) for message in wire.said)
    assert SECRET.encode() not in sent
    assert VERIFIER.stored_key not in sent
    assert VERIFIER.server_key not in sent


def test_with_a_channel_binding_nothing_less_is_spoken() -> None:
    wire = Wire()
    wire.run(VERIFIER, SECRET, target_binding=BINDING, source_binding=BINDING)
    assert {said.method for said in wire.said if isinstance(said, m.Authenticate)} == {"SCRAM-SHA-256-PLUS"}
    for target, source in ((BINDING, None), (None, BINDING)):
        with pytest.raises(AuthenticationError, match="another method"):
            Wire().run(VERIFIER, SECRET, target_binding=target, source_binding=source)


def test_somebody_in_between_with_another_certificate_is_seen() -> None:
    """He relays every word; but the source shook hands with him, and the target with him, too."""
    other = ("tls-server-end-point", b"\x02" * 32)
    with pytest.raises(AuthenticationError, match="another TLS certificate"):
        Wire().run(VERIFIER, SECRET, target_binding=BINDING, source_binding=other)


def test_a_wrong_password() -> None:
    with pytest.raises(AuthenticationError, match="the password is wrong"):
        Wire().run(VERIFIER, SECRET + "r")


def test_a_target_that_does_not_know_the_password() -> None:
    """It relays nothing and knows nothing; whatever it makes up, the source goes no further."""
    fake = Verifier(VERIFIER.iterations, VERIFIER.salt, VERIFIER.stored_key, bytes(32))
    with pytest.raises(AuthenticationError, match="did not prove that it knows the password"):
        Wire().run(fake, SECRET)


def test_a_target_that_asks_for_less_work_is_refused_before_anything_is_computed() -> None:
    cheap = Verifier(4096, VERIFIER.salt, VERIFIER.stored_key, VERIFIER.server_key)
    with pytest.raises(AuthenticationError, match="hashed 4096 times"):
        Wire().run(cheap, SECRET)

    def dearer(message: m.Message) -> m.Message:
        if isinstance(message, m.Challenge):
            head = message.data.rpartition(b",i=")[0]
            return m.Challenge(head + b",i=9999999")
        return message

    with pytest.raises(AuthenticationError, match="hashed 9999999 times"):
        Wire().run(VERIFIER, SECRET, change=dearer)


def test_one_side_only() -> None:
    with pytest.raises(AuthenticationError, match="asks for a password") as caught:
        Wire().run(VERIFIER, None)
    assert "--password-file" in caught.value.remedy
    with pytest.raises(AuthenticationError, match="asks for no password") as caught:
        Wire().run(None, SECRET)
    assert "--teleporter-password-file" in caught.value.remedy
    Wire().run(None, None)


def test_a_recorded_proof_is_of_no_use_again() -> None:
    wire = Wire()
    wire.run(VERIFIER, SECRET)
    recorded = [message for message in wire.said if isinstance(message, m.Authenticate)]

    def replay(message: m.Message) -> m.Message:
        return recorded.pop(0) if isinstance(message, m.Authenticate) else message

    with pytest.raises(TeleportError):
        Wire().run(VERIFIER, SECRET, change=replay)


@given(data=st.binary(max_size=400), which=st.integers(0, 3))
@settings(max_examples=60)
def test_any_bytes_in_a_step_raise_one_of_two_errors(data: bytes, which: int) -> None:
    seen = 0

    def spoil(message: m.Message) -> m.Message:
        nonlocal seen
        seen += 1
        if seen - 1 != which:
            return message
        kind: Any = type(message)
        return m.Authenticate(message.method, data) if isinstance(message, m.Authenticate) else kind(data)

    quick = Verifier(auth.LEAST_ITERATIONS, b"s" * 16, b"a" * 32, b"b" * 32)
    with pytest.raises((AuthenticationError, RemoteProtocolError)) as caught:
        Wire().run(quick, "x", change=spoil)
    assert data.decode("latin-1") not in str(caught.value) or len(data) < 5


# Verifiers and passwords


def test_a_verifier_is_read_back_and_shows_nothing() -> None:
    text = str(VERIFIER)
    assert Verifier.parse(text) == VERIFIER
    assert text.startswith("SCRAM-SHA-256$100000:")
    assert str(Verifier.of(SECRET, auth.LEAST_ITERATIONS)) != text  # a salt of its own
    assert SECRET not in text
    assert "'" not in repr(VERIFIER)
    for bad in ("", SECRET, text[:-4], text + "x", text.replace("100000", "1"), text.replace("100000", "99999999")):
        with pytest.raises(ValueError, match="not a verifier") as caught:
            Verifier.parse(bad)
        assert SECRET not in str(caught.value)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_is_a_password_or_is_refused_without_being_quoted(text: str) -> None:
    said = ""
    try:
        check_password(text)
    except AuthenticationError as error:
        said = str(error)
    assert len(text) < 12 or text not in said


def test_passwords_that_are_the_same_to_people() -> None:
    """SASLprep: composed and decomposed letters, no-break spaces."""
    Wire().run(Verifier.of("Zu\u0308rich\u00a0West", auth.LEAST_ITERATIONS), "Z\u00fcrich West")


# Guesses


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def guess(attempts: Attempts, address: str, *, right: bool = False) -> None:
    def attempt() -> bytes:
        if not right:
            raise WrongPassword("no.")
        return b"proof"

    attempts.judge(address, attempt)


def test_each_wrong_password_doubles_the_wait() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    waits = []
    for _ in range(9):
        assert attempts.wait_s("192.0.2.1") == 0
        with pytest.raises(WrongPassword):
            guess(attempts, "192.0.2.1")
        waits.append(attempts.wait_s("192.0.2.1"))
        with pytest.raises(AuthenticationError, match="too many wrong passwords"):
            guess(attempts, "192.0.2.1", right=True)  # the right one has to wait, too
        clock.now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    guess(attempts, "192.0.2.1", right=True)
    with pytest.raises(WrongPassword):
        guess(attempts, "192.0.2.1")
    assert attempts.wait_s("192.0.2.1") == 1  # the right one cleared the account
    assert attempts.wait_s("192.0.2.2") == 0  # others do not wait


def test_one_host_cannot_try_with_all_its_addresses() -> None:
    attempts = Attempts(Clock())
    with pytest.raises(WrongPassword):
        guess(attempts, "2001:db8::1")
    assert attempts.wait_s("2001:db8::2") == 1
    assert attempts.wait_s("2001:db8:0:1::1") == 0
    with pytest.raises(WrongPassword):
        guess(attempts, "fe80::1%eth0")
    assert attempts.wait_s("fe80::2%eth0") == 1


def test_many_hosts_together_have_a_limit() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    tried = 0
    for number in range(5000):
        try:
            guess(attempts, str(ipaddress.ip_address(number)))
        except WrongPassword:
            tried += 1
        except AuthenticationError:
            clock.now += 1
    assert tried <= auth.GUESSES + (clock.now - 1000) / auth.SECONDS_PER_GUESS + 1
    assert len(attempts._failed) <= auth.MAX_ADDRESSES


def test_old_failures_are_forgotten() -> None:
    clock = Clock()
    attempts = Attempts(clock)
    for _ in range(3):
        with pytest.raises(WrongPassword):
            guess(attempts, "192.0.2.1")
        clock.now += 60
    clock.now += auth.FORGET_S
    with pytest.raises(WrongPassword):
        guess(attempts, "192.0.2.1")
    assert attempts.wait_s("192.0.2.1") == 1


# Whole sessions between fake machines


def test_a_teleport_with_a_password(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "FIRST_DELAY_S", 60.0)
    source, target = pair.machine("source"), pair.machine("target")
    source.start()
    waiting = pair.wait(target, TargetOptions(verifier=VERIFIER))
    with pytest.raises(AuthenticationError, match="the target asks for a password"):
        pair.teleport(source, waiting)
    assert "asks for a password" in waiting.wait_failure(1)
    with pytest.raises(AuthenticationError, match="the target refused: the password is wrong"):
        pair.teleport(source, waiting, password="wrong")
    assert "the password is wrong" in waiting.wait_failure(2)
    with pytest.raises(AuthenticationError, match="too many wrong passwords"):
        pair.teleport(source, waiting, password=SECRET)
    waiting.wait_failure(3)
    assert source.runs
    assert "describe" not in source.log  # nothing of the machine was told
    assert "check" not in target.log
    monkeypatch.setattr(auth, "FIRST_DELAY_S", 0.0)
    pair.teleport(source, waiting, password=SECRET)
    waiting.wait_done()
    assert target.runs
    assert SECRET not in repr(waiting.events)


def test_a_source_with_a_password_refuses_a_target_without(pair: Any) -> None:
    source, target = pair.machine("source"), pair.machine("target")
    source.start()
    waiting = pair.wait(target)
    with pytest.raises(AuthenticationError, match="asks for no password"):
        pair.teleport(source, waiting, password=SECRET)
    waiting.wait_failure(1)
    assert source.runs
    assert waiting.waits


def test_nothing_goes_before_authentication() -> None:
    """By the state table: no OFFER, no INQUIRE, no pages in AUTHENTICATE."""
    target = Connection(Role.TARGET)
    source = Connection(Role.SOURCE)
    target.receive_data(source.send(m.Hello(bytes(16), (1,), (), "test", "box")))
    assert isinstance(target.next_event(), m.Hello)
    source.receive_data(target.send(m.Welcome(bytes(16), 1, (), ("SCRAM-SHA-256",), "test")))
    source.next_event()
    for message in (m.Offer({}, 1, 4096, (), 0, False), m.Inquire(), m.Begin(), m.Done()):
        with pytest.raises(TeleportError):
            source.send(message)
        again = Connection(Role.TARGET)
        again.phase = target.phase
        again.receive_data(m.encode(message))
        with pytest.raises(RemoteProtocolError, match="not allowed"):
            again.next_event()
