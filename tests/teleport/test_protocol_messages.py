"""Frames and messages: round trips, golden vectors, and that hostile bytes raise one kind of error only."""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import cbor2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmf.device.base import Payload
from vmf.errors import LocalProtocolError, RemoteProtocolError
from vmf.teleport.check import Blocker
from vmf.teleport.protocol import CLOSED, NEED_DATA, Connection, Phase, Role, codec, frames
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import MAX_PAGES, MAX_RAM_PAGES, MAX_RUNS, pack_runs, unpack_runs

GOLDEN = Path(__file__).parent / "golden" / "version-1.json"

ID = bytes(range(16))
RUNS = pack_runs(np.array([[1, 3], [7, 8]], dtype=np.uint64))
SAMPLES: dict[str, m.Message] = {
    "hello": m.Hello(ID, (1,), ("a-feature",), "vmf 0.1.0", "alpha"),
    "welcome": m.Welcome(ID, 1, (), ("none",), "vmf 0.1.0"),
    "authenticate": m.Authenticate("none", b""),
    "challenge": m.Challenge(b"nonce"),
    "authenticated": m.Authenticated(b""),
    "offer": m.Offer(
        {"memory_mib": 4, "devices": [["pc.uart16550", 0]], "none": None, "yes": True, "blob": b"\0\1", "less": -5},
        1024, 4096, (("pc.uart16550", 1, 0),), 0, False,
    ),
    "checked": m.Checked((Blocker("memory", "4 MiB", "8 MiB", "Do `vmf modifyvm x --memory 4`."),)),
    "checked-empty": m.Checked((), 2, bytes(range(32))),
    "begin": m.Begin(),
    "bye": m.Bye(),
    "pages": m.Pages(1, RUNS),
    "zeros": m.Zeros(2, RUNS),
    "round-end": m.RoundEnd(1, 12288),
    "round-ack": m.RoundAck(1, 12288),
    "paused": m.Paused(),
    "state": m.State((Payload("vcpu", 1, {"rip": (1 << 64) - 1, "xsave": b"\0" * 8}),), 123456789, True, 12288),
    "ready": m.Ready(),
    "handover": m.Handover(),
    "running": m.Running(1, 2),
    "done": m.Done(),
    "ping": m.Ping(1 << 63),
    "pong": m.Pong(1 << 63, 7),
    "cancel": m.Cancel("cancelled at the target"),
    "error": m.Error("state", "the clock is odd.", "Set it."),
    "inquire": m.Inquire(),
    "capabilities": m.Capabilities("box", "kvm", ((0, 0, 1, 2, 3, 4), (7, 1, 0, 0, 0, 0xFFFFFFFF)), 2_000_000, True),
    "locate": m.Locate(ID),
    "located": m.Located("never", "box", "It never came."),
    "join": m.Join(ID, bytes(range(32))),
    "joined": m.Joined(),
    "notes": m.Notes(("The CPU backend is another one.",)),
}  # fmt: skip


def parse(data: bytes) -> m.Message:
    header = frames.decode_header(data[: frames.HEADER_SIZE], m.LIMITS)
    body = data[frames.HEADER_SIZE :]
    assert len(body) == header.length
    frames.check_body(header, body)
    return m.decode(header.type, body)


def test_every_message_has_a_sample():
    assert {type(message) for message in SAMPLES.values()} == set(m.MESSAGES)


def test_type_numbers_are_unique():
    assert len(m.BY_TYPE) == len(m.MESSAGES)


@pytest.mark.parametrize("name", SAMPLES)
def test_round_trip(name):
    assert parse(m.encode(SAMPLES[name])) == SAMPLES[name]


def test_golden_vectors():
    """The bytes of version 1. This file is only ever added to: an old vmf must be able to talk to a new one."""
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(SAMPLES), "every sample needs its vector"
    for name, text in golden.items():
        assert m.encode(SAMPLES[name]).hex() == text, name
        assert parse(bytes.fromhex(text)) == SAMPLES[name], name


# Hostile bodies


def frame(kind: type[m.Message], body: object) -> bytes:
    return frames.encode_frame(kind.TYPE, body if isinstance(body, bytes) else cbor2.dumps(body))


def run(n: int, count: int) -> bytes:
    return n.to_bytes(4, "little") + count.to_bytes(4, "little")


