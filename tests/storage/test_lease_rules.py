"""The lease's rules by themselves; and what a machine's storage does with several of them, explored.

The exploration runs the storage of both sides of a handover (`vmf.testing.explored_storage`) against the leases of two
images: every deed is a few steps (flush, get a lock, write a record, open), any process can die or sleep between any
two and any step can fail, the handover message can be lost, the source's machine is started again, and a person breaks
leases. It walks through every reachable world, and asks in each who has what open. With one image the same is explored
together with the whole handover in `tests/teleport/test_handover_explored.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st

from vmf import host
from vmf.errors import ImageInUse, LeaseLost, StorageError
from vmf.machine.storage import MachineStorage
from vmf.storage import holder
from vmf.storage import lease as rules
from vmf.storage.holder import Lease
from vmf.storage.lease import Owner, Record, Standing
from vmf.testing import explored_storage as explored
from vmf.testing.explored_storage import Holding, Shared
from vmf.testing.exploring import dead_ends

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


@pytest.mark.parametrize("nothing", ["", "uninitialized", "0" * 32])
@pytest.mark.parametrize("boot", ["", "b9"])
def test_hosts_without_an_identity_are_not_one_host(nothing: str, boot: str) -> None:
    """The machine's definition is on both; after a crash of the one, or while it is cut off, the other one asks."""
    dead = evolve(A, host_id=nothing, boot_id="b1" if boot else "")
    heir = evolve(dead, incarnation="a2", boot_id=boot)
    record = rules.claim(Record("image"), dead, excludes=True)
    with pytest.raises(ImageInUse, match="cannot be seen") as caught:
        rules.claim(record, heir, excludes=True)
    assert "systemd-machine-id-setup" in caught.value.remedy
    assert rules.claim(rules.broken(record), heir, excludes=True).generation == 3, "a person decided"
    if boot:
        same_kernel = evolve(heir, boot_id="b1")
        assert rules.claim(record, same_kernel, excludes=True).generation == 2, "its lock proves it"


def test_hosts_of_one_template_are_not_one_host() -> None:
    record = rules.claim(Record("image"), A, excludes=True)
    with pytest.raises(ImageInUse, match="machine a on host h1"):
        rules.claim(record, evolve(A, incarnation="a2", host="h7", boot_id="b9"), excludes=True)


@pytest.mark.parametrize(
    ("heir", "held", "offered"),
    [
        (owner("a2", uuid="a"), True, False),
        (owner("a2", uuid="a", boot="b9"), True, False),
        (owner("c"), True, False),
        (owner("c", boot="b9"), False, False),
        (owner("a2", uuid="a", host="h2", boot="b2"), False, False),
    ],
)
def test_a_lock_that_reaches_one_host(heir: Owner, held: bool, offered: bool) -> None:
    """It proves the death of an owner on that host, but not that the other side of a teleport has not taken over."""
    record = rules.claim(Record("image"), A, excludes=False, excludes_here=True)
    for each, may in ((record, held), (rules.offer(record, A, 1, T1), offered)):
        if may:
            assert rules.claim(each, heir, excludes=False, excludes_here=True).generation == 2
        else:
            with pytest.raises(ImageInUse):
                rules.claim(each, heir, excludes=False, excludes_here=True)


