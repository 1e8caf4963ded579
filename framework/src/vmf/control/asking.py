"""One question to many machines of a home, all at once, so that one that is stuck holds up no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vmf.control.client import ControlClient
from vmf.errors import VmfError
from vmf.machine.home import Home

ANSWER_SECONDS = 2.0
"""How long a machine's process may take to answer what it can answer at once."""
_MOST_AT_ONCE = 256

T = TypeVar("T")


def ask(home: Home, name: str, question: Callable[[ControlClient], T], seconds: float = ANSWER_SECONDS) -> T | VmfError:
    """The answer of one machine, or why there is none."""
    try:
        with ControlClient.of(home, name, seconds) as client:
            return question(client)
    except VmfError as error:
        return error


def ask_all(
    home: Home, names: Iterable[str], question: Callable[[ControlClient], T], seconds: float = ANSWER_SECONDS
) -> dict[str, T | VmfError]:
    """`ask` of every machine named, side by side, in the order of `names`."""
    wanted = list(names)
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(len(wanted), _MOST_AT_ONCE), thread_name_prefix="vmf-ask") as pool:
        return dict(zip(wanted, pool.map(lambda name: ask(home, name, question, seconds), wanted), strict=True))
