"""The custodians do the deeds of the explored tables, and come to rest whatever a deed raises."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vmf.errors import LocalProtocolError, StateError
from vmf.teleport.custodian import SourceCustodian, TargetCustodian
from vmf.teleport.protocol import handover
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import (
    Answer,
    Deed,
    Note,
    SourceCustody,
    SourceEvent,
    TargetCustody,
    TargetEvent,
    may_discard,
    may_resume,
)

S, T, D = SourceCustody, TargetCustody, Deed


class Doing:
    """Deeds that are written down, and raise where wanted."""

    def __init__(self) -> None:
        self.done: list[Deed] = []
        self.fail: dict[Deed, BaseException] = {}
        self.deeds = {deed: (lambda deed=deed: self.do(deed)) for deed in Deed}

    def do(self, deed: Deed) -> None:
        self.done.append(deed)
        if deed in self.fail:
            raise self.fail[deed]


@pytest.fixture
def doing() -> Doing:
    return Doing()


def stopped(doing: Doing) -> SourceCustodian:
    custodian = SourceCustodian(doing.deeds)
    custodian.do(SourceEvent.BEGIN)
    custodian.do(SourceEvent.PAUSE)
    return custodian


def test_a_source_that_hands_over(doing):
    custodian = stopped(doing)
    assert custodian.may_send(m.State)
    assert not custodian.may_send(m.Handover)
    custodian.do(SourceEvent.READY)
    custodian.do(SourceEvent.RUNNING)
    assert custodian.state is S.GONE
    assert doing.done == [
        D.NOTE_OFFERED, D.STOP_GUEST, D.NOTE_HANDED_OVER, D.PASS_LEASE, D.SEND_HANDOVER, D.NOTE_GONE,
    ]  # fmt: skip


@pytest.mark.parametrize("deed", [D.NOTE_HANDED_OVER, D.PASS_LEASE])
@pytest.mark.parametrize("error", [StateError("no."), KeyboardInterrupt()])
def test_a_deed_that_fails_before_handover_is_undone(doing, deed, error):
    custodian = stopped(doing)
    doing.fail[deed] = error
    assert custodian.feed(SourceEvent.READY) is error
    assert custodian.state is S.HOLDS
    assert doing.done[-2:] == [D.RUN_GUEST, D.ERASE_NOTE]
    assert (D.TAKE_LEASE in doing.done) is (deed is D.PASS_LEASE)


def test_a_handover_that_may_have_left_is_uncertain(doing):
    custodian = stopped(doing)
    doing.fail[D.SEND_HANDOVER] = StateError("cut.")
    assert custodian.feed(SourceEvent.READY) is not None
    assert custodian.state is S.UNCERTAIN
    assert D.RUN_GUEST not in doing.done
    doing.fail[D.TAKE_LEASE] = StateError("the other has it.")
    with pytest.raises(StateError, match="the other has it"):
        custodian.do(SourceEvent.RESUME)
    assert custodian.state is S.UNCERTAIN
    assert D.RUN_GUEST not in doing.done
    doing.fail.clear()
    custodian.do(SourceEvent.RESUME)
    assert custodian.state is S.HOLDS


def test_an_interruption_between_two_steps_counts_as_a_failed_deed(doing):
    custodian = stopped(doing)
    custodian.state, custodian._doing = S.COMMITTED, True  # a signal came when the deed was due
    custodian.feed(SourceEvent.LOST)
    assert custodian.state is S.UNCERTAIN


def test_what_cannot_happen_is_a_bug(doing):
    with pytest.raises(LocalProtocolError, match="a bug in vmf"):
        SourceCustodian(doing.deeds).feed(SourceEvent.RUNNING)


def ready(doing: Doing, on_void=lambda: None) -> TargetCustodian:
    custodian = TargetCustodian(doing.deeds, on_void)
    custodian.do(TargetEvent.BEGIN)
    custodian.do(TargetEvent.STATE)
    assert custodian.state is T.READY
    return custodian


def test_a_target_that_takes_over(doing):
    custodian = ready(doing)
    custodian.do(TargetEvent.HANDOVER)
    assert custodian.owns
    assert custodian.ask(Note.TAKEN) is Answer.RUNS
    custodian.do(TargetEvent.CONFIRMED)
    assert custodian.state is T.SETTLED
    order = [D.TAKE_LEASE, D.NOTE_TAKEN, D.RUN_GUEST, D.SEND_RUNNING]
    assert doing.done[-4:] == order


def test_never_is_final(doing):
    voided = threading.Event()
    custodian = ready(doing, voided.set)
    assert custodian.ask(Note.PROMISED) is Answer.NEVER
    assert voided.is_set()
    custodian.feed(TargetEvent.HANDOVER)
    assert not custodian.owns
    assert D.RUN_GUEST not in doing.done
    assert custodian.ask(Note.PROMISED) is Answer.NEVER


def test_asked_while_a_deed_is_under_way(doing):
    custodian = TargetCustodian(doing.deeds, lambda: None)
    custodian.do(TargetEvent.BEGIN)
    doing.deeds[D.RESTORE] = lambda: answers.append(custodian.ask(Note.PROMISED))
    answers: list[Answer] = []
    custodian.feed(TargetEvent.STATE)
    assert answers == [Answer.NEVER]
    assert custodian.state is T.WAITING
    assert D.SEND_READY not in doing.done


def test_who_asks_and_who_hands_over_at_the_same_time(doing):
    """One of them wins: never both NEVER and a running guest."""
    for _ in range(200):
        doing.done.clear()
        custodian = ready(doing)
        answers: list[Answer] = []
        asker = threading.Thread(target=lambda c=custodian, a=answers: a.append(c.ask(Note.PROMISED)))
        asker.start()
        custodian.feed(TargetEvent.HANDOVER)
        asker.join()
        assert (answers[0] is Answer.RUNS) is custodian.owns is (D.RUN_GUEST in doing.done)


def test_a_machine_that_cannot_run_is_nobody_else_s(doing):
    custodian = ready(doing)
    doing.fail[D.RUN_GUEST] = StateError("odd.")
    assert custodian.feed(TargetEvent.HANDOVER) is doing.fail[D.RUN_GUEST]
    assert custodian.state is T.BROKEN
    assert custodian.owns
    assert custodian.ask(Note.TAKEN) is Answer.ENDED


def test_a_lease_that_went_elsewhere(doing):
    custodian = ready(doing)
    doing.fail[D.TAKE_LEASE] = StateError("generation 3.")
    assert custodian.feed(TargetEvent.HANDOVER) is not None
    assert custodian.state is T.WAITING
    assert custodian.ask(Note.PROMISED) is Answer.NEVER


def test_only_never_or_the_lease_lets_a_source_go_on():
    assert [each for each in Answer if may_resume(each).allowed] == [Answer.NEVER]
    assert {each for each in Answer if may_resume(each, leased=True).allowed} == {
        Answer.NEVER, Answer.UNKNOWN, Answer.UNREACHABLE,
    }  # fmt: skip


def test_what_is_not_allowed_says_what_it_would_risk():
    for verdict in (*map(may_resume, Answer), *map(may_discard, Answer), *(may_discard(a, True) for a in Answer)):
        assert verdict.why.endswith(".")
        assert verdict.allowed or verdict.risk


def test_the_tables_are_complete_for_people():
    rendered = handover.render_custody()
    for deed in Deed:
        assert deed.value in rendered
    assert handover.render_outcomes().count("\n") == len(Answer) + 1


def test_the_documentation_has_the_tables():
    docs = Path(__file__).parents[2] / "docs"
    remedy = "regenerate it: python -m vmf.teleport.document FILE"
    assert handover.render_outcomes() in (docs / "how-to/recover-from-an-interrupted-teleport.md").read_text(), remedy
    explained = (docs / "explanation/handover.md").read_text()
    assert handover.render_outcomes() in explained, remedy
    assert handover.render_custody() in explained, remedy
