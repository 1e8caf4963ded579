"""Who has to leave when more connections come than there is room for."""

from __future__ import annotations

import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vmf.transport.crowd import Crowd


def test_the_oldest_of_equals_leaves() -> None:
    crowd: Crowd[int] = Crowd(3)
    assert [crowd.enter(number, "a") for number in range(5)] == [None, None, None, 0, 1]
    assert crowd.everybody() == (2, 3, 4)


def test_who_speaks_stays_before_who_is_silent() -> None:
    crowd: Crowd[str] = Crowd(3)
    crowd.enter("honest", "a")
    crowd.advance("honest", 1)
    for number in range(100):
        assert crowd.enter(f"silent {number}", "a") != "honest"
    assert "honest" in crowd.everybody()
    assert crowd.leave("honest")
    assert not crowd.leave("honest")
    crowd.advance("honest", 2)  # gone: nothing happens
    assert "honest" not in crowd.everybody()


def test_a_flood_from_one_address_drops_only_its_own() -> None:
    """Even when its connections get further than the honest one."""
    crowd: Crowd[str] = Crowd(4)
    crowd.enter("honest", "b")
    for number in range(100):
        assert crowd.enter(f"flood {number}", "a") != "honest"
        crowd.advance(f"flood {number}", 2)
    assert "honest" in crowd.everybody()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=60), st.integers(1, 6))
def test_never_more_than_there_is_room_for(steps: list[tuple[int, int, bool]], places: int) -> None:
    crowd: Crowd[int] = Crowd(places)
    inside: set[int] = set()
    where: dict[int, int] = {}
    for number, (address, progress, leaves) in enumerate(steps):
        full = len(inside) == places
        before = Counter(where[each] for each in inside)
        dropped = crowd.enter(number, str(address))
        assert (dropped is not None) == full
        if dropped is not None:
            assert before[where[dropped]] == max(before.values())  # of the address with the most
            inside.remove(dropped)
        inside.add(number)
        where[number] = address
        crowd.advance(number, progress)
        if leaves:
            assert crowd.leave(number)
            inside.remove(number)
        assert set(crowd.everybody()) == inside
        assert len(crowd) <= places


def test_from_many_threads() -> None:
    crowd: Crowd[tuple[int, int]] = Crowd(8)
    dropped: list[tuple[int, int]] = []

    def visit(thread: int) -> None:
        for number in range(300):
            who = (thread, number)
            leaves = crowd.enter(who, str(thread))
            if leaves is not None:
                dropped.append(leaves)
            crowd.advance(who, 1)
            if number % 2 and not crowd.leave(who):
                pass  # somebody had it dropped

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(dropped)) == len(dropped)  # nobody was dropped twice
    assert len(crowd) <= 8
