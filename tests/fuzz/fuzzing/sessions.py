"""Whole sessions: the source and the target of a teleport, with a machine that is only RAM, and a peer that says
anything."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator, Sequence

from fuzzing import Choices, Finding, Target
from fuzzing.protocol import SAMPLES, as_framed, framed, golden, parse
from vmf.cpuid.negotiate import Capability
from vmf.device.base import Payload
from vmf.errors import StateError, TransportClosed, VmfError
from vmf.memory.guest import MIB
from vmf.teleport.progress import ProgressEvent
from vmf.teleport.protocol import frames
from vmf.teleport.protocol import messages as m
from vmf.teleport.source import SourceOptions, teleport_source
from vmf.teleport.target import wait_for_teleport
from vmf.testing.cpuid_tables import NEHALEM
from vmf.testing.teleport import FakeMachine
from vmf.transport.base import Address, Buffer, Channel, Listener

_PATIENCE_S = 0.005


class Recording(Channel):
    """The peer has said all it will say; what is sent is only counted."""

    def __init__(self, data: bytes) -> None:
        self.local = self.remote = Address("fuzz", "peer", 0)
        self._data = memoryview(data)
        self.sent = 0
        self.closed = threading.Event()

    def set_timeout(self, seconds: float | None) -> None:
        pass

    def send(self, *buffers: Buffer) -> None:
        self.sent += sum(memoryview(buffer).nbytes for buffer in buffers)

    def recv_into(self, buffer: memoryview) -> None:
        size = buffer.nbytes
        if size > len(self._data):
            raise TransportClosed("the peer has no more to say.")
        buffer.cast("B")[:] = self._data[:size]
        self._data = self._data[size:]

    def shutdown(self) -> None:
        self._data = self._data[:0]

    def close(self) -> None:
        self.shutdown()
        self.closed.set()


class OneVisit(Listener):
    """Somebody comes once; when he has gone nobody listens any more."""

    def __init__(self, channel: Recording) -> None:
        self.address = channel.local
        self._visitor = channel
        self._waiting = [channel]

    def accept(self, timeout: float | None) -> Channel:
        if self._waiting:
            return self._waiting.pop()
        self._visitor.closed.wait(60)
        raise TransportClosed("nobody else comes.")

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        pass


class Machine(FakeMachine):
    """As little as a teleport needs; one for all sessions."""

    def restore(self, payloads: Sequence[Payload]) -> None:
        if not all(payload.kind == "vcpu" for payload in payloads):
            raise StateError("it takes the state of a vCPU only.")

    def cpuid_capability(self) -> Capability:
        return Capability(NEHALEM, 2_000_000, False, "fake")

    def again(self) -> None:
        """As before its first session."""
        self.log.clear()
        if self.runs:
            self.halt()
        self.memory.clear()


@functools.cache
def _machine(name: str) -> Machine:
    return Machine(name, 4 * MIB, {})


@functools.cache
def _described() -> None:
    """The golden OFFER is one that this machine takes."""
    offer = next(each for each in SAMPLES if isinstance(each, m.Offer))
    _machine("target").description = dict(offer.description)


def target(data: bytes) -> None:
    """A target hears any frames: it waits again, or it runs what came; nothing else."""
    machine = _machine("target")
    _described()
    events: list[ProgressEvent] = []
    try:
        wait_for_teleport(machine, OneVisit(Recording(b"".join(framed(Choices(data))))), events.append)
    except TransportClosed:
        if machine.runs:
            raise Finding("it waits, and runs") from None
    else:
        if not machine.runs and "resume" not in machine.log:
            raise Finding("it has arrived, and nothing was resumed")
    finally:
        machine.again()
    for event in events:
        if "internal error" in event.message:
            raise Finding(event.message)
        if not event.message.isprintable():
            raise Finding(f"a message repeats what came: {event.message!r}")


def target_seeds() -> Iterator[bytes]:
    wires = {type(each): as_framed(wire) for each, wire in zip(SAMPLES, golden(), strict=True)}
    order = (
        m.Hello, m.Authenticate, m.Offer, m.Begin, m.Pages, m.Zeros, m.RoundEnd, m.Paused, m.Ping, m.State, m.Handover,
        m.Done,
    )  # fmt: skip
    for end in range(1, len(order) + 1):
        yield b"".join(wires[kind] for kind in order[:end])
    for kind in (m.Cancel, m.Error, m.Bye):
        yield b"".join(wires[each] for each in (*order[:3], kind))
    asking = m.Hello(bytes(range(m.ID_SIZE)), m.PROTOCOL_VERSIONS, m.FEATURES, "vmf", "alpha")
    for question in (m.Inquire, m.Locate):
        yield as_framed(m.encode(asking)) + wires[m.Authenticate] + wires[question] + wires[m.Bye]
    yield wires[m.Join] + wires[m.Pages]


_TURNS = frozenset(kind.TYPE for kind in (m.Hello, m.Authenticate, m.Offer, m.RoundEnd, m.State, m.Handover))
"""After these the source waits for an answer."""


class Answering(Recording):
    """A peer that says one more thing whenever it is its turn, knows the id of the teleport and answers pings.

    When it is not asked for a moment it says the next thing all the same.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(b"")
        self._answers_pings = data[:1] != b"\1"
        self._input = data[1:]
        self._pongs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._frames: list[bytes] | None = None
        self._turns = threading.Semaphore(0)

    def send(self, *buffers: Buffer) -> None:
        super().send(*buffers)
        message = bytes(memoryview(buffers[0])[:256])
        if self._frames is None:
            at = message.find(b"teleport_id") + len(b"teleport_id") + 1
            own = self._input.replace(bytes(range(m.ID_SIZE)), message[at : at + m.ID_SIZE])
            self._frames = list(framed(Choices(own)))
        if message[:4] != frames.MAGIC:
            return
        if message[4] == m.Ping.TYPE and self._answers_pings:
            asked = parse(message)
            assert isinstance(asked, m.Ping)
            self._pongs.put(m.encode(m.Pong(asked.sent_at, asked.sent_at)))
        if message[4] in _TURNS or message[4] == m.Ping.TYPE:
            self._turns.release()

    def recv_into(self, buffer: memoryview) -> None:
        if not self._data:
            self._turns.acquire(timeout=_PATIENCE_S)
            if not self._pongs.empty():
                self._data = memoryview(self._pongs.get())
            elif self._frames:
                self._data = memoryview(self._frames.pop(0))
        super().recv_into(buffer)


