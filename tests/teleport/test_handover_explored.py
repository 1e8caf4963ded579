"""Every interleaving of a handover: messages, losses, failing deeds, deaths, restarts, questions and their answers.

What is explored are the tables that the real source and target run on (`vmf.teleport.protocol.states.TABLE` and
`vmf.teleport.protocol.handover`) and, for a machine with a disk, the code that passes and takes its lease and opens the
image (`vmf.machine.storage`, see `explored_storage`). The test adds the world around them: wires, notes, a record and a
lock, storage that fails, processes that stop and die.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import pytest
from attrs import evolve, frozen

from vmf.teleport.protocol import handover as h
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import (
    SOURCE,
    TARGET,
    Answer,
    Deed,
    Note,
    SourceCustody,
    SourceEvent,
    TargetCustody,
    TargetEvent,
)
from vmf.teleport.protocol.states import FINAL, LOST, TABLE, Lost, Phase, Role
from vmf.testing import explored_storage as storage
from vmf.testing.explored_storage import Holding, Shared
from vmf.testing.exploring import dead_ends

S, T = SourceCustody, TargetCustody
IN_FLIGHT = 2
NOT_HERE = (m.Pages, m.Zeros, m.Ping, m.Pong, m.Inquire, m.Capabilities, m.Challenge)
"""They change nothing; test_protocol_states has them."""
Kind = type[m.Message]


@frozen(cache_hash=True)
class Source:
    custody: SourceCustody = S.HOLDS
    pending: Deed | None = None
    phase: Phase = Phase.HELLO
    alive: bool = True
    guest: bool = True
    note: Note = Note.NONE
    discarded: Answer | None = None
    restarted: bool = False
    holding: Holding | None = None
    log: storage.Log = ()
    """How far it is in a deed of its storage."""


@frozen(cache_hash=True)
class Target:
    custody: TargetCustody = T.WAITING
    pending: Deed | None = None
    phase: Phase = Phase.HELLO
    alive: bool = True
    guest: bool = False
    note: Note = Note.NONE
    restarted: bool = False
    holding: Holding | None = None
    log: storage.Log = ()


@frozen(cache_hash=True)
class World:
    source: Source = Source()
    target: Target = Target()
    to_target: tuple[Kind, ...] = ()
    to_source: tuple[Kind, ...] = ()
    linked: bool = True
    shared: Shared | None = None
    """The image and its lease; None for a machine without disks."""
    gone: bool = False
    """The storage failed for good in the middle of a deed."""
    asked: Answer | bool = False
    """A question under way, or the answer that came."""
    handed: bool = False
    """HANDOVER left."""
    ran: bool = False
    """The guest ran at the target."""


@frozen
class Rules:
    """What is explored; tests put mistakes in."""

    table: Mapping[tuple[Phase, Role, object], Phase]
    source: Mapping[tuple[SourceCustody, SourceEvent], SourceCustody]
    target: Mapping[tuple[TargetCustody, TargetEvent], TargetCustody]
    may_resume: Callable[[Answer, bool], h.Verdict] = h.may_resume
    recovered_source: Callable[[Note, bool], SourceCustody] = h.recovered_source

    def says(self, phase: Phase, role: Role) -> tuple[Kind | Lost, ...]:
        """What a side can say or notice in a phase."""
        found = SAYS.get(id(self.table))
        if found is None:
            found = SAYS[id(self.table)] = {}
            for at, who, kind in self.table:
                if kind not in NOT_HERE and kind is not m.Handover:
                    found[at, who] = (*found.get((at, who), ()), kind)
        return found.get((phase, role), ())


SAYS: dict[int, dict[tuple[Phase, Role], tuple[Kind | Lost, ...]]] = {}
RULES = Rules(TABLE, SOURCE, TARGET)


Edges = dict["World", list["World"]]


def explore(rules: Rules, leased: bool) -> tuple[dict[World, World | None], Edges]:
    """Every reachable world, with the one that it was first reached from; and from where each can be reached."""
    first = World()
    if leased:
        shared, held, nothing = storage.at_first(1)
        first = evolve(first, shared=shared, source=Source(holding=held), target=Target(holding=nothing))
    came_from: dict[World, World | None] = {first: None}
    back: Edges = {}
    todo = deque([first])
    while todo:
        world = todo.popleft()
        try:
            check(world)
            following = list(steps(rules, world))
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{error!r}, on the way {path(came_from, world)}") from error
        for each in following:
            back.setdefault(each, []).append(world)
            if each not in came_from:
                came_from[each] = world
                todo.append(each)
    return came_from, back


def path(came_from: Mapping[World, World | None], world: World | None) -> str:
    lines: list[str] = []
    while world is not None:
        s, t = world.source, world.target
        lines.append(
            f"source {s.custody.name}/{s.phase.name}{' runs' if s.guest else ''} {s.note.name}, "
            f"target {t.custody.name}/{t.phase.name}{' runs' if t.guest else ''} {t.note.name}, asked {world.asked}"
            f"{'' if world.shared is None else f', {_lease(world.shared)}'}"
        )
        world = came_from[world]
    return "\n  ".join(["", *reversed(lines)])


def _lease(shared: Shared) -> str:
    record = shared.records[0]
    return f"{record.standing.value} {record.owner.incarnation} {record.generation} {shared.locks} {shared.open}"


# The world's steps


def steps(rules: Rules, world: World) -> Iterator[World]:
    source, target = world.source, world.target
    if source.alive:
        yield from source_lives(rules, world)
        yield from source_dies(rules, world)
    elif source.custody is S.FREE and (source.note is not Note.GONE or source.discarded is Answer.NEVER):
        # `startvm` boots the machine anew. (After "it runs there" that would be the user's own second machine.)
        yield from booted(world)
    if target.alive:
        yield from target_lives(rules, world)
        nothing = None if world.shared is None else storage.nothing(1)
        dead = Target(T.WAITING, None, Phase.FAILED, False, False, target.note, target.restarted, nothing)
        dead = evolve(dead, custody=target.custody)
        freed = evolve(world, linked=False, shared=world.shared and world.shared.without("target"))
        yield evolve(freed, target=dead)
        if target.note is Note.TAKEN:  # a power failure: the last note did not reach the disk
            yield evolve(freed, target=evolve(dead, note=Note.PROMISED))
    elif not target.restarted:
        again = Target(note=target.note, phase=Phase.FAILED, restarted=True, holding=target.holding)
        yield evolve(world, target=again, to_target=())
    yield from asking(rules, world)
    if world.linked:
        yield evolve(world, linked=False)


def booted(world: World) -> Iterator[World]:
    source = evolve(world.source, guest=True, restarted=True)
    if world.shared is None:
        yield evolve(world, source=source)
    elif not world.source.restarted:
        step = storage.finish("heir", "claim", world.shared, storage.nothing(1))
        if step.status == "done":
            yield evolve(world, shared=step.shared, source=evolve(source, holding=step.holding))


def say(rules: Rules, world: World, role: Role, kind: Kind) -> World | None:
    """The message is sent (and perhaps lost); None when it cannot be sent now."""
    mine, theirs = ("source", "target") if role is Role.SOURCE else ("target", "source")
    side = getattr(world, mine)
    to = rules.table.get((side.phase, role, kind))
    queue = getattr(world, f"to_{theirs}")
    if to is None or len(queue) >= IN_FLIGHT:
        return None
    changed = {mine: evolve(side, phase=to), f"to_{theirs}": (*queue, kind) if world.linked else queue}
    return evolve(world, **changed, handed=world.handed or kind is m.Handover)


def feed_source(rules: Rules, world: World, event: SourceEvent) -> World:
    source = world.source
    assert source.pending is None
    to = rules.source[source.custody, event]
    usual, deed = h.source_step(source.custody, event)
    if to is not usual:
        deed = h.SOURCE_DEEDS.get(to)
    return evolve(world, source=evolve(source, custody=to, pending=deed))


def feed_target(rules: Rules, world: World, event: TargetEvent) -> World:
    target = world.target
    to = rules.target[target.custody, event]
    if event is TargetEvent.ASKED:
        return evolve(world, target=evolve(target, custody=to))  # what is being done goes on being done
    assert target.pending is None
    return evolve(world, target=evolve(target, custody=to, pending=h.TARGET_DEEDS.get(to)))


def source_lives(rules: Rules, world: World) -> Iterator[World]:
    source = world.source
    if world.shared is not None and source.pending in STORAGE_DEEDS:
        yield from storage_deed(rules, world, "source")
    elif source.pending is not None:
        calm = evolve(world, source=evolve(source, pending=None))
        for done in perform_source(rules, calm, source.pending):
            yield feed_source(rules, done, SourceEvent.DONE)
            if source.pending is not Deed.RUN_GUEST:
                yield feed_source(rules, done, SourceEvent.FAILED)
        if source.pending is not Deed.RUN_GUEST:  # a machine whose vCPU cannot go on is another failure
            yield feed_source(rules, calm, SourceEvent.FAILED)
    elif source.phase in FINAL:
        if source.custody not in (S.HOLDS, S.GONE, S.UNCERTAIN):
            yield feed_source(rules, world, SourceEvent.LOST)
    else:
        if source.phase is Phase.CHECKED and source.custody is S.HOLDS:
            yield feed_source(rules, world, SourceEvent.BEGIN)
        if source.phase is Phase.PRECOPY and source.custody is S.OFFERED:
            yield feed_source(rules, world, SourceEvent.PAUSE)
        for kind in rules.says(source.phase, Role.SOURCE):
            if kind is LOST:
                lost = evolve(source, phase=rules.table[source.phase, Role.SOURCE, LOST])
                yield feed_source(rules, evolve(world, linked=False, source=lost), SourceEvent.LOST)
            elif h.SOURCE_SENDS.get(kind, source.custody) is source.custody:
                said = say(rules, world, Role.SOURCE, kind)
                if said is not None:
                    over = said.source.phase in FINAL and kind is not m.Done
                    yield feed_source(rules, said, SourceEvent.LOST) if over else said
    # The reader thread hears at any time.
    if world.to_source:
        kind, rest = world.to_source[0], world.to_source[1:]
        after = evolve(world, to_source=rest)
        if source.phase in FINAL:
            yield after
        elif source.pending is None or h.SOURCE_HEARS.get(kind) is None:
            to = rules.table.get((source.phase, Role.TARGET, kind))
            assert to is not None, f"the source in {source.phase} cannot take {kind.word()}"
            heard = evolve(after, source=evolve(source, phase=to))
            if kind in h.SOURCE_HEARS and (source.custody, h.SOURCE_HEARS[kind]) in rules.source:
                heard = feed_source(rules, heard, h.SOURCE_HEARS[kind])
            yield heard
        if not world.linked:
            yield evolve(world, to_source=())


STORAGE_DEEDS = {Deed.PASS_LEASE: "pass", Deed.TAKE_LEASE: "take"}


def storage_deed(rules: Rules, world: World, who: str) -> Iterator[World]:
    """One step further, between any two of which others may go on, or this process may die."""
    side: Source | Target = getattr(world, who)
    assert world.shared is not None
    assert side.holding is not None
    for step in storage.advance(who, STORAGE_DEEDS[side.pending], world.shared, side.holding, side.log):
        ended = step.status != "paused"
        after = evolve(side, holding=step.holding, log=step.log, pending=None if ended else side.pending)
        following = evolve(world, shared=step.shared, gone=world.gone or step.gone, **{who: after})
        if not ended:
            yield following
            continue
        following = renumbered(following)
        if who == "source":
            yield feed_source(rules, following, SourceEvent.DONE if step.status == "done" else SourceEvent.FAILED)
        else:
            yield feed_target(rules, following, TargetEvent.DONE if step.status == "done" else TargetEvent.FAILED)


def renumbered(world: World) -> World:
    """So that trying again and again is no endless sequence of new worlds."""
    source, target = world.source, world.target
    if any(isinstance(result, bytes) for result in source.log + target.log):
        return world  # one of them has read the record as it is; it has the lock, so this is not endless either
    shared, first, second = storage.plain(world.shared, source.holding, target.holding)
    return evolve(world, shared=shared, source=evolve(source, holding=first), target=evolve(target, holding=second))


def perform_source(rules: Rules, world: World, deed: Deed) -> Iterator[World]:
    source = world.source
    notes = {
        Deed.NOTE_OFFERED: Note.OFFERED,
        Deed.NOTE_HANDED_OVER: Note.HANDED_OVER,
        Deed.NOTE_GONE: Note.GONE,
        Deed.ERASE_NOTE: Note.NONE,
    }
    if deed in notes:
        yield evolve(world, source=evolve(source, note=notes[deed]))
    elif deed is Deed.STOP_GUEST:
        yield evolve(world, source=evolve(source, guest=False))
    elif deed is Deed.RUN_GUEST:
        yield evolve(world, source=evolve(source, guest=True))
    elif deed in STORAGE_DEEDS:
        yield world  # without disks there is nothing to do
    elif deed is Deed.SEND_HANDOVER:
        said = say(rules, world, Role.SOURCE, m.Handover)
        if said is not None:
            yield said
    else:
        raise AssertionError(deed)


def source_dies(rules: Rules, world: World) -> Iterator[World]:
    source = world.source
    dead = evolve(source, alive=False, guest=False, pending=None, phase=Phase.FAILED, log=())
    if world.shared is not None:
        dead = evolve(dead, holding=storage.nothing(1))
        world = evolve(world, shared=world.shared.without("source"))
    yield evolve(
        world, linked=False, asked=False, source=evolve(dead, custody=rules.recovered_source(source.note, True))
    )
    if source.note is not Note.NONE or source.custody is S.HOLDS:
        # A power failure: only the first note was surely on the disk, and its erasure perhaps was not.
        note = Note.OFFERED if source.custody is not S.HOLDS else source.note
        custody = rules.recovered_source(note, False)
        yield evolve(world, linked=False, asked=False, source=evolve(dead, note=note, custody=custody))


def target_lives(rules: Rules, world: World) -> Iterator[World]:
    target = world.target
    if world.shared is not None and target.pending in STORAGE_DEEDS:
        yield from storage_deed(rules, world, "target")
        return
    if target.pending is not None:
        calm = evolve(world, target=evolve(target, pending=None))
        done = perform_target(rules, calm, target.pending)
        if done is not None:
            yield feed_target(rules, done, TargetEvent.DONE)
        yield feed_target(rules, calm, TargetEvent.FAILED)
        if done is not None and target.pending is not Deed.RUN_GUEST:
            yield feed_target(rules, done, TargetEvent.FAILED)
        return
    if target.phase in FINAL:
        if world.to_target:
            yield evolve(world, to_target=world.to_target[1:])
        if target.custody in (T.PROMISED, T.READY, T.VOID):
            yield feed_target(rules, world, TargetEvent.LOST)
        return
    for kind in rules.says(target.phase, Role.TARGET):
        if kind is LOST:
            lost = evolve(target, phase=rules.table[target.phase, Role.TARGET, LOST])
            yield feed_target(rules, evolve(world, linked=False, target=lost), TargetEvent.LOST)
        elif kind not in h.TARGET_SENDS:
            said = say(rules, world, Role.TARGET, kind)
            if said is not None:
                yield feed_target(rules, said, TargetEvent.LOST) if said.target.phase in FINAL else said
    if world.to_target:
        kind, rest = world.to_target[0], world.to_target[1:]
        to = rules.table.get((target.phase, Role.SOURCE, kind))
        assert to is not None, f"the target in {target.phase} cannot take {kind.word()}"
        heard = evolve(world, to_target=rest, target=evolve(target, phase=to))
        event = h.TARGET_HEARS.get(kind) or (TargetEvent.LOST if to in FINAL else None)
        if event is not None and (target.custody, event) in rules.target:
            heard = feed_target(rules, heard, event)
        yield heard
        if not world.linked:
            yield evolve(world, to_target=())


def perform_target(rules: Rules, world: World, deed: Deed) -> World | None:
    """The world afterwards; None when it must fail."""
    target = world.target
    if deed is Deed.NOTE_PROMISED:
        return evolve(world, target=evolve(target, note=Note.PROMISED))
    if deed is Deed.NOTE_TAKEN:
        return evolve(world, target=evolve(target, note=Note.TAKEN))
    if deed is Deed.RUN_GUEST:
        return evolve(world, target=evolve(target, guest=True), ran=True)
    if deed in (Deed.SEND_READY, Deed.SEND_RUNNING):
        return say(rules, world, Role.TARGET, m.Ready if deed is Deed.SEND_READY else m.Running)
    assert deed in (Deed.RESTORE, Deed.DISCARD, Deed.TAKE_LEASE)
    return world


def asking(rules: Rules, world: World) -> Iterator[World]:
    """The source (or, when its process died, somebody on its host) asks by teleport id, over another connection."""
    source, target, leased = world.source, world.target, world.shared is not None
    wants = source.pending is None and source.custody in (S.UNCERTAIN, S.ORPHANED)
    if not wants:
        return
    if world.asked is False:
        yield evolve(world, asked=True)
    elif world.asked is True:
        yield evolve(world, asked=Answer.UNREACHABLE)
        if target.alive:
            after = feed_target(rules, world, TargetEvent.ASKED)
            said = h.answer(after.target.custody, after.target.note)
            yield evolve(after, asked=said)
            yield evolve(after, asked=Answer.UNREACHABLE)  # the answer is lost, its effect is not
    else:
        yield evolve(world, asked=False)
        forgotten = evolve(world, asked=False)
        if source.custody is S.UNCERTAIN and rules.may_resume(world.asked, leased).allowed:
            yield feed_source(rules, forgotten, SourceEvent.RESUME)
        if h.may_discard(world.asked, orphaned=source.custody is S.ORPHANED).allowed:
            given_up = evolve(forgotten, source=evolve(source, discarded=world.asked))
            if source.custody is S.UNCERTAIN:
                yield feed_source(rules, given_up, SourceEvent.DISCARD)
            else:
                free = evolve(given_up.source, custody=S.FREE, note=Note.GONE)
                assert rules.source[S.ORPHANED, SourceEvent.DISCARD] is S.FORGETTING
                yield evolve(given_up, source=free)


# What must hold


def check(world: World) -> None:
    source, target = world.source, world.target
    assert not (source.guest and target.guest), "two run"
    if not world.handed:
        assert not world.ran, "the target ran what was not handed over"
        if source.alive and source.pending is None and source.custody is S.HOLDS:
            assert source.guest, "the machine was lost before the handover"
    if source.alive and source.custody in h.SOURCE_OWNS and source.pending is None:
        assert target.custody not in h.TARGET_OWNS or not target.alive, "both own it"
    if world.handed and source.alive and not target.guest and not world.ran:
        held = {S.COMMITTED, S.UNCERTAIN, S.RETAKING, S.RESUMING, S.CLEARING, S.HOLDS}
        assert source.custody in held or source.discarded, "nobody has it"
    if source.custody is S.GONE and source.discarded is None:
        assert world.ran, "the source let go of what never ran there"
    if source.custody in (S.UNCERTAIN, S.COMMITTED, S.RETAKING, S.GONE):
        assert not source.guest, "an uncertain source runs"
    if isinstance(world.asked, Answer) and world.handed:
        assert world.asked is not Answer.UNKNOWN, "the target does not know a teleport for which it said READY"
        if world.asked is Answer.NEVER:
            assert not target.guest, "it runs where it never arrived"
            assert target.custody not in h.TARGET_OWNS | {T.READY, T.TAKING}, "NEVER was not final"
    if world.shared is not None:
        assert all(len(names) <= 1 for names in world.shared.open), "two have the image open"
        if source.guest:
            name = "heir" if source.restarted else "source"
            assert storage.may_write(name, world.shared, source.holding), "it runs at the source, and cannot write"
        if target.guest:
            assert storage.may_write("target", world.shared, target.holding), "it runs there, and cannot write"


@pytest.mark.parametrize("leased", [False, True], ids=["no lease", "lease"])
def test_never_two_and_never_none(leased, capsys):
    worlds, back = explore(RULES, leased)
    with capsys.disabled():
        print(f"\nhandover, {'with' if leased else 'without'} a lease: {len(worlds)} states explored")
    seen_source = {w.source.custody for w in worlds}
    seen_target = {w.target.custody for w in worlds}
    assert seen_source == set(S) - {S.FORGETTING}, "a state that is never reached is a dead word"
    assert seen_target == set(T)
    assert {w.asked for w in worlds if isinstance(w.asked, Answer)} == set(Answer)
    # It reaches what it is about.
    assert any(w.source.custody is S.UNCERTAIN and w.target.guest for w in worlds)
    assert any(w.source.custody is S.HOLDS and w.source.guest and w.handed for w in worlds), "nobody resumed"
    assert any(w.source.custody is S.GONE and w.target.custody is T.SETTLED for w in worlds)
    assert any(w.source.custody is S.ORPHANED and w.target.guest for w in worlds)

    # Whatever happened: as long as both hosts and the storage are there, the machine can run again, or runs, somewhere.
    def both_alive(world: World) -> bool:
        return world.source.alive and world.target.alive and not world.target.restarted and not world.gone

    stuck = dead_ends(worlds, back, lambda w: w.source.guest or w.target.guest)
    lost = [w for w in stuck if both_alive(w) and w.target.custody is not T.BROKEN and w.source.discarded is None]
    assert not lost, f"{len(lost)} worlds cannot go on: {path(worlds, lost[0])}"


def changed(**changes) -> Rules:
    kinds = {"source": SOURCE, "target": TARGET, "table": TABLE}
    return evolve(
        RULES, **{name: {**kinds[name], **value} if name in kinds else value for name, value in changes.items()}
    )


MISTAKES = {
    "NEVER without voiding the session": changed(target={(T.READY, TargetEvent.ASKED): T.DROPPING}),
    "going on after a lost handover": changed(source={(S.COMMITTED, SourceEvent.LOST): S.RESUMING}),
    "going on when HANDOVER may have left": changed(source={(S.COMMITTED, SourceEvent.FAILED): S.RESUMING}),
    "running before HANDOVER": changed(target={(T.READY, TargetEvent.LOST): T.STARTING}),
    "voided, yet taken": changed(target={(T.VOID, TargetEvent.HANDOVER): T.TAKING}),
    "resume without an answer": changed(may_resume=lambda answer, leased: h.Verdict(True, "")),
    "resume after UNREACHABLE": changed(
        may_resume=lambda a, leased: h.Verdict(a in (Answer.NEVER, Answer.UNREACHABLE), "")
    ),
    "the note is forgotten": changed(recovered_source=lambda note, same_boot: S.FREE),
    "a note that a power failure lost": changed(
        recovered_source=lambda note, same_boot: S.ORPHANED if note is Note.HANDED_OVER else S.FREE
    ),
    "gone without RUNNING": changed(source={(S.COMMITTED, SourceEvent.LOST): S.LEAVING}),
    "not undone": changed(source={(S.STOPPED, SourceEvent.LOST): S.CLEARING}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_exploration_finds(mistake):
    with pytest.raises(AssertionError):
        explore(MISTAKES[mistake], leased=False)


def test_the_lease_stops_two_even_without_an_answer():
    """Where the lease decides, resuming without an answer is safe; the exploration shows that it is the lease."""
    explore(evolve(RULES, may_resume=lambda answer, leased: h.Verdict(leased, "")), leased=True)
    broken = changed(
        target={(T.TAKING, TargetEvent.FAILED): T.NOTING}, may_resume=lambda a, leased: h.Verdict(True, "")
    )
    with pytest.raises(AssertionError):
        explore(broken, leased=True)
