"""Callables of an embedding program: what they raise is their own, and ends neither the machine nor what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from vmf.plugins.containment import interrupted

log = logging.getLogger(__name__)


def name_of(listener: Callable[..., Any]) -> str:
    """A listener for people: "my_program.Window.state_changed"."""
    name = getattr(listener, "__qualname__", type(listener).__qualname__)
    return f"{getattr(listener, '__module__', None) or '?'}.{name}"


def tell(what: str, listeners: Iterable[Callable[..., Any]], *arguments: Any) -> list[Callable[..., Any]]:
    """Call all of them; those that raised, which is logged under their names.

    Args:
        what: what they listen to, for the log.

    The user's Ctrl-C on the main thread is raised, once all have been called.
    """
    failed: list[Callable[..., Any]] = []
    interruption: BaseException | None = None
    for listener in listeners:
        try:
            listener(*arguments)
        except BaseException as error:
            if interrupted(error):
                interruption = error
                continue
            failed.append(listener)
            log.exception("a listener to %s failed: %s", what, name_of(listener))
    if interruption is not None:
        raise interruption
    return failed
