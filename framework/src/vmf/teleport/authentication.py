"""Passwords of teleports: SCRAM-SHA-256 (RFC 5802, RFC 7677), spoken by the library scramp. No I/O.

Theory of operation. The target keeps a `Verifier`, made of the password and a random salt, from which the password can
only be guessed, never read. The source knows the password. In two exchanges of AUTHENTICATE and the target's answers
the source proves that it knows the password, and the target that it has the verifier; neither password nor anything
that could be replayed crosses the wire. What a listener on a connection that is not encrypted gets is enough to try
guesses at home: hence `ITERATIONS`, and hence the advice to use long passwords or TLS.

On a channel that has a binding (TLS: the hash of the target's certificate) the exchange is bound to it
(SCRAM-SHA-256-PLUS) and nothing less is accepted by either side, so there is no weaker method to talk anybody into.

A source with a password talks to nobody who does not prove to know it; a target with a verifier lets nobody in who does
not. A guess costs an attacker a connection and a wait, see `Attempts`.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import field, frozen

from vmf.errors import AuthenticationError, RemoteProtocolError
from vmf.teleport.protocol import messages as m

NONE = "none"
"""Method of a target that has no password."""
SCRAM = "SCRAM-SHA-256"
SCRAM_PLUS = "SCRAM-SHA-256-PLUS"

ITERATIONS = 600_000
"""Rounds of PBKDF2 in new verifiers, about a third of a second; OWASP's figure for PBKDF2-HMAC-SHA256 of 2023."""
LEAST_ITERATIONS, MOST_ITERATIONS = 100_000, 4_000_000
"""What a source computes for a target: fewer would make guesses cheap for a false target, more cost us too much."""
MAX_PASSWORD_BYTES = 1024

_USER = "vmf"
_SIZE = 32
"""Bytes of a SHA-256."""
_FORM = re.compile(
    r"SCRAM-SHA-256\$([1-9][0-9]{3,7}):([A-Za-z0-9+/=]{16,128})\$([A-Za-z0-9+/=]{44}):([A-Za-z0-9+/=]{44})"
)

Binding = tuple[str, bytes]
"""Name and data of a channel binding (RFC 5056), as `Channel.channel_binding` gives them."""
_M = TypeVar("_M", bound=m.Message)


@frozen
class Verifier:
    """What a target stores instead of a password.

    Attributes:
        iterations: rounds of PBKDF2.
        salt: random, 12 bytes or more.
        stored_key, server_key: as RFC 5802 calls them, 32 bytes each.
    """

    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def of(cls, password: str, iterations: int = ITERATIONS) -> Verifier:
        """Of a new password, with a fresh salt. Raises AuthenticationError when it cannot be one."""
        import scramp

        check_password(password)
        salt, stored, server, rounds = scramp.ScramMechanism(SCRAM).make_auth_info(password, iterations)
        return cls(rounds, salt, stored, server)

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read `str(verifier)`. Raises ValueError, which does not quote the text."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError("not a verifier")
        salt, stored, server = (base64.b64decode(part, validate=True) for part in match.groups()[1:])
        iterations = int(match[1])
        if not 4096 <= iterations <= MOST_ITERATIONS or len(salt) < 12 or {len(stored), len(server)} != {_SIZE}:
            raise ValueError("not a verifier")
        return cls(iterations, salt, stored, server)

    def __str__(self) -> str:
        """The form of PostgreSQL's `pg_authid.rolpassword`: `SCRAM-SHA-256$ROUNDS:SALT$STOREDKEY:SERVERKEY`."""
        salt, stored, server = (
            base64.b64encode(part).decode() for part in (self.salt, self.stored_key, self.server_key)
        )
        return f"{SCRAM}${self.iterations}:{salt}${stored}:{server}"


def check_password(password: str) -> None:
    """Raise AuthenticationError unless it can be a password; the message does not quote it."""
    from scramp.utils import ScramException, saslprep

    reason = ""
    if not password:
        reason = "is empty"
    elif len(password.encode("utf-8", "surrogatepass")) > MAX_PASSWORD_BYTES:
        reason = f"is longer than {MAX_PASSWORD_BYTES} bytes"
    else:
        try:
            if not saslprep(password):
                reason = "consists of invisible characters only"
        except (ScramException, ValueError):
            reason = (
                "contains a character that RFC 4013 (SASLprep) does not allow, a control character or an emoji, say"
            )
    if reason:
        raise AuthenticationError(f"the password {reason}.", "Choose another one.")


def method_for(binding: Binding | None) -> str:
    """The one method that is right on a channel."""
    return SCRAM if binding is None else SCRAM_PLUS


