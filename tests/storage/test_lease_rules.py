"""The lease's rules by themselves, and explored together with both sides of a handover.

The exploration runs two machines against one record, as `vmf.machine.storage` does it: every deed is a few steps (get
the lock, read, write, let go), any process can die or sleep between any two, the handover message can be lost. It
walks through every reachable world, and asks in each whether more than one side could write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st

from vmf.errors import ImageInUse, LeaseLost, StorageError
from vmf.storage import lease as rules
from vmf.storage.lease import Owner, Record, Standing

T1, T2 = "11" * 16, "22" * 16


def owner(name: str, uuid: str = "", host: str = "h1", boot: str = "b1") -> Owner:
    return Owner(incarnation=name, machine=name, uuid=uuid or name, host=host, host_id=host, boot_id=boot, pid=1)


A, B = owner("a"), owner("b", host="h2", boot="b2")


def test_the_life_of_a_lease() -> None:
    record = rules.claim(Record("image"), A, excludes=True)
    rules.verify(record, A, 1)
    record = rules.offer(record, A, 1, T1)
    for side in (A, B):
        with pytest.raises(LeaseLost):
            rules.verify(record, side, 1)
    record = rules.take(record, B, T1)
    rules.verify(record, B, 2)
    with pytest.raises(LeaseLost, match="machine b on host h2"):
        rules.verify(record, A, 1)
    with pytest.raises(LeaseLost):
        rules.take(record, A, T1)
    record = rules.release(record, B, 2)
    assert (record.standing, record.generation) == (Standing.FREE, 2)
    assert rules.claim(record, A, excludes=True).generation == 3


@pytest.mark.parametrize(
    ("heir", "excludes", "may"),
    [
        (owner("a2", uuid="a"), True, True),  # the same machine, started again after a crash
        (owner("a2", uuid="a", boot="b9"), True, True),  # after the host's
        (owner("c"), True, True),  # another machine under the same kernel, whose lock proves the owner dead
        (owner("c", boot="b9"), True, False),
        (owner("a2", uuid="a", host="h2", boot="b2"), True, False),  # the same definition on another host
        (owner("a2", uuid="a"), False, False),  # nothing proves anything
    ],
)
def test_who_may_claim_after_a_crash(heir: Owner, excludes: bool, may: bool) -> None:
    record = rules.claim(Record("image"), A, excludes=True)
    for each in (record, rules.offer(record, A, 1, T1)):
        if may:
            claimed = rules.claim(each, heir, excludes=excludes)
            assert claimed.generation == 2
            with pytest.raises(LeaseLost):
                rules.take(claimed, B, T1)  # an offer from before the crash is void
        else:
            with pytest.raises(ImageInUse, match="machine a on host h1"):
                rules.claim(each, heir, excludes=excludes)


def test_only_the_teleport_that_it_was_offered_to() -> None:
    record = rules.offer(rules.claim(Record("image"), A, excludes=True), A, 1, T1)
    with pytest.raises(LeaseLost):
        rules.take(record, B, T2)


def test_a_broken_lease_is_nobodys() -> None:
    record = rules.broken(rules.claim(Record("image"), A, excludes=True))
    for side in (A, B):
        with pytest.raises(LeaseLost):
            rules.verify(record, side, 1)
    assert rules.claim(record, B, excludes=False).generation == 3


# -- the bytes -----------------------------------------------------------------------------------------------

texts = st.text(max_size=60)
owners = st.builds(Owner, texts, texts, texts, texts, texts, texts, st.integers(0, 1 << 22))
records = st.builds(
    Record, texts, st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.sampled_from(Standing),
    st.none() | owners, texts, texts, st.integers(0, 1 << 33),
)  # fmt: skip


@given(records)
def test_records_are_read_as_written(record: Record) -> None:
    assert rules.decode(rules.encode(record) + bytes(4096)) == record
    assert rules.decode(bytes(4096) + rules.encode(record)) == record


@given(records, records, st.integers(0, 4095))
def test_a_torn_write_leaves_the_record_before(old: Record, new: Record, torn_at: int) -> None:
    old, new = evolve(old, sequence=6), evolve(new, sequence=7)
    torn = rules.encode(new)[:torn_at].ljust(4096, b"\0")
    found = rules.decode(rules.encode(old) + torn)
    assert found == (new if torn == rules.encode(new) else old)


@given(st.binary(max_size=9000))
def test_any_bytes_are_a_record_nothing_or_an_error(area: bytes) -> None:
    try:
        found = rules.decode(area)
    except StorageError:
        assert area.strip(b"\0")
    else:
        assert found is None or area.startswith(b"vmf-lease ")


def test_too_long_a_record_is_refused() -> None:
    with pytest.raises(StorageError, match="too long"):
        rules.encode(Record("x" * 5000))


# -- explored ------------------------------------------------------------------------------------------------


@frozen
class Side:
    """A process.

    Attributes:
        at: where it is in what it does.
        lock: it has the store's lock.
        read: the record that it read, about to act on it.
        generation: at which it believes to hold the lease; 0 when it does not.
        alive, open: the process lives; it has the image open for writing.
    """

    at: str
    lock: bool = False
    read: Record | None = None
    generation: int = 0
    alive: bool = True
    open: bool = False


@frozen
class World:
    record: Record
    source: Side
    target: Side
    handover: str = "unsent"  # on the wire: unsent, sent, lost, heard
    heir: Side = Side("idle")  # the source machine, started again on its host after a crash


def first_world() -> World:
    return World(
        record=rules.claim(Record("i"), A, excludes=True),
        source=Side("running", lock=True, generation=1, open=True),
        target=Side("waiting"),
    )


HEIR = owner("a2", uuid="a")
WHO = {"source": A, "target": B, "heir": HEIR}


def locked(world: World) -> bool:
    return any(side.lock for side in (world.source, world.target, world.heir))


def put(world: World, name: str, record: Record | None = None, handover: str = "", **changes: object) -> World:
    side = evolve(getattr(world, name), **changes)
    world = evolve(world, **{name: side})
    if record is not None:
        world = evolve(world, record=evolve(record, sequence=0, since=0, probe=""))
    return evolve(world, handover=handover) if handover else world


def steps(world: World, resume_by_lease: bool = True, fenced: bool = True) -> Iterator[World]:
    """Every world that can follow."""
    for name in ("source", "target", "heir"):
        side: Side = getattr(world, name)
        if not side.alive:
            continue
        if name != "heir" or side.at != "idle":
            yield put(world, name, alive=False, lock=False, open=False)  # killed: the kernel frees lock and file
        taker = (lambda record, name=name: rules.take(record, WHO[name], T1)) if name != "heir" else (
            lambda record: rules.claim(record, HEIR, excludes=True)
        )  # fmt: skip
        match side.at:
            case "running" if name == "source":
                yield put(world, name, at="flushed", open=False)
            case "flushed":
                record = rules.offer(world.record, A, side.generation, T1)
                yield put(world, name, record, at="offered", generation=0)
            case "offered":
                yield put(world, name, at="let go", lock=False)
            case "let go":
                yield put(world, name, at="uncertain", handover="sent")
                yield put(world, name, at="take")  # it could not be sent
            case "uncertain" if resume_by_lease:
                yield put(world, name, at="take")
            case "waiting" if world.handover == "sent":
                yield put(world, name, at="take", handover="heard")
            case "idle" if not world.source.alive:
                yield put(world, name, at="take")
            case "take":
                if locked(world):
                    yield put(world, name, at="lost")
                else:
                    yield put(world, name, at="taking", lock=True)
            case "taking":
                yield put(world, name, at="deciding", read=world.record)
            case "deciding":
                assert side.read is not None
                try:
                    record = taker(side.read)
                except (LeaseLost, ImageInUse):
                    yield put(world, name, at="lost", lock=False, read=None)
                else:
                    yield put(world, name, record, at="taken", read=None, generation=record.generation)
            case "taken":
                yield put(world, name, at="running again", open=True)
    if world.handover == "sent":
        yield evolve(world, handover="lost")


def writers(world: World, fenced: bool = True) -> list[str]:
    """Who would write now, if it tried."""
    found = []
    for name, who in WHO.items():
        side: Side = getattr(world, name)
        if not side.alive or not side.open:
            continue
        try:
            if fenced:
                rules.verify(world.record, who, side.generation)
        except LeaseLost:
            continue
        found.append(name)
    return found


def explore(step: Callable[[World], Iterator[World]]) -> dict[World, list[World]]:
    seen: dict[World, list[World]] = {}
    waiting = [evolve(first_world(), record=evolve(first_world().record, sequence=0))]
    while waiting:
        world = waiting.pop()
        if world in seen:
            continue
        seen[world] = list(step(world))
        waiting += seen[world]
    return seen


def test_at_most_one_writer_in_every_world(capsys: pytest.CaptureFixture[str]) -> None:
    worlds = explore(steps)
    with capsys.disabled():
        print(f"\nlease and handover: {len(worlds)} states, {sum(map(len, worlds.values()))} steps explored")
    for world in worlds:
        assert len(writers(world, fenced=False)) <= 1, world
    assert any(writers(world) == [name] for world in worlds for name in ("target",))
    assert any(writers(world) == ["heir"] for world in worlds)


def test_nobody_is_left_without_a_machine() -> None:
    """Where nobody dies, every ending has exactly one writer, and the other side knows that it is not the one."""
    endings = 0
    for world, following in explore(steps).items():
        everybody = world.source.alive and world.target.alive
        if everybody and all(not (next_.source.alive and next_.target.alive) for next_ in following):
            endings += 1
            assert len(writers(world)) == 1, world
            loser = world.target if writers(world) == ["source"] else world.source
            assert loser.at in ("lost", "waiting"), world
    assert endings > 1


def test_a_target_that_skips_the_lease_is_caught() -> None:
    """The exploration can fail: a target that opens the image without asking the lease writes beside the source."""

    def careless(world: World) -> Iterator[World]:
        yield from steps(world)
        if world.target.at == "waiting" and world.handover == "sent" and world.target.alive:
            yield put(world, "target", at="running again", open=True, handover="heard")

    assert any(len(writers(world, fenced=False)) > 1 for world in explore(careless))


def test_a_store_without_a_lock_cannot_decide() -> None:
    """Why `leased` is false there: both read the offer, both write their own record, and one believes wrongly."""

    def unlocked(world: World) -> Iterator[World]:
        for next_ in steps(world):
            yield evolve(next_, source=evolve(next_.source, lock=False), target=evolve(next_.target, lock=False))

    worlds = explore(unlocked)
    assert any(len(writers(world, fenced=False)) > 1 for world in worlds)
    assert all(len(writers(world)) <= 1 for world in worlds)  # but the fence tells them apart
