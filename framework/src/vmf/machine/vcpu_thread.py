"""The vCPU thread: the one thread that owns the vCPU, the devices and the timers.

Theory of operation
    Other threads never touch a device. They `post` a callable (or `call` it and wait for the result): it is put in a
    queue and the vCPU is kicked. The loop drains the queue, fires due timers, and lets the vCPU run until the
    earliest timer; when the guest halts, the thread sleeps in the queue itself, so that a post wakes it at once.

    A kick is never lost: when it comes between the draining and `Vcpu.run`, that run returns immediately. A kick that
    comes while the thread sleeps costs one needless empty run.

    The GIL: `Vcpu.run` and the sleep release it. Every port access of the guest takes it for a moment, so a Python
    thread that computes without pause delays the guest by the interpreter's switch interval; see `SWITCH_INTERVAL`.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from attrs import define, field

from vmf.cpu.backend import ExitReason, Vcpu, VmExit
from vmf.errors import MachineError, VmfError
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.plugins.containment import explain, where

log = logging.getLogger(__name__)

T = TypeVar("T")

SWITCH_INTERVAL = 0.0005
"""Seconds. The interpreter's default of 5 ms would be the latency of every port access beside a busy thread."""

THROTTLE_SLICE_NS = 5_000_000
"""How long a throttled vCPU runs before it sleeps."""


CALL_SECONDS = 10.0
"""How long posted work whose caller waits may wait for its turn."""
WORK_SECONDS = 180.0
"""How long it may take itself; the bounds of what devices wait for (their storage) are shorter."""
CLOSE_SECONDS = 10.0


@define
class _Call:
    """A posted callable whose caller waits, and may give up while it has not begun."""

    function: Callable[[], Any]
    done: threading.Event = field(factory=threading.Event)
    result: Any = None
    error: BaseException | None = None
    _lock: threading.Lock = field(factory=threading.Lock)
    _taken: bool = False

    def take(self) -> bool:
        """For the one who runs it and the one who gives it up: whoever is first has it."""
        with self._lock:
            taken, self._taken = self._taken, True
            return not taken

    def __call__(self) -> None:
        if not self.take():
            return
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001 - raised again at the caller
            self.error = error
        finally:
            self.done.set()