def source(data: bytes) -> None:
    """A source hears any frames: an error of vmf's own and the machine runs, or it was handed over."""
    machine = _machine("source")
    machine.start()
    channel = Answering(data)
    try:
        teleport_source(machine, channel, SourceOptions(timeout_s=5.0))
    except VmfError as error:
        if not machine.runs and "mark_handed_over" not in machine.log:
            raise Finding(f"the source does not run after: {error}") from error
        if not str(error).isprintable():
            raise Finding(f"an error repeats what came: {error!r}") from None
    else:
        if machine.runs:
            raise Finding("it teleported, and runs here")
    finally:
        machine.again()


def source_seeds() -> Iterator[bytes]:
    samples = {type(each): each for each in SAMPLES}
    order: tuple[m.Message, ...] = (
        samples[m.Welcome], samples[m.Authenticated], m.Checked(()), m.RoundAck(1, 0),
        m.Ready(), samples[m.Running],
    )  # fmt: skip
    for end in range(1, len(order) + 1):
        for flags in (b"\0", b"\1"):
            yield flags + b"".join(as_framed(m.encode(each)) for each in order[:end])
    for kind in (m.Cancel, m.Error, m.Checked):
        yield b"\0" + b"".join(as_framed(m.encode(each)) for each in (*order[:2], samples[kind]))


TARGETS = (
    Target("target", target, target_seeds, 2048, 2.0),
    Target("source", source, source_seeds, 1024, 1.0),
)