class _Proof:
    """The source's half of one exchange."""

    def __init__(self, password: str, binding: Binding | None) -> None:
        import scramp

        check_password(password)
        self.method = method_for(binding)
        self._client = scramp.ScramClient([self.method], _USER, password, channel_binding=binding)

    def first(self) -> bytes:
        return str(self._client.get_client_first()).encode()

    def answer(self, challenge: bytes) -> bytes:
        """Takes `LEAST_ITERATIONS` to `MOST_ITERATIONS` rounds of time, without the GIL."""
        _scram("the target's challenge", lambda: self._client.set_server_first(challenge.decode()))
        rounds = int(self._client.iterations)
        if not LEAST_ITERATIONS <= rounds <= MOST_ITERATIONS:
            raise AuthenticationError(
                f"the target wants the password hashed {rounds} times, not {LEAST_ITERATIONS} to {MOST_ITERATIONS}.",
                "Set the password there anew with this release of vmf, and check that it is the machine that you mean.",
            )
        return str(_scram("the target's challenge", self._client.get_client_final)).encode()

    def check(self, proof: bytes) -> None:
        """Raises AuthenticationError unless the target knows the verifier."""
        from scramp.utils import ScramException

        try:
            self._client.set_server_final(proof.decode())
        except (ScramException, ValueError):
            raise AuthenticationError(
                "the target did not prove that it knows the password: it is not the machine that you mean.",
                "Nothing was sent to it. Check host and port, and what may answer in its place.",
            ) from None


class _Challenge:
    """The target's half of one exchange."""

    def __init__(self, verifier: Verifier, binding: Binding | None) -> None:
        import scramp

        self.method = method_for(binding)
        known = (verifier.salt, verifier.stored_key, verifier.server_key, verifier.iterations)
        self._server = scramp.ScramMechanism(self.method).make_server(lambda user: known, channel_binding=binding)

    def challenge(self, first: bytes) -> bytes:
        from scramp.utils import ScramException, ServerError

        try:
            self._server.set_client_first(first.decode())
            return str(self._server.get_server_first()).encode()
        except (ScramException, ValueError) as error:
            raise _refused(error, ServerError.CHANNEL_BINDINGS_DONT_MATCH) from None

    def verify(self, final: bytes) -> bytes:
        """The target's own proof. Raises AuthenticationError for a wrong password."""
        from scramp.utils import ScramException, ServerError

        try:
            self._server.set_client_final(final.decode())
            return str(self._server.get_server_final()).encode()
        except (ScramException, ValueError) as error:
            raise _refused(error, ServerError.CHANNEL_BINDINGS_DONT_MATCH) from None


def _scram(what: str, step: Callable[[], Any]) -> Any:
    """A step on what the other side said. Raises RemoteProtocolError, and nothing of scramp's own."""
    from scramp.utils import ScramException

    try:
        return step()
    except (ScramException, ValueError):
        raise RemoteProtocolError(f"{what} is malformed, or not an answer to what this side said.") from None


def _refused(error: Exception, mismatch: object) -> Exception:
    """What a failed step at the target means: never which part of a guess was wrong, and nothing that was sent."""
    if getattr(error, "server_error", None) is mismatch:
        return AuthenticationError(
            "the source authenticated itself to another TLS certificate than this target's: somebody is in between.",
            "Check what lies between the two hosts.",
        )
    if getattr(getattr(error, "server_error", None), "value", "") == "invalid-proof":
        return WrongPassword("the password is wrong.", "Give the password that was set at the target.")
    return RemoteProtocolError("the source's proof of the password is malformed, or of another session.")


class WrongPassword(AuthenticationError):
    """A guess, as far as the target can tell."""


# -- guesses -------------------------------------------------------------------------------------------------

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
FORGET_S = 600.0
GUESSES, SECONDS_PER_GUESS = 20, 5.0
MAX_ADDRESSES = 1024


