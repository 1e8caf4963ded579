"""The state table, explored exhaustively for both sides at once, and its documentation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from attrs import evolve, frozen

from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol import states
from vmf.teleport.protocol.states import FINAL, LOST, SOURCE_OUTCOME, TABLE, TARGET_RUNS, Phase, Role, SourceOutcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"
IN_FLIGHT = 3
"""Messages on the way in one direction: a side that may send on and on (PAGES) is bounded by this."""


@frozen
class Side:
    """One end. `runs`: the guest executes there. `handed`: this source sent HANDOVER."""

    role: Role
    phase: Phase = Phase.HELLO
    alive: bool = True
    runs: bool = False
    handed: bool = False


@frozen
class World:
    source: Side
    target: Side
    to_target: tuple[type[m.Message], ...] = ()
    to_source: tuple[type[m.Message], ...] = ()
    linked: bool = True


def enter(side: Side, phase: Phase, said: object = None) -> Side:
    """What vmf.teleport.source and .target do with the machine when their phase changes."""
    if side.role is Role.SOURCE:
        handed = side.handed or said is m.Handover
        runs = side.runs and said is not m.Paused
        if phase in FINAL:
            # The source asks the outcome, nothing else.
            runs = SOURCE_OUTCOME[phase] is SourceOutcome.RUNS_HERE
        return evolve(side, phase=phase, handed=handed, runs=runs)
    return evolve(side, phase=phase, runs=phase in TARGET_RUNS)


def steps(world: World, table: Mapping[tuple[Phase, Role, object], Phase]) -> Iterator[World]:
    """Every next world: each legal message, each delivery, a cut, a loss, a death, giving up, at any moment."""
    for role in Role:
        mine, theirs = ("source", "target") if role is Role.SOURCE else ("target", "source")
        side: Side = getattr(world, mine)
        outgoing: tuple[type[m.Message], ...] = getattr(world, f"to_{theirs}")
        incoming: tuple[type[m.Message], ...] = getattr(world, f"to_{mine}")
        if not side.alive:
            continue
        yield evolve(world, linked=False, **{mine: evolve(side, alive=False, runs=False)})  # SIGKILL
        for (phase, who, says), to in table.items():
            if phase is not side.phase or who is not role:
                continue
            if says is LOST:  # a time-out or an error here, or the cut noticed
                yield evolve(world, linked=False, **{mine: enter(side, to)})
            elif says not in (m.Ping, m.Pong) and len(outgoing) < IN_FLIGHT:
                queue = (*outgoing, says) if world.linked else outgoing
                yield evolve(world, **{mine: enter(side, to, says), f"to_{theirs}": queue})
        if incoming:
            head, rest = incoming[0], incoming[1:]
            after = evolve(world, **{f"to_{mine}": rest})
            if side.phase in FINAL:
                yield after  # not read any more
            else:
                to_phase = table.get((side.phase, role.other, head))
                assert to_phase is not None, f"{role.value} in {side.phase} cannot take {head.word()}"
                yield evolve(after, **{mine: enter(side, to_phase)})
            if not world.linked:
                yield evolve(world, **{f"to_{mine}": ()})  # what was under way is lost
    if world.linked:
        yield evolve(world, linked=False)


def check(world: World) -> None:
    source, target = world.source, world.target
    assert not (source.runs and target.runs), f"two machines run: {world}"
    if source.handed:
        assert not source.runs, f"the source went on after HANDOVER: {world}"
    elif source.alive and source.phase in FINAL:
        assert source.runs, f"the machine was lost before HANDOVER: {world}"
    if target.runs:
        assert source.handed, f"the target runs what was not handed over: {world}"
    if source.alive and source.phase is Phase.DONE:
        assert target.runs or not target.alive, f"the source thinks it runs there: {world}"


def explore(table: Mapping[tuple[Phase, Role, object], Phase]) -> set[World]:
    first = World(Side(Role.SOURCE, runs=True), Side(Role.TARGET))
    seen = {first}
    todo = deque(seen)
    while todo:
        world = todo.popleft()
        check(world)
        for following in steps(world, table):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen


def test_exactly_one_runs_whatever_happens_and_whenever(capsys):
    worlds = explore(TABLE)
    ends = [w for w in worlds if w.source.phase in FINAL and w.target.phase in FINAL]
    with capsys.disabled():
        print(f"\nteleport state machine: {len(worlds)} states explored, {len(ends)} final")
    # The exploration reaches what it is about.
    assert any(w.source.phase is Phase.DONE and w.target.phase is Phase.DONE for w in worlds)
    assert any(w.source.phase is Phase.UNCERTAIN and w.target.runs for w in worlds)
    assert any(w.source.phase is Phase.UNCERTAIN and not w.target.runs for w in worlds)
    assert any(w.source.phase is Phase.CANCELLED and w.target.phase is Phase.CANCELLED for w in worlds)
    assert any(w.source.phase is Phase.CHECK_DONE and w.target.phase is Phase.CHECK_DONE for w in worlds)
    # Phases that nobody reaches would be dead words.
    assert {w.source.phase for w in worlds} | {w.target.phase for w in worlds} == set(Phase)


@pytest.mark.parametrize(
    "change",
    [
        {(Phase.HANDOVER, Role.SOURCE, LOST): Phase.FAILED},
        {(Phase.READY, Role.TARGET, LOST): Phase.DONE},
        {(Phase.RESTORE, Role.TARGET, m.Ready): Phase.HANDOVER},
        {(Phase.READY, Role.TARGET, m.Cancel): Phase.CANCELLED},
        {(Phase.PAUSE, Role.SOURCE, LOST): Phase.UNCERTAIN},
    ],
)
def test_the_exploration_finds_a_wrong_table(change):
    with pytest.raises(AssertionError):
        explore({**TABLE, **change})


def test_the_conversation_is_half_duplex():
    """In every phase one side speaks; only the end of a session and pings come from both."""
    for phase in Phase:
        speakers = {
            who for (at, who, says) in TABLE if at is phase and says not in (m.Cancel, m.Error, m.Ping, m.Pong, LOST)
        }
        assert len(speakers) == (0 if phase in FINAL else 1), phase


def test_every_message_is_legal_somewhere():
    assert {says for (_, _, says) in TABLE if says is not LOST} == set(m.MESSAGES)


def test_final_phases_end():
    assert not [key for key in TABLE if key[0] in FINAL]
    for phase in set(Phase) - FINAL:
        for role in Role:
            assert (phase, role, LOST) in TABLE, "a cut is possible in every phase"


def test_every_phase_has_an_outcome():
    assert set(SOURCE_OUTCOME) == set(Phase)


@pytest.mark.parametrize("render", [states.render_mermaid, states.render_table, states.render_limits])
def test_the_documentation_matches_the_table(render):
    assert render() in DOCUMENT.read_text(), f"regenerate it: python -m vmf.teleport.document {DOCUMENT}"
