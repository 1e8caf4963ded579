"""How far something long is, on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from vmf.cli.common import printable, size

if TYPE_CHECKING:
    from vmf.machine.home import Home


class Bar:
    """One line, redrawn, on a terminal; elsewhere a line every few seconds."""

    LINES_S = 5.0

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = 0.0 if self._live else time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.show(f"{printable(what)}: {size(done)} of {size(total)}", last=done >= total)

    def show(self, text: str, *, last: bool = False) -> None:
        """`last`: it is shown on a terminal even if the one before was shown a moment ago."""
        now = time.monotonic()
        if not self._live:
            if now - self._shown > self.LINES_S:
                self._shown = now
                click.echo(text, err=True)
        elif now - self._shown > 0.1 or last:
            self._shown = now
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def end(self) -> None:
        if self._live and self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)


class StartBar:
    """While a machine starts: what its process says of that, when it takes longer than a second."""

    FIRST_S = 1.0
    EVERY_S = 0.5

    def __init__(self, where: Home, name: str) -> None:
        self._home = where
        self._name = name
        self._bar = Bar()
        self._ended = threading.Event()
        self._drawing = threading.Lock()
        threading.Thread(target=self._watch, name="vmf-start-bar", daemon=True).start()

    def end(self) -> None:
        """It has started, or will not; idempotent. Waits for no answer of the machine."""
        with self._drawing:
            if not self._ended.is_set():
                self._ended.set()
                self._bar.end()

    def _watch(self) -> None:
        if self._ended.wait(self.FIRST_S):
            return
        from vmf.control.asking import ask

        while not self._ended.wait(self.EVERY_S):
            live = ask(self._home, self._name, lambda machine: machine.info())
            operation = live.get("operation") if isinstance(live, dict) else None
            with self._drawing:
                if isinstance(operation, dict) and not self._ended.is_set():
                    self._draw(operation)

    def _draw(self, operation: Mapping[str, Any]) -> None:
        if operation.get("total"):
            self._bar(str(operation.get("step")), int(operation.get("done", 0)), int(operation["total"]))
        else:
            what, seconds = printable(str(operation.get("what"))), float(operation.get("seconds", 0))
            self._bar.show(f"{what} of machine '{self._name}': {seconds:.0f} s")
