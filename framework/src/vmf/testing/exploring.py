"""What the exhaustive explorations of state machines share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

World = TypeVar("World", bound=Hashable)


def dead_ends(
    worlds: Iterable[World], back: Mapping[World, Iterable[World]], goal: Callable[[World], bool]
) -> set[World]:
    """The worlds from which no way leads to a goal; `back` has the worlds from which each one is one step away."""
    every = set(worlds)
    good = {world for world in every if goal(world)}
    todo = deque(good)
    while todo:
        for before in back.get(todo.popleft(), ()):
            if before in every and before not in good:
                good.add(before)
                todo.append(before)
    return every - good