class VcpuThread:
    """Runs one vCPU. `run_state` changes happen on the thread itself, through `call`."""

    def __init__(
        self,
        name: str,
        clock: MachineClock,
        timers: TimerQueue,
        on_exit: Callable[[VmExit], None],
        on_crash: Callable[[BaseException], None],
        before_run: Callable[[Vcpu], None] = lambda _vcpu: None,
    ) -> None:
        """Start the thread, with nothing to run yet.

        Args:
            on_exit: gets SHUTDOWN and ERROR exits, and a HALTED that no interrupt can end.
            on_crash: gets what a device or a posted callable raised.
                Both are called on the thread, with the vCPU no longer running.
            before_run: called with the vCPU before each of its runs.
        """
        self._clock = clock
        self._timers = timers
        self._on_exit = on_exit
        self._on_crash = on_crash
        self._before_run = before_run
        self._posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._vcpu: Vcpu | None = None
        self._running = False
        self._closing = False
        self._throttle = 0.0
        self.run_seconds = 0.0
        """Time spent inside the vCPU."""
        self.asleep = False
        """The guest has nothing to do until something is posted or a timer is due; to be read by any thread."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL))
        self._thread = threading.Thread(target=self._loop, name=f"vcpu-{name}", daemon=True)
        self._thread.start()

    # -- from any thread

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` on the vCPU thread soon."""
        self._posts.put(function)
        vcpu = self._vcpu
        if vcpu is not None:
            try:
                vcpu.kick()
            except VmfError as error:  # the backend's fault, not the poster's; the work waits for the next slice
                log.warning("%s", error)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the vCPU thread and return its result or raise its exception.

        Raises MachineError, naming the plugin that holds the thread up, when it does not get its turn within
        `CALL_SECONDS`: then it never runs. When it does not end within `WORK_SECONDS`, the machine has failed, too.
        """
        if threading.current_thread() is self._thread:
            return function()
        if not self._thread.is_alive():
            raise MachineError("the machine's vCPU thread has ended.")
        work = _Call(function)
        self.post(work)
        began = time.monotonic()
        while not work.done.wait(min(1.0, CALL_SECONDS)):
            if not self._thread.is_alive() and not work.done.is_set():
                raise MachineError("the machine's vCPU thread has ended.")
            waited = time.monotonic() - began
            if waited >= CALL_SECONDS and work.take():
                raise self._held_up(waited)
            if waited >= WORK_SECONDS:
                error = self._held_up(waited)
                self._on_crash(error)
                raise error
        if work.error is not None:
            raise work.error
        result: T = work.result
        return result

    def _held_up(self, seconds: float) -> MachineError:
        culprit = where(self._thread)
        return MachineError(
            f"the machine does not react: its vCPU thread has been in {culprit or 'one call'} for {seconds:.0f} s.",
            "Power it off; report this to the authors of the plugin." if culprit else "Power it off.",
        )

    def set_throttle(self, fraction: float) -> None:
        """Keep the vCPU from running for this fraction of the time."""
        self._throttle = min(max(fraction, 0.0), 0.99)
        self.post(lambda: None)

    def close(self) -> bool:
        """End the thread; idempotent. The vCPU is left to its owner, unless this is False: a plugin holds the thread
        up, which may still use vCPU, devices and RAM."""

        def end() -> None:
            self._closing = True

        if threading.current_thread() is self._thread:
            end()
            return True
        if self._thread.is_alive():
            self.post(end)
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s", self._held_up(CLOSE_SECONDS).message)
            return False
        return True

    # -- on the vCPU thread

    @property
    def running(self) -> bool:
        return self._running

    def attach(self, vcpu: Vcpu | None) -> None:
        """Set the vCPU to run."""
        self._vcpu = vcpu

    def set_running(self, running: bool) -> None:
        self._running = running

    def _loop(self) -> None:
        while not self._closing:
            try:
                self._step()
            except BaseException as error:  # noqa: BLE001 - becomes the machine's failure
                self._running = False
                self._on_crash(error)

    def _step(self) -> None:
        posts = self._posts
        for _ in range(posts.qsize()):  # what these post is for the next step, so that a step ends
            posts.get_nowait()()
            if self._closing:
                return
        vcpu = self._vcpu
        if not self._running or vcpu is None:
            posts.get()()
            return
        self._timers.run_due()
        if not posts.empty():
            return  # a timer posted something (a reset, say), and its kick may have preceded this vCPU's run
        next_timer = self._timers.next_deadline()
        deadline = None if next_timer is None else self._clock.host_deadline(next_timer)
        throttle = self._throttle
        if throttle:
            slice_end = time.monotonic_ns() + THROTTLE_SLICE_NS
            deadline = slice_end if deadline is None else min(deadline, slice_end)
        self._before_run(vcpu)
        started = time.perf_counter()
        self._timers.on_earlier = vcpu.kick
        try:
            exit_ = vcpu.run(deadline)
        finally:
            self._timers.on_earlier = None
        elapsed = time.perf_counter() - started
        self.run_seconds += elapsed
        if exit_.reason is ExitReason.HALTED and vcpu.halted_for_good():
            self._running = False
            self._on_exit(exit_)
        elif exit_.reason is ExitReason.HALTED:
            # The guest may have programmed a timer just before: the deadline from before the run is not good enough.
            next_timer = self._timers.next_deadline()
            self.asleep = True
            self._sleep_until(None if next_timer is None else self._clock.host_deadline(next_timer))
            self.asleep = False
        elif exit_.reason is not ExitReason.KICKED:
            self._running = False
            self._on_exit(exit_)
        if throttle:
            self._sleep_until(time.monotonic_ns() + int(elapsed * 1e9 * throttle / (1 - throttle)))

    def _sleep_until(self, deadline_ns: int | None) -> None:
        """Sleep until something is posted or the deadline (host monotonic) passes; then run what was posted."""
        try:
            if deadline_ns is None:
                self._posts.get()()
            else:
                delay = deadline_ns - time.monotonic_ns()
                if delay > 0:
                    self._posts.get(timeout=delay / 1e9)()
        except queue.Empty:
            pass


explain(VcpuThread.call.__code__, lambda values: values["self"]._thread)
