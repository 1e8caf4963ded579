"""Carries out what `vmf.teleport.protocol.handover` decides.

A custodian holds one side's state. `feed` moves it and does the deeds that follow, one after the other, on the caller's
thread, until a state without a deed is reached. A deed that raises is the event FAILED, so the custodian always comes
to rest in a state that was explored, and only then the error is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from vmf.errors import LocalProtocolError
from vmf.teleport.protocol import handover
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.handover import (
    SOURCE_SENDS,
    TARGET_SENDS,
    Answer,
    Deed,
    Note,
    SourceCustody,
    SourceEvent,
    TargetCustody,
    TargetEvent,
)

_State = TypeVar("_State")
_Event = TypeVar("_Event")
Deeds = Mapping[Deed, Callable[[], None]]


class SourceCustodian:
    """The source's.

    Attributes:
        state: see `SourceCustody`. Moved by one thread, read by any.
    """

    def __init__(self, deeds: Deeds) -> None:
        self.state = SourceCustody.HOLDS
        self._deeds = deeds
        self._doing = False

    def may_send(self, kind: type[m.Message]) -> bool:
        """Whether the state allows such a message; most do not depend on it."""
        return SOURCE_SENDS.get(kind, self.state) is self.state

    def feed(self, event: SourceEvent) -> BaseException | None:
        """Something happened; returns what went wrong in doing what follows (the first, when several did)."""
        first: BaseException | None = None
        if self._doing:  # a signal came between two steps: whether the deed was done is not known
            first = self._drive(SourceEvent.FAILED)
        return self._drive(event) or first

    def _drive(self, event: SourceEvent) -> BaseException | None:
        first: BaseException | None = None
        self._doing = True
        self.state, deed = _step(handover.source_step, self.state, event)
        while deed is not None:
            try:
                self._deeds[deed]()
                event = SourceEvent.DONE
            except BaseException as error:  # noqa: BLE001 - an interrupted deed must be undone, too; returned
                first = first or error
                event = SourceEvent.FAILED
            self.state, deed = handover.source_step(self.state, event)
        self._doing = False
        return first

    def do(self, event: SourceEvent) -> None:
        """`feed`, raising what went wrong."""
        error = self.feed(event)
        if error is not None:
            raise error


class TargetCustodian:
    """The target's. `ask` is for any thread, everything else for the session's.

    Attributes:
        teleport_id: of the session, as soon as it is known.
        state: see `TargetCustody`.
    """

    def __init__(self, deeds: Deeds, on_void: Callable[[], None]) -> None:
        """`on_void` is called, once, by `ask` when it ended the session; it should wake the session's thread."""
        self.teleport_id = b""
        self.state = TargetCustody.WAITING
        self._deeds = deeds
        self._on_void = on_void
        self._doing = False
        self._lock = threading.Lock()

    @property
    def owns(self) -> bool:
        """The machine is this side's: whatever happens, the session is not undone any more."""
        return self.state in handover.TARGET_OWNS

    def may_send(self, kind: type[m.Message]) -> bool:
        """Whether the state allows such a message; most do not depend on it."""
        return TARGET_SENDS.get(kind, self.state) is self.state

    def feed(self, event: TargetEvent) -> BaseException | None:
        """Something happened; returns what went wrong in doing what follows (the first, when several did)."""
        first: BaseException | None = None
        if self._doing:  # as at the source
            first = self._drive(TargetEvent.FAILED)
        return self._drive(event) or first

    def _drive(self, event: TargetEvent) -> BaseException | None:
        first: BaseException | None = None
        self._doing = True
        deed = self._move(event)
        while deed is not None:
            try:
                self._deeds[deed]()
                event = TargetEvent.DONE
            except BaseException as error:  # noqa: BLE001 - an interrupted deed must be undone, too; returned
                first = first or error
                event = TargetEvent.FAILED
            deed = self._move(event)
        self._doing = False
        return first

    def do(self, event: TargetEvent) -> None:
        """`feed`, raising what went wrong."""
        error = self.feed(event)
        if error is not None:
            raise error

    def _move(self, event: TargetEvent) -> Deed | None:
        with self._lock:
            self.state, deed = _step(handover.target_step, self.state, event)
            return deed

    def ask(self, note: Note) -> Answer:
        """What this side says of the teleport. After NEVER it cannot arrive any more: see `handover`, point 3."""
        with self._lock:
            before = self.state
            self.state, _ = handover.target_step(before, TargetEvent.ASKED)
            answer = handover.answer(self.state, note)
        if self.state is TargetCustody.VOID and before is not TargetCustody.VOID:
            self._on_void()
        return answer


def _step(
    step: Callable[[_State, _Event], tuple[_State, Deed | None]], state: _State, event: _Event
) -> tuple[_State, Deed | None]:
    try:
        return step(state, event)
    except KeyError:
        raise LocalProtocolError(f"{event} cannot happen in {state}: a bug in vmf.") from None
