"""Several channels for the RAM of one teleport.

One TCP stream is the work of one processor at each end: copying, and encrypting where TLS is used. Large machines
therefore send their pages over additional channels as well, to the same listener. Everything that decides anything is
said on the first channel. An additional one carries PAGES only, after JOIN has shown, with the secret token that the
target gave on the first channel, which teleport it belongs to.

What keeps it right: a page is sent at most once in a round, and a round has ended only when all bytes that its
ROUND_END counts have arrived, over whichever channel. So no page is overtaken by an older one of itself, and a channel
that loses something makes the count fall short, which fails the teleport before the handover.
"""

from __future__ import annotations

import hmac
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence

from vmf.errors import TeleportError, TransportClosed, VmfError
from vmf.memory import pages
from vmf.teleport.link import DRAIN_S, Link
from vmf.teleport.protocol import Connection, Role
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import PageRuns
from vmf.teleport.ram import RamReceiver
from vmf.transport.base import Channel

log = logging.getLogger(__name__)

JOIN_S = 5.0
"""For an additional channel to say JOIN and to be answered."""
WORTH_BYTES = 128 << 20
"""RAM in use from which additional channels are worth their set-up."""
_MOST = 3


def links_for(used_bytes: int, channel: Channel) -> int:
    """How many additional channels beside `channel` a source asks for when nobody said."""
    if used_bytes < WORTH_BYTES:
        return 0
    processors = len(os.sched_getaffinity(0))
    if channel.computes and channel.local.host == channel.remote.host:
        processors //= 2  # the target has its half of the work done by the same ones
    return min(_MOST, max(processors, 1) - 1)


def join(connect: Callable[[], Channel], ram_pages: int, teleport_id: bytes, checked: m.Checked) -> list[Link]:
    """At the source: as many of the additional channels that CHECKED granted as can be had."""
    links: list[Link] = []
    for _ in range(checked.links):
        channel = None
        try:
            channel = connect()
            channel.set_timeout(JOIN_S)
            link = Link(channel, Connection(Role.SOURCE))
            link.connection.join(ram_pages)
            link.send(m.Join(teleport_id, checked.token))
            if not isinstance(link.receive(), m.Joined):
                raise TeleportError("the target does not let it join.")
            links.append(link)
        except VmfError as error:
            log.info("an additional channel for RAM could not be had: %s", error)
            if channel is not None:
                channel.close()
            break
    return links


class Lanes:
    """At the source: hands batches of pages to whichever channel is free. For use by one thread.

    Each channel has a thread. After a failure everything that is left is dropped, and every call raises it.
    """

    def __init__(self, link: Link, extra: Sequence[Link]) -> None:
        self._links = (link, *extra)
        self._extra = extra
        # One batch waiting for each channel: while one is sent the next is looked through for zeros.
        self._jobs: queue.Queue[tuple[int, PageRuns, memoryview, pages.ByteRanges] | None] = queue.Queue(
            len(self._links)
        )
        self._failure: BaseException | None = None
        self._aborted = False
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name=f"vmf-teleport-lane-{number}", daemon=True)
            for number, each in enumerate(self._links)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, link: Link) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None and not self._aborted:
                    link.send_pages(*job)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                if self._failure is None:
                    self._failure = error
            finally:
                self._jobs.task_done()

    def send_pages(self, round_: int, runs: PageRuns, base: memoryview, ranges: pages.ByteRanges) -> None:
        """As `Link.send_pages`, some time before `drain` returns."""
        self._check()
        self._jobs.put((round_, runs, base, ranges))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Everything is on its way."""
        self._jobs.join()
        self._check()

    def unsent_bytes(self) -> int:
        """Bytes of pages that wait here or that the peer's host has not acknowledged."""
        waiting = list(self._jobs.queue)
        held = sum(int(job[3][:, 1].sum()) for job in waiting if job is not None)
        return held + sum(link.channel.unsent_bytes() for link in self._links)

    def set_timeout(self, seconds: float | None) -> None:
        for link in self._extra:
            link.channel.set_timeout(seconds)

    def abort(self) -> None:
        """Break the additional channels, drop what waits; any thread."""
        self._aborted = True
        for link in self._extra:
            link.channel.shutdown()

    def close(self) -> None:
        """End the threads and the additional channels; the first channel stays. Idempotent."""
        if not self._threads:
            return
        self.abort()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(DRAIN_S)
            if thread.is_alive():  # it is the first channel's, and its peer takes nothing
                self._links[0].channel.shutdown()
                thread.join()
        self._threads = []
        for link in self._extra:
            link.lost()
            link.channel.close()


class Joiners:
    """At the target: the additional channels of one session."""

    def __init__(self, ram: RamReceiver, ram_pages: int) -> None:
        self._ram = ram
        self._ram_pages = ram_pages
        self._guard = threading.Lock()
        self._places = 0
        self._teleport_id = self._token = b""
        self._links: list[Link] = []
        self._threads: list[threading.Thread] = []

    def open(self, teleport_id: bytes, wanted: int) -> m.Checked:
        """Let that many join from now on; a CHECKED without blockers that says so."""
        with self._guard:
            self._places = wanted
            self._teleport_id = teleport_id
            self._token = secrets.token_bytes(m.TOKEN_SIZE) if wanted else b""
            return m.Checked((), wanted, self._token)

    def shut(self) -> None:
        """Nobody joins any more."""
        with self._guard:
            self._places = 0

    @property
    def expecting(self) -> bool:
        """An additional channel may still join."""
        return self._places > 0

    @property
    def any_joined(self) -> bool:
        """There is an additional channel; the source sends no pages before it has all that it wants."""
        with self._guard:
            return bool(self._links)

    def admit(self, link: Link, message: m.Join) -> bool:
        """Let the channel join; False when it has no right to. A joined one is ours from then on."""
        with self._guard:
            known = hmac.compare_digest(message.token, self._token) and message.teleport_id == self._teleport_id
            if not self._places or not known:
                return False
            link.connection.join(self._ram_pages)
            try:
                link.channel.set_timeout(None)  # without work it is silent; the first channel shows that all is well
                link.send(m.Joined())
            except VmfError:
                return False
            self._places -= 1
            thread = threading.Thread(target=self._run, args=(link,), name="vmf-teleport-joined", daemon=True)
            self._links.append(link)
            self._threads.append(thread)
            thread.start()
        return True

    def _run(self, link: Link) -> None:
        try:
            while True:
                message = link.receive()
                if not isinstance(message, m.Pages):  # CANCEL or ERROR, which the first channel hears as well
                    raise TransportClosed(f"the source said {message.word()}.")
                self._ram.place(message, link)
        except TransportClosed as error:
            self._ram.arrival.short_of(TeleportError(f"an additional channel of the source closed early: {error}"))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._ram.arrival.fail(error)

    def close(self) -> None:
        """Break the channels and wait until nothing is written any more; idempotent."""
        self.shut()
        with self._guard:
            links, self._links = self._links, []
        for link in links:
            link.channel.shutdown()
        for thread in self._threads:
            thread.join()
        self._threads = []
        for link in links:
            link.lost()
            link.channel.close()