@pytest.mark.parametrize(
    ("content", "identity"),
    [
        ("0123456789abcdef" * 2 + "\n", "0123456789abcdef" * 2),
        ("uninitialized\n", ""), ("0" * 32, ""), ("x", ""), ("", ""), (None, ""),
    ],
)  # fmt: skip
def test_the_identity_of_this_host(
    content: str | None, identity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "machine-id"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(host, "_MACHINE_ID", str(file))
    assert holder.this_owner("vm", "u").host_id == identity


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

IMAGES = 2


@frozen(cache_hash=True)
class Side:
    """A process.

    Attributes:
        at: where it is: "running", "pass", "uncertain", "take", "claim", "waiting", "lost", "dead".
        log: how far it is in that deed.
    """

    at: str
    holding: Holding
    log: explored.Log = ()


@frozen(cache_hash=True)
class World:
    shared: Shared
    source: Side
    target: Side
    heir: Side
    handover: str = "unsent"  # on the wire: unsent, sent, lost, heard
    gone: bool = False  # the storage failed for good in the middle of a deed
    broken: bool = False  # a person broke leases


SIDES = ("source", "target", "heir")
AFTER = {
    ("pass", "done"): "uncertain",
    ("pass", "failed"): "take",
    ("take", "done"): "running",
    ("take", "failed"): "lost",
    ("claim", "done"): "running",
    ("claim", "failed"): "dead",
}


def first_world(images: int) -> World:
    shared, holding, nothing = explored.at_first(images)
    return World(shared, Side("running", holding), Side("waiting", nothing), Side("idle", nothing))


def put(world: World, name: str, at: str, **changes: object) -> World:
    return evolve(world, **{name: evolve(getattr(world, name), at=at, log=()), **changes})


def steps(world: World) -> Iterator[World]:
    """Every world that can follow."""
    for name in SIDES:
        side: Side = getattr(world, name)
        if side.at == "dead":
            continue
        if side.at != "idle":
            dead = Side("dead", explored.nothing(len(world.shared.records)))
            yield evolve(world, shared=world.shared.without(name), **{name: dead})
        match side.at:
            case "running" if name == "source" and world.handover == "unsent":
                yield put(world, name, "pass")
            case "uncertain":
                yield put(world, name, "take")
                if world.handover == "unsent":
                    yield evolve(world, handover="sent")
            case "lost" if name == "source":
                yield put(world, name, "take")  # a person tries again
            case "waiting" if world.handover == "sent":
                yield put(world, name, "take", handover="heard")
            case "idle" if world.source.at == "dead":
                yield put(world, name, "claim")
            case "pass" | "take" | "claim":
                yield from deed(world, name)
    if world.handover == "sent":
        yield evolve(world, handover="lost")
    if not world.broken:
        # `vmf media break-lock`: refused while somebody has the lock.
        pairs = zip(world.shared.records, world.shared.locks, strict=True)
        records = tuple(record if lock else rules.broken(record) for record, lock in pairs)
        if records != world.shared.records:
            yield evolve(world, shared=evolve(world.shared, records=records), broken=True)


def deed(world: World, name: str) -> Iterator[World]:
    side: Side = getattr(world, name)
    for step in explored.advance(name, side.at, world.shared, side.holding, side.log):
        at = AFTER.get((side.at, step.status), side.at)
        following = evolve(
            world, shared=step.shared, gone=world.gone or step.gone, **{name: Side(at, step.holding, step.log)}
        )
        logs = [result for each in SIDES for result in getattr(following, each).log]
        if step.status != "paused" and not any(isinstance(result, bytes) for result in logs):
            shared, *holdings = explored.plain(step.shared, *(getattr(following, each).holding for each in SIDES))
            sides = {each: evolve(getattr(following, each), holding=h) for each, h in zip(SIDES, holdings, strict=True)}
            following = evolve(following, shared=shared, **sides)
        yield following


def running(world: World) -> list[str]:
    return [name for name in SIDES if getattr(world, name).at == "running"]


def check(world: World) -> None:
    assert all(len(names) <= 1 for names in world.shared.open), f"two have an image open: {world}"
    assert len(running(world)) <= 1, f"two run: {world}"
    for name in running(world):
        assert explored.may_write(name, world.shared, getattr(world, name).holding), f"{name} cannot write: {world}"


def explore(images: int) -> dict[World, list[World]]:
    seen: dict[World, list[World]] = {}
    waiting = deque([first_world(images)])
    while waiting:
        world = waiting.popleft()
        if world in seen:
            continue
        check(world)
        seen[world] = list(steps(world))
        waiting += seen[world]
    return seen


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was explored with a mistake in it, or without."""
    explored.advance.cache_clear()
    yield
    explored.advance.cache_clear()


@pytest.fixture(scope="module")
def worlds() -> dict[World, list[World]]:
    return explore(IMAGES)


def test_at_most_one_writer_in_every_world(
    worlds: dict[World, list[World]], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\nleases of {IMAGES} images: {len(worlds)} states, {sum(map(len, worlds.values()))} steps explored")
    for name in SIDES:
        assert any(running(world) == [name] for world in worlds), f"{name} never runs"
    assert any(world.source.at == "running" and world.handover == "heard" for world in worlds), "nobody took back"


def without_a_way_to_run(worlds: dict[World, list[World]]) -> set[World]:
    """The worlds in which nobody died, no storage is gone and no lease broken, and yet nobody can run any more."""
    usual = [w for w in worlds if "dead" not in (w.source.at, w.target.at) and not w.gone | w.broken]
    back: dict[World, list[World]] = {}
    for world in usual:
        for each in worlds[world]:
            back.setdefault(each, []).append(world)
    return dead_ends(usual, back, lambda world: bool(running(world)))


def test_nobody_is_left_without_a_machine(worlds: dict[World, list[World]]) -> None:
    assert not without_a_way_to_run(worlds)


def test_a_target_that_skips_the_lease_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exploration can fail: a target that opens the images without asking the leases has them beside the source."""

    def careless(self: MachineStorage, teleport: str) -> None:
        for slot in self.slots:
            if not slot.drive.attached:
                self._open(slot)

    monkeypatch.setattr(MachineStorage, "take_leases", careless)
    with pytest.raises(AssertionError, match=r"two have an image open|cannot write"):
        explore(1)


def test_a_store_without_a_lock_cannot_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `leased` is false there: both read the offer, both write their own record, and one believes wrongly."""
    monkeypatch.setattr(explored._Store, "lock", lambda self: self._run.operate(lambda: True, point=True))
    with pytest.raises(AssertionError, match=r"two have an image open|cannot write"):
        explore(1)


def test_a_record_that_was_written_unheard_of_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the target would be the owner of a machine that it does not know to have."""
    monkeypatch.setattr(Lease, "_undo", lambda self, change: None)
    assert without_a_way_to_run(explore(1))
