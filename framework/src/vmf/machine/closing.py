"""Ending things that plugins made, each within a time limit: one that hangs holds up neither the others nor the end."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from vmf.plugins.containment import where

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""For each thing to close."""


def finish(steps: Sequence[tuple[str, Callable[[], None]]], seconds: float) -> bool:
    """Run the steps in order, on another thread; False when one did not end within `seconds`, or was left out.

    What a step raises is logged. After one that hangs, a new thread takes the rest.

    Args:
        steps: (what is closed, for people; how).
    """
    waiting = list(steps)
    finished = True
    while waiting:
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        given_up = threading.Event()
        thread = threading.Thread(target=_run, args=(tuple(waiting), done, given_up), name="vmf-close", daemon=True)
        thread.start()
        while waiting:
            try:
                done.get(timeout=seconds)
            except queue.Empty:
                given_up.set()
                what, _ = waiting.pop(0)
                log.warning("closing %s has not ended after %g s: %s", what, seconds, where(thread) or "it hangs")
                finished = False
                break
            waiting.pop(0)
    return finished


def _run(
    steps: Sequence[tuple[str, Callable[[], None]]], done: queue.SimpleQueue[None], given_up: threading.Event
) -> None:
    for what, close in steps:
        try:
            close()
        except BaseException:
            log.exception("closing %s failed", what)
        if given_up.is_set():
            return  # another thread has taken the rest
        done.put(None)
