"""How a teleport looks while it goes on: drawn on a terminal, as lines in a log, or as JSON lines for programs.

All of them take `vmf.teleport.progress.ProgressEvent` as a mapping, and leave out what a release may not know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from vmf.cli.common import duration, printable, say, size

if TYPE_CHECKING:
    from rich.console import RenderableType

Event = Mapping[str, Any]


class ProgressView(Protocol):
    """Shows events until it is closed; may be called from any thread."""

    def update(self, event: Event) -> None: ...

    def close(self) -> None: ...


def progress_view(kind: str, *, ends_told: bool = False) -> ProgressView:
    """A view: "auto" draws on a terminal and prints lines otherwise; "plain", "json", "none".

    `ends_told`: the caller says himself why it ended, so views for people do not.
    """
    if kind == "none":
        return _Silent()
    if kind == "json":
        return _Lines()
    if kind == "auto" and sys.stdout.isatty():
        return _Drawn(ends_told)
    return _Plain(ends_told)


_ENDS = ("failed", "cancelled", "uncertain")


def _message(event: Event, ends_told: bool) -> str:
    return "" if ends_told and event.get("phase") in _ENDS else str(event.get("message") or "")


class _Silent:
    def update(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """JSON lines."""

    def update(self, event: Event) -> None:
        say(json.dumps({"event": "progress", **event}))

    def close(self) -> None:
        pass


class _Plain:
    """A line for every phase, round and message."""

    def __init__(self, ends_told: bool = False) -> None:
        self._shown: tuple[Any, ...] = ()
        self._ends_told = ends_told

    def update(self, event: Event) -> None:
        if message := _message(event, self._ends_told):
            say(f"teleport: {message}")
        key = (event.get("teleport_id"), event.get("phase"), event.get("round"))
        if key != self._shown and event.get("phase") != "waiting":
            self._shown = key
            say("teleport: " + ", ".join(f"{label} {value}" if label else value for label, value in facts(event)))

    def close(self) -> None:
        pass


class _Drawn:
    """A live panel, redrawn a few times a second."""

    def __init__(self, ends_told: bool = False) -> None:
        from rich.live import Live

        self._ends_told = ends_told
        self._live = Live(refresh_per_second=8, transient=True)
        self._started = False
        self._closed = False

    def update(self, event: Event) -> None:
        if message := _message(event, self._ends_told):
            self._live.console.print(f"teleport: {message}", markup=False, highlight=False)
        if self._closed or event.get("phase") == "waiting":
            return
        if not self._started:
            self._started = True
            self._live.start()
        self._live.update(_drawing(event))

    def close(self) -> None:
        if self._started and not self._closed:
            self._live.stop()
        self._closed = True


def _drawing(event: Event) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    outer = Table.grid(padding=(0, 1))
    remaining = event.get("remaining_bytes") or 0
    total = (event.get("sent_bytes") or 0) + remaining
    outer.add_row(ProgressBar(total=float(total or 1), completed=float(total - remaining), width=60))
    inner = Table.grid(padding=(0, 2))
    for label, value in facts(event):
        inner.add_row(label or "phase", value)
    outer.add_row(inner)
    return outer


def facts(event: Event) -> list[tuple[str, str]]:
    """Label and value of what an event knows, in the order people want it; the phase has no label."""
    found: list[tuple[str, str]] = [("", str(event.get("phase", "?")))]

    def add(label: str, key: str, form: Any, *, zero: bool = False) -> None:
        value = event.get(key)
        if value is not None and (value or zero):
            found.append((label, form(value)))

    add("round", "round", str)
    add("moved", "sent_bytes", size)
    add("remaining", "remaining_bytes", size)
    add("rate", "bandwidth", lambda value: f"{size(value)}/s")
    add("dirty rate", "dirty_rate", lambda value: f"{size(value)}/s", zero=True)
    add("expected downtime", "expected_downtime_ns", duration, zero=True)
    add("ETA", "eta_ns", duration)
    add("throttle", "throttle", lambda value: f"{value:.0%}")
    if event.get("converging") is False:
        found.append(("converging", "no"))
    return found


def show_summary(summary: Mapping[str, Any]) -> None:
    """The figures of a finished teleport, and what the target had to say."""
    for note in summary.get("notes", ()):
        say(f"Note: {printable(note)}")
    rows = [
        ("downtime", duration(summary["downtime_ns"]) if "downtime_ns" in summary else ""),
        ("total time", duration(summary["total_ns"]) if "total_ns" in summary else ""),
        ("rounds", str(summary.get("rounds", ""))),
        ("memory moved", size(summary["bytes"]) if "bytes" in summary else ""),
        ("pages", _pages(summary)),
        ("throttle", f"{summary['throttle']:.0%}" if summary.get("throttle") else ""),
    ]
    rows = [(label, value) for label, value in rows if value]
    if not sys.stdout.isatty():
        for label, value in rows:
            say(f"{label + ':':<14}{value}")
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(show_header=False)
    for label, value in rows:
        drawn.add_row(label, value)
    Console().print(drawn)


def _pages(summary: Mapping[str, Any]) -> str:
    if "pages" not in summary:
        return ""
    zero, last = summary.get("zero_pages", 0), summary.get("last_pages", 0)
    return f"{summary['pages']} sent, {zero} zero, {last} in the downtime"
