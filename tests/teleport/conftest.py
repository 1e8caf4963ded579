"""Two fake machines and a listener between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from vmf.errors import TransportError
from vmf.teleport.progress import ProgressEvent, TeleportSummary
from vmf.teleport.source import SourceOptions, teleport_source
from vmf.teleport.target import TargetOptions, wait_for_teleport
from vmf.testing.teleport import FakeMachine, QueueListener, SocketChannel

MIB = 1 << 20


class Waiting:
    """A target that waits on a thread."""

    def __init__(self, machine: FakeMachine, options: TargetOptions | None = None) -> None:
        self.machine = machine
        self.listener = QueueListener()
        self.cancel = threading.Event()
        self.events: list[ProgressEvent] = []
        self.told = threading.Condition()
        self.summary: TeleportSummary | None = None
        self.error: BaseException | None = None
        self.on_event: Callable[[ProgressEvent], None] | None = None
        self._options = options
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _note(self, event: ProgressEvent) -> None:
        with self.told:
            self.events.append(event)
            self.told.notify_all()
        if self.on_event is not None:
            self.on_event(event)

    def _run(self) -> None:
        try:
            self.summary = wait_for_teleport(self.machine, self.listener, self._note, self.cancel, self._options)
        except BaseException as error:
            self.error = error

    def wait_failure(self, count: int = 1, timeout: float = 15.0) -> str:
        """Until `count` sessions have failed and it waits again; the last one's message."""

        def failures() -> list[str]:
            return [event.message for event in self.events if event.phase == "waiting" and event.message]

        with self.told:
            assert self.told.wait_for(lambda: len(failures()) >= count, timeout), "the target told of no failure"
            return failures()[-1]

    def wait_done(self, timeout: float = 15.0) -> TeleportSummary:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the target still waits"
        if self.error is not None:
            raise self.error
        assert self.summary is not None
        return self.summary

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self.cancel.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the target does not end"


class Pair:
    """A running source machine and targets made on demand."""

    def __init__(self) -> None:
        self.owner: dict[str, bool] = {}
        self._open: list[FakeMachine] = []
        self._waiting: list[Waiting] = []

    def machine(self, name: str, size: int = 8 * MIB, **settings: object) -> FakeMachine:
        machine = FakeMachine(name, size, self.owner, **settings)  # type: ignore[arg-type]
        self._open.append(machine)
        return machine

    def wait(self, machine: FakeMachine, options: TargetOptions | None = None) -> Waiting:
        waiting = Waiting(machine, options)
        self._waiting.append(waiting)
        return waiting

    def teleport(
        self,
        source: FakeMachine,
        waiting: Waiting,
        channel: SocketChannel | None = None,
        progress: Callable[[ProgressEvent], None] | None = None,
        cancel: threading.Event | None = None,
        **options: object,
    ) -> TeleportSummary:
        channel = channel or waiting.listener.connect()
        try:
            chosen = SourceOptions(**options)  # type: ignore[arg-type]
            return teleport_source(source, channel, chosen, progress, cancel)
        finally:
            channel.close()

    def close(self) -> None:
        for waiting in self._waiting:
            try:
                waiting.stop()
            except TransportError:
                pass
        for machine in self._open:
            machine.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()