@pytest.mark.parametrize(
    "data",
    [
        frame(m.Ping, {}),
        frame(m.Ping, {"sent_at": 1, "more": 1}),
        frame(m.Ping, {"sent_at": True}),
        frame(m.Ping, {"sent_at": -1}),
        frame(m.Ping, {"sent_at": 1 << 64}),
        frame(m.Ping, {"sent_at": 1.0}),
        frame(m.Ping, {"sent_at": "1"}),
        frame(m.Ping, [1]),
        frame(m.Ping, b""),
        frame(m.Ping, cbor2.dumps({"sent_at": 1}) + b"\0"),
        frame(m.Ping, b"\xa2gsent_at\x01gsent_at\x02"),  # the same key twice
        frame(m.Ping, b"\xbfgsent_at\x01\xff"),  # indefinite
        frame(m.Ping, b"\xa1gsent_at\x18\x01"),  # not the shortest form
        frame(m.Begin, b"\x9b" + b"\xff" * 8),  # 2^64 items
        frame(m.Begin, b"\x7b" + b"\xff" * 8),  # 2^64 characters
        frame(m.Begin, b"\x81" * 500 + b"\x00"),  # deep
        frame(m.Begin, b"\xa1\x01\x02"),  # a key that is no text
        frame(m.Begin, b"\xc1\x01"),  # a tag
        frame(m.Cancel, {"reason": "\x1b[31mred"}),
        frame(m.Cancel, {"reason": "two\nlines"}),
        frame(m.Cancel, {"reason": "x" * 1001}),
        frame(m.Cancel, b"\xa1freason\x62\xff\xfe"),  # not UTF-8
        frame(m.Pages, {"round": 1, "runs": b""}),
        frame(m.Pages, {"round": 1, "runs": b"1234567"}),
        frame(m.Pages, {"round": 1, "runs": run(5, 0)}),
        frame(m.Pages, {"round": 1, "runs": run(5, 1) + run(5, 1)}),
        frame(m.Pages, {"round": 1, "runs": run(5, 1) + run(4, 1)}),
        frame(m.Pages, {"round": 1, "runs": run(0, MAX_PAGES + 1)}),
        frame(m.Pages, {"round": 1, "runs": run(0xFFFFFFFF, 0xFFFFFFFF)}),
        frame(m.Zeros, {"round": 1, "runs": run(MAX_RAM_PAGES, 1)}),
        frame(m.Offer, {**cbor2.loads(m.encode(SAMPLES["offer"])[16:]), "page_size": 8192}),
        frame(m.State, {"payloads": [["x", 1, 0, {1: 2}]], "stopped_at": 0, "running": True}),
        frame(m.Checked, {"blockers": [["a", "b", "c"]]}),
        b"HTTP/1.1 400 Bad Request\r\n",
        b"VMFT" + b"\xff\xff" + b"\0" * 10,  # unknown type
        b"VMFT" + b"\x01\0" + b"\1\0" + b"\0" * 8,  # unknown flags
        b"VMFT" + b"\x01\0" + b"\0\0" + b"\xff\xff\xff\xff" + b"\0" * 4,  # 4 GiB
        m.encode(SAMPLES["hello"])[:-1] + b"\xff",  # checksum
    ],
)  # fmt: skip
def test_malformed_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        parse(data)


def test_many_runs_are_bounded():
    pairs = np.arange(MAX_RUNS + 1, dtype=np.uint64) * 2
    runs = pack_runs(np.stack((pairs, pairs + 1), axis=1))
    with pytest.raises(LocalProtocolError):
        m.encode(m.Zeros(1, runs))
    assert len(unpack_runs(runs)) == MAX_RUNS + 1


@pytest.mark.parametrize(
    "message",
    [
        m.Cancel("two\nlines"),
        m.RoundEnd(-1, 0),
        m.Hello(b"short", (1,), (), "vmf", "x"),
        m.Offer({"pi": 3.14}, 1, 4096, (), 0, False),
        m.Offer({"set": {1}}, 1, 4096, (), 0, False),  # type: ignore[dict-item]
        m.State((Payload("x", 1, {"big": 1 << 64}),), 0, True),
    ],
)  # fmt: skip
def test_what_the_other_side_could_not_read_is_not_sent(message):
    with pytest.raises(LocalProtocolError):
        m.encode(message)


def test_clean_text():
    assert m.clean_text("a\x1b[31m\nb") == "a [31m b"
    assert len(m.clean_text("x" * 5000)) == m.MAX_TEXT
    m.encode(m.Cancel(m.clean_text("\x00" * 5000)))


# Properties

_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


@given(_plain)
def test_codec_round_trips_plain_data(value):
    assert codec.decode(codec.encode(value)) == value


@given(st.binary(max_size=200))
@example(b"\x5f\x41\x00\xff")
def test_codec_refuses_or_decodes(data):
    try:
        value = codec.decode(data)
    except ValueError:
        return
    # What is accepted has exactly one encoding.
    assert codec.decode(codec.encode(value)) == value


