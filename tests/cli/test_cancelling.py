"""A signal during a long command cancels what it does, whatever the main thread is doing at that moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from vmf.cli import cancelling
from vmf.cli.cancelling import Cancelling


class Waiting:
    """What a command waits for: a pipe."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def end(self, word: bytes = b"cancelled") -> bool:
        os.write(self.writer, word)
        return True

    def wait(self) -> bytes:
        """Blocks in the kernel; after a generous while it ends with another word."""
        late = threading.Timer(60, self.end, [b"stuck"])
        late.start()
        try:
            return os.read(self.reader, 100)
        finally:
            late.cancel()


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    os.close(made.reader)
    os.close(made.writer)


def test_a_signal_that_does_not_wake_the_main_thread_cancels(waiting: Waiting) -> None:
    """As one that comes just before its system call: Python's own handlers would run when that returns."""
    ready = threading.Event()

    def send() -> None:
        ready.wait(60)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()  # before the mask, which it would inherit
    with Cancelling("test", waiting.end):
        signal.pthread_sigmask(signal.SIG_BLOCK, cancelling.SIGNALS)
        try:
            ready.set()
            assert waiting.wait() == b"cancelled"
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, cancelling.SIGNALS)
    sender.join()


def test_signals_of_one_instant_are_one_request_and_a_later_one_gives_up(waiting: Waiting) -> None:
    asked = threading.Event()

    def cancel() -> bool:
        asked.set()
        return True  # it takes its time

    def send() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        asked.wait(60)
        time.sleep(cancelling.SAME_REQUEST_S + 0.2)
        asked.clear()
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)

    def command() -> None:
        with Cancelling("test", cancel):
            sender.start()
            waiting.wait()

    with pytest.raises(KeyboardInterrupt):
        command()
    sender.join()
    assert not asked.is_set(), "it was the third signal that ended the wait"


def test_a_request_that_comes_before_the_machine_has_begun_is_repeated(
    waiting: Waiting, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = iter([False, False, True])

    def cancel() -> bool:
        return next(answers) and waiting.end()

    with Cancelling("test", cancel):
        os.kill(os.getpid(), signal.SIGINT)
        assert waiting.wait() == b"cancelled"
    assert capfd.readouterr().err == "\nvmf: cancelling the test ...\n"


def test_what_is_over_is_told(
    waiting: Waiting, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "NOT_BEGUN_S", 0.2)
    threading.Timer(2, waiting.end, [b"done"]).start()
    with Cancelling("test", lambda: False):
        os.kill(os.getpid(), signal.SIGINT)
        assert waiting.wait() == b"done"
    assert capfd.readouterr().err.endswith("vmf: too late to cancel\n")


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in cancelling.SIGNALS]
    with Cancelling("test", lambda: True):
        pass
    assert [signal.getsignal(number) for number in cancelling.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
