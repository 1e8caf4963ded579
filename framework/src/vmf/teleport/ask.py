"""Asking a waiting machine what its CPU backend can present, before one's own guest starts.

The session is that of a teleport up to AUTHENTICATED; then INQUIRE takes the place of OFFER. The machine that waits
is not touched and goes on waiting. Unlike a teleport the conversation is strictly question and answer, so one thread
does.
"""

from __future__ import annotations

import secrets
from typing import TypeVar

from attrs import frozen

from vmf.cpuid.negotiate import Capability
from vmf.cpuid.table import CpuidTable
from vmf.errors import RemoteProtocolError, StateError, TeleportError, VmfError
from vmf.teleport.authentication import prove
from vmf.teleport.link import Link, explain, farewell, remote_end
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.source import software
from vmf.transport.base import Channel

ANSWER_TIMEOUT_S = 10.0

_M = TypeVar("_M", bound=m.Message)


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
    link = Link(channel, Connection(Role.SOURCE))
    try:
        channel.set_timeout(timeout_s)
        answer = _ask(link, name, label, password)
    except BaseException as error:
        phase = link.phase
        link.finish(said=link.try_send(farewell(error)))
        if not isinstance(error, VmfError):
            raise
        raise explain(error, "target", phase) from (None if isinstance(error, TeleportError) else error)
    link.finish(said=True)
    return answer


def _ask(link: Link, name: str, label: str, password: str | None) -> HostCapability:
    teleport_id = secrets.token_bytes(m.ID_SIZE)
    link.send(m.Hello(teleport_id, m.PROTOCOL_VERSIONS, m.FEATURES, software(), m.clean_text(name, 255)))
    welcome = _expect(link, m.Welcome)
    if welcome.teleport_id != teleport_id or welcome.version not in m.PROTOCOL_VERSIONS:
        raise RemoteProtocolError("the target answered for another teleport or protocol version.")
    if m.CAPABILITIES not in welcome.features:
        raise TeleportError(
            f"the machine that waits there ({welcome.software}) cannot say what its CPU backend can present.",
            "Bring that host to the same release of vmf as this one.",
        )
    prove(welcome.methods, password, link.channel.channel_binding(), link.send, lambda kind: _expect(link, kind))
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