class Attempts:
    """Counts wrong passwords, and says who has to wait. Any thread.

    After the n-th wrong one from an address (of IPv6: from a /64, which one host can have for itself) nothing more is
    taken from there for 1, 2, 4 ... at most 60 seconds, right or wrong; ten quiet minutes or the right password clear
    the account. All addresses together have `GUESSES`, which grow back one every `SECONDS_PER_GUESS`: so whoever has
    many addresses tries 17,280 a day, and can, as long as he does so, keep others from authenticating.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._failed: dict[str, tuple[int, float]] = {}
        """By address: how many, and when the last (monotonic seconds); the longest ago first."""
        self._left = float(GUESSES)
        self._counted = now()

    def wait_s(self, address: str) -> float:
        """Seconds until an attempt from there will be taken; 0: now."""
        with self._lock:
            return self._wait(_group(address), self._now())

    def judge(self, address: str, guess: Callable[[], bytes]) -> bytes:
        """Make one attempt, `guess`, which is quick and raises WrongPassword; one at a time.

        Raises that, or AuthenticationError without trying when the address has to wait.
        """
        key = _group(address)
        with self._lock:
            now = self._now()
            if (wait := self._wait(key, now)) > 0:
                raise too_many(wait)
            try:
                answer = guess()
            except WrongPassword:
                count, _ = self._failed.pop(key, (0, 0.0))
                self._failed[key] = (count + 1, now)
                self._left -= 1
                while len(self._failed) > MAX_ADDRESSES:
                    del self._failed[next(iter(self._failed))]
                raise
            self._failed.pop(key, None)
            return answer

    def _wait(self, key: str, now: float) -> float:
        self._left = min(float(GUESSES), self._left + (now - self._counted) / SECONDS_PER_GUESS)
        self._counted = now
        for old in [each for each, (_, at) in self._failed.items() if now - at >= FORGET_S]:
            del self._failed[old]
        count, at = self._failed.get(key, (0, 0.0))
        own = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(count - 1, 10)) - (now - at) if count else 0.0
        everybody = (1 - self._left) * SECONDS_PER_GUESS
        return max(0.0, own, everybody)


def too_many(wait_s: float) -> AuthenticationError:
    """The error of somebody who has to wait."""
    return AuthenticationError(
        f"there were too many wrong passwords; the next one is taken in {max(1, round(wait_s))} s.",
        "Wait, then try again with the password that was set at the target.",
    )


def _group(address: str) -> str:
    """Whom an address stands for."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if number.version == 6 and not number.is_loopback:
        return str(ipaddress.ip_network((number, 64), strict=False))
    return str(number)


# -- the conversation ----------------------------------------------------------------------------------------

Send = Callable[[m.Message], None]
Expect = Callable[[type[m.Message]], Any]
"""The next message, which must be of that kind; raises what the connection raises otherwise."""


def methods_of(verifier: Verifier | None, binding: Binding | None) -> tuple[str, ...]:
    """For WELCOME: how a source has to authenticate."""
    return (NONE,) if verifier is None else (method_for(binding),)


def prove(methods: Sequence[str], password: str | None, binding: Binding | None, send: Send, expect: Expect) -> None:
    """The source's part of AUTHENTICATE, after WELCOME named `methods`.

    Raises AuthenticationError: the target wants a password and there is none, has none, or does not know it.
    """
    if password is None:
        if NONE not in methods:
            raise AuthenticationError(
                "the target asks for a password.",
                "Give the one that was set there: `--password-file FILE`, or `--password-file stdin` to be asked.",
            )
        send(m.Authenticate(NONE, b""))
        expect(m.Authenticated)
        return
    if method_for(binding) not in methods:
        known = NONE in methods
        raise AuthenticationError(
            "the target asks for no password, so it cannot show that it is the machine that you mean."
            if known
            else "the target wants another method of authentication than this side speaks on such a connection.",
            "Set the password there (`vmf modifyvm NAME --teleporter-password-file FILE`), or give none here."
            if known
            else "Bring both hosts to the same release of vmf, and use the same transport on both.",
        )
    proof = _Proof(password, binding)
    send(m.Authenticate(proof.method, proof.first()))
    challenge = expect(m.Challenge)
    send(m.Authenticate(proof.method, proof.answer(challenge.data)))
    proof.check(expect(m.Authenticated).data)


def demand(
    verifier: Verifier | None,
    binding: Binding | None,
    attempts: Attempts,
    address: str,
    send: Send,
    expect: Expect,
) -> None:
    """The target's part of AUTHENTICATE; `address` is the source's. Raises AuthenticationError."""
    said = expect(m.Authenticate)
    wanted = methods_of(verifier, binding)[0]
    if said.method != wanted:
        raise AuthenticationError("the source tried to authenticate by a method that was not offered.")
    if verifier is None:
        send(m.Authenticated(b""))
        return
    if (wait := attempts.wait_s(address)) > 0:
        raise too_many(wait)
    challenge = _Challenge(verifier, binding)
    send(m.Challenge(challenge.challenge(said.data)))
    said = expect(m.Authenticate)
    if said.method != wanted:
        raise RemoteProtocolError("the source changed its method of authentication halfway.")
    send(m.Authenticated(attempts.judge(address, lambda: challenge.verify(said.data))))