_u64 = st.integers(0, (1 << 64) - 1)
_text = st.text(st.characters(categories=("L", "N", "P")), max_size=50)
_messages = st.one_of(
    st.sampled_from(list(SAMPLES.values())),
    st.builds(m.Ping, _u64),
    st.builds(m.Pong, _u64, _u64),
    st.builds(m.Cancel, _text),
    st.builds(m.Error, _text, _text, _text),
    st.builds(m.Hello, st.binary(min_size=16, max_size=16), st.tuples(st.integers(0, 9)), st.just(()), _text, _text),
    st.builds(
        lambda body, at, runs: m.State((Payload("k", 1, body),), at, runs),
        st.dictionaries(st.text(max_size=8), _plain, max_size=4), _u64, st.booleans(),
    ),
)  # fmt: skip


@given(_messages)
def test_any_message_round_trips(message):
    assert parse(m.encode(message)) == message


def drive(connection: Connection, pieces: list[bytes]) -> list[object]:
    """Feed the pieces; what comes out, up to the first error. Anything but RemoteProtocolError escapes."""
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
    return out


def at_phase(role: Role, phase: Phase) -> Connection:
    connection = Connection(role)
    connection.phase = phase
    connection._ram_pages = 1024
    return connection


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


_streams = st.lists(
    st.one_of(
        _messages.map(m.encode),
        st.binary(max_size=60),
        st.tuples(_messages.map(m.encode), st.integers(0, 10_000), st.integers(1, 255)).map(
            lambda t: bytes(b ^ t[2] if i == t[1] % len(t[0]) else b for i, b in enumerate(t[0]))
        ),
        st.builds(lambda t, body: frames.encode_frame(t, body), st.integers(0, 25), st.binary(max_size=60)),
    ),
    max_size=5,
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(Role), st.sampled_from(Phase), _streams, st.lists(st.integers(0, 5000), max_size=6))
def test_any_bytes_parse_or_raise_the_one_error_however_they_are_cut(role, phase, data, cuts):
    whole = drive(at_phase(role, phase), [data])
    assert drive(at_phase(role, phase), split(data, cuts)) == whole
    assert drive(at_phase(role, phase), [data[i : i + 1] for i in range(len(data))]) == whole


def test_a_broken_connection_stays_broken_and_keeps_nothing():
    connection = Connection(Role.TARGET)
    connection.receive_data(b"GET / HTTP/1.0\r\n\r\n")
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="does not speak vmf"):
            connection.next_event()
        connection.receive_data(b"x" * 1000)
    assert connection.bytes_wanted() == 0
    assert len(connection._buffer) == 0


def test_a_checksum_covers_the_header():
    data = bytearray(m.encode(SAMPLES["begin"]))
    data[4] = m.Bye.TYPE
    with pytest.raises(RemoteProtocolError, match="damaged"):
        parse(bytes(data))
    data[12:16] = zlib.crc32(bytes(data[16:]), zlib.crc32(bytes(data[:12]))).to_bytes(4, "little")
    assert parse(bytes(data)) == m.Bye()


def test_exact_reading_and_bulk():
    """The I/O layer reads header, body and raw data exactly; pages must lie inside the offered RAM."""
    source, target = at_phase(Role.SOURCE, Phase.PRECOPY), at_phase(Role.TARGET, Phase.PRECOPY)
    data = source.send(m.Pages(1, RUNS))
    assert source.bulk_owed == 3 * 4096
    with pytest.raises(LocalProtocolError, match="were not sent yet"):
        source.send(m.RoundEnd(1, 0))
    source.bulk_sent(3 * 4096)
    assert target.bytes_wanted() == frames.HEADER_SIZE
    target.receive_data(data[:16])
    assert target.next_event() is NEED_DATA
    assert target.bytes_wanted() == len(data) - 16
    target.receive_data(data[16:])
    assert target.next_event() == m.Pages(1, RUNS)
    assert (target.bytes_wanted(), target.bulk_pending) == (0, 3 * 4096)
    assert target.next_event() is NEED_DATA
    target.bulk_received(3 * 4096)
    assert target.bytes_wanted() == frames.HEADER_SIZE
    target.receive_data(m.encode(m.Zeros(1, run(1024, 1))))
    with pytest.raises(RemoteProtocolError, match="beyond the RAM"):
        target.next_event()


def test_illegal_messages_are_refused_before_their_body_comes():
    connection = Connection(Role.TARGET)
    connection.receive_data(m.encode(SAMPLES["state"])[:16])
    with pytest.raises(RemoteProtocolError, match="STATE in phase HELLO"):
        connection.next_event()


def test_sending_out_of_turn_is_a_local_error():
    with pytest.raises(LocalProtocolError, match="cannot send HANDOVER in phase HELLO"):
        Connection(Role.SOURCE).send(m.Handover())
