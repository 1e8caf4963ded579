"""Fuzz targets: functions that take any bytes and raise only when vmf does what it must not do.

`TARGETS` lists them. Two callers use them: `tests/fuzz/fuzz.py`, which looks for new inputs guided by coverage, and
`tests/fuzz/test_fuzz_targets.py`, which in the ordinary run replays the seeds, the inputs that once found something
(`regressions/`) and what hypothesis thinks of.

What a target asserts is the promise of the code it drives: bytes of another host raise RemoteProtocolError and
nothing else, saved states StateError, definitions ConfigError, images ImageError, certificates TransportError;
how bytes were cut makes no difference; what was refused changed nothing; what was taken can be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import frozen


@frozen
class Target:
    """One way in.

    Attributes:
        name: on the command line, and the directory of its corpus.
        run: takes any bytes; whatever it raises is a finding.
        seeds: where the search begins.
        max_length: bytes of the longest input worth trying.
        share: of the time of a whole run, relative to the others.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    max_length: int = 4096
    share: float = 1.0


class Finding(AssertionError):
    """vmf did what it must not do."""


class Choices:
    """Reads decisions from an input; when it has run out, they are all zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, size: int = 1) -> int:
        """Little-endian, of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        """At most `size` bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))


def targets() -> dict[str, Target]:
    """All of them by name; imports what they drive."""
    from fuzzing import control, files, machines, payloads, protocol, records, sessions, tls

    every = (control, files, machines, payloads, protocol, records, sessions, tls)
    return {target.name: target for module in every for target in module.TARGETS}
