"""The protocol without I/O: the decoder, and both sides' state machines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fuzzing import Choices, Finding, Target
from vmf.errors import LocalProtocolError, RemoteProtocolError
from vmf.teleport.protocol import CLOSED, NEED_DATA, Connection, Phase, Role, codec, frames
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import MAX_PAGES, check_runs, count_pages, last_page, pack_runs, unpack_runs
from vmf.teleport.protocol.states import SOURCE_OUTCOME, TARGET_RUNS, SourceOutcome

GOLDEN = Path(__file__).parents[2] / "teleport" / "golden"
ROLES, PHASES = tuple(Role), tuple(Phase)
RAM_PAGES = 1024


def golden() -> list[bytes]:
    """Every message of the golden vectors, as it is on the wire."""
    return [
        bytes.fromhex(each) for file in sorted(GOLDEN.glob("*.json")) for each in json.loads(file.read_text()).values()
    ]


def parse(data: bytes) -> m.Message:
    """The message of exactly one frame. Raises RemoteProtocolError."""
    header = frames.decode_header(data[: frames.HEADER_SIZE], m.LIMITS)
    frames.check_body(header, data[frames.HEADER_SIZE :])
    return m.decode(header.type, data[frames.HEADER_SIZE :])


SAMPLES = [parse(each) for each in golden()]


def framed(choices: Choices) -> Iterator[bytes]:
    """Frames whose length and checksum are right, whatever is in them: (type, length of the body, body) each."""
    while choices:
        type_ = choices.number()
        body = choices.take(choices.number(2))
        yield frames.encode_frame(type_, body)
        if type_ == m.Pages.TYPE:
            yield bytes(_bulk(body))


def _bulk(body: bytes) -> int:
    """Raw data that goes with a PAGES message, so that what follows it is heard; not more than some pages."""
    try:
        return min(m.decode(m.Pages.TYPE, body).bulk, 16 * m.PAGE_SIZE)
    except RemoteProtocolError:
        return 0


def as_framed(wire: bytes) -> bytes:
    """What `framed` makes that frame of."""
    body = wire[frames.HEADER_SIZE :]
    return bytes([wire[4]]) + len(body).to_bytes(2, "little") + body


# -- any bytes, whole or split anywhere


def drive(connection: Connection, pieces: Iterable[bytes]) -> list[object]:
    """Feed the pieces: what came out, and the phase in which it ended; anything but RemoteProtocolError escapes."""
    out: list[object] = []
    try:
        for piece in pieces:
            connection.receive_data(piece)
            while True:
                if connection.bulk_pending:
                    connection.take_bulk()
                    if connection.bulk_pending:
                        break
                event = connection.next_event()
                if event in (NEED_DATA, CLOSED):
                    break
                out.append(event)
    except RemoteProtocolError as error:
        out.append(str(error))
    return [*out, connection.phase]


def at(role: Role, phase: Phase) -> Connection:
    connection = Connection(role)
    connection.phase = phase
    connection._ram_pages = RAM_PAGES
    connection._features = frozenset(m.FEATURES)
    return connection


def stream(data: bytes) -> None:
    """The same comes out of any bytes however they were cut, and it is messages or the one error."""
    choices = Choices(data)
    how, phase = choices.number(), PHASES[choices.number() % len(PHASES)]
    role = ROLES[how & 1]
    cuts = [choices.number(2) for _ in range(4)]
    wire = b"".join(framed(choices)) if how & 2 else choices.rest()
    whole = drive(at(role, phase), [wire])
    edges = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    if drive(at(role, phase), (wire[a:b] for a, b in itertools.pairwise(edges))) != whole:
        raise Finding("what comes out depends on how the bytes were cut")
    if len(wire) <= 512 and drive(at(role, phase), (wire[i : i + 1] for i in range(len(wire)))) != whole:
        raise Finding("what comes out depends on whether the bytes come one by one")


def stream_seeds() -> Iterator[bytes]:
    for number, wire in enumerate(golden()):
        for phase in range(len(PHASES)):
            cuts = bytes([number % 256, 0, 16, 0, 3, 0, 40, 0])
            yield bytes([number & 1, phase]) + cuts + wire
            yield bytes([2 | number & 1, phase]) + cuts + as_framed(wire)
    session = b"".join(as_framed(wire) for wire in golden())
    yield bytes([3, 0]) + bytes(8) + session


# -- one message


def message(data: bytes) -> None:
    """A body is refused, or it is a message that is sent as it came and understood as it was sent."""
    if not data:
        return
    kind = m.MESSAGES[data[0] % len(m.MESSAGES)]
    body = data[1:]
    try:
        value = codec.decode(body)
    except ValueError:
        value = None
    else:
        if codec.decode(codec.encode(value)) != value:
            raise Finding("plain data changes when it is encoded and decoded")
    try:
        decoded = m.decode(kind.TYPE, body)
    except RemoteProtocolError as error:
        if not str(error).isprintable() or len(str(error)) > 1000:
            raise Finding(f"an error repeats what came: {error!r}") from None
        return
    if parse(m.encode(decoded)) != decoded:
        raise Finding(f"{kind.word()} changes when it is encoded and decoded")


def message_seeds() -> Iterator[bytes]:
    for wire in golden():
        body = wire[frames.HEADER_SIZE :]
        yield bytes([m.MESSAGES.index(m.BY_TYPE[wire[4]])]) + body


def runs(data: bytes) -> None:
    """Page runs are refused, or the functions that use them agree about them."""
    try:
        check_runs(data, MAX_PAGES)
    except ValueError:
        return
    rows = unpack_runs(data)
    pages = int((rows[:, 1] - rows[:, 0]).sum())
    if not 0 < pages <= MAX_PAGES or count_pages(data) != pages or last_page(data) != int(rows[-1, 1]):
        raise Finding("page runs are counted differently")
    if pack_runs(rows) != data:
        raise Finding("page runs change when they are unpacked and packed")


def runs_seeds() -> Iterator[bytes]:
    for each in SAMPLES:
        if isinstance(each, m.Pages | m.Zeros):
            yield each.runs
    yield (0).to_bytes(4, "little") + MAX_PAGES.to_bytes(4, "little")
    yield b"".join((2 * i).to_bytes(4, "little") + b"\1\0\0\0" for i in range(40))


# -- both sides


def talk(data: bytes) -> None:
    """Two connections, and somebody in the middle.

    Each step is one of: a side says something, legal or not; some bytes arrive; a bit is flipped on the way, or bytes
    are put in; a side loses the connection. Whatever happens, only the two protocol errors are raised, and as long as
    nobody in the middle forges messages at most one side runs the machine.
    """
    choices = Choices(data)
    sides = {role: Connection(role) for role in ROLES}
    wires = {role: bytearray() for role in ROLES}  # towards that role
    broken: set[Role] = set()
    honest = True
    handed_over = False
    while choices:
        action = choices.number()
        role = ROLES[action & 1]
        side, incoming, outgoing = sides[role], wires[role], wires[role.other]
        what = action >> 1 & 7
        if what <= 2:
            said = SAMPLES[choices.number() % len(SAMPLES)]
            may = side.can_send(type(said))
            try:
                outgoing += side.send(said)
                outgoing += bytes(side.bulk_owed)
                side.bulk_sent(side.bulk_owed)
            except LocalProtocolError:
                if may:
                    raise Finding(f"{said.word()} may be sent, and is refused") from None
            else:
                if not may:
                    raise Finding(f"{said.word()} may not be sent, and is taken")
                handed_over |= isinstance(said, m.Handover)
        elif what <= 5:
            if what == 5:
                count = choices.number(2)
            else:
                count = len(incoming)
            piece = bytes(incoming[:count])
            del incoming[:count]
            out = drive(side, [piece])
            if isinstance(out[-2] if len(out) > 1 else None, str):
                broken.add(role)
                if side.bytes_wanted():
                    raise Finding("a broken connection wants more bytes")
        elif what == 6 and choices.number() % 4 == 0:
            side.lost()
        elif incoming:
            honest = False
            incoming[choices.number(2) % len(incoming)] ^= 1 << choices.number() % 8
        else:
            honest = False
            incoming += choices.take(choices.number() % 64)
        source, target = sides[Role.SOURCE], sides[Role.TARGET]
        if honest:
            if broken:
                raise Finding(f"an honest {broken} is refused")
            runs_there = target.phase in TARGET_RUNS
            runs_here = source.closed and source.outcome is SourceOutcome.RUNS_HERE
            if runs_there and (runs_here or not handed_over):
                raise Finding("both sides run the machine")
        if SOURCE_OUTCOME[source.phase] is SourceOutcome.RUNS_HERE and source.closed and handed_over:
            raise Finding("the source goes on after HANDOVER")


def talk_seeds() -> Iterator[bytes]:
    kinds = {type(each): number for number, each in enumerate(SAMPLES)}
    source, target = (ROLES.index(role) for role in (Role.SOURCE, Role.TARGET))
    order = (
        (source, m.Hello), (target, m.Welcome), (source, m.Authenticate), (target, m.Authenticated), (source, m.Offer),
        (target, m.Checked), (source, m.Begin), (source, m.Pages), (source, m.Zeros), (source, m.RoundEnd),
        (target, m.RoundAck), (source, m.Paused), (source, m.RoundEnd), (target, m.RoundAck), (source, m.State),
        (target, m.Ready), (source, m.Handover), (target, m.Running), (source, m.Done),
    )  # fmt: skip
    # Say, and deliver at the other side.
    steps = [bytes([side, kinds[kind], (1 - side) | 3 << 1]) for side, kind in order]
    for end in range(1, len(steps) + 1):
        yield b"".join(steps[:end])
        yield b"".join(steps[:end]) + bytes([source | 6 << 1, 0])
        yield b"".join(steps[:end]) + bytes([target | 7 << 1, 9]) + b"VMFT\1\0\0\0\1" + bytes([target | 3 << 1])
    for kind in (m.Ping, m.Cancel, m.Error, m.Inquire, m.Capabilities):
        yield b"".join(steps[:4]) + b"".join(bytes([side, kinds[kind], (1 - side) | 3 << 1]) for side in (0, 1))


TARGETS = (
    Target("stream", stream, stream_seeds, 4096, 2.0),
    Target("message", message, message_seeds, 2048, 2.0),
    Target("talk", talk, talk_seeds, 512, 2.0),
    Target("runs", runs, runs_seeds, 1024, 0.25),
)
