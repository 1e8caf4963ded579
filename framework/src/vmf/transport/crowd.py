"""Whom to drop when more connections come than there is room for.

A listener that gives every stranger a thread and a few seconds can be filled up by whoever opens many connections and
says nothing. So there is a number of places, and when they are taken somebody leaves for each one who comes: of the
address that has the most connections the one that has got least far, and of these the oldest. A flood from one address
therefore only ever drops its own, and one from the same address as an honest caller (a NAT, this host) drops the silent
before those who speak. Nobody is turned away at the door: an honest caller needs milliseconds.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class Crowd(Generic[_T]):
    """Who is inside, from where, and how far. Any thread."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._inside: dict[_T, tuple[str, int, int]] = {}
        """Address, progress and number of arrival."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._inside)

    def enter(self, who: _T, address: str) -> _T | None:
        """Take a place; who has to leave for it, or None. That one is inside no more, and is the caller's to drop."""
        with self._lock:
            leaves = self._weakest() if len(self._inside) >= self._places else None
            if leaves is not None:
                del self._inside[leaves]
            self._inside[who] = (address, 0, next(self._numbers))
            return leaves

    def _weakest(self) -> _T:
        crowd = Counter(address for address, _, _ in self._inside.values())

        def rank(who: _T) -> tuple[int, int, int]:
            address, progress, number = self._inside[who]
            return (-crowd[address], progress, number)

        return min(self._inside, key=rank)

    def advance(self, who: _T, progress: int) -> None:
        """It has got that far."""
        with self._lock:
            if who in self._inside:
                address, _, number = self._inside[who]
                self._inside[who] = (address, progress, number)

    def leave(self, who: _T) -> bool:
        """Free the place; False when it had been taken away already."""
        with self._lock:
            return self._inside.pop(who, None) is not None

    def everybody(self) -> tuple[_T, ...]:
        """Who is inside now, the longest first."""
        with self._lock:
            return tuple(self._inside)
