"""Asking a waiting machine what its CPU backend can present, or what became of an earlier teleport.

The session is that of a teleport up to AUTHENTICATED; then INQUIRE or LOCATE takes the place of OFFER. The machine that
waits goes on waiting. Unlike a teleport the conversation is strictly question and answer, so one thread does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TypeVar

from attrs import frozen

from vmf.cpuid.negotiate import Capability
from vmf.cpuid.table import CpuidTable
from vmf.errors import RemoteProtocolError, StateError, TeleportError, VmfError
from vmf.teleport.authentication import prove
from vmf.teleport.journal import Testimony
from vmf.teleport.link import Link, explain, farewell, remote_end
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import Answer
from vmf.teleport.source import software
from vmf.transport.base import Channel

ANSWER_TIMEOUT_S = 10.0

_M = TypeVar("_M", bound=m.Message)
_A = TypeVar("_A")


@frozen
class HostCapability:
    """What a waiting machine answered.

    Attributes:
        capability: of its CPU backend; the name says which backend and where.
        machine: the machine that waits there.
        backend: name of the backend plugin.
        software: program and version.
    """

    capability: Capability
    machine: str
    backend: str
    software: str


def ask_capability(
    channel: Channel,
    name: str,
    label: str,
    timeout_s: float = ANSWER_TIMEOUT_S,
    password: str | None = None,
) -> HostCapability:
    """Ask at the other end of a fresh channel, which is broken afterwards; the caller closes it.

    Args:
        name: who asks, for the other side's log.
        label: how to call the other side ("otherhost:6000").
        timeout_s: longest silence.
        password: of the machine that waits there; None for none.

    Raises TeleportError (or a subclass): no machine waits there, it is busy, or its vmf is too old to answer.
    """
    return _session(channel, timeout_s, lambda link: _ask_capability(link, name, label, password))


def ask_teleport(
    channel: Channel,
    name: str,
    teleport_id: bytes,
    timeout_s: float = ANSWER_TIMEOUT_S,
    password: str | None = None,
) -> Testimony:
    """Ask what became of a teleport; arguments and errors as of `ask_capability`.

    After Answer.NEVER it cannot arrive any more.
    """
    return _session(channel, timeout_s, lambda link: _ask_teleport(link, name, teleport_id, password))


def _session(channel: Channel, timeout_s: float, ask: Callable[[Link], _A]) -> _A:
    link = Link(channel, Connection(Role.SOURCE))
    try:
        channel.set_timeout(timeout_s)
        answer = ask(link)
    except BaseException as error:
        phase = link.phase
        link.finish(said=link.try_send(farewell(error)))
        if not isinstance(error, VmfError):
            raise
        raise explain(error, "target", phase) from (None if isinstance(error, TeleportError) else error)
    link.finish(said=True)
    return answer


def _greet(link: Link, name: str, password: str | None, feature: str, lacking: str) -> m.Welcome:
    """Up to AUTHENTICATED. `lacking`: what a target without the feature cannot do."""
    teleport_id = secrets.token_bytes(m.ID_SIZE)
    link.send(m.Hello(teleport_id, m.PROTOCOL_VERSIONS, m.FEATURES, software(), m.clean_text(name, 255)))
    welcome = _expect(link, m.Welcome)
    if welcome.teleport_id != teleport_id or welcome.version not in m.PROTOCOL_VERSIONS:
        raise RemoteProtocolError("the target answered for another teleport or protocol version.")
    if feature not in welcome.features:
        raise TeleportError(
            f"the machine that waits there ({welcome.software}) cannot say {lacking}.",
            "Bring that host to the same release of vmf as this one.",
        )
    prove(welcome.methods, password, link.channel.channel_binding(), link.send, lambda kind: _expect(link, kind))
    return welcome


def _ask_teleport(link: Link, name: str, teleport_id: bytes, password: str | None) -> Testimony:
    _greet(link, name, password, m.WHEREABOUTS, "what became of an earlier teleport")
    link.send(m.Locate(teleport_id))
    said = _expect(link, m.Located)
    link.send(m.Bye())
    try:
        answer = Answer(said.answer)
    except ValueError:
        raise RemoteProtocolError(f"the target answers {said.answer!r}, which means nothing here.") from None
    if answer is Answer.UNREACHABLE:
        raise RemoteProtocolError("the target says that it is not there.")
    return Testimony(answer, said.machine, said.detail)


def _ask_capability(link: Link, name: str, label: str, password: str | None) -> HostCapability:
    welcome = _greet(link, name, password, m.CAPABILITIES, "what its CPU backend can present")
    link.send(m.Inquire())
    answer = _expect(link, m.Capabilities)
    link.send(m.Bye())
    try:
        table = CpuidTable.from_wire([list(row) for row in answer.cpuid])
    except StateError as error:
        raise RemoteProtocolError(f"the target's CPUID table is impossible: {error.message}") from None
    called = m.clean_text(f"{label} ({answer.backend})", 255)
    capability = Capability(table, answer.tsc_khz, answer.tsc_scaling, called)
    return HostCapability(capability, answer.machine, answer.backend, welcome.software)


def _expect(link: Link, kind: type[_M]) -> _M:
    message = link.receive()
    if isinstance(message, m.Cancel | m.Error):
        raise remote_end(message, "target")
    if not isinstance(message, kind):
        raise RemoteProtocolError(f"the target sent {message.word()} where {kind.word()} was due.")
    return message
