"""The serial console's fan-out and its input queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmf.machine.console import MAX_PENDING_INPUT, SCROLLBACK, SerialConsole


@given(st.lists(st.binary(min_size=1, max_size=5000), max_size=60), st.integers(0, 59))
def test_a_late_listener_sees_the_scrollback_and_then_everything(pieces: list[bytes], at: int) -> None:
    console, early, late = SerialConsole(), bytearray(), bytearray()
    console.add_listener(early.extend)
    for number, piece in enumerate(pieces):
        if number == at:
            console.add_listener(late.extend, replay=True)
        console.output(piece)
    assert bytes(early) == b"".join(pieces)
    if at < len(pieces):
        before = b"".join(pieces[:at])[-SCROLLBACK:]
        assert bytes(late) == before + b"".join(pieces[at:])
    assert console.scrollback() == b"".join(pieces)[-SCROLLBACK:]


def test_a_removed_listener_hears_nothing_more() -> None:
    console, heard = SerialConsole(), bytearray()
    remove = console.add_listener(heard.extend)
    console.output(b"a")
    remove()
    console.output(b"b")
    assert heard == b"a"


@given(st.binary(max_size=300), st.lists(st.integers(0, 20), min_size=1, max_size=100))
def test_input_comes_out_whole_and_in_order_whatever_the_port_takes(data: bytes, rooms: list[int]) -> None:
    console, got = SerialConsole(), bytearray()
    console.type(data)
    for room in rooms:

        def accept(waiting: bytes, room: int = room) -> int:
            got.extend(waiting[:room])
            return min(room, len(waiting))

        console.feed(accept)
    assert bytes(got) + console.pending_input() == data


def test_input_is_bounded() -> None:
    console = SerialConsole()
    assert console.type(bytes(MAX_PENDING_INPUT + 5)) == MAX_PENDING_INPUT
    assert console.type(b"x") == 0


def test_held_input_is_not_taken() -> None:
    console = SerialConsole()
    console.type(b"before")
    console.hold_input()
    assert console.type(b"during") == 0
    assert console.pending_input() == b"before"
    console.accept_input()
    assert console.type(b"after") == 5
    assert console.pending_input() == b"beforeafter"
